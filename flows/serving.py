"""Starts Ray Serve's proxy on its port and serves again what the last deploy asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from serve.deploy import Beside, deploy, fingerprint_of
from serve.specification import EngineOptions
from tasks.registry import models
from tasks.registry.models import CHAMPION, Version
from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import Manifest
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


def serve_again(settings: Settings) -> str | None:
    """Serve what the last deploy asked for: a number names the version that was served, an alias
    the one it names now. Where that can't be, or nothing was ever deployed, the champion alone;
    None when no model has one. Raises UserError when that can't be served either.
    """
    store = Store.open(settings)
    configs = [deployed.config for deployed in reversed(store.all("deploy"))]
    if not configs:
        return _serve_champion(settings, store, configs)
    try:
        version, artifact = _found(store, configs[0]["version"])
        return deploy(settings, version, artifact, **_options(store, configs[0], version))
    except Unavailable:
        raise  # somebody deploys meanwhile
    except UserError as error:
        say(f"the last deploy is not served again, the champion takes its place: {error}")
    return _serve_champion(settings, store, configs)


def _serve_champion(
    settings: Settings, store: Store, configs: Sequence[dict[str, Any]]
) -> str | None:
    """Serve the champion of the model that was served last, else the newest of any, with replicas
    and engine as the last deploy of its model asked for them.
    """
    champions = [v for m in models.models() for v in models.versions(m) if CHAMPION in v.aliases]
    if not champions:
        return None
    last = configs[0]["version"]["model"] if configs else None
    champion = max(champions, key=lambda version: (version.model == last, version.created))
    artifact = store.get(champion.stage, champion.fingerprint)
    ours = (config for config in configs if config["version"]["model"] == champion.model)
    config = next(ours, {"replicas": 1})
    return deploy(settings, champion, artifact, **_scale(config))


def _scale(config: dict[str, Any]) -> dict[str, Any]:
    """Replicas and engine of a deploy."""
    return {
        "replicas": int(config["replicas"]),
        "most_replicas": config.get("most_replicas"),
        "engine": EngineOptions(**config.get("engine", {})),
        "drain_seconds": config.get("drain_seconds"),
    }


def _options(store: Store, config: dict[str, Any], main: Version) -> dict[str, Any]:
    """All that a deploy asked for beside its version; a draft or a version beside it that is gone
    is left out.
    """
    chosen: dict[str, Beside] = {}
    for told in config.get("beside", ()):
        if found := _if_found(store, told):
            chosen.setdefault(fingerprint_of(found[0]), Beside(*found, float(told["share"])))
    chosen.pop(fingerprint_of(main), None)  # one that was tried may have become the main one
    draft = _if_found(store, config["draft"]) if config.get("draft") else None
    return _scale(config) | {"draft": draft and draft[0], "beside": list(chosen.values())}


def _found(store: Store, told: dict[str, Any]) -> tuple[Version, Manifest]:
    """The version that a deploy meant, and its artifact. Raises UserError when either is gone."""
    number = f"{told['model']}@{told['version']}"
    asked = told.get("asked", number)
    version = models.named(asked)
    if asked == number and version.artifact != told["artifact"]:
        raise UserError(f"{number} was artifact {told['artifact']} and is now {version.artifact}")
    artifact = store.find(version.stage, version.fingerprint)
    if artifact is None:
        raise UserError(f"{number}: the store has no artifact {version.artifact}; train it again")
    return version, artifact


def _if_found(store: Store, told: dict[str, Any]) -> tuple[Version, Manifest] | None:
    try:
        return _found(store, told)
    except UserError as error:
        say(f"served without one of those before: {error}")
        return None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Start the proxy, then what was served; a model that can't be served doesn't stop the rest."""
    settings = Settings.load()
    settings.apply()
    try:
        start_proxy(settings)
    except subprocess.SubprocessError as error:
        say(f"Ray Serve did not start: {error}")
        return 1
    try:
        served = serve_again(settings)
    except UserError as error:
        say(f"no model is served: {error}")
    else:
        print(f"serving {served}" if served else "no model has a champion yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
