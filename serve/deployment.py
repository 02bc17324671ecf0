"""The Ray Serve deployment: one replica is the HTTP surface and the engines behind it.

A change of `user_config` reconfigures running replicas in place. A replica gets no traffic while it
reconfigures, so `reconfigure` only notes the wish where something is served already, and the
loading goes on behind it. A replica that serves nothing yet has nothing to answer but 503, at once,
and the proxy prefers whoever has least to do: it begins when its model is loaded.
"""

import asyncio
import logging
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.serve._private import replica
from starlette.applications import Starlette

from serve.app import create_app
from serve.fetch import fetch
from serve.gateway import access_log
from serve.host import ModelHost
from serve.keys import KeyRing
from serve.specification import ModelSpec
from tasks.state.api_keys import ApiKeys

log = logging.getLogger(__name__)

# More than the engine takes, so that it, and not a queue nobody sees, answers "too many" (429).
MAX_ONGOING_REQUESTS = 1024


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    health_check_period_s=5,
    health_check_timeout_s=60,  # cores that train as well may answer late
    logging_config={"enable_access_log": False},  # `serve.gateway` writes a line with more
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Endpoint:
    """Holds the model; the routes are `serve.app`'s."""

    def __init__(self) -> None:
        stay_on_loopback()
        write_access_log()
        self.host = ModelHost(fetch)
        self.keys = KeyRing(None)

    def __serve_build_asgi_app__(self) -> Starlette:
        replica = serve.get_replica_context().replica_id.unique_id
        return create_app(self.host, replica, self.keys)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the model of a `ModelSpec`; the first one is loaded when this returns.

        Raises ValidationError for anything else, and RuntimeError when the keys' database is not
        known here: nobody is let in unasked. A first model that cannot be loaded is a RuntimeError
        where other replicas may answer instead; the only one stays, to say why in `/health`.
        """
        spec = ModelSpec.model_validate(user_config)
        self.keys.store = await asyncio.to_thread(key_store, spec)
        self.host.want(spec)
        if self.host.current is None:
            await asyncio.to_thread(self.host.wait)
        if self.host.current is None and spec.copies > 1:
            reason = self.host.why_not_ready()
            raise RuntimeError(f"{spec.system_fingerprint} cannot be served: {reason}")

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self.host.healthy:
            raise RuntimeError("an engine has ended and cannot be started anew; the log says why")

    def __del__(self) -> None:
        self.host.close()


def key_store(spec: ModelSpec) -> ApiKeys | None:
    """Where the keys of a spec are; None when it names no database."""
    if spec.database is None:
        return None
    url = os.environ.get("GRISTMILL_DATABASE") if spec.database == "environment" else spec.database
    if not url:
        raise RuntimeError("GRISTMILL_DATABASE is not set where the replica runs; set it there too")
    return ApiKeys(url)


def write_access_log() -> None:
    """One JSON line a request on this process's standard output, which Ray keeps with its logs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.handlers = [handler]
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


def stay_on_loopback() -> None:
    """Keep this replica's internal server off the network when the whole cluster is on loopback.

    Ray 2.60 binds it to `[::]` whatever the node's address is, and has no setting for it. The token
    guards it, but the stack promises that nothing listens outside.
    """
    if not ray.util.get_node_ip_address().startswith("127."):
        return
    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(
        server, address.replace("[::]", "127.0.0.1")
    )


application = Endpoint.bind()  # type: ignore[attr-defined]
