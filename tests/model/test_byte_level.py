"""Byte-level BPE of others under our ids: the same pieces, nothing lost, no mark ever spelt."""

from __future__ import annotations

import functools
import json
import pickle
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.byte_level import LETTERS
from model.chat import (
    SPECIAL_PIECES,
    SPECIAL_TOKENS,
    Tokenizer,
    TokenizerError,
    encode_chat,
)
from model.engine import load_model
from model.huggingface import FormatError, save_directory
from model.tokenizer_files import tokenizer_files
from serve.grammar import LIMITS, Grammar
from serve.token_mask import GrammarCompiler
from tasks.export.gguf_file import add_vocabulary
from tasks.runtime.errors import UserError
from tasks.tokenizer.imported import import_tokenizer
from tests.foreign_checkpoints import byte_level
from tests.tasks.export.test_export import texts
from tests.tiny_models import transformer

KINDS = ("gpt2", "qwen2")


@functools.cache
def imported(kind: str) -> Tokenizer:
    return Tokenizer(reworked(kind))


def reworked(kind: str, **changed: Any) -> bytes:
    """The import of one of theirs, after changes to its file."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(json.loads(byte_level(kind).to_str()) | changed))
        return import_tokenizer(path)


def pieces_of(ours: Tokenizer, text: str) -> list[str]:
    return [ours.piece(token) for token in ours.encode(text)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_special_tokens_bytes_and_their_pieces_in_their_order(kind: str) -> None:
    ours = imported(kind)
    names = [ours.piece(token) for token in range(len(ours))]
    assert tuple(names[:SPECIAL_TOKENS]) == SPECIAL_PIECES
    assert ours.token_bytes[SPECIAL_TOKENS:][:256] == [bytes([byte]) for byte in range(256)]
    assert not any(ours.token_bytes[:SPECIAL_TOKENS])
    theirs = sorted(byte_level(kind).get_vocab().items(), key=lambda entry: entry[1])
    learned = [piece for piece, _ in theirs if len(piece) > 1 and not piece.startswith("<|")]
    assert names[SPECIAL_TOKENS + 256 :] == learned
    assert ours.kind == "byte-level" and ours.file_name == "tokenizer.json"
    with pytest.raises(TokenizerError, match="merges, not scores"):
        ours.score(300)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(st.text())
@example("  two  spaces,\ttabs\r\n\n and a NUL \x00 ")
@example("日本語 🎉 é e\u0301 \u202e \ufeff \u2581")
@example("".join(SPECIAL_PIECES) + "<|endoftext|><|im_start|>")
@example("a\ud800b")
def test_nothing_is_lost_and_nothing_spells_a_special_token(kind: str, text: str) -> None:
    ours = imported(kind)
    ids = ours.encode(text)
    assert ours.decode(ids) == text.encode("utf-8", "replace").decode()
    assert all(token >= SPECIAL_TOKENS for token in ids)
    stream = ours.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(
    st.binary()
    | st.lists(st.binary(max_size=3) | st.text(st.characters(codec="utf-8")).map(str.encode)).map(
        b"".join
    )
)
@example(bytes(range(256)))
def test_no_byte_is_lost(kind: str, data: bytes) -> None:
    ours = imported(kind)
    ids = ours.encode_bytes(data)
    assert ours.decode_bytes(ids) == data
    assert all(token >= SPECIAL_TOKENS for token in ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec="utf-8")))
def test_pieces_are_theirs_for_any_text(kind: str, text: str) -> None:
    # Theirs composes characters, ours leaves them as they are; its marks are no text to ours.
    text = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
    assert pieces_of(imported(kind), text) == byte_level(kind).encode(text).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_theirs_in_every_script(kind: str) -> None:
    for text in [*texts(200), "The mill's wheel doesn't turn: 1984, 12,000!\n\n  GRIST\n"]:
        text = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
        assert pieces_of(imported(kind), text) == byte_level(kind).encode(text).tokens


def test_a_space_put_before_texts_and_whole_words_first_are_as_said() -> None:
    words = json.loads(byte_level("gpt2").to_str())["pre_tokenizer"]
    prefixed = {"type": "Sequence", "pretokenizers": [words | {"add_prefix_space": True}]}
    assert reworked("gpt2", pre_tokenizer=prefixed["pretokenizers"][0]) == reworked("gpt2")
    assert pieces_of(Tokenizer(reworked("gpt2", pre_tokenizer=prefixed)), "mill")[0][0] == "m"
    # Llama 3 takes a word that is a piece as it is, whatever its merges say.
    model = json.loads(byte_level("gpt2").to_str())["model"]
    vocab = model["vocab"] | {"zqzq": len(model["vocab"])}
    whole = Tokenizer(reworked("gpt2", model=model | {"vocab": vocab, "ignore_merges": True}))
    assert pieces_of(whole, "zqzq") == ["zqzq"] and len(pieces_of(whole, "zqzqz")) > 1


def test_what_cannot_be_kept_is_refused() -> None:
    model = json.loads(byte_level("gpt2").to_str())["model"]
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    losing = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, last]}
    removed = {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False}
    for changed, message in (
        ({"pre_tokenizer": losing}, "pre-tokenizer WhitespaceSplit, which loses text"),
        ({"pre_tokenizer": losing | {"pretokenizers": [removed, last]}}, "pre-tokenizer Split"),
        ({"normalizer": {"type": "Lowercase"}}, r"changes texts before it cuts them \(Lowercase\)"),
        ({"model": model | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix '</w>'"),
    ):
        with pytest.raises(UserError, match=message):
            reworked("gpt2", **changed)


def test_ours_is_taken_as_it_is_and_travels(tmp_path: Path) -> None:
    ours = imported("qwen2")
    for name, body in tokenizer_files(ours).items():
        (tmp_path / name).write_bytes(body)
    assert import_tokenizer(tmp_path / "tokenizer.json") == ours.data
    again = pickle.loads(pickle.dumps(Tokenizer.load(tmp_path)))
    assert again.data == ours.data and again.encode("water") == ours.encode("water")
    body = json.loads(ours.data)
    vocab = body["model"]["vocab"]
    vocab[LETTERS[0]], vocab[LETTERS[1]] = vocab[LETTERS[1]], vocab[LETTERS[0]]
    with pytest.raises(TokenizerError, match="has not the byte 0 at id 16"):
        Tokenizer(json.dumps(body).encode())
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer\.json"):
        Tokenizer(b"{}")


def test_a_model_with_it_is_served_under_a_grammar(tmp_path: Path) -> None:
    ours = imported("qwen2")
    save_directory(tmp_path, transformer(vocab_size=len(ours)))
    (tmp_path / "tokenizer.json").write_bytes(ours.data)
    names = load_model(tmp_path).tokenizer
    mask = GrammarCompiler(names).compile(Grammar("regex", "[日本]{2}x", "form", LIMITS))()
    said = b""
    for _ in range(12):
        allowed = np.flatnonzero(mask.allowed().numpy())
        if set(allowed) <= set(names.stop_ids):
            break
        mask.push(int(allowed[-1]))
        said += names.token_bytes[allowed[-1]]
    assert len(said.decode()) == 3 and said.endswith(b"x")


def test_no_gguf_is_written_of_it() -> None:
    with pytest.raises(FormatError, match="knows the regular expressions of byte-level BPE by"):
        add_vocabulary(None, imported("gpt2"), 1000)


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_ids_from_what_is_exported(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = imported(kind)
    flags = {"qkv_bias": True} if kind == "qwen2" else {}
    save_directory(tmp_path, transformer(vocab_size=len(ours), **flags))
    for name, body in tokenizer_files(ours, context=128).items():
        (tmp_path / name).write_bytes(body)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    automatic = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(200):
        composed = unicodedata.normalize("NFC", text)  # as it does for Qwen 2, whatever is said
        assert automatic(composed)["input_ids"] == [ours.begin, *ours.encode(composed)]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert len(theirs) == len(ours) and theirs("x")["input_ids"][0] == ours.begin
    talk = [{"role": "user", "content": "What does dedent do?"}]
    rendered = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert rendered == encode_chat(talk, ours)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad, ours.end_of_document)
