"""Ray Serve's declarative REST interface: which applications it is told to run, and their state."""

from typing import Any

from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings

APPLICATION = "gristmill"
AUTOSCALING_SECONDS = {"upscale_delay_s": 10.0, "downscale_delay_s": 300.0}


def scale(replicas: int, most_replicas: int | None, target: int) -> dict[str, Any]:
    """A deployment's replicas: so many, or up to `most_replicas` while each has more than `target`
    requests.
    """
    if most_replicas is None or most_replicas <= replicas:
        return {"num_replicas": replicas}
    return {
        "num_replicas": "auto",
        "autoscaling_config": {
            "min_replicas": replicas,
            "max_replicas": most_replicas,
            "target_ongoing_requests": target,
            **AUTOSCALING_SECONDS,
        },
    }


def declare(settings: Settings, ours: dict[str, Any] | None) -> None:
    """Our application's configuration, or none; others in the same Serve keep theirs."""
    others = [config for config in _declared(settings) if config["name"] != APPLICATION]
    applications = others if ours is None else [*others, {"name": APPLICATION, **ours}]
    options = {"host": settings.host, "port": settings.ports.serve}
    body = {"proxy_location": "HeadOnly", "http_options": options, "applications": applications}
    serve_api(settings, "PUT", body)


def declared(settings: Settings) -> dict[str, Any] | None:
    """Our application's configuration as Serve was given it; None when it has none."""
    return next((one for one in _declared(settings) if one["name"] == APPLICATION), None)


def state(settings: Settings) -> dict[str, Any] | None:
    """What Serve says of our application; None when there is none."""
    found: dict[str, Any] | None = serve_api(settings, "GET")["applications"].get(APPLICATION)
    return found


def declared_scale(settings: Settings) -> dict[str, Any]:
    """How many replicas Serve was told to run of our application, as `scale` put it, and how long
    they may take to end; empty when it was told nothing, or does not answer.
    """
    try:
        ours = declared(settings) or {}
    except UserError:
        return {}
    models = (ours.get("args") or {}).get("llm_configs") or [{}]  # vLLM's are told another way
    (told,) = ours.get("deployments") or [models[0].get("deployment_config") or {}]
    names = ("num_replicas", "autoscaling_config", "graceful_shutdown_timeout_s")
    return {name: told[name] for name in names if name in told}


def gpus(settings: Settings) -> float:
    """GPUs of all living nodes of the Ray cluster."""
    nodes = dashboard(settings, "/api/v0/nodes?detail=true")["data"]["result"]["result"]
    alive = [node for node in nodes if node["state"] == "ALIVE"]
    return sum(float((node.get("resources_total") or {}).get("GPU", 0)) for node in alive)


def require_gpu(settings: Settings, asked: str) -> None:
    """Raise UserError where the cluster has no GPU; `asked` is the setting that needs one."""
    if gpus(settings) < 1:
        raise UserError(
            f"{asked} needs a GPU, and the Ray cluster at {settings.ray_dashboard} has none; add a "
            f"node with one, or leave it out"
        )


def serve_api(settings: Settings, method: str, body: Any = None) -> Any:
    """Serve's answer. Raises UserError when it refuses, Unavailable when silent."""
    return dashboard(settings, "/api/serve/applications/", method, body)


def dashboard(settings: Settings, path: str, method: str = "GET", body: Any = None) -> Any:
    """What Ray's dashboard answers. Raises UserError when it refuses, Unavailable when silent."""
    token = settings.ray_token_path
    try:
        return call(
            f"{settings.ray_dashboard}{path}",
            body,
            method=method,
            token=token.read_text().strip() if token.exists() else None,
            timeout=60,
        )
    except Refused as error:
        raise UserError(f"Ray Serve refused: {error}") from error
    except OSError as error:
        raise Unavailable(
            f"Ray's dashboard at {settings.ray_dashboard} cannot be reached ({error}); "
            "start the stack: gristmill up"
        ) from error


def _declared(settings: Settings) -> list[dict[str, Any]]:
    """The configurations of all applications Serve was given by REST."""
    applications = serve_api(settings, "GET")["applications"].values()
    return [a["deployed_app_config"] for a in applications if a.get("deployed_app_config")]
