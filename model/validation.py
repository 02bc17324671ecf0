"""Loss on text that is not trained on, source by source."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.loader import Loader, rank_slice
from model.sharding import Ranks

OVERALL = "heldout_loss"


@torch.no_grad()
def heldout_losses(
    loss_sum: nn.Module,
    sources: Mapping[str, Loader],
    sequences: int,
    micro_batch: int,
    device: torch.device,
    ranks: Ranks,
    *,
    bf16: bool,
) -> dict[str, float]:
    """Nats per target of the first `sequences` sequences of each source, and over all of them.

    loss_sum: batch → summed nats. Ranks share the sequences, the same however many they are; all
    get the result. The names are `heldout_loss` and, where there are several sources,
    `heldout_loss_SOURCE`.
    """
    nats, counts = torch.zeros(len(sources), dtype=torch.float64), []
    most = math.ceil(math.ceil(sequences / ranks.count) / micro_batch)
    for place, loader in enumerate(sources.values()):
        ids = loader.order(0, sequences)
        counts.append(max(loader.targets(ids), 1))
        mine = loader.read(rank_slice(ids, ranks.index, ranks.count)).micro_batches(micro_batch)
        for number in range(most):
            # Divided weights are gathered for each micro-batch, by all ranks together: one that has
            # no more takes part with a sequence that counts for nothing.
            idle = number >= len(mine)
            piece = loader.read(ids[:1]) if idle else mine[number]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                summed: Tensor = loss_sum(piece.to(device))
            if not idle:
                nats[place] += summed.double().cpu()
    ranks.add(nats)
    losses = {OVERALL: float(nats.sum()) / sum(counts)}
    if len(sources) > 1:
        each = zip(sources, nats.tolist(), counts, strict=True)
        losses |= {f"{OVERALL}_{name}": value / count for name, value, count in each}
    return losses
