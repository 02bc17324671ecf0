"""All quality rules, in the order in which a document that breaks several is counted."""

from __future__ import annotations

from tasks.corpus.filters.alphabetic import ALPHABETIC
from tasks.corpus.filters.bad_words import ADULT_WORDS, TOXIC_WORDS
from tasks.corpus.filters.boilerplate import LOREM_IPSUM, NOTICES
from tasks.corpus.filters.bullets import BULLETS
from tasks.corpus.filters.colossal import CURLY_LINES, FEW_WORD_LINES, SCRIPT_LINES, TERMINAL_LINES
from tasks.corpus.filters.length import WORDS
from tasks.corpus.filters.line_shape import LINES_PER_WORD, PUNCTUATED_LINES, SHORT_LINES
from tasks.corpus.filters.repetition import (
    DUPLICATE_GRAMS,
    DUPLICATE_LINE_CHARACTERS,
    DUPLICATE_LINES,
    DUPLICATE_PARAGRAPHS,
    TOP_GRAMS,
)
from tasks.corpus.filters.rule import Rule
from tasks.corpus.filters.sentences import SENTENCES
from tasks.corpus.filters.stop_words import ENGLISH_STOP_WORDS
from tasks.corpus.filters.symbols import ELLIPSES, SYMBOLS
from tasks.corpus.filters.word_length import WORD_LENGTH

RULES: tuple[Rule, ...] = (
    WORDS,
    BULLETS,
    WORD_LENGTH,
    ALPHABETIC,
    SYMBOLS,
    ELLIPSES,
    ENGLISH_STOP_WORDS,
    DUPLICATE_LINES,
    DUPLICATE_LINE_CHARACTERS,
    DUPLICATE_PARAGRAPHS,
    TOP_GRAMS,
    DUPLICATE_GRAMS,
    LOREM_IPSUM,
    NOTICES,
    PUNCTUATED_LINES,
    SHORT_LINES,
    LINES_PER_WORD,
    SENTENCES,
    TERMINAL_LINES,
    FEW_WORD_LINES,
    SCRIPT_LINES,
    CURLY_LINES,
    TOXIC_WORDS,
    ADULT_WORDS,
)
