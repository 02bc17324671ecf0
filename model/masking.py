"""The masked-LM objective (BERT, arXiv:1810.04805): guess the tokens that were hidden."""

import numpy as np
import torch

from model.loader import Batch, DataError, Ints, Loader, Place


class MaskedLoader:
    """Another loader's sequences, a fixed share of each hidden and asked for.

    Of the chosen tokens 80% become `mask`, 10% a random token, 10% stay; only they count in the
    loss. The choice is a function of (seed, id), so it does not change with ranks or resumption;
    every row hides the same number of tokens, so that `targets` needs no reading. A sequence met
    again in a later epoch is masked in the same places.
    """

    masked = True

    def __init__(
        self, source: Loader, *, mask: int, vocab_size: int, seed: int, share: float = 0.15
    ) -> None:
        if not 0 < share < 1 or round(share * source.sequence) < 1:
            raise DataError(
                f"mask share {share} hides no token of a sequence of {source.sequence}; raise it"
            )
        self.source, self.sequence = source, source.sequence
        self.mask, self.vocab_size, self.seed = mask, vocab_size, seed
        self.hidden = round(share * source.sequence)

    def order(self, first: int, count: int) -> Ints:
        return self.source.order(first, count)

    def read(self, ids: Ints) -> Batch:
        batch = self.source.read(ids)
        tokens, counted = batch.tokens.clone(), torch.zeros_like(batch.tokens, dtype=torch.bool)
        for row, number in enumerate(ids):
            draw = np.random.Generator(np.random.Philox(key=[self.seed, int(number)]))
            chosen = draw.permutation(self.sequence)[: self.hidden]
            kinds = draw.random(self.hidden)
            random = draw.integers(0, self.vocab_size, self.hidden)
            kept = batch.tokens[row, chosen].numpy()
            new = np.where(kinds < 0.8, self.mask, np.where(kinds < 0.9, random, kept))
            tokens[row, chosen] = torch.from_numpy(new)
            counted[row, chosen] = True
        return Batch(tokens, batch.tokens, counted, batch.positions, batch.segments)

    def targets(self, ids: Ints) -> int:
        return len(ids) * self.hidden

    def places(self, number: int) -> list[Place]:
        return self.source.places(number)
