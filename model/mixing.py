"""Two sources of sequences in one run: documents replayed during fine-tuning, lest they be
forgotten.
"""

import numpy as np
import torch
from torch import Tensor

from model.loader import Batch, DataError, Ints, Loader


class MixedLoader:
    """Sequences of `main` with a fixed `share` of `replay` spread evenly among them.

    Sequence number k is one of replay's exactly when ⌊(k+1)·share⌋ exceeds ⌊k·share⌋, and each
    source
    goes on in its own order: the mixture resumes exactly where both sources do. An id is the
    source's own, doubled, plus one for replay.
    """

    def __init__(self, main: Loader, replay: Loader, share: float) -> None:
        if not 0 <= share < 1:
            raise DataError(f"replay share {share} must be at least 0 and below 1")
        if main.sequence != replay.sequence:
            raise DataError(f"sequences of {main.sequence} and {replay.sequence} tokens do not mix")
        self.sequence = main.sequence
        self.main, self.replay, self.share = main, replay, share

    def order(self, first: int, count: int) -> Ints:
        before = np.floor(np.arange(first, first + count + 1) * self.share).astype(np.int64)
        replayed = np.diff(before) > 0
        ids = np.empty(count, dtype=np.int64)
        replays = int(replayed.sum())
        ids[replayed] = self.replay.order(int(before[0]), replays) * 2 + 1
        ids[~replayed] = self.main.order(first - int(before[0]), count - replays) * 2
        return ids

    def read(self, ids: Ints) -> Batch:
        parts = [
            _complete(loader.read(ids[ids % 2 == source] // 2))
            for source, loader in enumerate((self.main, self.replay))
        ]
        back = torch.from_numpy(np.argsort(np.argsort(ids % 2, kind="stable"), kind="stable"))
        columns = zip(*parts, strict=True)
        return Batch(*(torch.cat(column).index_select(0, back) for column in columns))

    def targets(self, ids: Ints) -> int:
        main, replay = ids[ids % 2 == 0] // 2, ids[ids % 2 == 1] // 2
        return self.main.targets(main) + self.replay.targets(replay)


def _complete(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A batch's tensors with those it leaves out written down, so that it can be stacked."""
    tokens = batch.tokens
    everything = torch.ones_like(tokens, dtype=torch.bool)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return (
        tokens,
        batch.targets,
        everything if batch.mask is None else batch.mask,
        positions if batch.positions is None else batch.positions,
        torch.zeros_like(tokens) if batch.segments is None else batch.segments,
    )
