"""The tokenizer in its own file and Hugging Face's: tokenizer.json and the two that describe it.

For byte-level BPE tokenizer.json is our own file, too. SentencePiece merges the adjacent pair whose
union has the best score; Hugging Face's BPE applies a list of pairs in order. Listing every way to
cut each piece into two pieces, in the order of the pieces' scores, makes them the same. What is
left: there, a text that spells a special token is read as that token and, of SentencePiece's kinds,
one that contains U+2581 as if it held a space. And `AutoTokenizer` of transformers 5 takes Qwen's
words and NFC for every model of the architecture Qwen 2, whatever these files say;
`PreTrainedTokenizerFast` reads them.
"""

import json
from pathlib import Path
from typing import Any

from model.chat import (
    BEGIN,
    BEGIN_PIECE,
    BYTE_TOKENS,
    CHAT_TEMPLATE,
    END_OF_DOCUMENT_PIECE,
    PAD_PIECE,
    SPECIAL_PIECES,
    SPECIAL_TOKENS,
    TOOL_CHAT_TEMPLATE,
    UNKNOWN_PIECE,
    Tokenizer,
)
from model.sentence_pieces import SPACE_MARK

NEVER = -1e6  # the score of a Unigram piece that must not be chosen


CONFIG = "tokenizer_config.json"


def tokenizer_files(
    tokenizer: Tokenizer, context: int | None = None, *, tools: bool = False
) -> dict[str, bytes]:
    """File name → content: the file that `Tokenizer.load` reads, and those of other programs.

    context: the model's, in tokens, for callers that cut to it. tools: it was trained to call some.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_PIECE,
        "eos_token": END_OF_DOCUMENT_PIECE,
        "unk_token": UNKNOWN_PIECE,
        "pad_token": PAD_PIECE,
        "clean_up_tokenization_spaces": False,
        "chat_template": TOOL_CHAT_TEMPLATE if tools else CHAT_TEMPLATE,
    }
    if context is not None:
        config["model_max_length"] = context
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    theirs = {} if tokenizer.kind == "byte-level" else {"tokenizer.json": tokenizer_json(tokenizer)}
    return {
        tokenizer.file_name: tokenizer.data,
        **{name: to_json(body) for name, body in theirs.items()},
        CONFIG: to_json(config),
        "special_tokens_map.json": to_json({name: config[name] for name in names}),
    }


def chat_template(directory: Path) -> str:
    """Of a model's directory; empty where none is said."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except FileNotFoundError:
        return ""
    return str(config.get("chat_template") or "")


def calls_tools(directory: Path) -> bool:
    """Whether the model of a directory was trained to call tools."""
    return chat_template(directory) == TOOL_CHAT_TEMPLATE


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the `tokenizers` library loads, of a SentencePiece vocabulary."""
    return tokenizer_body(
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        model=_bpe(tokenizer) if tokenizer.kind == "bpe" else _unigram(tokenizer),
    )


def tokenizer_body(
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    model: dict[str, Any],
) -> dict[str, Any]:
    """A tokenizer.json with our special tokens, which puts the beginning before every text."""
    begin = {"SpecialToken": {"id": BEGIN_PIECE, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, piece in enumerate(SPECIAL_PIECES)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, sequence],
            "pair": [begin, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                BEGIN_PIECE: {"id": BEGIN_PIECE, "ids": [BEGIN], "tokens": [BEGIN_PIECE]}
            },
        },
        "decoder": decoder,
        "model": model,
    }


def _bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = {tokenizer.piece(token): token for token in range(len(tokenizer))}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNKNOWN_PIECE,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": _merges(tokenizer, vocabulary),
    }


def _unigram(tokenizer: Tokenizer) -> dict[str, Any]:
    """There every piece may stand for its letters, also a byte's (`<0x41>`) or a special token's:
    these get a score below which no text is cut. Only where a vocabulary lacks the very letters of
    `<0x41>` is that text read as the byte."""
    fixed = SPECIAL_TOKENS + BYTE_TOKENS
    rows = [
        [tokenizer.piece(token), NEVER if token < fixed else tokenizer.score(token)]
        for token in range(len(tokenizer))
    ]
    return {"type": "Unigram", "unk_id": tokenizer.unknown, "vocab": rows, "byte_fallback": True}


def _merges(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> list[list[str]]:
    learned = range(SPECIAL_TOKENS + BYTE_TOKENS, len(tokenizer))
    usable = {tokenizer.piece(token) for token in learned}
    merges = []
    for token in sorted(learned, key=lambda token: -tokenizer.score(token)):
        piece = tokenizer.piece(token)
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in usable and right in usable]
        merges += [list(pair) for pair in sorted(pairs, key=lambda p: [vocabulary[q] for q in p])]
    return merges


def to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
