"""The vectorised walk finds exactly what py3langid's own loop finds."""

from hypothesis import given
from hypothesis import strategies as st
from py3langid.langid import MODEL_FILE, LanguageIdentifier, visit_counts
from shared_data import shared

from tasks.corpus.language_id import _CODE, _without_code, identifier

THEIRS = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8"))))
def test_counts_are_those_of_the_loop(text: bytes) -> None:
    features, counts = identifier().counts(text)
    theirs = visit_counts(THEIRS.tk_nextmove, THEIRS._rowbase, THEIRS.tk_output, text) or {}
    assert dict(zip(features.tolist(), counts.tolist(), strict=True)) == dict(theirs)


def test_answers_are_those_of_py3langid() -> None:
    japanese = shared("text/wagahaiwa_nekodearu.ja.txt").read_text()
    english = shared("text/botchan.txt").read_text()
    texts = [japanese[:2000], english[:2000], english[5000:5040], "Der Zug fährt ab.", "", "123"]
    for text in texts:
        (code, score), (their_code, their_score) = (
            one.classify(text) for one in (identifier(), THEIRS)
        )
        assert code == their_code
        assert abs(score - their_score) < 1e-3


@given(st.lists(st.text("ab_(:/{.é", min_size=1, max_size=6), max_size=12))
def test_words_that_look_like_code_are_left_out(words: list[str]) -> None:
    expected = " ".join(word for word in words if not _CODE.search(word))
    assert _without_code(" ".join(words)) == expected
