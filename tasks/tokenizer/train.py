"""The tokenizer stage: a SentencePiece vocabulary from a bounded sample of the training split.

The settings make the round trip lossless: no normalisation, no invented leading space, bytes for
whatever the vocabulary lacks. Newlines are ordinary characters here, learned inside pieces
(".\\n\\n##"): measured on the embedded corpus at 4,096 pieces, 3.58 bytes per token, against 3.34
when lines were given one by one and the newline was a piece of its own. Pieces across scripts
(`split_by_unicode_script=False`, 3.93) are not used: names would be cut differently inside a
signature and inside a question, and the model has to recognise them in both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import pyarrow as pa
import sentencepiece
from pydantic import Field, field_validator, model_validator

from model import chat
from model.chat import BYTE_TOKENS, CONTROL_SYMBOLS, SPECIAL_TOKENS, Tokenizer
from model.sentence_pieces import SPACE_MARK
from model.tokenizer_files import tokenizer_files
from tasks.corpus.sampling import sample_documents
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.manifest import Manifest
from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store
from tasks.tokenizer.imported import (
    digest_of,
    import_tokenizer,
    imported_file,
    sentencepiece_format,
)

TAB_MARK = "\u2409"  # stands for a tab while a vocabulary is learned
SENTENCE_CHARACTERS = 4000  # of one training "sentence"; SentencePiece leaves out longer ones
MEASURED = 2_000_000  # characters the compression is measured on
GROUPS = 30  # languages shown, and domains
EXAMPLES = 4


class TokenizerConfig(StageConfig):
    """How the vocabulary is made."""

    vocab_size: int = Field(4096, le=1_000_000)
    """Pieces in the vocabulary, with 256 bytes and 16 special tokens among them."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """How pieces are found: joined from frequent pairs, or those that make the text most likely."""
    import_from: str = place("")
    """A SentencePiece model or tokenizer.json made elsewhere (byte-level BPE, too), or a directory
    that holds one, below a source root, instead of learning one here. Its pieces get our ids;
    nothing is normalised, and no space is put before a text."""
    import_digest: str = ""
    """What that file holds; filled in by itself."""
    sample_megabytes: float = Field(32.0, gt=0)
    """Training text looked at; more than this is sampled by document."""
    character_coverage: float = Field(0.9999, gt=0.9, le=1.0)
    """Share of the sample's characters that get a piece; the others are written as bytes."""
    longest_piece: int = Field(24, ge=2, le=128)
    """Characters in the longest piece."""

    @field_validator("vocab_size")
    @classmethod
    def holds_the_required(cls, value: int) -> int:
        least = BYTE_TOKENS + SPECIAL_TOKENS + 1
        if value < least:
            raise ValueError(
                f"vocab_size {value} < {BYTE_TOKENS} required bytes + {SPECIAL_TOKENS} special "
                f"tokens + 1; raise it to at least {least}"
            )
        return value

    @model_validator(mode="after")
    def learns_or_imports(self) -> Self:
        learned = ("vocab_size", "kind", "sample_megabytes", "character_coverage", "longest_piece")
        for name in learned if self.import_from else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is of a vocabulary that is learned, not of one that is imported; "
                    "leave it out"
                )
        return self

    def vocabulary(self) -> int:
        """How many tokens there will be."""
        if not self.import_from:
            return self.vocab_size
        return len(Tokenizer(import_tokenizer(imported_file(self.import_from))))

    def resolve(self) -> Self:
        digest = digest_of(self.import_from) if self.import_from else ""
        return self.model_copy(update={"import_digest": digest})


@stage("tokenizer", version=2)
def train_tokenizer(config: TokenizerConfig, work: Workspace, *, corpus: Manifest) -> Outcome:
    """Learn the vocabulary from the training split."""
    with ray_session() as session:
        trained = next(
            result
            for _, result in session.map(
                _train, [(config, work, corpus)], label="Tokenizer", unit="vocabularies"
            )
        )
    return Outcome(
        counts={"vocabulary": trained.vocabulary, "sample_bytes": trained.sample_bytes},
        metrics={
            "bytes_per_token": round(trained.bytes_per_token, 4),
            "heldout_bytes_per_token": round(trained.heldout_bytes_per_token, 4),
        },
        reports=(
            Report(
                "tokenizer",
                "table",
                [
                    {
                        "vocabulary": trained.vocabulary,
                        "bytes per token": round(trained.bytes_per_token, 3),
                        "on held-out documents": round(trained.heldout_bytes_per_token, 3),
                        "sample": f"{trained.sample_bytes / 1e6:.1f} MB",
                    }
                ],
                "The vocabulary and how far it compresses",
            ),
            Report("tokenizer-groups", "table", trained.groups, "By language and domain"),
            Report("tokenizer-examples", "markdown", trained.examples, "Held-out text in tokens"),
        ),
    )


@dataclass(frozen=True)
class Trained:
    vocabulary: int
    sample_bytes: int
    bytes_per_token: float
    heldout_bytes_per_token: float
    groups: list[dict[str, Any]]
    examples: str


def _train(config: TokenizerConfig, work: Workspace, corpus: Manifest) -> Trained:
    """In a Ray worker: train, write the files, measure."""
    texts: list[str] = []
    if config.import_from:
        data = import_tokenizer(imported_file(config.import_from))
    else:
        texts = _sample(work.store, corpus, "train-", int(config.sample_megabytes * 1e6))
        data = train_sentencepiece(
            texts, config.vocab_size, config.character_coverage, config.longest_piece, config.kind
        )
    tokenizer = Tokenizer(data)
    for name, body in tokenizer_files(tokenizer).items():
        work.write_bytes(name, body)
    measured = _sample(work.store, corpus, "train-", MEASURED)
    heldout = _sample(work.store, corpus, "heldout-", MEASURED)
    return Trained(
        len(tokenizer),
        sum(len(text.encode()) for text in texts),
        bytes_per_token(tokenizer, measured),
        bytes_per_token(tokenizer, heldout or measured),
        by_group(tokenizer, lambda columns: work.store.tables(corpus, "train-", columns)),
        _examples(tokenizer, heldout or measured),
    )


