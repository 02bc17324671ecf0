"""Answers of a given form: a grammar becomes a mask over tokens, in the engine's process."""

import functools

import numpy as np
import torch

from model.chat import Tokenizer
from model.engine import ConstraintError, ConstraintFactory
from serve.grammar import KEPT, Compiled, Grammar, reason, vocabulary

QUICK = 0.1  # seconds that a grammar may take to be compiled between two steps


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ends = tokenizer.stop_ids
        self._size = len(tokenizer)
        make = functools.partial(Compiled, vocabulary(tokenizer))
        self._compiled = functools.lru_cache(maxsize=KEPT)(make)

    def compile(self, grammar: Grammar) -> ConstraintFactory:
        """Raises GrammarError for one that was not checked."""
        compiled = self._compiled(grammar.kind, grammar.text, grammar.limits)
        return functools.partial(TokenMask, compiled, self._ends, self._size, grammar.param)


class TokenMask:
    """Follows one answer through its grammar.

    Raises ConstraintError naming `param` where it cannot: a grammar that was small when compiled
    may need more states than its limits allow once an answer is under way.
    """

    def __init__(self, compiled: Compiled, ends: tuple[int, ...], size: int, param: str) -> None:
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()  # one factory may make several
        self._ends = list(ends)
        self._size = size
        self._param = param
        self._tokens: list[int] = []
        self._renewed = False

    def allowed(self) -> torch.Tensor:
        """bool (V,). Where the text is whole and nothing can follow, only the end is left."""
        mask = self._mask()
        if self._matcher.is_error() and self._renew():
            mask = self._mask()
        if self._matcher.is_error():
            raise self._lost(reason(self._matcher.get_error()))
        stopped = self._matcher.is_stopped()
        if not stopped and not bool(mask.any()):
            raise self._lost("no token of this model can follow")
        mask[self._ends] = stopped or bool(mask[self._ends].any())
        return mask

    def push(self, token: int) -> None:
        if token in self._ends:
            return
        if not self._matcher.consume_token(token) and not (
            self._renew() and self._matcher.consume_token(token)
        ):
            raise self._lost(reason(self._matcher.get_error()) or f"token {token} is not in it")
        self._tokens.append(token)

    def _mask(self) -> torch.Tensor:
        """bool (V,), all False where the matcher has stopped."""
        if self._matcher.is_stopped():  # as an error does, too
            return torch.zeros(self._size, dtype=torch.bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._size].astype(bool))

    def _renew(self) -> bool:
        """Go on with a matcher that has met this answer alone; False when it does already, or all
        answers would wait too long for it.
        """
        if self._renewed or self._compiled.seconds > QUICK:
            return False
        self._renewed = True
        self._matcher = self._compiled.renewed()
        return all(self._matcher.consume_token(token) for token in self._tokens)

    def _lost(self, reason: str) -> ConstraintError:
        return ConstraintError(
            f"{self._param!r} could not be followed beyond {len(self._tokens)} tokens of the "
            f"answer: {reason}; ask for a simpler form"
        )
