"""Starts Ray Serve's proxy on its port and serves the champion again, if there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from serve.deploy import Beside, deploy
from serve.specification import EngineOptions
from tasks.registry import models
from tasks.registry.models import CHAMPION, Version
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store

START_SECONDS = 280.0


def start_proxy(settings: Settings) -> None:
    """Start Serve in the running cluster; harmless when it runs."""
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.serve.scripts", "start", "--address", settings.ray),
            *("--http-host", settings.host, "--http-port", str(settings.ports.serve)),
            *("--proxy-location", "HeadOnly"),
        ],
        check=True,
        timeout=START_SECONDS,
    )


def serve_champion(settings: Settings) -> str | None:
    """Serve the champion as the last deploy did; None when no model has one."""
    champions = [v for m in models.models() for v in models.versions(m) if CHAMPION in v.aliases]
    if not champions:
        return None
    champion = max(champions, key=lambda version: version.created)
    store = Store.open(settings)
    artifact = store.get(champion.stage, champion.fingerprint)
    return deploy(settings, champion, artifact, **_as_before(store, champion))


def _as_before(store: Store, champion: Version) -> dict[str, Any]:
    """Replicas and engine as the last deploy of this model asked for them."""
    for deployed in sorted(store.all("deploy"), key=lambda one: one.created, reverse=True):
        if deployed.config["version"]["model"] == champion.model:
            draft = deployed.config.get("draft")
            return {
                "replicas": int(deployed.config["replicas"]),
                "most_replicas": deployed.config.get("most_replicas"),
                "engine": EngineOptions(**deployed.config.get("engine", {})),
                "draft": draft and models.get(draft["model"], draft["version"]),
                "drain_seconds": deployed.config.get("drain_seconds"),
                "beside": list(_beside(store, champion, deployed.config)),
            }
    return {}


def _beside(store: Store, champion: Version, config: dict[str, Any]) -> Iterator[Beside]:
    """The versions that were served beside it, while the registry and the store have them."""
    for told in config.get("beside", ()):
        version = models.find(told["model"], told["version"])
        artifact = version and store.find(version.stage, version.fingerprint)
        if version and artifact and version.artifact != champion.artifact:
            yield Beside(version, artifact, float(told["share"]))


def main() -> int:
    """Start the proxy, then the champion; a champion that can't be served doesn't stop the rest."""
    settings = Settings.load()
    settings.apply()
    try:
        start_proxy(settings)
    except subprocess.SubprocessError as error:
        print(f"Ray Serve did not start: {error}", file=sys.stderr)
        return 1
    try:
        served = serve_champion(settings)
    except UserError as error:
        print(f"the champion is not served: {error}", file=sys.stderr)
    else:
        print(f"serving {served}" if served else "no model has a champion yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
