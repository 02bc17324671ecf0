"""Who asks: API keys with scopes and limits. Without a single key the endpoint is open."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from serve.errors import ApiError, not_ready
from tasks.state.api_keys import ApiKey, digest

log = logging.getLogger(__name__)

REFRESH_SECONDS = 2.0  # how long a revoked key may still be taken, while the database answers
PATIENCE_SECONDS = 0.5  # how long requests wait for a database that has answered so far
READ_SECONDS = 10.0  # after so long nothing is expected of a reading any more
OPEN = ("/", "/health", "/ready", "/metrics", "/static")
SCOPE_OF = {
    "/v1/chat/completions": "generate",
    "/v1/completions": "generate",
    "/v1/responses": "generate",
    "/v1/embeddings": "embed",
}  # everything else: "read"


class KeyStore(Protocol):
    """Where the keys are kept: `tasks.state.api_keys.ApiKeys`."""

    def all(self) -> list[ApiKey]: ...


class Bucket:
    """`rate` a minute, and never more than a minute's worth at once."""

    def __init__(self, rate: int, now: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._now = now
        self._left, self._at = float(rate), now()

    def wait(self, amount: float = 1) -> float:
        """Seconds until so much may be taken; 0 when it may now."""
        now = self._now()
        self._left = min(self.rate, self._left + (now - self._at) * self.rate / 60)
        self._at = now
        return max(0.0, amount - self._left) * 60 / self.rate

    def take(self, amount: float) -> None:
        """Less than nothing is given back. A bucket may go below nothing, and then fills up again
        before more may be taken.
        """
        self._left -= amount


@dataclass
class Account:
    """A key in use on this replica."""

    key: ApiKey
    requests: Bucket | None = None
    tokens: Bucket | None = None

    def admit(self, takes_tokens: bool) -> None:
        """Count a request. Raises ApiError 429 beyond a limit."""
        if takes_tokens and self.tokens is not None:
            _require(self.tokens, 1, "tokens")
        if self.requests is not None:
            _require(self.requests, 1, "requests")
            self.requests.take(1)

    def reserve(self, least: int, most: int) -> int:
        """Take the tokens that a request may come to, so that those made at the same time do not
        exceed the limit together; how many were taken.

        most: more than `least` where the request does not say. Then what is certain must be left,
        and the rest is taken below nothing, a minute's worth at most. Raises ApiError 429, or 400
        where waiting would not help.
        """
        if self.tokens is None:
            return 0
        rate = self.tokens.rate
        if least > rate:
            raise ApiError(
                400,
                f"this request may take {least} tokens, more than this key's limit of {rate} "
                "tokens a minute; ask for fewer or shorter answers, or send less",
                code="request_too_large",
            )
        _require(self.tokens, least, "tokens")
        taken = min(most, rate)
        self.tokens.take(taken)
        return taken

    def correct(self, tokens: int) -> None:
        """Take more than was reserved, or give back what is less than nothing."""
        if self.tokens is not None:
            self.tokens.take(tokens)


def _require(bucket: Bucket, amount: int, what: str) -> None:
    if (seconds := bucket.wait(amount)) > 0:
        after = int(seconds) + 1
        raise ApiError(
            429,
            f"this key's limit of {bucket.rate} {what} a minute has no room for {amount} more now; "
            f"try again in {after} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(after)},
        )


@dataclass
class KeyRing:
    """The keys of the state database, looked at again every few seconds.

    While the database answers, a request waits for the reading that is due. When it fails or stays
    silent, requests go by what was read last and wait no more; it is asked again every
    REFRESH_SECONDS, behind them. Only where no key was ever read, nobody is let in.
    """

    store: KeyStore | None  # None: not known yet, or nobody needs a key
    _accounts: dict[str, Account] = field(default_factory=dict)
    _known: bool = False  # whether they were ever read
    _tried_at: float | None = None
    _silent: bool = False  # whether the last reading failed or takes long
    _reading: "asyncio.Task[None] | None" = None
    # A thread of its own: a reading that hangs must not take those that encode long prompts.
    _reader: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "keys"))

    async def account(self, path: str, authorization: str | None) -> Account | None:
        """Whose request this is; None where no key is needed.

        Raises ApiError: 401 for no key or a wrong one, 403 for one without the scope, 503 when the
        keys were never read.
        """
        if self.store is None or path in OPEN or path.startswith("/static/"):
            return None
        reading = self._refresh()
        if reading is not None and not (self._known and self._silent):
            patience = PATIENCE_SECONDS if self._known else None
            await asyncio.wait({reading}, timeout=patience)
            self._silent = self._silent or not reading.done()
        if not self._known:
            raise not_ready("the API keys cannot be read")
        if not self._accounts:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "no API key; send the header Authorization: Bearer KEY",
                code="missing_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        account = self._accounts.get(digest(key.strip()))
        if account is None or not account.key.valid:
            raise ApiError(
                401,
                "this API key is unknown, expired or revoked",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope = SCOPE_OF.get(path, "read")
        if scope not in account.key.scopes:
            raise ApiError(
                403, f"this API key has no scope {scope!r}", code="insufficient_permissions"
            )
        return account

    def _refresh(self) -> "asyncio.Task[None] | None":
        """The reading under way, begun now if it is time; None where there is none."""
        now = time.monotonic()
        due = self._tried_at is None or now - self._tried_at >= REFRESH_SECONDS
        if self._reading is None and due:
            self._tried_at = now
            self._reading = asyncio.create_task(self._read())
        return self._reading

    async def _read(self) -> None:
        store = self.store
        assert store is not None
        try:
            reading = asyncio.get_running_loop().run_in_executor(self._reader, store.all)
            keys = await asyncio.wait_for(reading, READ_SECONDS)
        except Exception:
            log.exception("the API keys cannot be read; those read last go on being used")
            self._silent = True
        else:
            self._silent = False
            # A limit goes on where it was; revoked keys stay, so that the endpoint stays closed.
            self._accounts = {key.digest: self._account(key) for key in keys}
            self._known = True
        finally:
            self._reading = None

    def _account(self, key: ApiKey) -> Account:
        before = self._accounts.get(key.digest)
        if before is not None:
            before.key = key
            return before
        requests, tokens = (
            Bucket(rate) if rate else None
            for rate in (key.requests_per_minute, key.tokens_per_minute)
        )
        return Account(key, requests, tokens)
