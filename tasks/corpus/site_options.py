"""How single sites are asked: headers, cookies, a proxy, a delay; secrets only by name.

A value may hold `${NAME}`: the environment variable of the process that starts the crawl. What a
person writes stands in manifests and forms; what the variable holds goes to the workers in memory
and to the site, and into nothing that is kept: WARC request records say `(not recorded)` instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tasks.corpus.urls import DEFAULT_PORTS, canonical_url, domain_name, host_of
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.stage_config import StageConfig

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
# What only the crawler itself may say of its requests.
OURS = frozenset({"host", "user-agent", "from", "content-length", "transfer-encoding"}) | frozenset(
    {"connection", "accept-encoding", "range", "if-none-match", "if-modified-since", "cookie"}
)
SECRET = frozenset({"authorization", "proxy-authorization", "x-api-key", "x-auth-token"})
HIDDEN = "(not recorded)"


@dataclass(frozen=True)
class Site:
    """A site's options with every variable in its place. For requests, never to be kept."""

    host: str
    headers: tuple[tuple[str, str], ...] = ()
    secret: frozenset[str] = frozenset()  # lower-case names of headers that hold a variable
    proxy: str = ""
    delay: float | None = None

    def covers(self, host: str) -> bool:
        """Whether `host` (a port may follow) is this site's or below it."""
        bare = host if host == self.host else re.sub(r":\d+$", "", host)
        return bare == self.host or bare.endswith("." + self.host)


class SiteOptions(StageConfig):
    """How one site, subdomains included, is asked."""

    host: str = Field(min_length=1, description="Domain, or host:port: example.org")
    headers: dict[str, str] = Field(
        {},
        description="Headers sent with every request to the site. ${NAME} in a value stands for "
        "an environment variable; credentials are accepted only so.",
    )
    cookies: dict[str, str] = Field(
        {}, description="Cookies sent with every request to the site; ${NAME} as in headers."
    )
    proxy: str = place(
        "",
        description="HTTP proxy for the site, http://host:port. One with a password: ${NAME}.",
    )
    delay: float | None = place(
        None,
        ge=0,
        description="Seconds between requests where robots.txt names no Crawl-delay.",
    )

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        """As addresses spell it: lower case, IDNA, IPv6 in brackets, a port where one is stated."""
        if "/" in host:
            raise ValueError(f"{host!r} is no host; write it like example.org")
        stated = re.fullmatch(r"(\[.*\]|[^:]*):(\d+)", host.strip())
        name, port = stated.groups() if stated else (host, "")
        name = domain_name(name)
        name = f"[{name}]" if ":" in name else name
        if not port:
            return name
        if int(port[:6]) in DEFAULT_PORTS.values():
            raise ValueError(
                f"{host!r} names a port that addresses leave out; write {name}, which stands for "
                "every port and for what is below it"
            )
        return host_of(canonical_url(f"http://{name}:{port}"))

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not _TOKEN.fullmatch(name) or re.search(r"[\r\n\x00]", value):
                raise ValueError(f"header {name!r} cannot be sent; check its name and value")
            if name.lower() in OURS:
                raise ValueError(f"header {name!r} is the crawler's own; leave it out")
            if name.lower() in SECRET and not _VARIABLE.search(value):
                raise ValueError(
                    f"header {name!r} is a secret; put it in an environment variable and write "
                    "${NAME} here"
                )
        return headers

    @field_validator("cookies")
    @classmethod
    def _are_cookies(cls, cookies: dict[str, str]) -> dict[str, str]:
        for name, value in cookies.items():
            if not _TOKEN.fullmatch(name) or re.search(r"[\s;,\x00]", value):
                raise ValueError(f"cookie {name!r} cannot be sent; check its name and value")
        return cookies

    @model_validator(mode="after")
    def _proxy_is_one(self) -> SiteOptions:
        if self.proxy and not _VARIABLE.search(self.proxy):
            check_proxy(self.proxy)
            if "@" in self.proxy:
                raise ValueError("proxy holds a password; put it in a variable and write ${NAME}")
        return self

    def resolved(self, environment: Mapping[str, str] = os.environ) -> Site:
        """Raises UserError naming the variable that is not set or the proxy that is none."""

        def filled(text: str) -> str:
            def value(match: re.Match[str]) -> str:
                name = match.group(1)
                if name not in environment:
                    raise UserError(
                        f"crawl.sites names ${{{name}}} for {self.host}, which is not set; set it "
                        "where the flow runs (for the local stack: before gristmill up)"
                    )
                return environment[name]

            return _VARIABLE.sub(value, text)

        headers = {name: filled(value) for name, value in self.headers.items()}
        secret = {name.lower() for name, value in self.headers.items() if _VARIABLE.search(value)}
        if self.cookies:
            pairs = (f"{name}={filled(value)}" for name, value in self.cookies.items())
            headers["Cookie"] = "; ".join(pairs)
            if any(_VARIABLE.search(value) for value in self.cookies.values()):
                secret.add("cookie")
        proxy = filled(self.proxy)
        if proxy:
            try:
                check_proxy(proxy)
            except ValueError as error:
                raise UserError(f"crawl.sites, {self.host}: {error}") from None
        return Site(self.host, tuple(headers.items()), frozenset(secret), proxy, self.delay)


def check_proxy(proxy: str) -> None:
    """Raises ValueError, without showing a password, for anything but an HTTP proxy's address."""
    parts = urlsplit(proxy)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the proxy is no address of an HTTP proxy; write http://host:port")
