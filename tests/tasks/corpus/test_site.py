"""The embedded site: what its pages say, what they must not say, and that they never vary."""

import hashlib
import inspect
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trafilatura

from tasks.corpus.docstring_html import block_html, inline_html
from tasks.corpus.language_docs import topic_html
from tasks.corpus.site import is_current, render_site
from tasks.corpus.stdlib_docs import first_sentence

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site") / "stdlib"
    assert render_site(root) > 1000
    return root


def tree(root: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            int(path.stat().st_mtime),
        )
        for path in sorted((root / "pages").rglob("*"))
        if path.is_file()
    }


def text_of(site: Path, module: str) -> str:
    html = (site / "pages" / "library" / f"{module}.html").read_text()
    text = trafilatura.extract(html, fast=True, output_format="markdown", include_comments=False)
    assert text is not None
    return str(text)


@pytest.mark.slow
def test_rendering_again_elsewhere_gives_the_same_bytes(site: Path, tmp_path: Path) -> None:
    secret = "correct-horse-battery-staple"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "4242",
        "SECRET": secret,
        "LC_ALL": "C",
    }
    again = tmp_path / "again"
    code = "import pathlib, sys, tasks.corpus.site as s; s.render_site(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(again)],
        env=environment,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    assert tree(again) == tree(site)
    assert is_current(site)
    assert is_current(again)
    for path in again.rglob("*.html"):
        assert secret not in path.read_text()


def test_pages_name_no_host_path_address_or_person(site: Path) -> None:
    places = {sys.prefix, sys.base_prefix, str(Path.home()), str(ROOT), str(Path.cwd())}
    places -= {"/", "/usr", "/usr/local", "/home", "/root"}  # named by the documentation itself
    host = platform.node()
    pages = site / "pages"
    for path in pages.rglob("*"):
        if not path.is_file():
            continue
        text = path.read_text()
        for place in places:
            assert place not in text, f"{path.name} names {place}"
        assert len(host) < 8 or host not in text, f"{path.name} names the host"
        source = pages / "source" / path.name
        if "library" in path.parts and re.search(r" at 0x[0-9a-f]{8,}", text):
            # An address that an author wrote into a docstring is text like any other.
            assert source.exists(), f"{path.name} shows an object address"
            assert " at 0x" in source.read_text(), f"{path.name} shows an object address"


def test_extracted_text_keeps_every_signature_and_sentence_in_order(site: Path) -> None:
    import json
    import shlex
    import textwrap

    for module in (textwrap, json, shlex):
        text = text_of(site, module.__name__)
        position = 0
        for name in sorted(n for n in module.__all__ if inspect.isfunction(getattr(module, n))):
            heading = text.find(f"## `{module.__name__}.{name}(", position)
            assert heading >= 0, f"{module.__name__}.{name} has no heading"
            position = heading
            sentence = first_sentence(inspect.getdoc(getattr(module, name)) or "")
            words = re.findall(r"[A-Za-z]{3,}", sentence)
            following = re.findall(r"[A-Za-z]{3,}", text[heading : heading + 2000])
            where = following.index(words[0]) if words else 0
            assert following[where : where + len(words)] == words


@pytest.mark.parametrize(
    ("module", "heading"),
    [
        ("math", "## `math.gcd(*integers)`"),
        ("struct", "## `struct.calcsize(format, /)`"),
        ("os", "## `os.listdir(path=None)`"),
        ("itertools", "## `class itertools.chain(*iterables)`"),
        ("builtins", "## `builtins.abs(x, /)`"),
        ("collections", "## `class collections.OrderedDict"),
        ("collections.abc", "## `class collections.abc.Mapping"),
        ("time", "## `time.sleep(seconds)`"),
        ("pathlib", "### `Path.read_text(encoding=None"),
        ("subprocess", "## `subprocess.run("),
    ],
)
def test_modules_written_in_c_or_elsewhere_are_documented(
    site: Path, module: str, heading: str
) -> None:
    assert heading in text_of(site, module)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("asyncio.runners", "Also available as `asyncio.run`."),
        ("posixpath", "Also available as `os.path.join`."),
        ("unittest.case", "Also available as `unittest.TestCase`."),
        ("concurrent.futures.thread", "`concurrent.futures.ThreadPoolExecutor`."),
    ],
)
def test_pages_say_the_name_people_use(site: Path, module: str, line: str) -> None:
    assert line in text_of(site, module)


def test_a_class_shows_what_it_inherits_from_documented_classes(site: Path) -> None:
    timer = text_of(site, "threading").split("## `class threading.Timer(", 1)[1]
    inherited = timer.split("### Inherited from `threading.Thread`", 1)[1]
    assert "`Thread.is_alive()`: Return whether the thread is alive." in inherited
    assert "Thread.run" not in inherited  # Timer has its own
    errors = text_of(site, "json.decoder")
    assert "### Inherited from `BaseException`" in errors  # through ValueError and Exception
    path = text_of(site, "pathlib")
    posix = path.split("## `class pathlib.PosixPath", 1)[1].split("\n## ", 1)[0]
    bases = re.findall(r"### Inherited from `([\w.]+)`", posix)
    assert bases == ["pathlib.Path", "pathlib.PurePath"]  # nearest first, each once


