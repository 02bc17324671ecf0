"""A checkpoint made with another tokenizer, its rows moved to the ids of ours.

Importing a tokenizer keeps its pieces and changes their ids, so the rows of the embedding, of the
output matrix and of its bias are put in another order: for each of our ids the row of the same
piece. Our begin, end of document, unknown, padding and mask get the rows of theirs, any other
special token that of theirs with the same name. What they do not have gets the mean of the rows
that are kept (Hewitt, "Initializing New Word Embeddings", 2021: no new token is then likelier than
the old ones). Rows that no id of ours wants, such as their own special tokens, are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.byte_level import read_json
from model.chat import (
    BEGIN_PIECE,
    END_OF_DOCUMENT_PIECE,
    MASK_PIECE,
    PAD_PIECE,
    SPECIAL_PIECES,
    SPECIAL_TOKENS,
    UNKNOWN_PIECE,
    Tokenizer,
    TokenizerError,
)
from model.config import ModelConfig
from model.families import FormatError
from model.huggingface import load_config, read_parameters, read_settings
from model.transformer import Transformer

ROWS = ("model.embed_tokens.weight", "lm_head.weight", "model.head.output_bias")
# What the settings of their files call our special tokens; in config.json the first and `_id`.
ROLES = {
    UNKNOWN_PIECE: ("unk_token",),
    BEGIN_PIECE: ("bos_token", "cls_token"),
    END_OF_DOCUMENT_PIECE: ("eos_token", "sep_token"),
    PAD_PIECE: ("pad_token",),
    MASK_PIECE: ("mask_token",),
}


def is_foreign(directory: Path) -> bool:
    """Whether a checkpoint has a tokenizer that is not in our layout."""
    try:
        Tokenizer.load(directory)
    except TokenizerError:
        return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return False


def load_for(directory: Path, tokenizer: Tokenizer) -> Transformer:
    """The model of a Hugging Face directory, speaking `tokenizer`, which must be the import of its
    own. One that was exported from here is loaded as it is.
    """
    config, values = parameters_for(directory, tokenizer)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.load_state_dict(dict(values), assign=True)
    return model


def parameters_for(
    directory: Path, tokenizer: Tokenizer
) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The shape of that model and its state, a parameter at a time (`read_parameters`)."""
    config, values = load_config(directory), read_parameters(directory)
    if not is_foreign(directory):
        return config, values
    ids = their_ids(directory, tokenizer, config.vocab_size)
    return replace(config, vocab_size=len(ids)), _with_rows(values, ids)


def _with_rows(
    values: Iterator[tuple[str, Tensor]], ids: Sequence[int | None]
) -> Iterator[tuple[str, Tensor]]:
    """Row `ids[token]` of the vocabulary for each token; a new row where it is None."""
    for name, tensor in values:
        yield name, _moved(tensor, ids) if name in ROWS else tensor


def _moved(rows: Tensor, ids: Sequence[int | None]) -> Tensor:
    """(theirs, …) → (ours, …)."""
    kept = torch.tensor([token for token in ids if token is not None])
    missing = torch.tensor([token is None for token in ids])
    moved = rows[torch.tensor([token or 0 for token in ids])]
    parts = [rows[part].double().sum(0) for part in kept.split(4096)]
    moved[missing] = (torch.stack(parts).sum(0) / len(kept)).to(rows.dtype)
    return moved


def their_ids(directory: Path, tokenizer: Tokenizer, rows: int) -> list[int | None]:
    """For each id of `tokenizer` that of the same token in the checkpoint's own; None where it has
    none, or no row for it.

    Raises FormatError when the directory has no tokenizer, or one without these pieces.
    """
    theirs = _Vocabulary.of(directory)
    special = theirs.roles(directory)
    ids = [special.get(piece, theirs.special.get(piece)) for piece in SPECIAL_PIECES]
    learned = range(SPECIAL_TOKENS, len(tokenizer))
    ids += [theirs.ids.get(tokenizer.piece(token)) for token in learned]
    ids = [token if token is not None and token < rows else None for token in ids]
    if all(token is None for token in ids[SPECIAL_TOKENS:]):
        raise FormatError(
            f"{directory.name}: its tokenizer has none of the pieces of this run's; import it with "
            f"tokenizer.import_from"
        )
    return ids


