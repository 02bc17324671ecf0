"""URL canonicalisation, scope, traps and aliases."""

from urllib.parse import urlsplit

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tasks.corpus.crawl_config import CrawlConfig
from tasks.corpus.urls import (
    Aliases,
    Scope,
    canonical_url,
    domain_name,
    link_target,
    numbered_shape,
    trap_reason,
)

EQUIVALENT = [
    ("HTTP://Example.ORG", "http://example.org/"),
    ("http://example.org:80/a", "http://example.org/a"),
    ("https://example.org:443/a", "https://example.org/a"),
    ("https://example.org:80/a", "https://example.org:80/a"),
    ("http://example.org/a#part", "http://example.org/a"),
    ("http://example.org/%7euser/%e4", "http://example.org/~user/%E4"),
    ("http://example.org/a/./b/../c", "http://example.org/a/c"),
    ("http://example.org/%2e%2e/secret", "http://example.org/secret"),
    ("http://example.org/../../a", "http://example.org/a"),
    ("http://example.org/a b?q=ü", "http://example.org/a%20b?q=%C3%BC"),
    ("http://example.org/100%", "http://example.org/100%25"),
    ("http://example.org/?", "http://example.org/"),
    ("http://example.org/?b=2&a=1", "http://example.org/?b=2&a=1"),
    ("http://example.org/?utm_source=x&id=3&gclid=9", "http://example.org/?id=3"),
    ("http://example.org/p;jsessionid=AF3?x=1", "http://example.org/p?x=1"),
    ("http://example.org/p?PHPSESSID=3a", "http://example.org/p"),
    ("http://bücher.example/", "http://xn--bcher-kva.example/"),
    ("http://example.org./", "http://example.org/"),
    ("http://[2001:DB8:0:0::1]:80/", "http://[2001:db8::1]/"),
    (" http://example.org/a\n", "http://example.org/a"),
]


@pytest.mark.parametrize(("written", "canonical"), EQUIVALENT)
def test_equivalent_spellings_have_one_canonical_form(written: str, canonical: str) -> None:
    assert canonical_url(written) == canonical


@pytest.mark.parametrize(
    "url",
    [
        "mailto:a@example.org",
        "javascript:void(0)",
        "ftp://example.org/",
        "http:///path",
        "http://user:secret@example.org/",
        "http://exa mple.org/",
        "http://example.org:99999/",
        "http://[::1/",
        "http://a..b/",
        "http://example.org/" + "x" * 3000,
        "",
    ],
)
def test_what_cannot_be_asked_for_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        canonical_url(url)


def test_links_are_resolved_against_their_page() -> None:
    base = "http://example.org/library/json.html"
    assert canonical_url("re.html#findall", base) == "http://example.org/library/re.html"
    assert canonical_url("//other.org/x", base) == "http://other.org/x"
    assert canonical_url("?page=2", base) == "http://example.org/library/json.html?page=2"


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=30))
def test_canonical_form_is_a_fixed_point(path: str, query: str) -> None:
    try:
        once = canonical_url(f"http://example.org/{path}?{query}")
    except ValueError:
        return
    assert canonical_url(once) == once
    assert once.isascii()


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_canonical_or_refused(text: str) -> None:
    try:
        once = canonical_url(text)
    except ValueError:
        return
    assert canonical_url(once) == once


@settings(deadline=None)
@given(st.text(alphabet="ab./%2eE;=jsiond", max_size=40))
def test_no_dot_segment_survives(path: str) -> None:
    once = canonical_url("http://example.org/" + path)
    assert not {".", ".."} & set(once.split("?")[0].split("/")[3:])


