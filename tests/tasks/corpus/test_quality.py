"""Language and quality: documentation with code survives, rubbish goes with the rule's name."""

import pytest
from documents_of import documents, rows, urls
from inline_shards import run_inline
from pydantic import ValidationError
from shared_data import shared

from tasks.corpus.filters.bad_words import words_of
from tasks.corpus.language import LanguageConfig, language
from tasks.corpus.language_id import identify
from tasks.corpus.measure import IDENTIFIED, MeasureConfig, measure
from tasks.corpus.page_text import read_page
from tasks.corpus.quality import RULES, QualityConfig, quality
from tasks.corpus.reading import Reading
from tasks.corpus.records import Place, read_record, scan
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import planning

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


def measured(texts: dict[str, str]) -> Manifest:
    return measure(MeasureConfig(), documents=documents(texts))


def select_quality(config: QualityConfig, texts: dict[str, str]) -> Manifest:
    return quality(config, documents=documents(texts), attributes=measured(texts))


def select_language(config: LanguageConfig, texts: dict[str, str]) -> Manifest:
    return language(config, documents=documents(texts), attributes=measured(texts))


def test_articles_and_documentation_survive() -> None:
    texts = {"http://h/a": PROSE, "http://h/d": DOCUMENTATION, "http://h/c": CONSTANTS}
    manifest = select_quality(QualityConfig(), texts)
    assert urls(manifest) == list(texts), rows(manifest, "rejected-")


GERMAN = """\
Der Haufen ist eine Datenstruktur, in der das kleinste Element immer ganz vorne liegt. Wer etwas
einordnet, vergleicht es mit seinem Vorfahren und tauscht so lange, bis die Ordnung wieder stimmt.
Entnimmt man die Spitze, so tritt das letzte Blatt an ihre Stelle und sinkt danach hinab. Beide
Schritte dauern nur so lange, wie der Baum hoch ist, und das sind wenige Ebenen. Darum eignet sich
diese Anordnung gut, wenn Aufgaben nach ihrer Dringlichkeit abgearbeitet werden sollen. Auch beim
Sortieren hilft sie, denn jede Entnahme liefert den jeweils geringsten Wert. Ein Nachteil bleibt:
Die Suche nach beliebigen Eintragungen muss im schlimmsten Fall alles durchlaufen, weil Geschwister
untereinander keine feste Reihenfolge haben.
"""
CHINESE = """\
堆是一种特殊的树形数据结构，最小的元素总是位于最前面，因此取出它只需要很少的时间。
插入新元素时，先把它放在末尾，然后与父节点比较，如果更小就交换位置，直到顺序恢复正确为止。
取出顶端以后，最后一片叶子会移到空出来的位置，再逐层向下移动，直到两个孩子都不比它小。
这两个步骤所需的时间都取决于树的高度，而树的高度随着元素数量的增加只会缓慢增长。
因此，当任务必须按照紧急程度依次处理时，这种结构非常合适，许多操作系统都在使用它。
排序的时候也可以利用它，因为每次取出的都是剩下元素里面最小的那一个，全部取完便得到了顺序。
不过它也有缺点：要寻找任意一个元素，最坏的情况下必须检查所有的节点，因为兄弟之间没有固定的先后。
如果需要经常查找，就应该选择平衡的搜索树或者散列表，它们能够更快地找到指定的内容。
现代的程序语言大多在标准库中提供了现成的实现，使用者不必自己动手编写这些细节。
学习它的原理仍然很有意义，因为许多更复杂的算法，例如最短路径，都建立在这个基础之上。
"""


@pytest.mark.parametrize(("text", "code"), [(GERMAN, "de"), (CHINESE, "zh")])
def test_prose_in_other_languages_is_not_judged_by_english_or_by_blanks(
    text: str, code: str
) -> None:
    texts = {"http://h/a": text}
    (row,) = rows(measured(texts), "attributes-")
    assert (row["language"], row["stop_words"]) == (code, None)
    assert (row["word_length"] is None) == (code == "zh")
    manifest = select_quality(QualityConfig(), texts)
    assert urls(manifest) == list(texts), rows(manifest, "rejected-")
    assert urls(select_language(LanguageConfig(languages=(code,)), texts)) == list(texts)


@pytest.mark.parametrize("rule", RUBBISH)
def test_rubbish_goes_by_its_rule(rule: str) -> None:
    texts = {"http://h/good": PROSE, "http://h/bad": RUBBISH[rule]}
    manifest = select_quality(QualityConfig(), texts)
    (row,) = rows(manifest, "rejected-")
    value = {r["url"]: r for r in rows(measured(texts), "attributes-")}["http://h/bad"][rule]
    config = QualityConfig()
    found = next(r for r in RULES if r.name == rule)
    assert not (
        (getattr(config, found.low) if found.low else value)
        <= value
        <= (getattr(config, found.high) if found.high else value)
    ), value
    assert row["text"] == RUBBISH[rule]
    assert row["reason"].startswith(f"{row['rule']} ")
    assert manifest.rules == {row["rule"]: 1}


