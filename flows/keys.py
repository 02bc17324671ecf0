"""`gristmill keys`: who may ask the endpoint."""

from __future__ import annotations

import argparse
import time

from tasks.runtime.settings import Settings
from tasks.state.api_keys import SCOPES, ApiKeys


def create(settings: Settings, arguments: argparse.Namespace) -> int:
    """Make an API key and print it, once. From the first key on the endpoint asks for one."""
    key = ApiKeys(settings.database_url).create(
        arguments.name,
        tuple(arguments.scope or SCOPES),
        arguments.requests_per_minute,
        arguments.tokens_per_minute,
        arguments.days,
    )
    print(key)
    return 0


def show(settings: Settings, arguments: argparse.Namespace) -> int:
    """List the keys; what they are is not kept."""
    for key in ApiKeys(settings.database_url).all():
        state = "revoked" if key.revoked else "valid" if key.valid else "expired"
        limits = f"{key.requests_per_minute or '∞'} requests, {key.tokens_per_minute or '∞'} tokens"
        made = time.strftime("%Y-%m-%d", time.localtime(key.created))
        print(f"{key.id}  {state:8} {made}  {','.join(key.scopes)}  {limits} a minute  {key.name}")
    return 0


def revoke(settings: Settings, arguments: argparse.Namespace) -> int:
    """Refuse a key from now on."""
    ApiKeys(settings.database_url).revoke(arguments.id)
    return 0


def add_arguments(command: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The sub-commands of `gristmill keys`."""
    actions = command.add_subparsers(required=True, metavar="ACTION")
    made = actions.add_parser("create", parents=[shared], help=create.__doc__)
    made.add_argument("name", help="whose key it is, for the list")
    made.add_argument("--scope", action="append", choices=SCOPES, help="default: all")
    made.add_argument("--requests-per-minute", type=int, metavar="N")
    made.add_argument("--tokens-per-minute", type=int, metavar="N", help="prompt and answer")
    made.add_argument("--days", type=float, metavar="N", help="until it expires")
    made.set_defaults(command=create)
    actions.add_parser("list", parents=[shared], help=show.__doc__).set_defaults(command=show)
    gone = actions.add_parser("revoke", parents=[shared], help=revoke.__doc__)
    gone.add_argument("id", help="the part after gm- in the key, and the first column of the list")
    gone.set_defaults(command=revoke)
