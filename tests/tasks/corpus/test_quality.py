"""Language and quality: documentation with code survives, rubbish goes with the rule's name."""

import pytest
from documents_of import documents, rows, urls
from inline_shards import run_inline
from pydantic import ValidationError

from tasks.corpus.language import LanguageConfig, identify, language
from tasks.corpus.quality import RULES, QualityConfig, quality
from tasks.corpus.reading import Reading
from tasks.runtime.errors import UserError

PROSE = (
    "The committee met on Tuesday to discuss the repair of the old bridge over the river. "
    "Several members spoke about the costs, and a few of them wanted to wait for another year. "
    "In the end they decided to ask an engineer for advice before spending any more money. "
    "She will visit the town next month, look at the foundations and write a short report. "
    "Until then the bridge stays open for people on foot, but closed for every kind of lorry. "
    "The mayor thanked everybody who had come, even though it had been a long and rainy day.\n\n"
    "Afterwards the guests walked down to the water to see the damage with their own eyes. "
    "Most of it was hidden below the surface, where nobody had looked for many years."
)
DOCUMENTATION = "# textwrap\n\nText wrapping and filling.\n\n" + "\n\n".join(
    f"## textwrap.{name}(text, width={width})\n\nReturn the {name} of `text` with `width`.\n\n"
    f"```\n>>> {name}('a b')\n{{'a': [1, 2], 'b': None}}\n```\n\n"
    f"Raises ValueError when the {name} is not possible, and otherwise leaves `text` as it was."
    for width, name in enumerate(["wrap", "fill", "shorten", "dedent", "indent", "expand"])
)
CONSTANTS = (
    "# errno\n\nSymbols of the operating system.\n\n"
    + "\n".join(f"- `errno.E{name}`" for name in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    + "\n\n## errno.strerror(code)\n\nTranslate an error code to a message string.\n"
    + "The numbers differ from system to system, and so do the names that are known. " * 2
)

RUBBISH = {
    "words": "Too short.",
    "bullet_lines": "\n".join(f"- [entry {n}] of a menu that goes on and on" for n in range(40)),
    "word_length": "Zusammengesetzteswort" * 3 + (" internationalization" * 60),
    "alphabetic_words": "The figures: " + "12.5 99 | 3.1 " * 60,
    "symbols": "Look here # and there # for more ... of # this # the tags " * 20,
    "ellipsis_lines": "\n".join(
        f"The story number {n} of the day and that is ..." for n in range(30)
    ),
    "stop_words": "keyword cheap buy shoes online store best price " * 30,
    "duplicate_lines": "\n".join(["The same line over and over again."] * 30),
    "lorem_ipsum": PROSE + "\n\nLorem ipsum dolor sit amet.",
    "notice_lines": "\n".join(
        [f"We use cookies, and that is the reason number {n} to have them." for n in range(9)]
        + ["The rest of the page is this line."]
    ),
    "short_lines": "\n".join(f"the entry {n}." for n in range(60)),
    "punctuated_lines": "\n".join(
        f"the {a} and the {b} have to be with each other in the house of {a}"
        for a, b in zip("abcdefghijklmnop", "qrstuvwxyzabcdef", strict=True)
    ),
    "top_grams": " ".join(f"{w} click here" for w in PROSE.split()),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


def test_articles_and_documentation_survive() -> None:
    texts = {"http://h/a": PROSE, "http://h/d": DOCUMENTATION, "http://h/c": CONSTANTS}
    manifest = quality(QualityConfig(), documents=documents(texts))
    assert urls(manifest) == list(texts), rows(manifest, "rejected-")


@pytest.mark.parametrize("rule", RUBBISH)
def test_rubbish_goes_by_its_rule(rule: str) -> None:
    texts = {"http://h/good": PROSE, "http://h/bad": RUBBISH[rule]}
    manifest = quality(QualityConfig(), documents=documents(texts))
    (row,) = rows(manifest, "rejected-")
    measured = {r["url"]: r for r in rows(manifest, "attributes-")}["http://h/bad"]
    config = QualityConfig()
    found = next(r for r in RULES if r.name == rule)
    assert not (
        (getattr(config, found.low) if found.low else measured[rule])
        <= measured[rule]
        <= (getattr(config, found.high) if found.high else measured[rule])
    ), measured
    assert row["text"] == RUBBISH[rule]
    assert row["reason"].startswith(f"{row['rule']} ")
    assert manifest.rules == {row["rule"]: 1}


def test_every_rule_has_bounds_that_exist_and_a_column() -> None:
    fields = QualityConfig.model_fields
    for rule in RULES:
        assert rule.low or rule.high
        assert not rule.low or rule.low in fields
        assert not rule.high or rule.high in fields
    manifest = quality(QualityConfig(), documents=documents({"http://h/a": PROSE}))
    assert set(rows(manifest, "attributes-")[0]) == {"id", "url", *(r.name for r in RULES)}


def test_addresses_are_excluded_by_pattern() -> None:
    texts = {"http://h/source/a": PROSE, "http://h/library/a": PROSE}
    config = QualityConfig(exclude_urls=("/source/",))
    assert urls(quality(config, documents=documents(texts))) == ["http://h/library/a"]
    with pytest.raises(ValidationError, match="no regular expression"):
        QualityConfig(exclude_urls=("(",))
    with pytest.raises(ValidationError, match="min_words 9 > max_words 8"):
        QualityConfig(min_words=9, max_words=8)


def test_nothing_left_names_the_rule_and_the_setting() -> None:
    with pytest.raises(
        UserError, match=r"'words' removed 2 .* lower quality.min_words \(now: 50\)"
    ):
        quality(QualityConfig(), documents=documents({"http://h/a": "a", "http://h/b": "b"}))


GERMAN = "Die Brücke über den Fluss wurde im vergangenen Jahr wegen Bauarbeiten gesperrt. " * 5


def test_languages_are_told_apart_and_code_has_none() -> None:
    assert identify(Reading.of(PROSE))[0] == "en"
    assert identify(Reading.of(GERMAN))[0] == "de"
    assert identify(Reading.of("これは日本語の文章です。" * 10), 10)[0] == "ja"
    assert identify(Reading.of("```\nfor x in y: print(x)\n```\n`a`, `b`, c_d(e)"), 10)[0] == "und"


def test_unwanted_languages_go_and_documentation_stays() -> None:
    texts = {
        "http://h/en": PROSE,
        "http://h/de": GERMAN,
        "http://h/code": "# m\n\n```\n" + "x = [y for y in z]\n" * 20 + "```",
        "http://h/doc": DOCUMENTATION,
    }
    manifest = language(LanguageConfig(), documents=documents(texts))
    kept = {row["url"][9:]: row["language"] for row in rows(manifest)}
    assert kept == {"en": "en", "code": "und", "doc": "en"}
    assert manifest.rules == {"language-other": 1}
    assert rows(manifest, "rejected-")[0]["language"] == "de"
    every = language(LanguageConfig(languages=()), documents=documents(texts))
    assert every.counts["documents"] == 4


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"\['xx'\] are not known; give ISO 639-1"):
        LanguageConfig(languages=("en", "xx"))
    with pytest.raises(UserError, match=r"add it to language\.languages"):
        language(LanguageConfig(languages=("fr",)), documents=documents({"http://h/a": GERMAN}))
