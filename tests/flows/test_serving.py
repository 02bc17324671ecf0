"""What is served when Serve is started anew: the last deploy, while it can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import serving
from flows.deploy import DeployConfig, ServedConfig, serve_version
from serve.deploy import fingerprint_of
from tasks.registry import models
from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import MANIFEST, Store


class Stack:
    """A registry and a store with deploys; `served` is what Serve was told after a restart."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.store = settings, Store.open(settings)
        self.known: list[models.Version] = []
        self.broken: set[str] = set()
        self.deploys = 0
        self.served: list[tuple[str, dict[str, Any]]] = []
        monkeypatch.setattr(models, "models", lambda: sorted({v.model for v in self.known}))
        monkeypatch.setattr(models, "versions", self._versions)
        monkeypatch.setattr("flows.deploy.deploy_version", self._write)
        monkeypatch.setattr(serving, "deploy", self._serve)

    def _versions(self, model: str) -> list[models.Version]:
        return [one for one in self.known if one.model == model]

    def register(self, model: str, number: str, *aliases: str) -> None:
        artifact = f"finetune/{model}{number}"
        self._commit("finetune", f"{model}{number}")
        created = float(len(self.known))
        version = models.Version(model, number, "run", artifact, aliases, {}, created, {})
        self.known.append(version)

    def move(self, model: str, alias: str, number: str) -> None:
        for index, one in enumerate(self.known):
            if one.model == model:
                left = [name for name in one.aliases if name != alias]
                aliases = (*left, alias) if one.version == number else tuple(left)
                self.known[index] = replace(one, aliases=aliases)

    def deploy(self, model: str, named: str, **values: Any) -> None:
        """As the flow does it."""
        config = DeployConfig.model_validate(values)
        serve_version(config, models.get(model, named), named)

    def restart(self) -> tuple[str, dict[str, Any]]:
        serving.serve_again(self.settings)
        return self.served[-1]

    def _write(self, config: ServedConfig) -> None:
        self.deploys += 1
        mark = f"{self.deploys:064}"
        self._commit("deploy", mark, config=config.model_dump(mode="json"), created=f"2026-{mark}")

    def _commit(self, stage: str, mark: str, **more: Any) -> None:
        manifest = Manifest(
            stage=stage, version=1, fingerprint=mark, content=mark, files=(), **more
        )
        directory = self.store.directory(stage, mark)
        directory.write_bytes(MANIFEST, manifest.model_dump_json().encode())

    def _serve(
        self, settings: Settings, version: models.Version, artifact: Manifest, **options: Any
    ) -> str:
        name = f"{version.model}@{version.version}"
        assert artifact.fingerprint == version.fingerprint
        if name in self.broken:
            raise UserError(f"{name} cannot be served: its weights are gone")
        self.served.append((name, options))
        return fingerprint_of(version)


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    made = Stack(Settings(home=tmp_path, store=str(tmp_path / "store")), monkeypatch)
    made.register("ours", "1")
    made.register("ours", "2", "champion")
    made.register("other", "1", "champion")
    return made


def beside(options: dict[str, Any]) -> list[tuple[str, str, float]]:
    found = options["beside"]
    return [(one.version.model, one.version.version, one.share) for one in found]


def test_before_any_deploy_it_is_the_newest_champion(stack: Stack) -> None:
    assert stack.restart()[0] == "other@1"
    stack.known.clear()
    stack.served.clear()
    assert serving.serve_again(stack.settings) is None and not stack.served


def test_a_version_that_was_gone_back_to_stays(stack: Stack) -> None:
    stack.deploy("ours", "champion")
    stack.deploy("ours", "1", replicas=2, beside=["other"], engine={"slots": 4})
    name, options = stack.restart()
    assert name == "ours@1" and options["replicas"] == 2 and options["engine"].slots == 4
    assert beside(options) == [("other", "1", 1.0)]
    stack.move("ours", "champion", "1")
    stack.move("ours", "champion", "2")
    assert stack.restart()[0] == "ours@1"


def test_what_was_named_by_an_alias_follows_it(stack: Stack) -> None:
    stack.register("ours", "3", "challenger")
    stack.register("ours", "4")
    stack.deploy("ours", "champion", canary="challenger", canary_share=0.2, beside=["ours@1"])
    name, options = stack.restart()
    assert name == "ours@2" and beside(options) == [("ours", "3", 0.2), ("ours", "1", 0.0)]
    stack.move("ours", "challenger", "4")
    name, options = stack.restart()
    assert name == "ours@2" and beside(options) == [("ours", "4", 0.2), ("ours", "1", 0.0)]
    stack.move("ours", "champion", "4")  # the canary is the main one now
    name, options = stack.restart()
    assert name == "ours@4" and beside(options) == [("ours", "1", 0.0)]


def test_a_version_that_can_no_longer_be_served_gives_way_to_the_champion(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    stack.deploy("ours", "1", replicas=3, beside=["other"])
    stack.broken.add("ours@1")
    name, options = stack.restart()
    assert name == "ours@2" and options["replicas"] == 3 and "beside" not in options
    told = capsys.readouterr().err
    assert "the champion takes its place: ours@1 cannot be served: its weights are gone" in told
    stack.known = [one for one in stack.known if (one.model, one.version) != ("ours", "1")]
    assert stack.restart()[0] == "ours@2"
    assert "no version or alias '1'" in capsys.readouterr().err
    stack.broken.add("ours@2")
    with pytest.raises(UserError, match="ours@2 cannot be served"):
        stack.restart()


def test_one_beside_it_that_is_gone_is_left_out(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    stack.deploy("ours", "1", beside=["other@1", "ours@2"])
    Path(stack.store.directory("finetune", "other1").path, MANIFEST).unlink()
    name, options = stack.restart()
    assert name == "ours@1" and beside(options) == [("ours", "2", 0.0)]
    assert "other@1: the store has no artifact finetune/other1" in capsys.readouterr().err


def test_another_version_under_the_same_number_is_not_taken_for_it(stack: Stack) -> None:
    """As in a registry that was begun anew."""
    stack.deploy("ours", "1")
    stack.known[0] = replace(stack.known[0], artifact="finetune/ours2")
    assert stack.restart()[0] == "ours@2"


def test_a_deploy_of_before_these_names_keeps_its_version(stack: Stack) -> None:
    stack.deploy("ours", "1")
    (before,) = stack.store.all("deploy")
    del before.config["version"]["asked"]
    stack._commit("deploy", before.fingerprint, config=before.config, created=before.created)
    assert stack.restart()[0] == "ours@1"


def test_a_deploy_that_comes_meanwhile_is_not_replaced(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten(*_: Any, **__: Any) -> str:
        raise Unavailable("Ray Serve was told to serve another version meanwhile")

    stack.deploy("ours", "1")
    monkeypatch.setattr(serving, "deploy", forgotten)
    with pytest.raises(Unavailable):
        stack.restart()
