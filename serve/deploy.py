"""Put a registered version behind the endpoint, through Serve's REST interface.

Callable from any process: nothing here joins the Ray cluster.
"""

import json
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from serve import serve_api, vllm
from serve.about import about
from serve.specification import MAX_CHOICES, EngineOptions, ModelSpec
from tasks.registry.models import Version
from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store

DEPLOYMENT = "Endpoint"
IMPORT_PATH = "serve.deployment:application"
DEPLOY_SECONDS = 300.0
POLL_SECONDS = 0.25
LEAST_DRAIN_SECONDS = 120.0
SLOWEST_FLOPS = 2e9  # of one core that others use, too, in products of few rows
FORGOTTEN_SECONDS = 15.0
"""How long Serve may speak of another wish than ours before ours counts as lost."""


def fingerprint_of(version: Version) -> str:
    """The `system_fingerprint` of replies: model, version, and the weights it stands for."""
    return f"{version.model}-{version.version}-{version.fingerprint[:12]}"


class Beside(NamedTuple):
    """A version served at the same time as the main one, of its model or of another. share: 0–1 of
    the requests for its model's bare name.
    """

    version: Version
    artifact: Manifest
    share: float


def specification(
    settings: Settings,
    version: Version,
    artifact: Manifest,
    share: float = 1.0,
    beside: tuple[ModelSpec, ...] = (),
    engine: EngineOptions | None = None,
    draft: Version | None = None,
) -> ModelSpec:
    """What a replica needs to know to serve a version."""
    known = about(Store.open(settings), artifact)
    database = settings.database_url
    lineage = {"run": version.run_id, "artifact": version.artifact, **version.lineage}
    lineage |= {f"data.{stage}": digest for stage, digest in known.data.items()}
    return ModelSpec(
        name=version.model,
        version=version.version,
        system_fingerprint=fingerprint_of(version),
        store=settings.store_uri,
        artifact=version.artifact,
        lineage=lineage,
        scores=dict(version.scores),
        title=known.title,
        corpus=known.corpus,
        examples=known.examples,
        request=uuid.uuid4().hex,
        # An address with a password stays out of what Serve shows of a deployment.
        database=database if database.startswith("sqlite:") else "environment",
        aliases=tuple(sorted(version.aliases)),
        share=share,
        beside=beside,
        draft=draft and draft.artifact,
        **(engine or EngineOptions()).model_dump(),
    )


def deploy(
    settings: Settings,
    version: Version,
    artifact: Manifest,
    *,
    replicas: int = 1,
    most_replicas: int | None = None,
    beside: Sequence[Beside] = (),
    engine: EngineOptions | None = None,
    draft: Version | None = None,
    drain_seconds: float | None = None,
    timeout: float = DEPLOY_SECONDS,
    on_wait: Callable[[str], None] | None = None,
) -> str:
    """Serve a version, and others `beside` it, and return its `system_fingerprint` once every
    replica answers with it.

    The version before answers until then, and goes on if the new one cannot be loaded. Serve adds
    replicas up to `most_replicas` while each has more requests than its engine has slots. `draft`
    guesses `engine.speculate` tokens ahead for all versions of its own model. A replica that is to
    end gets `drain_seconds` for the answers under way; None: as long as the longest may take.
    `on_wait` hears what is being waited for. Raises UserError when Serve refuses, a replica cannot
    load the model, or nothing happens within `timeout` seconds.
    """
    _own(version, artifact)
    for other in beside:
        _own(other.version, other.artifact)
    if drain_seconds is None:
        of_all = (artifact, *(other.artifact for other in beside))
        options = engine or EngineOptions()
        drain_seconds = max(longest_answer(settings, one, options) for one in of_all)
    if engine is not None and engine.kind == "vllm":
        if beside or draft is not None:
            raise UserError("vllm serves one version without a draft model; leave both out")
        name = fingerprint_of(version)
        scale = (replicas, most_replicas, drain_seconds)
        vllm.deploy(settings, version, artifact, name, engine, *scale, on_wait)
        return name
    if engine is not None and engine.device == "cuda":
        serve_api.require_gpu(settings, "engine.device cuda")
    left = 1 - sum(other.share for other in beside if other.version.model == version.model)
    if left < 0 or any(not 0 <= other.share <= 1 for other in beside):
        raise UserError(f"the canaries' shares leave {left:.0%} for the main version; lower them")
    names = [fingerprint_of(one) for one in (version, *(other.version for other in beside))]
    for name in (name for name in names if names.count(name) > 1):
        raise UserError(f"{name} cannot be served beside itself; choose another version")
    others = tuple(
        specification(settings, *other, engine=engine, draft=_drafting(draft, other.version))
        for other in beside
    )
    spec = specification(
        settings, version, artifact, left, others, engine, _drafting(draft, version)
    )
    apply_config(settings, spec, replicas, most_replicas, drain_seconds)
    wait_until_served(settings, spec, replicas, timeout, on_wait)
    return spec.system_fingerprint