def test_every_rule_has_bounds_that_exist_and_a_column() -> None:
    fields = QualityConfig.model_fields
    for rule in RULES:
        assert rule.low or rule.high
        assert not rule.low or rule.low in fields
        assert not rule.high or rule.high in fields
    columns = set(rows(measured({"http://h/a": PROSE}), "attributes-")[0])
    assert columns == {"id", "url", *IDENTIFIED.names, *(rule.name for rule in RULES)}


# Off by default: bounds as their papers have them, and a page that each is made for.
STRICT = {
    "sentences": ({"min_sentences": 3}, PROSE.split(". ")[0] * 3 + "."),
    "terminal_lines": ({"min_terminal_lines": 0.9}, PROSE + "\n\nSee also the following:"),
    "few_word_lines": ({"max_few_word_lines": 0.5}, PROSE + "\n\nTwo words.\nOne.\nMore words."),
    "script_lines": ({"max_script_lines": 0.1}, PROSE + "\n\nThis needs JavaScript."),
    "curly_lines": ({"max_curly_lines": 0.0}, PROSE + "\n\nfunction f() { return 1; } by itself."),
    "lines_per_word": ({"max_lines_per_word": 0.3}, "\n".join(f"Here is{n}." for n in range(60))),
    "toxic_words": ({"max_toxic_words": 5}, PROSE + " What a dumbass!"),
    "adult_words": ({"max_adult_words": 5}, PROSE + " Free PORN, here."),
}


@pytest.mark.parametrize("rule", STRICT)
def test_rules_that_are_off_by_default_can_be_turned_on(rule: str) -> None:
    bounds, text = STRICT[rule]
    texts = {"http://h/good": PROSE, "http://h/doc": DOCUMENTATION, "http://h/bad": text}
    lax = {name: getattr(QualityConfig(), name) for name in QualityConfig.model_fields}
    lax |= {"max_duplicate_lines": 1, "max_duplicate_line_characters": 1, "max_short_lines": 1}
    lax |= {"max_top_grams": 99, "max_duplicate_grams": 99, "max_duplicate_paragraphs": 1}
    lax |= {"min_words": 5, "min_stop_words": 0}
    assert len(urls(select_quality(QualityConfig(**lax), texts))) == 3
    manifest = select_quality(QualityConfig(**lax | bounds), texts)
    assert manifest.rules == {rule: 1}
    assert urls(manifest) == ["http://h/good", "http://h/doc"]


def test_word_lists_are_in_lower_case_and_apart() -> None:
    toxic, adult = words_of("toxic"), words_of("adult")
    assert toxic and adult and not toxic & adult
    assert all(word == word.lower() and word.isalpha() for word in toxic | adult)


def test_pages_with_code_survive_every_published_bound() -> None:
    """Documentation as above and the real WARC samples, with C4's and FineWeb's bounds on."""
    strict = QualityConfig(
        min_sentences=3,
        min_terminal_lines=0.5,
        max_few_word_lines=0.3,
        max_script_lines=0.0,
        max_curly_lines=0.0,
        max_lines_per_word=0.3,
    )
    real = pages_with_code()
    assert len(real) >= 3
    assert urls(select_quality(QualityConfig(), real)) == list(real)
    technical = {url: text for url, text in real.items() if Reading.of(text).is_technical}
    texts = {"http://h/d": DOCUMENTATION, "http://h/c": CONSTANTS} | technical
    assert len(texts) >= 3
    manifest = select_quality(strict, texts)
    assert urls(manifest) == list(texts), rows(manifest, "rejected-")


def pages_with_code() -> dict[str, str]:
    """Real pages beside the checkout with code in their text."""
    found = {}
    for name in ("warc/sample-0000.warc.gz", "warc/sample-0001.warc.gz"):
        data = shared(name).read_bytes()
        for place in scan(shared(name)):
            assert isinstance(place, Place)
            page = read_record(data[place.offset : place.offset + place.length], 10**8)
            text = ""
            if b"<pre" in page.body or b"<code" in page.body:
                text = read_page(page.body, page.headers.get("content-type", "")).text
            if Reading.of(text).code_share > 0.01:
                found[place.url] = text
    return found


def test_another_threshold_runs_nothing_but_the_selection() -> None:
    texts = {"http://h/a": PROSE, "http://h/d": DOCUMENTATION, "http://h/de": GERMAN}

    def walk(least: int, threshold: float) -> None:
        found = documents(texts)
        columns = measure(MeasureConfig(), documents=found)
        known = language(LanguageConfig(threshold=threshold), documents=found, attributes=columns)
        quality(QualityConfig(min_words=least), documents=known, attributes=columns)

    walk(50, 0.5)
    for (least, threshold), again in (
        ((60, 0.5), {"quality": "quality.min_words 50 → 60"}),
        (
            (50, 0.6),
            {"language": "language.threshold 0.5 → 0.6", "quality": "documents changed"},
        ),
    ):
        with planning() as planned:
            walk(least, threshold)
        assert {step.stage: step.why for step in planned if step.status == "run"} == again


