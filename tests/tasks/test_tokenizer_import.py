"""Vocabularies of the other kind and from elsewhere: lossless, id for id, told by group."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from model.chat import SPECIAL_TOKENS, Tokenizer, TokenizerError
from model.tokenizer_files import tokenizer_files, tokenizer_json
from tasks.runtime.errors import UserError
from tasks.tokenizer.imported import import_tokenizer, imported_file
from tasks.tokenizer.train import TokenizerConfig, by_group, train_sentencepiece
from tasks.training.start_from import require_tokenizer
from tests.tasks.export.test_export import texts
from tests.tiny_models import tokenizer

WORDS = ["mill", "grist", "grain", "stone", "water", "wheel", "flour", "bread", "oven", "baker"]


def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=40)) + ".\n" for _ in range(200)]


UNIGRAM = Tokenizer(train_sentencepiece(corpus(), 310, kind="unigram"))


@given(st.text())
def test_unigram_is_lossless(text: str) -> None:
    assert UNIGRAM.decode(UNIGRAM.encode(text)) == text.encode("utf-8", "replace").decode()


def test_unigram_has_our_layout_and_says_what_it_is() -> None:
    assert (UNIGRAM.kind, tokenizer().kind) == ("unigram", "bpe")
    assert UNIGRAM.encode("<|user|>") != [UNIGRAM.roles["user"]]
    assert len(UNIGRAM.encode("grist mill")) <= 4
    assert tokenizer_json(UNIGRAM)["model"]["type"] == "Unigram"


@pytest.mark.peer
def test_exported_unigram_gives_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, body in tokenizer_files(UNIGRAM).items():
        (tmp_path / name).write_bytes(body)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*texts(), *corpus()[:20]]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == UNIGRAM.encode(text)
        assert theirs.decode(UNIGRAM.encode(text)) == text


def test_our_own_vocabulary_is_taken_as_it_is(tmp_path: Path) -> None:
    names = tokenizer()
    for name, body in tokenizer_files(names).items():
        (tmp_path / name).write_bytes(body)
    assert import_tokenizer(tmp_path / "tokenizer.model") == names.data
    again = Tokenizer(import_tokenizer(tmp_path / "tokenizer.json"))
    for text in texts():
        assert again.encode(text) == names.encode(text)
    require_tokenizer(tmp_path, names.data)
    with pytest.raises(UserError, match="was not made with this run's tokenizer; set"):
        require_tokenizer(tmp_path, UNIGRAM.data)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_of_others_keeps_its_pieces_and_loses_nothing(tmp_path: Path, kind) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type=kind,
        vocab_size=32,
        minloglevel=2,
    )
    path = tmp_path / "theirs.model"
    path.write_bytes(model.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = Tokenizer(import_tokenizer(path))
    assert len(ours) == SPECIAL_TOKENS + 256 + 32 - 3
    for text in [*texts(20), " grist mill"]:
        assert ours.decode(ours.encode(text)) == text
    # Theirs puts a space before the text.
    pieces = [ours.piece(token) for token in ours.encode(" grist mill water")]
    assert pieces == theirs.EncodeAsPieces("grist mill water")


def test_what_has_no_such_form_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", str(tmp_path))
    path = tmp_path / "tokenizer.json"
    letters: dict = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    for body, message in (
        ({"model": letters | {"byte_fallback": False}}, "a BPE that neither joins bytes nor falls"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "is a WordPiece"),
    ):
        path.write_text(json.dumps(body))
        with pytest.raises(UserError, match=message):
            import_tokenizer(path)
    over_bytes: dict = {"pre_tokenizer": {"type": "ByteLevel"}}
    for body, message in (
        ({}, "it has no model"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "it has no vocab of pieces with ids"),
        ({"model": letters | {"vocab": {"a": "0"}}}, "it has no vocab of pieces with ids"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}} | over_bytes, "it has no merges of two"),
        ({"model": letters | {"merges": ["abc"]}}, "it has no merges of two pieces"),
        ({"model": letters | {"merges": [5]}} | over_bytes, "it has no merges of two pieces"),
        ({"model": letters | {"unk_token": ["a"]}}, "it has an unk_token that is no piece"),
        ({"model": {"type": "Unigram"}}, "it has no vocab of pieces with scores"),
        ({"model": {"type": "Unigram", "vocab": [["a"]]}}, "it has no vocab of pieces with scores"),
        ({"model": {"type": "Unigram", "vocab": [], "unk_id": 0}}, "it has unk_id 0, which is no"),
        ({"model": letters, "added_tokens": [{"id": 0}]}, "it has added_tokens without content"),
        ({"model": letters, "normalizer": "NFC"}, "it has a normalizer without a type"),
        (
            {"model": letters, "pre_tokenizer": {"type": "Sequence"}},
            "it has a pre_tokenizer without a type",
        ),
    ):
        for mark in (b"", b"\xef\xbb\xbf", b" \n"):
            path.write_bytes(mark + json.dumps(body).encode())
            for read in (import_tokenizer, Tokenizer.load):
                words = rf"tokenizer\.json is no tokenizer\.json of the library.*: {message}"
                with pytest.raises((UserError, TokenizerError), match=words):
                    read(path)
    for data in (b"[]", b"\xff\xfe{", b"{"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"is no tokenizer\.json of the library"):
            import_tokenizer(path)
    # Ours, as an editor may save it.
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + tokenizer_files(UNIGRAM)[path.name])
    assert len(Tokenizer(import_tokenizer(tmp_path / "marked.json"))) == len(UNIGRAM)
    (tmp_path / "x.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        import_tokenizer(tmp_path / "x.model")
    assert imported_file(str(tmp_path)) == path
    with pytest.raises(UserError, match="is no file, and no directory with"):
        imported_file(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="lies outside the directories"):
        imported_file("/etc/passwd")
    with pytest.raises(ValueError, match="vocab_size is of a vocabulary that is learned"):
        TokenizerConfig(import_from="x", vocab_size=300)
    assert len(TokenizerConfig(import_from=str(tmp_path)).resolve().import_digest) == 64


def test_compression_is_told_by_language_and_domain() -> None:
    rows = [
        {"id": "1", "text": "grist mill " * 9, "url": "https://a.example/1", "language": "en"},
        {"id": "2", "text": "日本語" * 9, "url": "https://b.example/1", "language": "ja"},
        {"id": "3", "text": "grain", "url": "https://a.example/2", "language": "en"},
    ]

    def tables(columns: list[str]) -> Iterator[pa.Table]:
        yield pa.Table.from_pylist(rows).select(columns)

    told = by_group(UNIGRAM, tables)
    assert [(row["of"], row["name"], row["documents"]) for row in told] == [
        ("language", "en", 2),
        ("language", "ja", 1),
        ("domain", "a.example", 2),
        ("domain", "b.example", 1),
    ]
    english, japanese, *_ = (row["bytes per token"] for row in told)
    assert english > 2 and japanese == 1.0
