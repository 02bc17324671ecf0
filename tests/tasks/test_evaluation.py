"""Scores against hand-computed values, other implementations, and what must hold of them."""

import lzma
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.transformer import Transformer
from tasks.evaluation.bits_per_byte import score_documents, windows
from tasks.evaluation.compression import METHODS, compressed_size, conditional_bits_per_byte
from tasks.evaluation.gates import Scores, compare
from tasks.evaluation.intervals import bootstrap_ratio, mean, wilson
from tasks.evaluation.questions import answers, continuations, judge
from tasks.evaluation.rouge import longest_common_subsequence, rouge_l
from tests.tiny_models import VOCABULARY, tokenizer, transformer

NAMES = tokenizer()
TEXT = "Remove any common leading whitespace from every line in text. " * 12


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        # Lin 2004, section 3.1: S1 as reference, S2 and S3 with L = 3 and 2 of 4 words.
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("police killed the gunman", "the gunman kill police", 0.5),
        ("The quick brown fox.", "the quick, brown dog", 0.75),
        ("a b c d", "a c", 2 * 1.0 * 0.5 / 1.5),
        ("Return `os.stat_result`", "return os stat result", 1.0),
        ("anything", "", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_agrees_with_values_worked_out_by_hand(
    reference: str, answer: str, score: float
) -> None:
    assert rouge_l(reference, answer) == pytest.approx(score)


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=7)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_the_one_found_by_trying_all(left, right) -> None:
    def is_within(short: list[str], long: list[str]) -> bool:
        rest = iter(long)
        return all(word in rest for word in short)

    subsequences = (
        [word for bit, word in enumerate(left) if mask >> bit & 1] for mask in range(1 << len(left))
    )
    best = max(len(part) for part in subsequences if is_within(part, right))
    assert longest_common_subsequence(left, right) == best
    assert longest_common_subsequence(right, left) == best


def test_an_exact_answer_may_differ_in_white_space_only() -> None:
    assert judge("Return a  copy.", " Return a\ncopy. ").exact
    assert not judge("Return a copy.", "return a copy.").exact
    assert not judge("Return a copy.", "Return a copy").exact


def test_wilsons_interval_agrees_with_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(successes, trials)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_a_bootstrap_interval_is_the_same_every_time_and_narrows_with_more_items() -> None:
    values = [float(n % 2) for n in range(400)]
    found = mean(values)
    assert found == mean(values) and found.value == 0.5
    half = 1.96 * 0.5 / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)
    few = mean(values[:40])
    assert few.high - few.low > 2 * (found.high - found.low)
    assert bootstrap_ratio([6.0], [3.0]) == (2.0, 2.0, 2.0)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(2, 40))
def test_windows_predict_every_token_once_from_half_a_context_at_least(length, context) -> None:
    predicted = []
    for window in windows(0, length, context):
        assert 0 <= window.start < window.first <= window.end
        assert window.end - window.start <= context
        given_before = window.first - window.start  # tokens read before the first prediction
        assert window.start == 0 or given_before >= context // 2
        predicted += range(window.first, window.end + 1)
    assert predicted == list(range(1, length))


@pytest.mark.parametrize("text", [TEXT, "short", "é" * 100])
def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(text: str) -> None:
    model = Transformer(ModelConfig(vocab_size=VOCABULARY, width=32, heads=2, layers=1, context=32))
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    (score,) = score_documents(model, NAMES, [text])
    tokens = len(NAMES.encode(text))
    assert score.tokens == tokens and score.bytes == len(text.encode())
    assert score.bits == pytest.approx(math.log2(VOCABULARY) * tokens, rel=1e-6)


