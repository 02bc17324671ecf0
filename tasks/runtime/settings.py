"""Where things are: addresses, ports and directories of the stack. Places never bear identity.

Values come, later ones winning, from the defaults, `<home>/settings.json` and environment
variables `GRISTMILL_<FIELD>`. A laptop uses the defaults; a cluster sets `GRISTMILL_STORE=s3://…`,
`GRISTMILL_PREFECT_API_URL`, `GRISTMILL_MLFLOW_URL`, `GRISTMILL_RAY_ADDRESS`, … and nothing else
changes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.runtime.errors import UserError


class Ports(BaseModel):
    """Loopback ports of the embedded stack, outside the range 10002–19999 that Ray workers use.

    Whatever Ray and HAProxy listen on by a fixed number is here, so that two stacks on one machine
    never meet; Ray chooses the rest itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefect: int = Field(4200, ge=1, le=65535)
    mlflow: int = Field(4201, ge=1, le=65535)
    site: int = Field(4202, ge=1, le=65535)
    ray_gcs: int = Field(4203, ge=1, le=65535)
    ray_dashboard: int = Field(8265, ge=1, le=65535)
    serve: int = Field(8000, ge=1, le=65535)
    ray_client: int = Field(4204, ge=1024, le=65535)
    ray_agent: int = Field(4205, ge=1024, le=65535)
    ray_metrics: int = Field(4206, ge=1024, le=65535)
    ray_autoscaler: int = Field(4207, ge=1024, le=65535)
    serve_fallback: int = Field(4208, ge=1024, le=65535)
    serve_metrics: int = Field(4209, ge=1024, le=65535)
    serve_stats: int = Field(4210, ge=1024, le=65535)


class Settings(BaseModel):
    """Resolved places of one Gristmill home."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    host: str = "127.0.0.1"
    ports: Ports = Ports()
    store: str | None = Field(None, description="artifact store: a directory or an s3:// URI")
    database: str | None = Field(None, description="SQLAlchemy URL of the state database")
    prefect_api_url: str | None = None
    mlflow_url: str | None = None
    ray_address: str | None = None
    ray_dashboard_url: str | None = None
    serve_url: str | None = None
    runner: str = Field("flows.deployments", description="module that serves the deployments")
    ray_cpus: int | None = Field(None, ge=1, description="logical CPUs of the embedded Ray node")
    ray_object_store_mb: int = Field(512, ge=80, description="MB of the embedded object store")
    source_roots: str | None = Field(
        None, description="directories that corpus sources may be read from, separated by colons"
    )

    @classmethod
    def load(cls, home: str | Path | None = None) -> Self:
        """Settings of `home`, else of `$GRISTMILL_HOME`, else of `.gristmill/`.

        Raises UserError naming the file or variable that holds an impossible value.
        """
        home = Path(home or os.environ.get("GRISTMILL_HOME") or ".gristmill").expanduser().resolve()
        values: dict[str, Any] = {}
        source = home / "settings.json"
        try:
            if source.exists():
                values = json.loads(source.read_text())
            for name in cls.model_fields:
                variable = f"GRISTMILL_{name.upper()}"
                if name not in ("home", "ports") and os.environ.get(variable):
                    values[name] = os.environ[variable]
            return cls(**(values | {"home": home}))
        except (ValidationError, json.JSONDecodeError, TypeError) as error:
            reason = str(error).replace("\n", " ")
            raise UserError(f"{source} or a GRISTMILL_* variable is wrong: {reason}") from error

    def save(self) -> None:
        """Write `<home>/settings.json` so that later commands find the same places."""
        self.home.mkdir(parents=True, exist_ok=True)
        values = self.model_dump(mode="json", exclude={"home"}, exclude_defaults=True)
        target = self.home / "settings.json"
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(values, indent=2) + "\n")
        partial.replace(target)

    @property
    def store_uri(self) -> str:
        return self.store or str(self.home / "store")

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.home / 'state.db'}"

    @property
    def prefect_api(self) -> str:
        return self.prefect_api_url or f"http://{self.host}:{self.ports.prefect}/api"

    @property
    def prefect_dashboard(self) -> str:
        return self.prefect_api.removesuffix("/api")

    @property
    def mlflow(self) -> str:
        return self.mlflow_url or f"http://{self.host}:{self.ports.mlflow}"

    @property
    def ray(self) -> str:
        return self.ray_address or f"{self.host}:{self.ports.ray_gcs}"

    @property
    def ray_dashboard(self) -> str:
        return self.ray_dashboard_url or f"http://{self.host}:{self.ports.ray_dashboard}"

    @property
    def serve(self) -> str:
        return self.serve_url or f"http://{self.host}:{self.ports.serve}"

    @property
    def site(self) -> str:
        return f"http://{self.host}:{self.ports.site}"

    @property
    def ray_token_path(self) -> Path:
        return self.home / "ray.token"

    def environment(self) -> dict[str, str]:
        """Variables every process of the stack needs; telemetry is off everywhere."""
        environment = {
            "GRISTMILL_HOME": str(self.home),
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": self.prefect_api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "DO_NOT_TRACK": "1",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Embedded, Ray otherwise takes 127.0.0.1 as the machine's public address and listens
            # everywhere. Said both ways, as other settings may have been applied before.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if self.ray_address is None else "1",
        }
        if self.ray_token_path.exists():
            environment |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.ray_token_path),
            }
        return environment

    def apply(self) -> None:
        """Put `environment()` into this process, before Prefect, Ray or MLflow are imported."""
        os.environ.update(self.environment())
