"""vLLM through ray.serve.llm, as far as a machine without GPU and vLLM can tell.

The configuration is checked by the classes of the installed Ray that will read it (ray.serve.llm
itself cannot be imported without vLLM), the state of a running application by the form that Serve
gives it. No vLLM has been met.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from ray.serve.schema import ServeApplicationSchema

from flows.deploy import DeployConfig
from serve import vllm
from serve.deploy import deploy, fingerprint_of, served
from serve.specification import EngineOptions
from tasks.registry.models import Version
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import MANIFEST, Store
from tasks.state.api_keys import ApiKeys

ENGINE = EngineOptions(kind="vllm", weights="bfloat16", slots=64, max_waiting=9, speculate=4)


class Ray(BaseHTTPRequestHandler):
    """A cluster's dashboard and the endpoint behind it: one node, and what was last declared."""

    gpus: ClassVar[float] = 1.0
    told: ClassVar[list[dict[str, Any]]] = []
    status: ClassVar[str] = "RUNNING"

    def do_GET(self) -> None:
        applications = {
            one["name"]: {"status": self.status, "message": "no room", "deployed_app_config": one}
            for one in self.told
        }
        node = {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": self.gpus}}
        gone = {"state": "DEAD", "resources_total": {"GPU": 8.0}}
        self.answer(
            {
                "/api/v0/nodes?detail=true": {"data": {"result": {"result": [node, gone]}}},
                "/api/serve/applications/": {"applications": applications},
                "/v1/models": {"data": [{"id": "gristmill"}]},
            }.get(self.path)
        )

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).told = body["applications"]
        self.answer({})

    def answer(self, body: object) -> None:
        self.send_response(404 if body is None else 200)
        data = json.dumps(body).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of a stack whose cluster has a GPU and vLLM."""
    found = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "vllm" else found(name)
    )
    Ray.gpus, Ray.told, Ray.status = 1.0, [], "RUNNING"
    with ThreadingHTTPServer(("127.0.0.1", 0), Ray) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield Settings(home=tmp_path, serve_url=url, ray_dashboard_url=url)
        server.shutdown()


def registered(settings: Settings) -> tuple[Version, Manifest]:
    """A version whose artifact is a directory of the store."""
    directory = Store.open(settings).directory("finetune", "f" * 64)
    file = directory.write_bytes("config.json", b"{}")
    manifest = Manifest(
        stage="finetune", version=1, fingerprint="f" * 64, content="f" * 64, files=(file,)
    )
    directory.write_bytes(MANIFEST, manifest.model_dump_json().encode())
    version = Version(
        model="gristmill",
        version="3",
        run_id="a-run",
        artifact=f"finetune/{'f' * 64}",
        aliases=(),
        scores={},
        created=0.0,
        lineage={},
    )
    return version, manifest


def test_rays_own_classes_take_the_configuration(tmp_path: Path) -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    declared = vllm.application("gristmill", "gristmill-3-abc", tmp_path, ENGINE, 1, 4)
    ServeApplicationSchema.model_validate({"name": "gristmill", **declared})
    (config,) = declared["args"]["llm_configs"]
    read = LLMConfig.model_validate(config)
    assert read.model_loading_config.model_id == "gristmill"
    assert read.model_loading_config.model_source == str(tmp_path)
    assert read.accelerator_config.kind == "gpu"
    assert read.engine_kwargs["max_num_seqs"] == 64 and read.engine_kwargs["dtype"] == "bfloat16"
    assert read.engine_kwargs["speculative_config"]["num_speculative_tokens"] == 4
    assert read.deployment_config["autoscaling_config"]["max_replicas"] == 4
    assert read.deployment_config["max_queued_requests"] == 9
    assert read.deployment_config["graceful_shutdown_timeout_s"] == 120


def test_a_version_is_declared_and_known_again(cluster: Settings) -> None:
    version, artifact = registered(cluster)
    name = deploy(cluster, version, artifact, engine=ENGINE)
    assert name == fingerprint_of(version)
    (told,) = Ray.told
    assert told["import_path"] == "ray.serve.llm:build_openai_app"
    assert Path(told["args"]["llm_configs"][0]["model_loading_config"]["model_source"]).is_dir()
    assert served(cluster)["shares"] == {name: 1.0}
    Ray.status = "DEPLOYING"
    assert served(cluster)["shares"] == {}


def test_what_is_missing_is_said_in_one_sentence(
    cluster: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, artifact = registered(cluster)

    def refused(**more: Any) -> str:
        with pytest.raises(UserError) as error:
            deploy(cluster, version, artifact, engine=ENGINE, **more)
        assert Ray.told == []
        return str(error.value)

    assert "one version without a draft model" in refused(draft=version)
    ApiKeys(cluster.database_url).create("a team")
    assert "without asking for the API keys" in refused()
    Ray.gpus = 0.0
    assert "needs a GPU, and the Ray cluster at http://127" in refused()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs vLLM, which is not installed: pip install 'gristmill[vllm]'" in refused()


def test_our_own_engine_on_a_gpu_is_refused_where_there_is_none(cluster: Settings) -> None:
    version, artifact = registered(cluster)
    Ray.gpus = 0.0
    with pytest.raises(UserError, match=r"engine\.device cuda needs a GPU, and the Ray cluster"):
        deploy(cluster, version, artifact, engine=EngineOptions(device="cuda"))
    assert Ray.told == []


def test_a_start_that_fails_says_what_serve_says(cluster: Settings) -> None:
    version, artifact = registered(cluster)
    Ray.status = "DEPLOY_FAILED"
    with pytest.raises(UserError, match="could not start vLLM: no room"):
        deploy(cluster, version, artifact, engine=ENGINE)


def test_the_form_takes_it() -> None:
    config = DeployConfig.model_validate({"engine": {"kind": "vllm", "weights": "bfloat16"}})
    assert config.engine.kind == "vllm"
