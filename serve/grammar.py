"""Answers of a given form: a JSON schema or a regular expression becomes a mask over tokens.

llguidance does the parsing. A grammar is compiled and checked before its request reaches the
engine, within limits on its size, so that no schema can stall the answers of others.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from model.chat import Tokenizer
from model.engine import ConstraintError
from serve.errors import ApiError

MAX_GRAMMAR_CHARACTERS = 65_536


@dataclass(frozen=True)
class Limits:
    """How large a grammar may be, and how large it may grow while an answer follows it."""

    size: int = 100_000
    states: int = 20_000  # of its lexer
    fuel: int = 200_000  # of the lexer's construction

    def theirs(self) -> LLParserLimits:
        return LLParserLimits(
            max_grammar_size=self.size,
            max_lexer_states=self.states,
            initial_lexer_fuel=self.fuel,
        )


LIMITS = Limits()


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.end_of_turn
        self.bos_token_id = tokenizer.begin
        self.tokens = tokenizer.token_bytes
        self.special_token_ids = [id for id, text in enumerate(self.tokens) if not text]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))
        self._ends = tokenizer.stop_ids
        self._size = len(tokenizer)
        self._compiled = functools.lru_cache(maxsize=64)(self._compile)

    def compile(self, kind: str, text: str, param: str, limits: Limits | None = None) -> "Grammar":
        """kind: "json_schema" or "regex"; limits: None for LIMITS. Raises ApiError 400 naming
        `param` for what is none, or is too large.
        """
        limits = limits or LIMITS
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise ApiError(
                400,
                f"the grammar has {len(text)} characters, more than {MAX_GRAMMAR_CHARACTERS}",
                param=param,
                code="invalid_value",
            )
        compiled, problem = self._compiled(kind, text, limits)
        if compiled is None:
            message = f"not a usable {kind}: {_reason(problem)}"
            raise ApiError(400, message, param=param, code="invalid_value")
        mask = functools.partial(TokenMask, compiled, self._ends, self._size, param)
        return Grammar(kind, text, param, limits, mask)

    def _compile(self, kind: str, text: str, limits: Limits) -> tuple["Compiled | None", str]:
        """A grammar ready for answers, or why there is none."""
        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text)
            else:
                grammar = LLMatcher.grammar_from_regex(text)
            problem = LLMatcher.validate_grammar(grammar, self._tokenizer, limits=limits.theirs())
            compiled = Compiled(self._tokenizer, grammar, limits)
            matcher = compiled.matcher
            begins = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8).any()
            if problem or matcher.is_error() or not begins:
                reason = problem or (matcher.is_error() and matcher.get_error())
                return None, reason or "no text matches it"
        except (ValueError, OverflowError) as error:
            return None, str(error)
        return compiled, ""


class Compiled:
    """A grammar and a matcher at its beginning, which answers copy.

    Copies share the states that the lexer has met, and these count against the limits: what many
    answers met together would one day end the next one. So an answer that meets the limit goes on
    with a matcher of its own making, and later ones begin with that.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, limits: Limits) -> None:
        self._make = functools.partial(
            LLMatcher, tokenizer, grammar, log_level=0, limits=limits.theirs()
        )
        self.matcher = self._make()

    def renewed(self) -> LLMatcher:
        """A matcher that has met nothing."""
        self.matcher = self._make()
        return self.matcher.deep_copy()


@dataclass(frozen=True, eq=False)
class Grammar:
    """A grammar that compiles; called, the constraint of one answer. Its mask is not pickled: in
    another process it must be compiled again.
    """

    kind: str
    text: str
    param: str  # of the request, which errors name
    limits: Limits
    mask: "Callable[[], TokenMask] | None"

    def __call__(self) -> "TokenMask":
        if self.mask is None:
            raise TypeError("this grammar comes from another process; compile it")
        return self.mask()

    def __reduce__(self) -> tuple[Any, ...]:
        return Grammar, (self.kind, self.text, self.param, self.limits, None)


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
            raise self._lost(_reason(self._matcher.get_error()))
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
            raise self._lost(_reason(self._matcher.get_error()) or f"token {token} is not in it")
        self._tokens.append(token)

    def _mask(self) -> torch.Tensor:
        """bool (V,), all False where the matcher has stopped."""
        if self._matcher.is_stopped():  # as an error does, too
            return torch.zeros(self._size, dtype=torch.bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._size].astype(bool))

    def _renew(self) -> bool:
        """Go on with a matcher that has met this answer alone; False when it does already."""
        if self._renewed:
            return False
        self._renewed = True
        self._matcher = self._compiled.renewed()
        return all(self._matcher.consume_token(token) for token in self._tokens)

    def _lost(self, reason: str) -> ConstraintError:
        return ConstraintError(
            f"{self._param!r} could not be followed beyond {len(self._tokens)} tokens of the "
            f"answer: {reason}; ask for a simpler form"
        )


def _reason(problem: str) -> str:
    """llguidance's complaint without the state it prints after it."""
    return " ".join(problem.split("<state>")[0].split())[:300]
