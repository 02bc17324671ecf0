"""The held-out split: nothing that is held out, or resembles it, is in training."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from documents_of import documents, rows, urls
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_shards import run_inline
from pydantic import ValidationError

from tasks.corpus import held_out
from tasks.corpus.arrays import is_among, read_array
from tasks.corpus.groups import draw, stable_key
from tasks.corpus.leakage import Marks, line_marks, own_marks, without_leaks
from tasks.corpus.shingles import normalise
from tasks.corpus.split import SplitConfig, split
from tasks.runtime.errors import UserError
from tasks.runtime.store import Directory

NOTICE = "Copyright of the example foundation, all of the rights are reserved for ever."
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "frost",
    "grove",
    "heron",
    "inlet",
    "jetty",
    "knoll",
    "larch",
    "marsh",
]


def sentence(number: int, salt: str) -> str:
    chosen = [WORDS[(number * 7 + k * k + ord(salt)) % len(WORDS)] for k in range(9)]
    return f"Return the {' '.join(chosen)} of item{number}{salt} in the given collection."


def module(number: int) -> str:
    name = f"module{number}"
    parts = [f"# {name}", f"The {name} module handles the things of kind {number}."]
    for salt in "abcd":
        parts += [f"## {name}.function_{salt}(x, y)", sentence(number, salt)]
    return "\n\n".join([*parts, NOTICE])


def site(count: int = 40) -> dict[str, str]:
    """Module pages, their sources (other line breaks), and one page of summaries of them all."""
    pages = {f"http://h:8080/library/module{n}.html": module(n) for n in range(count)}
    for n in range(count):
        wrapped = "\n".join(
            f'def function_{salt}(x, y):\n    """{sentence(n, salt)[:37]}\n    '
            f'{sentence(n, salt)[37:]}\n    """\n    return x{n} + y{salt}'
            for salt in "abcd"
        )
        pages[f"http://h:8080/source/module{n}.html"] = f"# source {n}\n\n```\n{wrapped}\n```"
    entries = [
        f"- `module{n}.function_{salt}`: {sentence(n, salt)}"
        for n in range(count)
        for salt in "abc"
    ] + [f"- module{n}.function_d: short fact {n}" for n in range(count)]
    pages["http://h:8080/summary.html"] = "# All functions\n\n" + "\n".join(entries)
    return pages


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


def own_clusters(texts: dict[str, str]) -> tuple[str, ...]:
    return tuple(str(number) for number in range(len(texts)))


def cut_by(text: str, held: Marks) -> tuple[str, int]:
    marks = line_marks(text)
    hits = is_among(marks.windows, held.windows), is_among(marks.names, held.names)
    left, lines = without_leaks(marks, *hits)
    return left, len(lines)


def divided(texts: dict[str, str], **options):
    return split(SplitConfig(**options), documents=documents(texts, own_clusters(texts)))


def test_no_line_of_a_held_out_document_is_in_training_however_it_is_broken() -> None:
    manifest = divided(site())
    held, train = rows(manifest, "heldout-"), rows(manifest, "train-")
    assert held and train
    seen = " ".join(normalise(row["text"]) for row in train)
    lines = {line for row in held for line in row["text"].split("\n")}
    long = {line for line in lines if len(normalise(line)) >= 40}
    leaked = {line for line in long if normalise(line) in seen}
    assert leaked == {NOTICE}  # everybody's, and so nobody's own
    assert sum(NOTICE in row["text"] for row in train) > 20
    cuts = rows(manifest, "cut-")
    assert len(cuts) == manifest.metrics["leaked_lines_cut"] > 0
    texts, left = site(), {row["url"]: row["id"] for row in train}
    for cut in cuts:
        assert texts[cut["url"]].split("\n")[cut["line"] - 1] == cut["text"]
        assert cut["id"] == left[cut["url"]] != cut["before"]