@dataclass(frozen=True)
class _Vocabulary:
    """ids: of all tokens, by name; special: of those that are added or control symbols, though some
    add what is a piece of SentencePiece's (Gemma's runs of spaces)."""

    ids: Mapping[str, int]
    special: Mapping[str, int]
    named: Mapping[str, str]  # our special token → theirs, as far as this file says

    @classmethod
    def of(cls, directory: Path) -> "_Vocabulary":
        """From tokenizer.json, by which transformers goes, or else SentencePiece's file."""
        if (directory / "tokenizer.json").is_file():
            return cls._of_json((directory / "tokenizer.json").read_bytes(), directory)
        if (directory / "tokenizer.model").is_file():
            return cls._of_sentencepiece((directory / "tokenizer.model").read_bytes())
        raise FormatError(f"{directory.name} holds neither tokenizer.json nor tokenizer.model")

    @classmethod
    def _of_json(cls, data: bytes, directory: Path) -> "_Vocabulary":
        try:
            body = read_json(data)
        except ValueError as error:
            raise FormatError(f"{directory.name}: tokenizer.json {error}") from error
        model = body["model"]
        listed = model["vocab"]
        if not isinstance(listed, dict):  # Unigram: rows of a piece and its score
            listed = {piece: token for token, (piece, _) in enumerate(listed)}
        special = {token["content"]: token["id"] for token in body.get("added_tokens") or ()}
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        if unknown is not None and unknown in listed:
            special.setdefault(unknown, listed[unknown])
        return cls(listed | special, special, {} if unknown is None else {UNKNOWN_PIECE: unknown})

    @classmethod
    def _of_sentencepiece(cls, data: bytes) -> "_Vocabulary":
        import sentencepiece

        theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
        names = {theirs.IdToPiece(token): token for token in range(len(theirs))}
        special = {
            name: token
            for name, token in names.items()
            if theirs.IsControl(token) or theirs.IsUnknown(token)
        }
        told = (theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id())
        named = {
            ours: theirs.IdToPiece(token)
            for ours, token in zip(SPECIAL_PIECES, told, strict=False)
            if token >= 0
        }
        return cls(names, special, named)

    def roles(self, directory: Path) -> dict[str, int]:
        """Our special token → the id that has its meaning there.

        config.json says what the model was trained with, but many hold a family's default that
        their tokenizer has not: an id counts only when it is a special token.
        """
        config = _json(directory / "config.json")
        settings = _json(directory / "special_tokens_map.json")
        settings |= {k: v for k, v in _json(directory / "tokenizer_config.json").items() if v}
        found: dict[str, int] = {}
        for ours, called in ROLES.items():
            told = config.get(f"{called[0]}_id")
            told = told if isinstance(told, list) else [told]
            names = [_content(settings.get(name)) for name in called]
            names += [self.named.get(ours, ""), ours]
            usable = [token for token in told[:1] if token in self.special.values()]
            usable += [self.special[name] for name in names if name in self.special]
            if usable:
                found[ours] = usable[0]
        # Documents begin where the last one ended for who marks only ends.
        if BEGIN_PIECE not in found and END_OF_DOCUMENT_PIECE in found:
            found[BEGIN_PIECE] = found[END_OF_DOCUMENT_PIECE]
        # Padding with the row of an end would be as likely as the end, and end nothing.
        pad = found.pop(PAD_PIECE, None)
        return found if pad is None or pad in found.values() else found | {PAD_PIECE: pad}


def _content(token: Any) -> str:
    """A token's text, which some files hold with settings around it; empty for none."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def _json(path: Path) -> dict[str, Any]:
    return read_settings(path) if path.is_file() else {}