def test_addresses_are_excluded_by_domain_and_word() -> None:
    hosts = ("http://bad.example/a", "http://www.bad.example:8080/", "http://notbad.example/")
    words = ("http://h/free-casino/1", "http://h/Casino.html", "http://h/casinos/")
    config = QualityConfig(exclude_hosts=("Bad.example",), exclude_url_words=("casino",))
    manifest = select_quality(config, dict.fromkeys((*hosts, *words, "http://[bad/"), PROSE))
    assert urls(manifest) == ["http://notbad.example/", "http://h/casinos/", "http://[bad/"]
    assert manifest.rules == {"host": 2, "url-words": 2}


def test_excluded_domains_and_words_may_be_spelt_beyond_ascii() -> None:
    hosts = ("http://xn--mnchen-3ya.de/", "http://www.München.de/a", "http://h/M%C3%BCnchen/")
    config = QualityConfig(exclude_hosts=("*.München.de",), exclude_url_words=("MÜNCHEN",))
    manifest = select_quality(config, dict.fromkeys((*hosts, "http://h/m/"), PROSE))
    assert urls(manifest) == ["http://h/m/"]
    assert manifest.rules == {"host": 2, "url-words": 1}
    for word in ("a-b", ""):
        with pytest.raises(ValidationError, match=f"'{word}' is not one word; write a pattern"):
            QualityConfig(exclude_url_words=(word,))
    with pytest.raises(ValidationError, match="is more than a name"):
        QualityConfig(exclude_hosts=("e.org/x",))


def test_addresses_are_excluded_by_pattern() -> None:
    texts = {"http://h/source/a": PROSE, "http://h/library/a": PROSE}
    config = QualityConfig(exclude_urls=("/source/",))
    assert urls(select_quality(config, texts)) == ["http://h/library/a"]
    with pytest.raises(ValidationError, match="no regular expression"):
        QualityConfig(exclude_urls=("(",))
    with pytest.raises(ValidationError, match="min_words 9 > max_words 8"):
        QualityConfig(min_words=9, max_words=8)


def test_nothing_left_names_the_rule_and_the_setting() -> None:
    with pytest.raises(
        UserError, match=r"'words' removed 2 .* lower quality.min_words \(now: 50\)"
    ):
        select_quality(QualityConfig(), {"http://h/a": "a", "http://h/b": "b"})


GERMAN = "Die Brücke über den Fluss wurde im vergangenen Jahr wegen Bauarbeiten gesperrt. " * 5


def test_languages_are_told_apart_and_code_has_none() -> None:
    assert identify(Reading.of(PROSE))[0] == "en"
    assert identify(Reading.of(GERMAN))[0] == "de"
    assert identify(Reading.of("これは日本語の文章です。" * 10))[0] == "ja"
    assert identify(Reading.of("```\nfor x in y: print(x)\n```\n`a`, `b`, c_d(e)"))[0] == "und"


def test_unwanted_languages_go_and_documentation_stays() -> None:
    texts = {
        "http://h/en": PROSE,
        "http://h/de": GERMAN,
        "http://h/code": "# m\n\n```\n" + "x = [y for y in z]\n" * 20 + "```",
        "http://h/doc": DOCUMENTATION,
    }
    manifest = select_language(LanguageConfig(), texts)
    kept = {row["url"][9:]: row["language"] for row in rows(manifest)}
    assert kept == {"en": "en", "code": "und", "doc": "en"}
    assert manifest.rules == {"language-other": 1}
    assert rows(manifest, "rejected-")[0]["language"] == "de"
    every = select_language(LanguageConfig(languages=()), texts)
    assert every.counts["documents"] == 4


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"\['xx'\] are not known; give ISO 639-1"):
        LanguageConfig(languages=("en", "xx"))
    with pytest.raises(UserError, match=r"add it to language\.languages"):
        select_language(LanguageConfig(languages=("fr",)), {"http://h/a": GERMAN})


def test_a_shard_that_lost_all_its_documents_and_copies_of_a_text_find_their_measures() -> None:
    german = {f"http://h/de/{n}": f"{GERMAN} Nummer {n}." for n in range(4)}  # a shard of their own
    found = documents(
        german | {"http://h/a": PROSE, "http://h/b": DOCUMENTATION, "http://h/c": PROSE}
    )
    columns = measure(MeasureConfig(), documents=found)
    known = language(LanguageConfig(), documents=found, attributes=columns)
    kept = quality(QualityConfig(), documents=known, attributes=columns)
    assert urls(kept) == ["http://h/a", "http://h/b", "http://h/c"]
    other = measure(MeasureConfig(), documents=documents({"http://h/a": PROSE}))
    with pytest.raises(ValueError, match="is none of the documents that were measured"):
        language(LanguageConfig(), documents=found, attributes=other)
