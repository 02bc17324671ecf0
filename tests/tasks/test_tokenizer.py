"""Learning a vocabulary: deterministic, bounded, and clear about what it cannot do."""

import hashlib
import inspect
import random
import textwrap

import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat import SPECIAL_TOKENS, Tokenizer
from model.tokenizer_files import tokenizer_files
from tasks.corpus.sampling import sample_documents
from tasks.runtime.errors import UserError
from tasks.tokenizer.shards import encode_documents
from tasks.tokenizer.train import GROUPS, TokenizerConfig, by_group, train_sentencepiece

GOLDEN_TEXT = [f"def square_{n}(x):\n    return x ** {n}\n\n" for n in range(200)]


def test_the_same_texts_give_the_same_bytes() -> None:
    # Raise the stage's version when this changes: caches hold vocabularies made the old way.
    proto = train_sentencepiece(GOLDEN_TEXT, 320)
    assert proto == train_sentencepiece(GOLDEN_TEXT, 320)
    pieces = [Tokenizer(proto).piece(token) for token in range(320)]
    digest = hashlib.sha256("\n".join(pieces).encode()).hexdigest()
    assert digest[:16] == "2e0641bf1f05d5aa"


def test_digits_stand_alone_and_newlines_are_learned_within_pieces() -> None:
    names = Tokenizer(train_sentencepiece(GOLDEN_TEXT, 320))
    pieces = [names.decode([token]) for token in range(len(names))]
    assert not any(sum(c.isdigit() for c in piece) > 1 for piece in pieces)
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tabs_are_learned_within_pieces_and_exported_id_for_id(kind) -> None:
    tabbed = [inspect.getsource(it).replace("    ", "\t") for it in (inspect, random, textwrap)]
    names = Tokenizer(train_sentencepiece(tabbed, 600, kind=kind))
    assert len(names.encode("\n\t\t")) == 1
    exported = tokenizers.Tokenizer.from_str(tokenizer_files(names)["tokenizer.json"].decode())
    draw = random.Random(0)
    parts = ("\t", "\n", " ", "if x:", "def", "\u2409", "8") if kind == "bpe" else ("\n\t", "if x:")
    mixed = ["".join(draw.choices(parts, k=20)) for _ in range(200)]
    for text in (*tabbed, *mixed):
        ids = names.encode(text)
        assert names.decode(ids) == text
        assert exported.encode(text, add_special_tokens=False).ids == ids


def test_characters_the_vocabulary_lacks_are_written_as_bytes() -> None:
    names = Tokenizer(train_sentencepiece(GOLDEN_TEXT, 320))
    ids = names.encode("é")
    assert [names.piece(token) for token in ids] == ["<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (50_000, r"vocab_size 50000 is larger than the corpus supports \(\d+ pieces\); lower it"),
        (275, r"vocab_size 275 cannot hold 256 bytes, 16 special tokens .* at least \d+"),
    ],
)
def test_an_impossible_vocabulary_says_what_would_do(vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_sentencepiece([inspect.getsource(textwrap)], vocab_size)


def test_a_vocabulary_below_the_required_tokens_is_refused_by_the_form() -> None:
    with pytest.raises(ValueError, match="vocab_size 100 < 256 required bytes"):
        TokenizerConfig(vocab_size=100)
    assert TokenizerConfig(vocab_size=256 + SPECIAL_TOKENS + 1).vocab_size == 273


def test_no_text_is_one_clear_sentence() -> None:
    with pytest.raises(UserError, match="no text to learn a vocabulary from"):
        train_sentencepiece(["", "  \n"], 300)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("ab ", min_size=1, max_size=40), min_size=1, max_size=30),
    st.integers(1, 200),
    st.randoms(),
)
def test_a_sample_depends_only_on_the_set_of_documents(texts, budget, draw) -> None:
    rows = [{"id": f"{n}", "text": text} for n, text in enumerate(texts)]
    chosen = sample_documents([pa.Table.from_pylist(rows)], budget)
    draw.shuffle(rows)
    cut = draw.randint(0, len(rows))
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    assert sample_documents([pa.Table.from_pylist(part) for part in parts], budget) == chosen
    size = sum(len(text) for _, text in chosen)
    total = sum(len(text[:budget]) for text in texts)
    assert size >= min(budget, total)
    assert size - len(chosen[-1].text) < budget


def test_documents_are_separated_and_found_again() -> None:
    names = Tokenizer(train_sentencepiece(GOLDEN_TEXT, 320))
    ids, starts = encode_documents(names, ["one", "", "two words"])
    assert ids.dtype.itemsize == 2 and starts.tolist()[0] == 0
    cut = [ids[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert [names.decode(document) for document in cut] == ["one", "", "two words"]
    assert all(d[0] == names.begin and d[-1] == names.end_of_document for d in cut)


def test_shards_change_only_with_the_version_of_the_stage() -> None:
    names = Tokenizer(train_sentencepiece(GOLDEN_TEXT, 320))
    ids, starts = encode_documents(names, GOLDEN_TEXT[:2])
    assert starts.tolist() == [0, 17]
    assert ids.tolist() == [
        1,
        284,
        290,
        303,
        319,
        300,
        297,
        282,
        288,
        289,
        281,
        285,
        292,
        319,
        299,
        299,
        2,
        1,
        284,
        290,
        303,
        298,
        300,
        297,
        282,
        288,
        289,
        281,
        285,
        292,
        298,
        299,
        299,
        2,
    ]


def test_domains_are_told_also_where_there_are_many_languages() -> None:
    languages = [f"l{number:02}" for number in range(GROUPS + 5)]
    rows = [
        {"id": name, "text": "grist", "url": "https://a.example/", "language": name}
        for name in languages
    ]
    names = Tokenizer(train_sentencepiece(GOLDEN_TEXT, 320))
    told = by_group(names, lambda columns: [pa.Table.from_pylist(rows).select(columns)])
    assert [row["name"] for row in told] == [*languages[:GROUPS], "a.example"]
