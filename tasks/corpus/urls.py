"""URLs: one canonical spelling per page, what is in scope, what is a trap, what is aliased."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from mimetypes import MimeTypes
from urllib.parse import urljoin, urlsplit, urlunsplit

import idna

MAX_LENGTH = 2048  # characters; longer addresses are session state or attacks
DEFAULT_PORTS = {"http": 80, "https": 443}

_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PATH = _UNRESERVED | frozenset("!$&'()*+,;=:@/")
_QUERY = _PATH | frozenset("?")
_GLOB = _QUERY | frozenset("[]")
_TRACKING = re.compile(
    r"(?:utm_\w+|gclid|dclid|fbclid|msclkid|yclid|mc_[ce]id|igshid|_ga|_gl"
    r"|phpsessid|jsessionid|aspsessionid\w*|sessionid|session_id|sid)$",
    re.IGNORECASE,
)
_PATH_SESSION = re.compile(r";(?:jsessionid|phpsessid|sid)=[^/;]*", re.IGNORECASE)
_BINARY = re.compile(
    r"\.(?:7z|aac|apk|avi|bin|bmp|bz2|css|deb|dmg|docx?|eot|epub|exe|flac|gif|gz|ico|iso|jar|jpe?g"
    r"|js|m4[av]|mkv|mov|mp[34]|mpe?g|msi|odt|og[agv]|otf|pdf|png|pptx?|ps|rar|rpm|rss|svg|tar|tgz"
    r"|tiff?|ttf|wasm|wav|web[mp]|whl|wmv|woff2?|xlsx?|xz|zip|zst)$",
    re.IGNORECASE,
)
# A path that is its own canonical spelling: no dot segments, nothing encoded, no parameters.
_PLAIN_PATH = re.compile(r"/(?:[A-Za-z0-9_~-][A-Za-z0-9_.~-]*(?:/|\Z))*\Z")
_DAY, _MONTH = "(?:0?[1-9]|[12][0-9]|3[01])", "(?:0?[1-9]|1[0-2])"
_CALENDAR = re.compile(
    "/(?:"
    f"[12][0-9]{{3}}[/._-]{_MONTH}(?:[/._-]{_DAY})?"  # 2024/5, 2024-05-17
    f"|(?:{_DAY}[/._-])?{_MONTH}[/._-](?:1[89]|2[01])[0-9]{{2}}"  # 5/2024, 17.05.2024
    f"|{_MONTH}[/._-]{_DAY}[/._-](?:1[89]|2[01])[0-9]{{2}}"  # 5/17/2024
    "|(?:1[89]|2[01])[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"  # 20240517
    r")/?\Z"
)
_PLACE = re.compile(r"([A-Za-z*]+)://([^/]*)(/.*)?")  # scheme, host and path of a pattern
_NAMES = re.compile(r"[^*]+|\*(?:\.[A-Za-z0-9-]+){2,}")  # a host, `*.example.org`; not `*.html`
_BLANKS = "".join(map(chr, range(33)))  # stripped as browsers do (WHATWG URL, section 4.1)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_REMEMBERED = 50_000  # links of late; the menu of a site stands on each of its pages


def canonical_url(url: str, base: str | None = None) -> str:
    """The one spelling of a page's address (RFC 3986, section 6; IDNA 2008).

    Lower-case scheme and host, no default port, no fragment, no dot segments, percent-encoding only
    where needed and in capitals, no tracking or session parameters. The order of parameters stays:
    it can matter. Canonical addresses are fixed points. Raises ValueError with a reason for
    everything a crawler cannot ask for.
    """
    text = re.sub(r"[\t\r\n]", "", url.strip(_BLANKS))
    parts = urlsplit(urljoin(base, text) if base else text)
    scheme = parts.scheme.lower()
    if scheme not in DEFAULT_PORTS:
        raise ValueError(f"scheme {scheme!r} is not http or https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the address carries credentials")
    host, port = _host(parts.hostname), parts.port
    netloc = host if port in (None, DEFAULT_PORTS[scheme]) else f"{host}:{port}"
    path = _percent(parts.path, _PATH)
    while (stripped := _PATH_SESSION.sub("", path)) != path:
        path = stripped
    path = _without_dot_segments(path)
    pairs = [pair for pair in _percent(parts.query, _QUERY).split("&") if pair]
    query = "&".join(pair for pair in pairs if not _TRACKING.match(pair.partition("=")[0]))
    result = urlunsplit((scheme, netloc, path, query, ""))
    if len(result) > MAX_LENGTH:
        raise ValueError(f"the address has {len(result)} characters, more than {MAX_LENGTH}")
    return result


def canonical_or_empty(href: str, base: str = "") -> str:
    """`canonical_url`, or empty for what is no address of a page."""
    try:
        return canonical_url(href, base)
    except ValueError:
        return ""


def address_key(url: str) -> str:
    """What an address is known by: its canonical form without http or https."""
    if not url.startswith(("http://", "https://")):
        return url
    # Archives hold addresses that nobody could ask for.
    return (canonical_or_empty(url) or url).partition(":")[2]


def link_target(href: str, base: str) -> str | None:
    """The canonical address a link on the page `base` leads to.

    Empty for what leads to no page (a place on this one, mailto:, javascript:), None for what is
    no address at all. Much quicker than `canonical_url` for the links most pages have.
    """
    text = href.strip().strip(_BLANKS).partition("#")[0].strip(_BLANKS)
    if not text:
        return ""
    # A path is relative to the page's directory; a query alone, or a host without a name, to its
    # file name as well.
    whole = text[0] in "?;" or text.startswith("//")
    return _link_target(text, base if whole else _directory(base))


@lru_cache(maxsize=_REMEMBERED)
def _link_target(text: str, base: str) -> str | None:
    if _PLAIN_PATH.match(text) and len(text) < MAX_LENGTH // 2:
        origin = _canonical_origin(base)
        if origin is not None:
            return origin + text
    scheme = _SCHEME.match(text)
    if scheme and scheme.group(1).lower() not in DEFAULT_PORTS:
        return ""
    try:
        return canonical_url(text, base)
    except ValueError:
        return None


@lru_cache(maxsize=1024)
def _canonical_origin(base: str) -> str | None:
    try:
        return canonical_url("/", base)[:-1]
    except ValueError:
        return None


@lru_cache(maxsize=1024)
def _directory(base: str) -> str:
    address = base.partition("#")[0].partition("?")[0]
    head, slash, _ = address.rpartition("/")
    return head + slash if slash and not head.endswith("/") else base


def _host(hostname: str | None) -> str:
    host = (hostname or "").rstrip(".")
    if not host:
        raise ValueError("the address names no host")
    if ":" in host:
        return f"[{ipaddress.IPv6Address(host.partition('%')[0]).compressed}]"
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(f"host {host!r} is not a valid name: {error}") from error
    host = host.lower()
    if not re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_-])?", host) or ".." in host:
        raise ValueError(f"host {host!r} is not a valid name")
    return host


def _percent(text: str, allowed: frozenset[str]) -> str:
    if allowed.issuperset(text):
        return text
    result, position = [], 0
    while position < len(text):
        character = text[position]
        code = text[position + 1 : position + 3]
        if character == "%" and re.fullmatch(r"[0-9A-Fa-f]{2}", code):
            decoded = chr(int(code, 16))
            result.append(decoded if decoded in _UNRESERVED else f"%{code.upper()}")
            position += 3
            continue
        if character in allowed:
            result.append(character)
        else:
            encoded = character.encode("utf-8", "replace")
            result.append("".join(f"%{byte:02X}" for byte in encoded))
        position += 1
    return "".join(result)


def _without_dot_segments(path: str) -> str:
    """RFC 3986, section 5.2.4."""
    kept: list[str] = []
    segments = path.split("/")[1:] if path.startswith("/") else path.split("/")
    for position, segment in enumerate(segments):
        last = position == len(segments) - 1
        if segment == "..":
            if kept:
                kept.pop()
            if last:
                kept.append("")
        elif segment == ".":
            if last:
                kept.append("")
        else:
            kept.append(segment)
    return "/" + "/".join(kept)


def host_of(url: str) -> str:
    """Host with port where it is not the scheme's own: one unit of politeness."""
    return urlsplit(url).netloc