def test_summaries_tell_nothing_of_what_is_held_out_and_all_of_the_rest() -> None:
    manifest = divided(site())
    numbers = {re.search(r"(\d+)\.html", url).group(1) for url in urls(manifest, "heldout-")}
    (summary,) = [r for r in rows(manifest, "train-") if r["url"].endswith("/summary.html")]
    told = set(re.findall(r"module(\d+)\.", summary["text"]))
    assert told == {str(n) for n in range(40)} - numbers
    assert summary["text"].count("short fact") == 40 - len(numbers)


def test_many_tiny_ranges_of_marks_cut_what_one_range_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = divided(site())
    assert whole.metrics["leaked_lines_cut"] > 0 < whole.metrics["common_passages"]
    read = []

    def counted(directory: Directory, name: str) -> np.ndarray:
        array = read_array(directory, name)
        read.append((name, len(array)))
        return array

    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(held_out, "MARKS", 3)
    monkeypatch.setattr(held_out, "read_array", counted)
    cut_up = divided(site())
    assert cut_up.files == whole.files
    assert (cut_up.metrics, cut_up.counts) == (whole.metrics, whole.counts)
    # Nobody reads more held-out marks at a time than a range has.
    assert len({name for name, _ in read if name.startswith("_marks-windows-")}) > 50
    assert max(size for _, size in read) < 20


def test_a_page_and_its_source_are_never_divided() -> None:
    manifest = divided(site())
    held = {url.rsplit("/", 1)[1] for url in urls(manifest, "heldout-")}
    assert not held & {url.rsplit("/", 1)[1] for url in urls(manifest, "train-")}
    assert 2 * len(held) == manifest.counts["heldout_documents"]


def test_the_choice_is_stable_under_growth_and_ports() -> None:
    few, many = site(30), site(40)
    moved = {url.replace("http://h:8080", "https://h:9"): text for url, text in few.items()}
    held_few = {stable_key(url) for url in urls(divided(few), "heldout-")}
    held_many = {stable_key(url) for url in urls(divided(many), "heldout-")}
    assert held_few == {stable_key(url) for url in urls(divided(moved), "heldout-")}
    assert held_few == {key for key in held_many if int(re.search(r"(\d+)\.", key)[1]) < 30}
    assert held_few != {stable_key(url) for url in urls(divided(few, seed=1), "heldout-")}


def held_of(addresses: list[str], clusters: list[str], **options) -> list[bool]:
    """Which of these documents, of ten words each that no other has, are held out."""
    texts = {url: f"{n}x " * 3 for n, url in enumerate(addresses)}
    manifest = split(SplitConfig(**options), documents=documents(texts, tuple(clusters)))
    held = set(urls(manifest, "heldout-"))
    assert len(held) + len(urls(manifest, "train-")) == len(addresses)
    return [url in held for url in addresses]


def reference(addresses: list[str], clusters: list[str], config: SplitConfig) -> list[bool]:
    """The rule in plain Python over the whole corpus."""
    groups = list(range(len(addresses)))
    keys = [
        {("c", cluster)} | {(p, m[1]) for p in config.group_urls if (m := re.search(p, url))}
        for url, cluster in zip(addresses, clusters, strict=True)
    ]
    for _ in addresses:
        for a, mine in enumerate(keys):
            for b, theirs in enumerate(keys):
                if mine & theirs:
                    groups[a] = groups[b] = min(groups[a], groups[b])
    members = {g: [i for i, own in enumerate(groups) if own == g] for g in set(groups)}
    draws = {
        g: draw(config.seed, min(stable_key(addresses[i]) for i in rows))
        for g, rows in members.items()
    }
    most = config.largest_group * len(addresses)
    small = [g for g, rows in members.items() if len(rows) <= most]
    held = {g for g in small if draws[g] < config.fraction}
    held = held or {min(small or draws, key=draws.__getitem__)}
    if len(held) == len(draws):
        held.remove(max(held, key=draws.__getitem__))
    return [group in held for group in groups]