def test_scope_by_host_prefix_and_glob() -> None:
    scope = Scope(
        frozenset({"example.org"}),
        domains=("docs.net",),
        include=("/library/", "https://*.docs.net/*"),
        exclude=("/library/private/", "*[?]print=1*"),
        max_depth=3,
    )
    assert scope.reason("http://example.org/library/a", 1) == ""
    assert scope.reason("https://x.docs.net/a", 1) == ""
    assert scope.reason("http://example.org/other", 1) == "not included"
    assert scope.reason("http://example.org/library/private/a", 1) == "excluded"
    assert scope.reason("http://example.org/library/a?print=1", 1) == "excluded"
    assert scope.reason("http://example.org:8080/library/a", 1) == "other host"
    assert scope.reason("http://notdocs.net/library/a", 1) == "other host"
    assert scope.reason("http://example.org/library/a", 4) == "too deep"
    assert scope.reason("http://example.org/library/a.PNG", 1) == "file type"


def test_a_pattern_of_a_path_with_a_star_is_a_glob_over_the_path() -> None:
    scope = Scope(frozenset({"e.org"}), include=("/docs/*.html",), exclude=("/docs/*?print=1",))
    assert scope.reason("http://e.org/docs/a/b.html", 1) == ""
    assert scope.reason("http://e.org/docs/a.html?x=1", 1) == ""
    assert scope.reason("http://e.org/docs/a.txt", 1) == "not included"
    assert scope.reason("http://e.org/other/docs/a.html", 1) == "not included"
    assert scope.reason("http://e.org/docs/a.html?print=1", 1) == "excluded"


PATTERNS = [
    ("/größe/", "http://a.org/größe/x"),
    ("/a b", "http://a.org/a b/c"),
    ("/a[1]/", "http://a.org/a[1]/"),
    ("/x?print=", "http://a.org/x?print=1"),
    ("/%7Euser/", "http://a.org/~user/"),
    ("*/gr%c3%b6*", "http://a.org/größe"),
    ("/größe/*.html", "http://a.org/größe/x.html"),
    ("*[?]q=ü*", "http://a.org/x?q=ü"),
    ("HTTP://A.org/*", "http://a.org/x"),
    ("https://*.Münchner-Bücher.de/*", "https://www.münchner-bücher.de/x"),
    ("https://a.org:443/[a-c]*", "https://a.org/b"),
    ("http*://a.org:8080/x?", "http://a.org:8080/xy"),
    ("https://a.*", "https://a.org/"),
    ("https://*Special:*", "https://a.org/wiki/Special:Random"),
    ("HTTPS://A.org*Special:*/x", "https://a.org/wiki/Special:Random/x"),
    ("https://*.html", "https://a.org/x.html"),
    ("*://*/B?.Html", "https://a.org/B1.Html"),
    ("https://*?lang=en", "https://a.org/x?lang=en"),
    ("https://*ü*", "https://a.org/größe/ü"),
    ("https://Www*.*.A.org/*", "https://www2.b.a.org/x"),
    ("https://*:443/X*", "https://a.org/Xy"),
    ("embedded://stdlib/library/*", "embedded://stdlib/library/json.html"),
]


@pytest.mark.parametrize(("written", "url"), PATTERNS)
def test_a_pattern_matches_however_it_is_spelt(written: str, url: str) -> None:
    (pattern,) = CrawlConfig(exclude=(written,)).exclude
    address = url if url.startswith("embedded:") else canonical_url(url)
    hosts = frozenset({urlsplit(address).netloc})
    assert Scope(hosts, exclude=(pattern,)).reason(address, 0) == "excluded"
    assert CrawlConfig(exclude=(pattern,)).exclude == (pattern,)


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "private", "example.org/x", "https://a.org", "https://*.a.org", "https://"),
        *("/[äö]*", "https://*ü*.de/*", "https://bü*"),
    ],
)
def test_a_pattern_that_matches_no_address_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern .* matches no address.*; write "):
        CrawlConfig(include=(pattern,))


def test_files_of_a_wanted_type_are_in_scope() -> None:
    scope = Scope(frozenset({"e.org"}), content_types=("text/html", "application/pdf"))
    assert scope.reason("http://e.org/a.PDF", 1) == ""
    assert scope.reason("http://e.org/a.pdf.gz", 1) == "file type"
    assert scope.reason("http://e.org/a.zip", 1) == "file type"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Example.ORG", "example.org"),
        ("https://Example.org/", "example.org"),
        ("*.example.org", "example.org"),
        (".example.org.", "example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::FFFF:7f00:1]", "::ffff:7f00:1"),
        ("localhost", "localhost"),
    ],
)
def test_a_domain_has_one_spelling(text: str, name: str) -> None:
    assert domain_name(text) == name
    assert CrawlConfig(domains=(text,)).domains == (name,)