def test_the_language_reference_is_prose_code_and_headings(site: Path) -> None:
    html = (site / "pages" / "reference" / "with.html").read_text()
    text = str(trafilatura.extract(html, fast=True, output_format="markdown"))
    assert text.startswith("# The `with` statement")
    assert "wrap the execution of a block with methods defined by a context manager" in text
    assert "```\nwith A() as a:\n    with B() as b:\n        SUITE\n```" in text
    assert "- The context manager’s `__enter__()` method is invoked." in text
    assert "with_item          ::= expression" in html
    assert '<a href="/reference/with.html">' in (site / "pages" / "index.html").read_text()


def test_topics_become_blocks() -> None:
    text = (
        'The "x" thing\n=============\n\nSay **this**:\n\n   code(x)\n\nobject.f(self)\n\n'
        "   Does  it\n   well.\n\n   Note:\n\n     No code.\n\n"
        "* one\n  more\n\n* two\n\n  deep\n\nEnd."
    )
    assert topic_html(text) == (
        "<h2>The <code>x</code> thing</h2>\n"
        "<p>Say <strong>this</strong>:</p>\n<pre><code>code(x)</code></pre>\n"
        "<p><code>object.f(self)</code></p>\n<p>Does it well.</p>\n<p>Note:</p>\n<p>No code.</p>\n"
        "<ul>\n<li>one more</li>\n<li>two\n<p>deep</p></li>\n</ul>\n<p>End.</p>"
    )
    assert topic_html("") == ""


def test_examples_keep_their_lines(site: Path) -> None:
    assert ">>> json.dumps(['foo', {'bar': ('baz', None, 1.0, 2)}])\n'[\"foo\"" in text_of(
        site, "json"
    )


def test_every_link_leads_somewhere(site: Path) -> None:
    pages = site / "pages"
    redirects = {"/docs/json", "/docs/pathlib", "/docs/textwrap"}
    targets = set()
    for path in pages.rglob("*.html"):
        if "source" not in path.parts:
            targets |= set(re.findall(r'href="(/[^"#]*)', path.read_text()))
    assert len(targets) > 1000
    missing = {t for t in targets if not (pages / t.lstrip("/")).is_file()}
    assert missing <= redirects | {"/private/calendar/2024-01-01"}


def test_the_site_has_what_real_sites_have(site: Path) -> None:
    pages = site / "pages"
    assert (pages / "latest/json.html").read_bytes() == (pages / "library/json.html").read_bytes()
    assert 'content="noindex, follow"' in (pages / "search.html").read_text()
    assert "Disallow: /private/" in (pages / "robots.txt").read_text()
    sitemap = (pages / "sitemap.xml").read_text()
    assert sitemap.count("<loc>{base}/library/") > 500
    assert "/private/" not in sitemap
    names = {path.stem for path in (pages / "library").iterdir()}
    assert not {n for n in names if n.startswith("_") or ".test" in n or n.startswith("test")}


def test_a_site_of_another_renderer_is_not_current(site: Path, tmp_path: Path) -> None:
    assert not is_current(tmp_path / "nothing")
    (tmp_path / "site.json").write_text('{"renderer": 0}')
    assert not is_current(tmp_path)
    (tmp_path / "site.json").write_text('{"rend')
    assert not is_current(tmp_path)


def test_first_sentences() -> None:
    assert first_sentence("Return x, e.g. 3. And more.") == "Return x, e.g. 3."
    assert first_sentence("Wrap\ntext.\n\nMore.") == "Wrap text."
    assert first_sentence("No full stop\n\nMore.") == "No full stop"
    assert first_sentence("max(a, b) -> value\n\nReturn the largest.") == "Return the largest."
    assert first_sentence("") == ""


def test_docstrings_become_blocks() -> None:
    doc = (
        "Join\nlines of ``x < y``::\n\n    a <b>\n      c\n\n"
        "- one\n  more\n- two\n\n>>> f(1)\n2\n\nEnd."
    )
    assert block_html(doc) == (
        "<p>Join lines of <code>x &lt; y</code>:</p>\n"
        "<pre><code>a &lt;b&gt;\n  c</code></pre>\n"
        "<ul>\n<li>one more</li>\n<li>two</li>\n</ul>\n"
        "<pre><code>&gt;&gt;&gt; f(1)\n2</code></pre>\n"
        "<p>End.</p>"
    )
    assert inline_html("Use `max_len` and *this* with **kwargs & <tag>") == (
        "Use <code>max_len</code> and <em>this</em> with **kwargs &amp; &lt;tag&gt;"
    )
    assert block_html("") == ""
