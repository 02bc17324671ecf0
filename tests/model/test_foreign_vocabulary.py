"""Checkpoints of others under our ids say what transformers says of theirs, token by token."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch

from model.chat import (
    BEGIN,
    END_OF_DOCUMENT,
    PAD,
    SPECIAL_TOKENS,
    UNKNOWN,
    Tokenizer,
    encode_chat,
)
from model.foreign_vocabulary import is_foreign, load_for, their_ids
from model.huggingface import FormatError, save_directory
from model.tokenizer_files import tokenizer_files
from model.transformer import Transformer
from tasks.runtime.errors import UserError
from tasks.tokenizer.imported import import_tokenizer
from tasks.training.start_from import require_tokenizer
from tests.foreign_checkpoints import (
    END,
    byte_level,
    learned_from,
    save_checkpoint,
    sentence_pieces,
)
from tests.tasks.export.test_export import texts
from tests.tiny_models import tokenizer as another

pytestmark = pytest.mark.peer

FAMILIES = ("llama", "gpt2", "qwen2")
ROWS = ("model.embed_tokens.weight", "lm_head.weight", "model.head.output_bias")


def imported(directory: Path) -> Tokenizer:
    return Tokenizer(import_tokenizer(directory / "tokenizer.json"))


@torch.no_grad()
def assert_same_logits(ours: Transformer, theirs: Any, ids: list[int | None], steps: int) -> None:
    """For random tokens that both have, and of those columns that both have."""
    both = torch.tensor([token for token, other in enumerate(ids) if other is not None])
    other = torch.tensor([token for token in ids if token is not None])
    drawn = torch.randint(len(both), (3, steps), generator=torch.Generator().manual_seed(0))
    expected = theirs(other[drawn]).logits[..., other]
    torch.testing.assert_close(ours.eval()(both[drawn])[..., both], expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01  # far enough apart for a wrong row to show


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_moved_rows_give_their_logits(family: str, tied: bool, tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    names = imported(tmp_path)
    ours = load_for(tmp_path, names)
    assert is_foreign(tmp_path) and ours.config.vocab_size == len(names)
    assert ours.config.tied_embeddings == tied and (ours.lm_head is None) == tied
    ids = their_ids(tmp_path, names, theirs.config.vocab_size)
    assert None not in ids[SPECIAL_TOKENS:]
    assert_same_logits(ours, theirs, ids, 60)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_get_their_rows_and_chat_marks_the_mean(family: str, tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, family, tie_word_embeddings=False)
    names, rows = imported(tmp_path), theirs.config.vocab_size
    ids = their_ids(tmp_path, names, rows)
    named = {"llama": (0, 1, 2)}.get(family, (None, 0, 0))  # <|endoftext|> is both
    assert (ids[UNKNOWN], ids[BEGIN], ids[END_OF_DOCUMENT]) == named
    state = load_for(tmp_path, names).state_dict()
    before = theirs.state_dict()
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    kept = [token for token in ids if token is not None]
    for ours, of_theirs in zip(ROWS, (embedding, "lm_head.weight"), strict=False):
        mean = before[of_theirs][kept].mean(0)
        for token in (PAD, names.end_of_turn, *names.roles.values(), names.mask):
            assert ids[token] is None
            torch.testing.assert_close(state[ours][token], mean)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_texts_are_the_same_tokens_to_both(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_checkpoint(tmp_path, family)
    theirs, names = AutoTokenizer.from_pretrained(tmp_path), imported(tmp_path)
    ids = their_ids(tmp_path, names, 10_000)
    for text in (*(text[-3000:] for text in learned_from()), *texts(20)):
        text = unicodedata.normalize("NFC", text) if family == "qwen2" else text
        encoded = theirs(text)["input_ids"]
        assert [ids[token] for token in names.encode(text)] == encoded


def test_only_the_invented_space_tells_llamas_tokens_from_ours(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_checkpoint(tmp_path, "llama")
    theirs, names = AutoTokenizer.from_pretrained(tmp_path), imported(tmp_path)
    ids = their_ids(tmp_path, names, 10_000)
    for text in ("First Citizen:\nBefore we", "speak, hear é", learned_from()[0][-3000:]):
        encoded = theirs(text, add_special_tokens=False)["input_ids"]
        assert [ids[token] for token in names.encode(f" {text}")] == encoded
        assert names.decode(names.encode(text)) == text


def test_a_checkpoint_with_sentencepieces_file_alone_is_read_by_it(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, "llama")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(sentence_pieces())
    names = Tokenizer(import_tokenizer(tmp_path / "tokenizer.model"))
    ids = their_ids(tmp_path, names, theirs.config.vocab_size)
    assert ids[:3] == [0, 1, 2] and None not in ids[SPECIAL_TOKENS:]
    assert_same_logits(load_for(tmp_path, names), theirs, ids, 40)


def test_a_piece_that_their_file_adds_as_a_token_keeps_its_row(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    names = imported(tmp_path)
    before = their_ids(tmp_path, names, 600)
    body = json.loads((tmp_path / "tokenizer.json").read_text())
    body["added_tokens"].append({"id": before[-1], "content": names.piece(len(names) - 1)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    assert their_ids(tmp_path, names, 600) == before
    # One that lies beyond the model's rows has none.
    assert their_ids(tmp_path, names, 599) == [None if i == 599 else i for i in before]


def test_the_bias_of_a_masked_models_output_moves_with_its_rows(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    made = byte_level("qwen2")
    names = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, mask_token="<|im_start|>", pad_token="<|im_end|>"
    )
    names.save_pretrained(tmp_path)
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "vocab_size": len(names)}
    theirs = BertForMaskedLM(BertConfig(**sizes, pad_token_id=2, initializer_range=0.15)).eval()
    torch.nn.init.normal_(theirs.cls.predictions.bias)
    theirs.save_pretrained(tmp_path)
    ours = imported(tmp_path)
    ids = their_ids(tmp_path, ours, len(names))
    assert (ids[ours.mask], ids[PAD], ids[END_OF_DOCUMENT]) == (1, 2, 0)
    assert_same_logits(load_for(tmp_path, ours), theirs, ids, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_again_is_read_by_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    save_checkpoint(tmp_path / "theirs", family)
    names = imported(tmp_path / "theirs")
    ours = load_for(tmp_path / "theirs", names).eval()
    out = tmp_path / "ours"
    save_directory(out, ours)
    for name, body in tokenizer_files(names, ours.config.context).items():
        (out / name).write_bytes(body)
    again, read = (
        AutoModelForCausalLM.from_pretrained(out),
        PreTrainedTokenizerFast.from_pretrained(out),
    )
    talk = [{"role": "user", "content": "Where is the mill?"}]
    rendered = read.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert rendered == encode_chat(talk, names)
    tokens = torch.tensor([rendered])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, ours(tokens), atol=1e-5, rtol=0)
    for text in texts(40):
        assert read(text, add_special_tokens=False)["input_ids"] == names.encode(text)
    # It has our layout now, so another training goes on from it as it is.
    assert not is_foreign(out)
    require_tokenizer(out, names.data)
    for ours_now, before in zip(load_for(out, names).parameters(), ours.parameters(), strict=True):
        assert torch.equal(ours_now, before)


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "gpt2")
    require_tokenizer(tmp_path, imported(tmp_path).data)
    with pytest.raises(UserError, match="was not made with this run's tokenizer; set tokenizer"):
        require_tokenizer(tmp_path, another().data)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        their_ids(tmp_path, another(), 1000)
    vocab = {"model": {"type": "BPE", "vocab": {"mill": 0}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(FormatError, match="has none of the pieces of this run's"):
        their_ids(tmp_path, another(), 1000)
