"""Guessing what comes next from what came before: prompt lookup.

A model that answers from its prompt, or in a fixed form, repeats itself. Where its last tokens
stood before, what followed them is proposed. Noise for sampling belongs to a position, so what
would be chosen there is known as soon as its logits are: a guess that equals it is simply right,
and the distribution of answers is untouched (no acceptance test as in arXiv:2211.17192 is needed).
"""

from collections.abc import Sequence

SIZES = (3, 2)  # tokens that must agree, the longest first; one alone agrees with too much


class NgramIndex:
    """Where each n-gram of a growing sequence ended last."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → index of the token after it

    @property
    def length(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """More tokens came."""
        for token in tokens:
            # Listed when something follows it: the last n-gram must not find itself.
            for size in SIZES:
                if len(self._tokens) >= size:
                    self._after[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens that may come next; none where nothing agrees."""
        if count <= 0:
            return []
        for size in SIZES:
            at = self._after.get(tuple(self._tokens[-size:]))
            if at is not None and len(self._tokens) >= size:
                return self._tokens[at : at + count]
        return []