@pytest.mark.parametrize("text", ["", "a b", "https://e.org/docs", "e.org:8080", "e.org/x"])
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="domain"):
        CrawlConfig(domains=(text,))


def test_repeating_paths_are_traps() -> None:
    assert trap_reason("http://e.org/a/b/a/b/a/b/a/b/") == "trap: repeating path"
    assert trap_reason("http://e.org/a/a/a/a") == "trap: repeating path"
    assert trap_reason("http://e.org/" + "/".join(map(str, range(30)))) == "trap: path too deep"
    assert trap_reason("http://e.org/2024/01/01/a") == ""


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/cal/2024/5/17", "/cal/#/#/#"),
        ("/cal/2024/5/", "/cal/#/#/"),
        ("/2024-05-17?x=1", "/#-#-#"),
        ("/2024.12.31/", "/#.#.#/"),
        ("/events/17/5/2024", "/events/#/#/#"),
        ("/events/17.05.2024", "/events/#.#.#"),
        ("/events/5/17/2024/", "/events/#/#/#/"),
        ("/month/05-2024", "/month/#-#"),
        ("/day/20240517", "/day/#"),
        ("/day/20241317", ""),
        ("/gallery/12/3456", ""),
        ("/gallery/31/31/2024", ""),
        ("/3.12/", ""),
        ("/abs/1409.1556", ""),
        ("/abs/1409.0112", ""),
        ("/bible/1/2/3", ""),
        ("/gallery/123/4567", ""),
        ("/2024/13/1", ""),
        ("/2024/12/32", ""),
        ("/x2024/5", ""),
        ("/3.12/library/os.html", ""),
        ("/2024/05/17/a-name", ""),
        ("/2024/05/17/12345", ""),
        ("/questions/12/34567/", ""),
        ("/page/2", ""),
        ("/", ""),
    ],
)
def test_only_what_ends_in_a_date_looks_like_a_calendar(path: str, shape: str) -> None:
    assert numbered_shape(f"http://e.org{path}") == shape


@settings(deadline=None)
@given(st.sampled_from(["/", "/library/json.html", "/a?b=c"]))
def test_aliases_are_inverse(path: str) -> None:
    aliases = Aliases((("embedded://stdlib", "http://127.0.0.1:4202"),))
    assert aliases.place(f"embedded://stdlib{path}") == f"http://127.0.0.1:4202{path}"
    assert aliases.name(aliases.place(f"embedded://stdlib{path}")) == f"embedded://stdlib{path}"
    assert aliases.name(f"http://127.0.0.1:42021{path}") == f"http://127.0.0.1:42021{path}"


HREF = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="/.~?#;:%@ab0-_=&", max_size=20),
    st.sampled_from([written for written, _ in EQUIVALENT]),
)
BLANKS = "".join(map(chr, range(33)))
BASE = st.sampled_from(
    [
        *("http://example.org/", "http://example.org/a/b.html", "https://e.org:8443/x/?q=/y#z"),
        *("http://EXAMPLE.org", "http://e.org/a//b/c", "http://[::1]:80/p", "http://a..b/x"),
    ]
)


@settings(deadline=None, max_examples=400)
@given(HREF, BASE)
@example("//", "http://example.org/a/b.html")
def test_the_quick_way_to_a_link_leads_where_the_long_one_does(href: str, base: str) -> None:
    text = href.strip(BLANKS).partition("#")[0].strip(BLANKS)
    assume(text == text.strip() and href.strip() == href.strip(BLANKS))  # links lose those as well
    found = link_target(href, base)
    try:
        expected = canonical_url(text, base)
    except ValueError:
        assert not found
        return
    assert found == (expected if text else "")
    assert link_target("mailto:a@b.org", base) == link_target("#part", base) == ""
