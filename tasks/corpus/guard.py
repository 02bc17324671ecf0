"""Keeps a crawl out of private networks.

A page of the open web may link or redirect to `http://127.0.0.1:8265/` or to a cloud's metadata
address, and a name may resolve to one. Every address is therefore checked where the connection is
made, after resolution: loopback, link-local and other private ranges are reached only at the exact
host and port of a seed that itself lies there.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from tasks.corpus.urls import DEFAULT_PORTS

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PrivateAddressError(OSError):
    """The host resolves to private addresses only and is no seed."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, embedded IPv4 addresses included."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def endpoint(url: str) -> tuple[str, int]:
    """Host and port a request to `url` connects to."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme]


def private_seeds(urls: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """The endpoints among the seeds that resolve to private addresses: those a person asked for."""
    found = set()
    for url in urls:
        host, port = endpoint(url)
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            continue  # the fetch will say so
        if not any(is_public(str(answer[4][0])) for answer in answers):
            found.add((host, port))
    return tuple(sorted(found))


class GuardedResolver(AbstractResolver):
    """Resolves names for aiohttp and refuses what is private and no seed."""

    def __init__(
        self, allowed: Iterable[tuple[str, int]], proxies: Iterable[tuple[str, int]] = ()
    ) -> None:
        """`proxies` may lie anywhere; as the target of a request they are like any address."""
        self.allowed = frozenset(allowed)
        self._proxies = frozenset(proxies) - self.allowed
        self._inner = ThreadedResolver()

    def check_literal(self, url: str) -> None:
        """Refuse private IP literals: aiohttp connects to those without asking a resolver."""
        host, port = endpoint(url)
        if (host, port) in self._proxies:
            raise PrivateAddressError(f"{host}:{port} is a proxy, not a site")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return
        if not is_public(host) and (host, port) not in self.allowed:
            raise PrivateAddressError(f"{host}:{port} is a private address")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if (host, port) in self.allowed | self._proxies:
            return found
        public = [answer for answer in found if is_public(answer["host"])]
        if not public:
            raise PrivateAddressError(f"{host}:{port} resolves to private addresses")
        return public

    async def close(self) -> None:
        await self._inner.close()