def by_group(
    tokenizer: Tokenizer, tables: Callable[[list[str]], Iterable[pa.Table]]
) -> list[dict[str, Any]]:
    """Bytes per token of each language and of each domain, of a sample of the documents; those with
    most text first. A vocabulary that suits one of them ill shows here. tables: the documents, with
    the columns asked for; they are read twice, and never held.
    """
    sampled = {d.id: d.text for d in sample_documents(tables(["id", "text"]), MEASURED)}
    amounts: dict[tuple[str, str], list[int]] = {}
    for table in tables(["id", "url", "language"]):
        for row in table.to_pylist():
            text = sampled.pop(row["id"], None)
            if text is None:
                continue
            found = len(text.encode("utf-8", "replace")), len(tokenizer.encode(text))
            domain = urlsplit(row["url"] or "").netloc or "files"
            for group in (("language", row["language"] or "not stated"), ("domain", domain)):
                counts = amounts.setdefault(group, [0, 0, 0])
                for which, amount in enumerate((1, *found)):
                    counts[which] += amount
    rows = sorted(amounts.items(), key=lambda entry: -entry[1][1])
    shown = [[row for row in rows if row[0][0] == kind] for kind in ("language", "domain")]
    return [
        {
            "of": kind,
            "name": name,
            "documents": documents,
            "bytes": size,
            "bytes per token": round(size / max(tokens, 1), 3),
        }
        for of_kind in shown
        for (kind, name), (documents, size, tokens) in of_kind[:GROUPS]
    ]


def _sample(store: Store, corpus: Manifest, prefix: str, budget: int) -> list[str]:
    tables = store.tables(corpus, prefix, ["id", "text"])
    return [document.text for document in sample_documents(tables, budget)]


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    character_coverage: float = 0.9999,
    longest_piece: int = 24,
    kind: Literal["bpe", "unigram"] = "bpe",
) -> bytes:
    """A serialised SentencePiece model with our special tokens; the same texts give the same bytes.

    Raises UserError when the texts cannot support `vocab_size`, or it cannot hold their characters.
    """
    sentences = [sentence for text in texts for sentence in _sentences(text)]
    if not sentences:
        raise UserError("the training split holds no text to learn a vocabulary from; crawl more")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            max_sentencepiece_length=longest_piece,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=chat.UNKNOWN,
            bos_id=chat.BEGIN,
            eos_id=chat.END_OF_DOCUMENT,
            pad_id=chat.PAD,
            unk_piece=chat.UNKNOWN_PIECE,
            bos_piece=chat.BEGIN_PIECE,
            eos_piece=chat.END_OF_DOCUMENT_PIECE,
            pad_piece=chat.PAD_PIECE,
            control_symbols=list(CONTROL_SYMBOLS),
            max_sentence_length=4 * SENTENCE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _in_our_words(str(error), vocab_size) from error
    return _with_tabs(model.getvalue())


def _with_tabs(data: bytes) -> bytes:
    """Pieces learned with `TAB_MARK` are of tabs, which SentencePiece puts between texts and so
    never into a piece."""
    proto = sentencepiece_format().ModelProto.FromString(data)
    for piece in proto.pieces:
        piece.piece = piece.piece.replace(TAB_MARK, "\t")
    return bytes(proto.SerializeToString(deterministic=True))


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes for each token of these texts."""
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / max(tokens, 1)


def _sentences(text: str) -> Iterator[str]:
    """A text in pieces of whole lines. Characters that stand for others are left out."""
    text = text.encode("utf-8", "replace").decode()
    text = text.replace(SPACE_MARK, "").replace("\u2585", "")
    text = text.replace(TAB_MARK, "").replace("\t", TAB_MARK)
    begun = ""
    for line in text.splitlines(keepends=True):
        if begun and len(begun) + len(line) > SENTENCE_CHARACTERS:
            yield begun
            begun = ""
        begun += line
        while len(begun) > SENTENCE_CHARACTERS:
            yield begun[:SENTENCE_CHARACTERS]
            begun = begun[SENTENCE_CHARACTERS:]
    if begun.strip():
        yield begun


def _in_our_words(message: str, vocab_size: int) -> UserError:
    too_high = re.search(r"too high .*<= (\d+)", message)
    if too_high:
        return UserError(
            f"vocab_size {vocab_size} is larger than the corpus supports ({too_high[1]} pieces); "
            f"lower it to at most {too_high[1]} or add documents"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return UserError(
            f"vocab_size {vocab_size} cannot hold {BYTE_TOKENS} bytes, {SPECIAL_TOKENS} special "
            f"tokens and the corpus's characters; raise it to at least {too_small[1]} "
            "or lower character_coverage"
        )
    return UserError(
        f"no vocabulary of vocab_size {vocab_size} can be learned: {message.split('] ')[-1]}; "
        "lower it or add documents"
    )


def _examples(tokenizer: Tokenizer, texts: list[str]) -> str:
    """A line of each of some texts, its tokens told apart."""
    lines = []
    for text in texts:
        line = next((line for line in text.splitlines() if len(line) > 40), "")[:120]
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(line)]
        if pieces:
            lines.append("    " + "│".join(pieces).replace("\n", "⏎"))
        if len(lines) == EXAMPLES:
            break
    return "\n\n".join(lines) or "no line long enough to show"
