"""A version behind vLLM on GPUs: Ray Serve's own LLM application instead of our replica.

vLLM reads the directory our engine reads, in Hugging Face's format. It is never imported here, and
ray.serve.llm, which cannot be imported without it, only by Serve. What answers then is Ray's
endpoint: no canary, no keys, no chat page; a new version replaces the one before.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve import serve_api
from serve.specification import EngineOptions
from tasks.registry.models import Version
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tasks.state.api_keys import ApiKeys

IMPORT_PATH = "ray.serve.llm:build_openai_app"
SERVED = "GRISTMILL_SERVED"  # in the application's environment: which version it is
START_SECONDS = 1800.0  # vLLM reads the weights, compiles and captures graphs before it answers
POLL_SECONDS = 1.0


def deploy(
    settings: Settings,
    version: Version,
    artifact: Manifest,
    fingerprint: str,
    engine: EngineOptions,
    replicas: int,
    most_replicas: int | None = None,
    drain_seconds: float = 120.0,
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Serve a version with vLLM and return when it answers.

    Raises UserError where vLLM, a GPU or a shared directory is missing, where API keys are in use,
    and when Serve cannot start it within START_SECONDS.
    """
    require(settings)
    directory = _directory(settings, artifact)
    serve_api.declare(
        settings,
        application(
            version.model, fingerprint, directory, engine, replicas, most_replicas, drain_seconds
        ),
    )
    _wait(settings, version.model, fingerprint, on_wait)


def application(
    name: str,
    fingerprint: str,
    directory: Path,
    engine: EngineOptions,
    replicas: int = 1,
    most_replicas: int | None = None,
    drain_seconds: float = 120.0,
) -> dict[str, Any]:
    """What Serve is told: ray.serve.llm's builder with one `LLMConfig` for the model `name`."""
    options: dict[str, Any] = {"dtype": engine.weights, "max_num_seqs": engine.slots}
    if engine.speculate:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": engine.speculate,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 2,
        }
    config = {
        "model_loading_config": {"model_id": name, "model_source": str(directory)},
        "engine_kwargs": options,
        "deployment_config": {
            **serve_api.scale(replicas, most_replicas, engine.slots),
            "max_ongoing_requests": engine.slots,
            "max_queued_requests": engine.max_waiting,
            "graceful_shutdown_timeout_s": drain_seconds,
        },
    }
    return {
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"llm_configs": [config]},
        "runtime_env": {"env_vars": {SERVED: fingerprint}},
    }


def served(settings: Settings) -> dict[str, Any]:
    """The version that Serve answers with, as `/health` of our replica would say it; empty when
    what runs is not vLLM, or not running.
    """
    try:
        state = serve_api.state(settings)
    except UserError:
        return {}
    config = (state or {}).get("deployed_app_config") or {}
    if state is None or state["status"] != "RUNNING" or config.get("import_path") != IMPORT_PATH:
        return {}
    fingerprint = config["runtime_env"]["env_vars"][SERVED]
    (told,) = config["args"]["llm_configs"]
    return {"shares": {fingerprint: 1.0}, "engines": {fingerprint: told["engine_kwargs"]}}


def require(settings: Settings) -> None:
    """Raise UserError for what is missing, in one sentence."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine.kind vllm needs vLLM, which is not installed: pip install 'gristmill[vllm]' "
            "where the flows and Ray run, or leave engine.kind out"
        )
    serve_api.require_gpu(settings, "engine.kind vllm")
    if ApiKeys(settings.database_url).all():
        raise UserError(
            "engine.kind vllm would answer without asking for the API keys that were made; serve "
            "with our own engine, or put a gateway before an installation without keys"
        )


def _directory(settings: Settings, artifact: Manifest) -> Path:
    store = Store.open(settings)
    directory = store.of(artifact)
    if not directory.is_local:
        raise UserError(
            f"engine.kind vllm reads a directory, not {store.uri}; set GRISTMILL_STORE to one that "
            "every GPU node sees"
        )
    return Path(directory.path)


def _wait(
    settings: Settings, name: str, fingerprint: str, on_wait: Callable[[str], None] | None
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while fingerprint not in served(settings).get("shares", {}) or not _answers(settings, name):
        state = serve_api.state(settings) or {"status": "NOT_STARTED", "message": ""}
        if state["status"] == "DEPLOY_FAILED":
            raise UserError(f"Ray Serve could not start vLLM: {state['message']}")
        if time.monotonic() >= deadline:
            raise UserError(
                f"{fingerprint} was not served within {START_SECONDS:.0f} s: Serve says "
                f"{state['status']} {state['message']}; see the logs of Ray Serve"
            )
        if on_wait:
            on_wait(f"vLLM starts with {fingerprint} ({state['status'].lower()})")
        time.sleep(POLL_SECONDS)


def _answers(settings: Settings, name: str) -> bool:
    try:
        models = call(f"{settings.serve}/v1/models", timeout=5)
    except (OSError, Refused):
        return False
    return any(model.get("id") == name for model in models.get("data", []))
