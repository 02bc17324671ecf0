"""Loss on text that is not trained on, source by source."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.loader import Loader, rank_slice

OVERALL = "heldout_loss"


@torch.no_grad()
def heldout_losses(
    loss_sum: nn.Module,
    sources: Mapping[str, Loader],
    sequences: int,
    micro_batch: int,
    device: torch.device,
    *,
    bf16: bool,
) -> dict[str, float]:
    """Nats per target of the first `sequences` sequences of each source, and over all of them.

    loss_sum: batch → summed nats. Ranks share the sequences; all get the result. The names are
    `heldout_loss` and, where there are several sources, `heldout_loss_SOURCE`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    nats, counts = torch.zeros(len(sources), dtype=torch.float64), []
    for place, loader in enumerate(sources.values()):
        # As many for each rank: with divided weights they wait for each other.
        ids = loader.order(0, -(-sequences // world) * world)
        counts.append(max(loader.targets(ids), 1))
        mine = loader.read(rank_slice(ids, rank, world))
        for piece in mine.micro_batches(micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                summed: Tensor = loss_sum(piece.to(device))
            nats[place] += summed.double().cpu()
    if world > 1:
        dist.all_reduce(nats)
    losses = {OVERALL: float(nats.sum()) / sum(counts)}
    if len(sources) > 1:
        each = zip(sources, nats.tolist(), counts, strict=True)
        losses |= {f"{OVERALL}_{name}": value / count for name, value, count in each}
    return losses