def _drafting(draft: Version | None, version: Version) -> Version | None:
    """The draft model, for versions of the same model: those of others have other tokenizers."""
    return draft if draft is not None and draft.model == version.model else None


def apply_config(
    settings: Settings,
    spec: ModelSpec,
    replicas: int,
    most_replicas: int | None = None,
    drain_seconds: float = LEAST_DRAIN_SECONDS,
) -> None:
    """Declare our application; others in the same Serve keep their configuration."""
    scale = serve_api.scale(replicas, most_replicas, spec.slots)
    spec = spec.model_copy(update={"copies": max(replicas, most_replicas or 1)})
    deployment = {
        "name": DEPLOYMENT,
        **scale,
        "graceful_shutdown_timeout_s": drain_seconds,
        "user_config": spec.model_dump(mode="json"),
    }
    if spec.device == "cuda":
        deployment["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 1}
    ours = {"route_prefix": "/", "import_path": IMPORT_PATH, "deployments": [deployment]}
    serve_api.declare(settings, ours)


def longest_answer(settings: Settings, artifact: Manifest, engine: EngineOptions) -> float:
    """Seconds after which the longest answer of a model is over wherever we serve it, at least
    LEAST_DRAIN_SECONDS.

    As many answers as an engine takes may each fill the context, as many at a time as there are
    slots: so many steps, each of 2 FLOPs for every parameter and sequence of a full batch. Too much
    costs nothing: a replica ends with its last answer. Where the directory does not say, the least
    is all that is known.
    """
    directory = Store.open(settings).of(artifact)
    sizes = {file.name: file.size for file in artifact.files}
    if "config.json" not in sizes:
        return LEAST_DRAIN_SECONDS
    config = json.loads(directory.read_bytes("config.json"))
    context = config.get("max_position_embeddings") or config.get("n_positions") or 0
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    each = 2 if "16" in str(config.get("dtype") or config.get("torch_dtype")) else 4
    # One request that comes alone may bring more than slots and queue hold.
    answers = max(engine.slots + engine.max_waiting, MAX_CHOICES)
    steps = math.ceil(answers / engine.slots) * context
    seconds = steps * (2 * weights / each * engine.slots / SLOWEST_FLOPS)
    return max(LEAST_DRAIN_SECONDS, float(round(seconds)))


def undeploy(settings: Settings) -> None:
    """Take our application away; harmless when there is none."""
    if serve_api.declared(settings) is not None:
        serve_api.declare(settings, None)


def _own(version: Version, artifact: Manifest) -> None:
    """Raise UserError unless this is the version's artifact."""
    if f"{artifact.stage}/{artifact.fingerprint}" != version.artifact:
        raise UserError(
            f"{version.model} version {version.version} is artifact {version.artifact}, "
            f"not {artifact.stage}/{artifact.fingerprint}; deploy the version's own artifact"
        )


def served(settings: Settings) -> dict[str, Any]:
    """Every `system_fingerprint` the endpoint answers with: `shares` of the requests, `aliases` and
    the options of its `engines`; and the `scale` that Serve was told.
    """
    state = _health(settings) or vllm.served(settings)
    told = {key: state.get(key, {}) for key in ("shares", "aliases", "engines")}
    return told | {"scale": serve_api.declared_scale(settings)}


def served_version(settings: Settings) -> str | None:
    """The `system_fingerprint` the endpoint answers with; None when nothing is served."""
    state = _health(settings)
    return str(state["serving"]) if state.get("serving") else None


def wait_until_served(
    settings: Settings,
    spec: ModelSpec,
    replicas: int,
    timeout: float,
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Return when all replicas that Serve runs, and at least `replicas`, serve the versions of the
    spec.

    Raises UserError as `deploy` does, and Unavailable when Serve no longer knows of our wish: it
    was started anew with another one, or a later deploy replaced it.
    """
    fingerprint = spec.system_fingerprint
    deadline = time.monotonic() + timeout
    known = time.monotonic()
    serving: set[str] = set()
    said = ""
    wished = spec.served_state() | {"loading": None}
    while True:
        state = _health(settings)
        heard = state.get("request") == spec.request
        for one in spec.everything if heard else ():
            if reason := state["failed"].get(one.system_fingerprint):
                raise UserError(f"{one.system_fingerprint} cannot be served: {reason}")
        is_served = {key: state.get(key) for key in wished} == wished
        if is_served and state["replica"] not in serving:
            serving.add(state["replica"])
            if len(serving) < replicas:
                continue
        status, problem, request, running = _application(settings)
        if len(serving) >= replicas and running <= serving:
            return
        if request in (spec.request, None):
            known = time.monotonic()
        elif time.monotonic() - known > FORGOTTEN_SECONDS:
            raise Unavailable(
                f"{fingerprint} is not served: Ray Serve was started anew or told to serve another "
                "version meanwhile; run it again"
            )
        if status == "DEPLOY_FAILED":
            raise UserError(f"Ray Serve could not start the endpoint: {_reason(problem)}")
        if time.monotonic() >= deadline:
            raise UserError(
                f"{fingerprint} was not served within {timeout:.0f} s: Serve says {status}, "
                f"{settings.serve}/health says {state or 'nothing'}; see the logs of Ray Serve"
            )
        count = f"{len(serving)} of {max(replicas, len(running))}"
        news = f"{count} replicas serve {fingerprint} ({status.lower()})"
        if on_wait and news != said:
            on_wait(news)
            said = news
        time.sleep(POLL_SECONDS)


def _reason(problem: str) -> str:
    """What a replica gave as the reason, of the traceback that Serve shows; else all of it."""
    found = re.findall(r"^RuntimeError: (\S+ cannot be served: .*)$", problem, re.MULTILINE)
    return found[-1] if found else problem


def _health(settings: Settings) -> dict[str, Any]:
    """What a replica says of itself; empty when none answers."""
    try:
        state = call(f"{settings.serve}/health", timeout=5)
    except (OSError, Refused):
        return {}
    return state if isinstance(state, dict) else {}


def _application(settings: Settings) -> tuple[str, str, str | None, set[str]]:
    """Serve's status of our application, its message, the request it was last given, and the
    replicas that get requests.

    The request is None where it is not known: a busy dashboard may owe an answer.
    """
    try:
        found = serve_api.state(settings)
    except UserError as error:
        return "UNKNOWN", str(error), None, set()
    if found is None:
        return "NOT_STARTED", "", "", set()
    deployment = (found.get("deployments") or {}).get(DEPLOYMENT) or {}
    running = {
        one["replica_id"]
        for one in deployment.get("replicas") or ()
        if one["state"] in ("RUNNING", "UPDATING")
    }
    declared = (found.get("deployed_app_config") or {}).get("deployments") or [{}]
    request = (declared[0].get("user_config") or {}).get("request")
    return str(found["status"]), str(found.get("message", "")), request, running
