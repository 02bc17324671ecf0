"""Grammars as llguidance compiles them, without torch. Run as a program it is the killable child
that tells whether a grammar compiles (`serve.grammar_check`).

No limit of llguidance's own holds for everything: the intersection of a dozen short expressions
takes minutes and gigabytes before it is refused.
"""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from model.chat import Tokenizer
from tasks.runtime import killable

KEPT = 64  # grammars remembered by the replica, and by the engine
AT_ONCE = 2  # grammars being compiled in either
TRIED = 16  # bytes of an answer


class GrammarError(ValueError):
    """A grammar that cannot be followed; the message says why."""


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


@dataclass(frozen=True)
class Grammar:
    """A grammar that compiles. It stands for the constraint of an answer until it comes to the
    engine's process, which compiles it.
    """

    kind: str  # "json_schema", "regex" or "grammar", llguidance's variant of Lark's
    text: str
    param: str  # of the request, which errors name
    limits: Limits

    def __call__(self) -> NoReturn:
        raise TypeError("a grammar follows no answer; compile it")


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


def vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """A tokenizer in llguidance's shape: 0.1 s for 32,000 tokens."""
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))


class Compiled:
    """A grammar and a matcher at its beginning, which answers copy.

    Copies share the states that the lexer has met, and these count against the limits: what many
    answers met together would one day end the next one. So an answer that meets the limit goes on
    with a matcher of its own making, and later ones begin with that.
    """

    def __init__(self, vocabulary: LLTokenizer, kind: str, text: str, limits: Limits) -> None:
        """Raises GrammarError for what is no grammar, or is larger than the limits."""
        begun = time.monotonic()
        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text)
            elif kind == "grammar":
                grammar = LLMatcher.grammar_from_lark(text)
            else:
                grammar = LLMatcher.grammar_from_regex(text)
            self._make = functools.partial(
                LLMatcher, vocabulary, grammar, log_level=0, limits=limits.theirs()
            )
            self.matcher = self._make()
            begins = any(self.matcher.compute_bitmask())
        except (ValueError, OverflowError) as error:
            raise GrammarError(reason(str(error))) from error
        if self.matcher.is_error() or not begins:
            raise GrammarError(reason(self.matcher.get_error()) or "no text matches it")
        self.seconds = time.monotonic() - begun

    def renewed(self) -> LLMatcher:
        """A matcher that has met nothing."""
        self.matcher = self._make()
        return self.matcher.deep_copy()


class Judge:
    """Tells whether answers can follow a grammar."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = vocabulary(tokenizer)
        found = [(text[0], id) for id, text in enumerate(tokenizer.token_bytes) if len(text) == 1]
        # What opens something comes first, as it is there that a grammar branches; then letters.
        found.sort(key=lambda one: (one[0] not in b'{["', one[0] <= 0x20, one))
        self._bytes = [id for _, id in found]

    def problem(self, kind: str, text: str, limits: Limits) -> str:
        """Why no answer can follow it; empty where one can. Some that compile are too large from an
        answer's first bytes on, so a few are tried.
        """
        try:
            matcher = Compiled(self._vocabulary, kind, text, limits).matcher
        except GrammarError as error:
            return str(error)
        for _ in range(TRIED):
            if matcher.is_stopped():  # as an error does, too
                break
            bits = matcher.compute_bitmask()
            allowed = (id for id in self._bytes if bits[id // 8] >> id % 8 & 1)
            if (token := next(allowed, None)) is None:
                break
            matcher.consume_token(token)
        return reason(matcher.get_error())


def reason(problem: str) -> str:
    """llguidance's complaint without the state it prints after it."""
    return " ".join(problem.split("<state>")[0].split())[:300]


def main() -> None:
    """Judge grammars for the tokenizer of a model directory until the parent is gone."""
    judge = Judge(Tokenizer.load(Path(sys.argv[3])))

    def answer(asked: dict[str, Any], _: bytes) -> dict[str, Any]:
        limits = Limits(**asked["limits"])
        return {"problem": judge.problem(asked["kind"], asked["text"], limits)}

    killable.serve(answer)


if __name__ == "__main__":
    main()
