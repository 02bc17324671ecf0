"""One HTTP exchange: asked, read within limits, kept as it will stand in a WARC record."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.connector import Connection
from yarl import URL

from tasks.corpus import warc
from tasks.corpus.binary import binary_kind
from tasks.corpus.content_coding import ACCEPTED, CodingError, Decoder, UnknownCoding
from tasks.corpus.fetch_plan import Limits
from tasks.corpus.guard import GuardedResolver, PrivateAddressError, endpoint
from tasks.corpus.site_options import HIDDEN, Site

MAX_ERROR_BODY = 64 * 1024
CONNECT_SECONDS = 15
_DAMAGED = "truncated or damaged body"
_CODING = "content coding"  # that nobody offered
_CODED = ("compressed data", "unknown")  # what a body looks like in one that is not undone
MAX_NAME = 40  # characters of a name that a server chose
FINAL = ("private address", "TLS error", "credentials only over https", "proxy refuses")


class FetchError(Exception):
    """No whole answer came; the message is the reason, in the same few words for one cause."""

    @property
    def reason(self) -> str:
        return str(self.args[0])

    @property
    def may_pass(self) -> bool:
        """Whether asking again could help."""
        return self.reason not in FINAL and not self.reason.startswith(_CODING)


@dataclass(frozen=True)
class Answer:
    """An exchange with the headers a crawler acts on."""

    exchange: warc.Exchange
    etag: str
    modified: str
    content_type: str
    charset: str | None
    directives: tuple[str, ...]
    location: str
    links: tuple[str, ...]  # Link headers
    retry_after: float | None
    seconds: float  # from the request to the end of the answer
    refused: str = ""  # why the body was not read to its end

    @property
    def media_type(self) -> str:
        """Of Content-Type, in lower case; a server that says nothing most likely sends HTML."""
        return _media_type(self.content_type)


class Client:
    """HTTP for one partition: one pool of connections, the guard against private addresses."""

    def __init__(
        self, session: aiohttp.ClientSession, resolver: GuardedResolver, parallel: int
    ) -> None:
        self._session, self._resolver = session, resolver
        self._private = resolver.allowed
        self._room = asyncio.Semaphore(parallel)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, limits: Limits, private: Iterable[tuple[str, int]], parallel: int
    ) -> AsyncIterator[Client]:
        """A client that reaches private addresses only at the endpoints `private`, with at most
        `parallel` requests in flight.
        """
        proxies = {endpoint(site.proxy) for site in limits.sites if site.proxy}
        resolver = GuardedResolver(private, proxies)
        connector = aiohttp.TCPConnector(resolver=resolver, limit=0, ttl_dns_cache=300)
        headers = {
            "User-Agent": limits.user_agent,
            "Accept": "text/html,application/xhtml+xml,text/plain;q=0.9,*/*;q=0.1",
            "Accept-Encoding": ACCEPTED,
        }
        if "@" in limits.contact:
            headers["From"] = limits.contact.removeprefix("mailto:")
        async with aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # see content_coding
            timeout=aiohttp.ClientTimeout(
                total=limits.timeout, sock_connect=min(limits.timeout, CONNECT_SECONDS)
            ),
            max_line_size=16_384,
            max_field_size=32_768,
            response_class=_Response,
        ) as session:
            # aiohttp would repeat a request on a dropped connection by itself, without the delay.
            session._retry_connection = False
            yield cls(session, resolver, parallel)

    async def ask(
        self,
        url: str,
        headers: dict[str, str] | None = None,
        types: tuple[str, ...] | None = None,
        max_bytes: int = MAX_ERROR_BODY,
        site: Site | None = None,
    ) -> Answer:
        """GET `url`, without following redirects.

        `site` says what else is sent, and by which proxy. A page whose type is not among `types`
        is not read; one longer than `max_bytes` is cut.
        Raises FetchError when no whole answer comes.
        """
        try:
            self._resolver.check_literal(url)
            async with self._room:
                return await self._exchange(url, headers or {}, types, max_bytes, site)
        except UnknownCoding as error:
            raise FetchError(f"{_CODING} {error.coding}") from error
        except CodingError as error:
            raise FetchError(_DAMAGED) from error
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise FetchError(_reason(error)) from error

    async def _exchange(
        self,
        url: str,
        headers: dict[str, str],
        types: tuple[str, ...] | None,
        max_bytes: int,
        site: Site | None,
    ) -> Answer:
        date, begun = warc.warc_date(), time.monotonic()
        secret = site.secret if site else frozenset()
        if site is not None:
            self._require_secrecy(url, site)
            headers = dict(site.headers) | headers
        proxy = site.proxy if site and site.proxy else None
        async with self._session.get(
            URL(url, encoded=True), headers=headers, allow_redirects=False, proxy=proxy
        ) as response:
            # Behind a proxy, the site's address is not known.
            address = response.peer if isinstance(response, _Response) and not proxy else ""
            content_type = response.headers.get("Content-Type", "")
            refused = ""
            if response.status == 200 and types is not None:
                media = _media_type(content_type)
                if media not in types:
                    refused = f"content type {media}"
                elif (response.content_length or 0) > max_bytes:
                    refused = "too large"
            body = bytearray()
            if not refused:
                limit = max_bytes if response.status == 200 else MAX_ERROR_BODY
                decoder = Decoder(response.headers.get("Content-Encoding", ""), limit)
                async for chunk in response.content.iter_any():
                    body += decoder.feed(chunk)
                    if decoder.overflown:
                        if response.status == 200:
                            refused = "too large"
                        body = body[:limit]
                        response.close()
                        break
                else:
                    decoder.finish()
                # Most such names are slips of a server that codes nothing.
                if decoder.unknown and binary_kind(bytes(body), content_type) in _CODED:
                    raise UnknownCoding(decoder.unknown[0][:MAX_NAME])
            request_info = response.request_info
            path = URL(url, encoded=True).raw_path_qs
            head = f"GET {path} HTTP/1.1\r\n" + "".join(
                f"{name}: {HIDDEN if name.lower() in secret else value}\r\n"
                for name, value in request_info.headers.items()
            )
            pairs = tuple(
                (k.decode("utf-8", "surrogateescape"), v.decode("utf-8", "surrogateescape"))
                for k, v in response.raw_headers
            )
            return Answer(
                warc.Exchange(
                    url,
                    (head + "\r\n").encode("utf-8", "replace"),
                    response.status,
                    response.reason or "",
                    pairs,
                    bytes(body),
                    address,
                    date,
                ),
                response.headers.get("ETag", ""),
                response.headers.get("Last-Modified", ""),
                content_type,
                response.charset,
                tuple(response.headers.getall("X-Robots-Tag", [])),
                response.headers.get("Location", ""),
                tuple(response.headers.getall("Link", [])),
                _retry_after(response.headers.get("Retry-After", "")),
                time.monotonic() - begun,
                refused,
            )

    def _require_secrecy(self, url: str, site: Site) -> None:
        """Refuse to send what an environment variable holds where others can read along."""
        if site.secret and not url.startswith("https:") and endpoint(url) not in self._private:
            raise FetchError("credentials only over https")


def _reason(error: BaseException) -> str:
    """A failed request's reason in a few words, the same for the same cause."""
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        inner = getattr(following, "os_error", None)
        following = inner if isinstance(inner, BaseException) else following.__cause__
    if any(isinstance(cause, PrivateAddressError) for cause in causes):
        return "private address"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return "proxy refuses"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return "proxy does not answer"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "name not resolved"
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return "TLS error"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return "connection refused"
    if isinstance(error, aiohttp.ContentTypeError | aiohttp.ClientPayloadError):
        return _DAMAGED
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "connection closed"
    if isinstance(error, aiohttp.ClientConnectorError | OSError):
        return "no connection"
    return "not HTTP"


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower() or "text/html"


class _Response(aiohttp.ClientResponse):
    """Knows who answered: a short answer has let go of its connection before anyone can ask."""

    peer = ""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        if connection.transport is not None:
            peer = connection.transport.get_extra_info("peername")
            self.peer = str(peer[0]) if peer else ""
        return await super().start(connection)


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3), a number or a date; infinite for
    a number of hundreds of digits."""
    if re.fullmatch(r"[0-9]+", value.strip()):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
