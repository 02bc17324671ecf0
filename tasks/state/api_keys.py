"""Keys of the endpoint: made once, shown once, and kept only as a hash."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

import sqlalchemy as sa

from tasks.runtime.errors import UserError
from tasks.state.schema import api_keys, database

PREFIX = "gm"
SCOPES = ("generate", "embed", "read")
"""generate: completions, chat, responses. embed: embeddings. read: models and tokens."""


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; the key itself is not."""

    id: str
    name: str
    digest: str
    scopes: tuple[str, ...]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: float
    expires: float | None
    revoked: float | None

    @property
    def valid(self) -> bool:
        expired = self.expires is not None and self.expires <= time.time()
        return self.revoked is None and not expired


def digest(key: str) -> str:
    """Keys are 256 random bits, so a plain hash gives nothing away."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The keys of one state database."""

    def __init__(self, url: str) -> None:
        self._engine = database(url)

    def create(
        self,
        name: str,
        scopes: tuple[str, ...] = SCOPES,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        days: float | None = None,
    ) -> str:
        """A new key, which nobody can show again. Raises UserError for a scope or limit that is
        none.
        """
        for scope in scopes:
            if scope not in SCOPES:
                raise UserError(f"scope {scope!r} is unknown; there are {', '.join(SCOPES)}")
        limits = (requests_per_minute, tokens_per_minute, days)
        if any(limit is not None and limit <= 0 for limit in limits):
            raise UserError("limits and days must be above 0; leave one out for none")
        id = secrets.token_hex(4)
        key = f"{PREFIX}-{id}-{secrets.token_urlsafe(32)}"
        now = time.time()
        row = {
            "id": id,
            "name": name,
            "digest": digest(key),
            "scopes": list(scopes),
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "created": now,
            "expires": None if days is None else now + days * 86_400,
        }
        with self._engine.begin() as connection:
            connection.execute(api_keys.insert().values(**row))
        return key

    def all(self) -> list[ApiKey]:
        """Every key ever made, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.created))
            return [ApiKey(**{**row._mapping, "scopes": tuple(row.scopes)}) for row in rows]

    def revoke(self, id: str) -> None:
        """The key is refused from now on. Raises UserError when there is no such key."""
        with self._engine.begin() as connection:
            changed = connection.execute(
                api_keys.update()
                .where(api_keys.c.id == id, api_keys.c.revoked.is_(None))
                .values(revoked=time.time())
            )
        if not changed.rowcount:
            raise UserError(f"there is no valid key {id}; see them: gristmill keys list")