def domain_name(text: str) -> str:
    """The one spelling of a domain: lower case, IDNA, no dots around it, IPv6 bare.

    Raises ValueError for what is no name of a host alone.
    """
    bare = text.strip(_BLANKS).removeprefix("*").strip(".")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(bare.strip("[]")).compressed
    address = bare if "://" in bare else f"http://{bare}"
    try:
        parts = urlsplit(canonical_url(address))
    except ValueError as error:
        raise ValueError(
            f"domain {text!r} is no name: {error}; write it like example.org"
        ) from error
    if parts.path != "/" or parts.query or parts.port:
        raise ValueError(
            f"domain {text!r} is more than a name; write {parts.hostname!r}, and paths as `include`"
        )
    return parts.hostname or ""


def trap_reason(url: str) -> str:
    """Why an address looks like a crawler trap; empty when it does not."""
    parts = urlsplit(url)
    segments = [segment for segment in parts.path.split("/") if segment]
    if len(segments) > 24:
        return "trap: path too deep"
    for width in (1, 2, 3):
        for start in range(len(segments) - 4 * width + 1):
            unit = segments[start : start + width]
            if all(segments[start + k * width :][:width] == unit for k in range(1, 4)):
                return "trap: repeating path"
    if parts.query.count("&") >= 12:
        return "trap: too many parameters"
    return ""


