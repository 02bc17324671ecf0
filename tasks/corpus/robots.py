"""robots.txt by RFC 9309, read by protego."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from protego import Protego

from tasks.corpus.charset import decode_marked
from tasks.corpus.opt_out import (
    SEVERAL,
    Location,
    named_agents,
    reserves,
    tdm_locations,
    tdm_reserves,
)

MAX_BYTES = 512 * 1024  # RFC 9309, section 2.5 asks for at least 500 KiB
MAX_REDIRECTS = 5  # section 2.3.1.2
MAX_AGE = 24 * 3600  # seconds, section 2.4
ASK_AGAIN = 1800  # seconds after which a server that could not say is asked again


@dataclass(frozen=True)
class Robots:
    """What one origin's robots.txt says; plain data, so that it can be kept between rounds.

    `policy` is "rules" (parse `text`), "all" (no file: everything is allowed) or "none" (the server
    could not say, or `failure` kept it from answering, here or for tdmrep.json: nothing is).
    """

    policy: str
    text: str = ""
    status: int = 0
    failure: str = ""
    tdm: str = ""  # the origin's tdmrep.json, where it has one
    read_at: float = 0  # Unix time
    clipped: bool = False  # longer than MAX_BYTES: the rest was not read

    @classmethod
    def of_response(cls, status: int, body: bytes) -> Robots:
        """Section 2.3.1: 2xx are rules, 4xx mean no restriction, all else means nothing allowed.

        429 is counted with the server errors: such a server wants fewer requests, not more.
        """
        if 200 <= status < 300:
            head, clipped = body[:MAX_BYTES], len(body) > MAX_BYTES
            text = decode_marked(head) or head.decode("utf-8", "replace")
            if clipped:  # `Disallow: /` would be left of a rule cut in two
                text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1]
            return cls("rules", text.replace("\x00", ""), status, clipped=clipped)
        if 400 <= status < 500 and status != 429:
            return cls("all", "", status)
        return cls("none", "", status)

    def is_stale(self, now: float) -> bool:
        """Whether it is to be asked for again before anything else is."""
        return now - self.read_at > (ASK_AGAIN if self.policy == "none" else MAX_AGE)

    def kept_in_place_of(self, newer: Robots, now: float) -> Robots:
        """`newer`, or these rules for as long as the server cannot say (section 2.4)."""
        if newer.policy != "none" or self.policy == "none":
            return newer
        return replace(self, read_at=now - MAX_AGE + ASK_AGAIN)

    def with_tdm_of(self, older: Robots, now: float) -> Robots:
        """These rules with older reservations, for as long as the server cannot say of them."""
        return replace(self, tdm=older.tdm, read_at=now - MAX_AGE + ASK_AGAIN)

    @cached_property
    def _rules(self) -> Any:
        return Protego.parse(self.text)

    def allows(self, url: str, agent: str) -> bool:
        """Whether the product token `agent` may fetch `url`."""
        if self.policy == "rules":
            return bool(self._rules.can_fetch(url, agent))
        return self.policy == "all"

    @cached_property
    def _named(self) -> list[str]:
        return named_agents(self.text)

    @cached_property
    def _locations(self) -> list[Location]:
        return tdm_locations(self.tdm) if self.tdm else []

    def opts_out(self, url: str) -> str:
        """Why the site does not want the text of `url` mined (`tasks.corpus.opt_out`), or empty."""
        if self._locations:
            parts = urlsplit(url)
            path = f"{parts.path}?{parts.query}" if parts.query else parts.path
            if reserved := tdm_reserves(self._locations, path):
                return reserved
        if self.policy != "rules":
            return ""
        signal = reserves(self.text)
        if signal:
            return f"robots.txt {signal}"
        shut_out = [agent for agent in self._named if not self.allows(url, agent)]
        return f"robots.txt shuts out {', '.join(shut_out[:3])}" if len(shut_out) >= SEVERAL else ""

    def crawl_delay(self, agent: str) -> float | None:
        """Seconds between requests the site asks for; None when it says nothing."""
        if self.policy != "rules":
            return None
        delay = self._rules.crawl_delay(agent)
        rate = self._rules.request_rate(agent)
        slowest = [float(delay)] if delay is not None else []
        if rate is not None and rate.requests:
            # Of numbers with hundreds of digits no quotient is a float.
            with contextlib.suppress(OverflowError):
                slowest.append(rate.seconds / rate.requests)
        return max(slowest) if slowest else None

    @property
    def sitemaps(self) -> list[str]:
        return list(self._rules.sitemaps) if self.policy == "rules" else []
