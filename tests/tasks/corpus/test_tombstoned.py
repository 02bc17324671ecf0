"""What a tombstone names: addresses, domains and digests as people write them."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.tombstoned import Forgotten, parse
from tasks.runtime.errors import UserError
from tasks.state.tombstones import Tombstone


@pytest.mark.parametrize(
    ("what", "kind", "value"),
    [
        ("https://Example.org/a/../b?utm_source=x#c", "url", "//example.org/b"),
        ("HTTPS://example.org/b", "url", "//example.org/b"),
        ("embedded://stdlib/library/json.html", "url", "embedded://stdlib/library/json.html"),
        ("Example.ORG", "domain", "example.org"),
        ("example.org/", "domain", "example.org"),
        ("example.org:8080", "domain", "example.org:8080"),
        ("bücher.example", "domain", "xn--bcher-kva.example"),
        ("0123456789abcdef", "digest", "0123456789abcdef"),
        ("0123456789ABCDEF" * 4, "digest", "0123456789abcdef"),
        ("sha256:" + "A" * 52 + "====", "digest", "sha256:" + "A" * 52),
        ("SHA-256:" + "00" * 32, "digest", "sha256:" + "A" * 52),
        ("sha1:" + "2sho" * 8, "digest", "sha1:" + "2SHO" * 8),
        ("sha1:" + "ff" * 20, "digest", "sha1:" + "7" * 32),
    ],
)
def test_what_is_meant_is_seen(what: str, kind: str, value: str) -> None:
    assert parse(what) == (kind, value)


@pytest.mark.parametrize(
    "what",
    ["", "word", "a b.org", "sha256:short", "deadbeef", "sha1:" + "A" * 52, "sha1:" + "1" * 32],
)
def test_what_means_nothing_is_refused(what: str) -> None:
    with pytest.raises(UserError, match="is no address"):
        parse(what)


@pytest.mark.parametrize(
    "what",
    [
        *("example.org/page", "example.org/page/", "example.org/a/../b", "//example.org/x"),
        *("example.org?p=1", "example.org?utm_source=x", "example.org/#part", "example.org\\page"),
        *("example.org/?from=https://e.net/", "8.8.8.8/24", "[::1]/x", "localhost:8000/x"),
        *("example.org:80", "example.org:443"),
    ],
)
def test_more_than_a_domain_buries_no_domain(what: str) -> None:
    with pytest.raises(UserError, match=r"is no address|is more than a domain; write https:"):
        parse(what)


@pytest.mark.parametrize(
    "what",
    [
        *("http://", "https:///x", "https://exa mple.org/x", "https://example.org:99999/x"),
        *("HTTP://a..b/", "https://user:pw@example.org/p"),
    ],
)
def test_an_address_that_no_page_has_is_refused_with_the_reason(what: str) -> None:
    with pytest.raises(UserError, match=r"is no page's address: .+; mend it"):
        parse(what)


def test_a_domain_covers_what_is_below_it_and_nothing_beside() -> None:
    stones = (
        Tombstone(1, "domain", "example.org", "", 0),
        Tombstone(2, "url", "//e.net/p", "", 0),
    )
    forgotten = Forgotten(stones)
    for url in ("http://example.org/", "https://a.b.example.org:8443/x", "http://EXAMPLE.org"):
        assert forgotten.address(url) == stones[0]
    for url in ("http://notexample.org/", "http://example.org.net/", "http://e.net/p/q", ""):
        assert forgotten.address(url) is None
    assert forgotten.address("https://e.net/x/../p#top") == stones[1]
    assert forgotten.digest(None, "") is None


HOSTS = ("a.example", "b.a.example", "bücher.example", "127.0.0.1", "[::1]", "c.example:8080")
SPELT = (*HOSTS, "A.Example", "xn--bcher-kva.example", "0x7f.1", "a.example.", "a%2eexample")
PLACES = st.sampled_from(["", "/", "/x", "/X?q=1#part", "/x y", "/é"])


@given(
    st.lists(st.sampled_from(HOSTS) | st.tuples(st.sampled_from(HOSTS), PLACES), max_size=3),
    st.lists(
        st.tuples(
            st.sampled_from(["http://", "https://", "file://"]), st.sampled_from(SPELT), PLACES
        )
    ),
)
def test_a_look_at_whole_columns_misses_no_address(buried: list[Any], spelt: list[Any]) -> None:
    named = [what if isinstance(what, str) else "http://" + "".join(what) for what in buried]
    stones = tuple(Tombstone(n, *parse(what), "", 0.0) for n, what in enumerate(named))
    forgotten = Forgotten(stones)
    addresses = ["".join(parts) for parts in spelt]
    possible = forgotten.possibly(pa.chunked_array([addresses], pa.string())).to_pylist()
    for address, asked in zip(addresses, possible, strict=True):
        assert asked or forgotten.address(address) is None