def test_bits_are_those_of_one_pass_where_the_document_fits_the_context() -> None:
    model = transformer(context=256)
    ids = torch.tensor([[NAMES.begin, *NAMES.encode(TEXT[:300])]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).log_softmax(-1)
    expected = -logits.gather(2, ids[:, 1:, None]).sum() / math.log(2)
    (score,) = score_documents(model, NAMES, [TEXT[:300]])
    assert score.bits == pytest.approx(float(expected), rel=1e-5)


def test_a_document_costs_the_same_in_any_company() -> None:
    model = transformer(context=64)
    texts = [TEXT, "short", TEXT[:200], "", "x = 1"]
    together = score_documents(model, NAMES, texts)
    for text, score in zip(texts, together, strict=True):
        (alone,) = score_documents(model, NAMES, [text])
        assert alone.bits == pytest.approx(score.bits, rel=1e-5)
    assert together[3].bits == 0 and together[3].bytes == 0


def test_a_window_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context 100 is not between 2 and the model's 64"):
        score_documents(transformer(context=64), NAMES, ["x"], context=100)


def test_answers_come_in_the_order_of_the_questions_whatever_their_length() -> None:
    model = transformer(context=64)
    questions = ["What is a?", "x " * 200, "Why?"]
    given_answers = answers(model, NAMES, questions, longest=6)
    assert given_answers[1] == ""
    assert given_answers[0] == answers(model, NAMES, questions[:1], longest=6)[0]
    assert len(continuations(model, NAMES, ["def f", "x " * 200], longest=6)) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_text_already_read_costs_almost_nothing(method) -> None:
    text = bytes(lzma.compress(zlib.__doc__.encode())) * 3  # no pattern but its repetition
    training = compressed_size(method, text)
    both = compressed_size(method, text + text[: len(text) // 3])
    assert conditional_bits_per_byte(both, training, len(text) // 3) < 1
    assert training < 1.4 * len(text) / 3


def scores(bits: list[float], exact: dict[str, list[bool]]) -> Scores:
    return Scores(
        {f"d{n}": (value, 100) for n, value in enumerate(bits)},
        {
            group: {f"q{n}": right for n, right in enumerate(flags)}
            for group, flags in exact.items()
        },
    )


CHAMPION = scores([100.0 + n % 7 for n in range(60)], {"recall": [n % 3 > 0 for n in range(300)]})


def changed(bits: float = 0.0, flip: int = 0, to: bool = True) -> Scores:
    """The champion with other bits a document, and the first `flip` answers set."""
    found = {name: (value + bits, size) for name, (value, size) in CHAMPION.documents.items()}
    right = dict(CHAMPION.exact["recall"])
    for name in list(right)[:flip]:
        right[name] = to
    return Scores(found, {"recall": right})


def test_a_model_is_not_better_than_itself() -> None:
    decision = compare(CHAMPION, CHAMPION)
    assert not decision.moved and "nothing beyond noise" in decision.reason


def test_fewer_bits_win_unless_answers_get_worse() -> None:
    assert compare(changed(bits=-5), CHAMPION).moved
    worse = compare(changed(bits=-5, flip=150, to=False), CHAMPION)
    assert not worse.moved and "recall questions less exactly" in worse.reason


def test_better_answers_win_unless_bits_get_more() -> None:
    better = compare(changed(flip=150), CHAMPION)
    assert better.moved and "more exactly" in better.reason
    worse = compare(changed(bits=5, flip=150), CHAMPION)
    assert not worse.moved and "0.0500 bits per byte more" in worse.reason


def test_noise_moves_nothing() -> None:
    swinging = {
        name: (bits + (3 if number % 2 else -3), size)
        for number, (name, (bits, size)) in enumerate(CHAMPION.documents.items())
    }
    assert not compare(Scores(swinging, CHAMPION.exact), CHAMPION).moved
    assert not compare(changed(flip=2), CHAMPION).moved


def test_models_scored_on_other_documents_are_not_compared() -> None:
    other = Scores({"elsewhere": (1.0, 100)}, {})
    assert "no scored document in common" in compare(other, CHAMPION).reason


def test_scores_change_only_with_the_version_of_their_stage() -> None:
    # Raise the version of evaluate or compression-baseline when these change.
    sizes = [compressed_size(method, TEXT.encode()) for method in METHODS]
    assert sizes == [65, 65, 77]
    plan = [(window.start, window.first, window.end) for window in windows(0, 150, 64)]
    assert plan == [(0, 1, 64), (32, 65, 96), (64, 97, 128), (85, 129, 149)]
    assert wilson(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)
    assert mean([0.0, 1.0, 1.0, 0.5]) == (0.625, 0.25, 1.0)
