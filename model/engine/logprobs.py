"""What the model itself thought of the tokens, whatever was done to its logits afterwards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.engine.sequence import TokenLogprob


@torch.inference_mode()
def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """For each row of logits (n, V): the logprob of its token and of its `counts` likeliest."""
    logits = logits.cpu().float()
    normed = logits - logits.logsumexp(-1, keepdim=True)
    chosen = normed.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    most = max(counts)
    values, ids = normed.topk(most, dim=-1) if most else (None, None)
    found = []
    for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        top: tuple[tuple[int, float], ...] = ()
        if count and values is not None and ids is not None:
            top = tuple(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))
        found.append(TokenLogprob(token, chosen[row], top))
    return found