@pytest.mark.parametrize("seed", range(6))
def test_shards_choose_as_one_table_would(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.corpus.groups.SHARDS_PER_RANGE", 1 + seed)
    rng = random.Random(seed)
    addresses = [f"http://h:{n % 3}/{rng.choice('ab')}/{n}/p{rng.randrange(9)}" for n in range(24)]
    clusters = [str(rng.randrange(30)) for _ in addresses]
    options = {
        "fraction": [0.02, 0.3, 0.5][seed % 3],
        "seed": seed,
        "group_urls": (r"/(p[0-2])$", r"/(b/1)"),
        "largest_group": [0.05, 0.2, 1.0][seed // 2],
    }
    expected = reference(addresses, clusters, SplitConfig(**options))
    assert held_of(addresses, clusters, **options) == expected


def test_clusters_of_similar_documents_stay_together() -> None:
    addresses = [f"http://h/{n}" for n in range(100)]
    held = held_of(addresses, [str(n // 4) for n in range(100)], fraction=0.3)
    for start in range(0, 100, 4):
        assert len(set(held[start : start + 4])) == 1
    assert 0.1 < sum(held) / 100 < 0.5


def test_a_large_group_is_not_held_out() -> None:
    addresses = [f"http://h/{n}" for n in range(40)]
    clusters = ["big" if n < 20 else str(n) for n in range(40)]
    for seed in range(3):
        held = held_of(addresses, clusters, seed=seed)
        assert not any(held[:20])
        assert any(held[20:])


def test_a_small_corpus_holds_one_group_out_and_one_document_is_refused() -> None:
    assert sorted(held_of(["http://h/a", "http://h/b"], ["a", "b"])) == [False, True]
    with pytest.raises(UserError, match=r"2 documents form 1 group .* needs two; crawl more pages"):
        held_of(["http://h/a", "http://h/b"], ["a", "a"])


def test_group_patterns_need_one_group() -> None:
    with pytest.raises(ValidationError, match="0 groups; give exactly one"):
        SplitConfig(group_urls=("/library/",))


text_lines = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=8
)


@settings(max_examples=200)
@given(text_lines, text_lines, st.integers(0, 7), st.integers(20, 60))
def test_whatever_is_planted_is_cut(
    held: list[str], train: list[str], place: int, width: int
) -> None:
    planted = held[place % len(held)]
    broken = re.sub(rf"(.{{{width},}}?) ", r"\1\n    # ", planted)
    text = "\n".join([*train[:place], broken, *train[place:]])
    marks = own_marks("\n".join(held))
    cut, _ = cut_by(text, marks)
    for line in held:
        if len(normalise(line)) >= 40:
            assert f" {normalise(line)} " not in f" {normalise(cut)} "


def test_only_what_is_shared_is_cut_and_empty_code_goes_with_it() -> None:
    fact = "Return the absolute value of the number that is given as x."
    text = f"# page\n\nOf its own.\n\n```\n{fact}\n```\n\n- keep this\n- math.fabs: see there"
    marks = own_marks(f"# math\n\n## math.fabs(x)\n\n{fact}")
    assert cut_by(text, marks) == ("# page\n\nOf its own.\n\n- keep this", 2)
    untouched = cut_by(text, Marks(marks.windows[:0], marks.names[:0]))
    assert untouched == (text, 0)


def test_a_page_keeps_its_text_when_a_held_out_list_quotes_it() -> None:
    fact = "Return the absolute value of the number that is given as x."
    page = f"# math\n\n## math.fabs(x)\n\n{fact}"
    quoting = f"# other\n\n## other.own(x)\n\n{NOTICE}\n\n- `math.fabs(x)`: {fact}"
    assert cut_by(page, own_marks(quoting)) == (page, 0)
    summary = "# all\n\n- other.own(x): something\n- math.fabs(x): kept"
    assert cut_by(summary, own_marks(quoting))[1] == 1