def numbered_shape(url: str) -> str:
    """The path with `#` for its numbers, where it ends in a year and a month, perhaps a day, in
    one of their usual orders, as the pages of a calendar do (`/cal/2024/5/17`, `/2024-05`,
    `/17.05.2024`, `/20240517`); else empty.

    Articles by date or by number are no calendar: theirs ends in a word, or in no date (a verse
    `/bible/1/2/3`, a preprint `/abs/1409.1556`).
    """
    path = urlsplit(url).path
    return re.sub("[0-9]+", "#", path) if _CALENDAR.search(path) else ""


@dataclass(frozen=True)
class Scope:
    """Which addresses a crawl may fetch.

    `hosts` are exact (host and port), `domains` cover their subdomains. A pattern that starts with
    `/` is a prefix of path and query, or with a `*` in it a glob over the path, with or without the
    query; any other is a glob over the whole address. All are spelt as by `canonical_pattern`.
    Names of files that are no pages stay out unless their type is among `content_types`.
    """

    hosts: frozenset[str]
    domains: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_depth: int = 16
    content_types: tuple[str, ...] = ()

    def reason(self, url: str, depth: int) -> str:
        """Why `url` stays out; empty when it is in scope."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.netloc not in self.hosts and not any(
            host == domain or host.endswith("." + domain) for domain in self.domains
        ):
            return "other host"
        if depth > self.max_depth:
            return "too deep"
        if _BINARY.search(parts.path) and _type_of(parts.path) not in self.content_types:
            return "file type"
        if _matches(url, parts.path, self.exclude):
            return "excluded"
        if self.include and not _matches(url, parts.path, self.include):
            return "not included"
        return trap_reason(url)


def canonical_pattern(text: str) -> str:
    """A pattern of `Scope` in the spelling of canonical addresses; `*`, `?` and `[…]` stay.

    Raises ValueError for what no address could match.
    """
    pattern = text.strip(_BLANKS)
    if pattern.startswith("/") and "*" not in pattern:
        return _percent(pattern, _QUERY)
    if re.search(r"\[[^]]*[^\x00-\x7f]", pattern):
        raise ValueError(
            f"pattern {text!r} matches no address: [ ] stands for one sign, and a letter beyond "
            "ASCII is several in an address; write *"
        )
    place = _PLACE.fullmatch(pattern)
    if place is None:
        if not re.search(r"[*?\[]", pattern):
            raise ValueError(
                f"pattern {text!r} matches no address; write /{pattern} for paths that begin so, "
                f"*{pattern}* for addresses that hold it"
            )
        return _percent(pattern, _GLOB)
    scheme, host, path = place.groups(default="")
    if not path and (not host or _NAMES.fullmatch(host)):
        raise ValueError(f"pattern {text!r} matches no address; write {pattern}/* for all of them")
    if not path or (host.isascii() and re.search(r"\*(?![.*]|:\d|\Z)", host)):
        # `*` stands for slashes too: what follows may be of the path, where case counts.
        before, _, after = host.partition("*")
        host, path = f"{before}*", after + path
    scheme, labels = scheme.lower(), host.lower().split(".")
    try:
        encoded = [x if x.isascii() else idna.encode(x, uts46=True).decode() for x in labels]
    except idna.IDNAError as error:
        raise ValueError(
            f"pattern {text!r} matches no address: {error}; write each part of the host whole"
        ) from error
    host = ".".join(encoded).removesuffix(f":{DEFAULT_PORTS.get(scheme)}")
    return f"{scheme}://{host}{_percent(path, _GLOB)}"


def _matches(url: str, path: str, patterns: Iterable[str]) -> bool:
    return any(_matches_one(url, path, pattern) for pattern in patterns)


def _matches_one(url: str, path: str, pattern: str) -> bool:
    if not pattern.startswith("/"):
        return fnmatchcase(url, pattern)
    whole = f"{path}?{urlsplit(url).query}"
    if "*" not in pattern:
        return whole.startswith(pattern)
    return fnmatchcase(path, pattern) or fnmatchcase(whole, pattern)


_TYPES = MimeTypes()  # without the files of this machine, which would make scopes depend on it


def _type_of(path: str) -> str:
    """The media type that the ending of a path stands for; empty where none or packed."""
    kind, coding = _TYPES.guess_type(path)
    return kind if kind and not coding else ""


@dataclass(frozen=True)
class Aliases:
    """Names that stand for a place: `embedded://stdlib` for wherever the embedded site listens.

    Documents carry the name, so their addresses do not change with a port; requests and WARC
    records carry the place.
    """

    places: tuple[tuple[str, str], ...] = ()  # (name prefix, place prefix), without final slashes

    def place(self, url: str) -> str:
        return self._replace(url, 0, 1)

    def name(self, url: str) -> str:
        return self._replace(url, 1, 0)

    def _replace(self, url: str, old: int, new: int) -> str:
        for pair in self.places:
            if url == pair[old] or url.startswith(pair[old] + "/"):
                return pair[new] + url[len(pair[old]) :]
        return url
