"""A stage: config and manifests in, one manifest out, cached by fingerprint, run as a Prefect task.

    @stage("extract", version=1)
    def extract(config: ExtractConfig, work: Workspace, *, crawl: Manifest) -> Outcome: ...

    pages = extract(params.extract, crawl=crawled)      # in a flow: returns a Manifest

Called inside a Prefect flow it is a task: Cached if the store has the manifest, else run under a
lease and committed. Called inside `planning()` nothing runs: each call is recorded with the reason
it would run or not, and returns the manifest as far as it is known. Anywhere else it simply runs.
"""

from __future__ import annotations

import datetime
import errno
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext, TaskRunContext
from prefect.states import Completed, State

from tasks.runtime import fingerprint as identities
from tasks.runtime.errors import Unavailable, Unfinished, UserError
from tasks.runtime.manifest import FileEntry, Manifest, Scalar
from tasks.runtime.planning import UNKNOWN, Planned, differences, plan_under_way
from tasks.runtime.progress import Progress, run_logger
from tasks.runtime.provenance import code_version, cpu_seconds, package_versions
from tasks.runtime.settings import Settings
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import MANIFEST, REPORT, Directory, Store
from tasks.state.leases import lease, wait_until_free
from tasks.state.tombstones import PURGE

C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Report:
    """Something a person reads on the run page: a table, Markdown or a link."""

    key: str
    kind: Literal["table", "markdown", "link"]
    body: Any
    description: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a stage says of what it made. Files found in its directory are added by the runner."""

    counts: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    world: Mapping[str, Scalar] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    content: str | None = None
    reports: tuple[Report, ...] = ()


@dataclass(frozen=True)
class Workspace(Directory):
    """The directory a stage writes into; invisible as an artifact until committed. Picklable.

    What stands there on entry was written by an earlier attempt at the same fingerprint: a shard
    stage skips shards that are there. Names starting with `_` are scratch (checkpoints, state):
    kept for resuming, never part of the artifact, removed on commit.
    """

    stage: str
    fingerprint: str
    home: Path

    @property
    def store(self) -> Store:
        return Store(self.uri, self.home / "cache")

    def scratch(self, name: str = "") -> Path:
        """A directory on this machine's disk that survives a restart, removed on commit."""
        path = self.home / "work" / f"{self.stage}-{self.fingerprint[:16]}" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def progress(self, label: str, total: float, unit: str, start: float = 0) -> Progress:
        return Progress(label, total, unit, start)


class Stage(Generic[C]):
    """A stage function with a name, a version and a place in the store."""

    def __init__(
        self,
        function: Callable[..., Outcome],
        name: str,
        version: int,
        retries: int,
        content_addressed: bool,
        still_true: Callable[[Manifest], bool] | None,
        foresee: Callable[[Any, Store], str] | None,
    ) -> None:
        self.function, self.name, self.version = function, name, version
        self.retries, self.content_addressed = retries, content_addressed
        self.still_true, self.foresee = still_true, foresee
        self.__doc__ = function.__doc__
        self.__name__ = name

    def fingerprint(self, config: C, inputs: Mapping[str, Manifest]) -> str:
        contents = {key: manifest.content for key, manifest in inputs.items()}
        return identities.fingerprint(self.name, self.version, config.resolve(), contents)

    def __call__(self, config: C, **inputs: Manifest) -> Manifest:
        planned = plan_under_way()
        if planned is not None:
            return self._plan(config, inputs, planned)
        if FlowRunContext.get() is None:
            return self.run(config, inputs)
        bodies = {key: manifest.model_dump(mode="json") for key, manifest in inputs.items()}
        state = self._task(config, bodies, return_state=True)
        return Manifest.model_validate(state.result())

    @cached_property
    def _task(self) -> Any:
        def run_stage(config: Any, inputs: dict[str, Any]) -> State[Any]:
            manifests = {key: Manifest.model_validate(body) for key, body in inputs.items()}
            found = self.find(config, manifests)
            if found is not None:
                publish(Store.open().of(found))
                return Completed(
                    name="Cached",
                    message=f"{self.name} {found.fingerprint[:12]} was made {found.created}",
                    data=found.model_dump(mode="json"),
                )
            manifest = self.run(config, manifests)
            return Completed(data=manifest.model_dump(mode="json"))

        return task(
            name=self.name,
            description=(self.__doc__ or "").strip().split("\n")[0],
            task_run_name=self.name,
            retries=self.retries,
            retry_delay_seconds=5,
            retry_condition_fn=is_worth_retrying,
            cache_policy=NO_CACHE,
            persist_result=False,
        )(run_stage)

    def find(self, config: C, inputs: Mapping[str, Manifest]) -> Manifest | None:
        """The artifact, if it is there and what it says of the outside world still holds."""
        found = Store.open().find(self.name, self.fingerprint(config, inputs))
        if found is None or (self.still_true is not None and not self.still_true(found)):
            return None
        return found

    def run(self, config: C, inputs: Mapping[str, Manifest]) -> Manifest:
        """Make the artifact, or return it if another run made it meanwhile."""
        settings = Settings.load()
        store = Store.open(settings)
        resolved = config.resolve()
        mark = self.fingerprint(config, inputs)
        directory = store.directory(self.name, mark)
        work = Workspace(directory.uri, directory.path, self.name, mark, settings.home)
        with lease(settings.database_url, f"{self.name}/{mark}", patience=24 * 3600):
            # In this order: a purge takes its lease first, then looks for those of stages, so that
            # one of the two sees the other.
            wait_until_free(
                settings.database_url,
                PURGE,
                lambda holder: run_logger().info(f"{self.name} waits for a purge by {holder}"),
            )
            found = self.find(config, inputs)
            if found is not None:
                return found
            begun, cpu = time.monotonic(), cpu_seconds()
            try:
                outcome = self.function(resolved, work, **inputs)
                manifest = self._commit(work, resolved, inputs, outcome, begun, cpu)
            except (Unavailable, Unfinished):
                raise
            except UserError:
                discard(work)
                raise
            except Exception as error:
                if is_full_disk(error):
                    raise UserError(
                        f"no space left on the disk of {work.path} during stage {self.name!r}; "
                        "free some there and run again: what was finished is kept"
                    ) from error
                raise
        publish(work)
        run_logger().info(f"{self.name} {mark[:12]} made in {time.monotonic() - begun:.1f} s")
        return manifest

    def _commit(
        self,
        work: Workspace,
        config: StageConfig,
        inputs: Mapping[str, Manifest],
        outcome: Outcome,
        begun: float,
        cpu: float,
    ) -> Manifest:
        reports = [vars(report) for report in outcome.reports]
        work.write_bytes(REPORT, json.dumps(reports, indent=1).encode())  # columns keep their order
        known = {entry.name: entry for entry in outcome.files}
        names = [n for n in work.names() if not n.startswith("_") and n != MANIFEST]
        manifest = Manifest(
            stage=self.name,
            version=self.version,
            fingerprint=work.fingerprint,
            content=outcome.content or work.fingerprint,
            inputs={key: m.fingerprint for key, m in inputs.items()},
            input_contents={key: m.content for key, m in inputs.items()},
            config=config.model_dump(mode="json"),
            counts=dict(outcome.counts),
            rules=dict(outcome.rules),
            metrics=dict(outcome.metrics),
            world={"machine": platform.machine(), **outcome.world},
            files=tuple(known.get(name) or work.entry(name) for name in names),
            code=code_version(),
            packages=package_versions(),
            cost={
                "wall_seconds": round(time.monotonic() - begun, 3),
                "driver_cpu_seconds": round(cpu_seconds() - cpu, 3),
            },
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        )
        work.write_bytes(MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
        clean_scratch(work)
        return manifest

    def _plan(self, config: C, inputs: Mapping[str, Manifest], planned: list[Planned]) -> Manifest:
        open_inputs = [key for key, m in inputs.items() if m.content == UNKNOWN]
        if open_inputs:
            why = f"depends on what {' and '.join(open_inputs)} will find"
            planned.append(Planned(self.name, UNKNOWN, "unknown", why))
            return self._stub(config, UNKNOWN, UNKNOWN)
        mark = self.fingerprint(config, inputs)
        found = self.find(config, inputs)
        if found is not None:
            erased = f", {found.not_replayable}" if found.not_replayable else ""
            planned.append(Planned(self.name, mark, "cached", f"made {found.created}{erased}"))
            return found
        foreseen = self.foresee(config, Store.open()) if self.foresee else ""
        why = "; ".join(filter(None, (self._why(config, inputs), foreseen)))
        planned.append(Planned(self.name, mark, "run", why))
        return self._stub(config, mark, UNKNOWN if self.content_addressed else mark)

    def _stub(self, config: C, mark: str, content: str) -> Manifest:
        return Manifest(
            stage=self.name,
            version=self.version,
            fingerprint=mark,
            content=content,
            config=config.resolve().model_dump(mode="json"),
        )

    def _why(self, config: C, inputs: Mapping[str, Manifest]) -> str:
        """What differs from the artifact of this stage that is nearest to the one asked for."""
        wanted = identities.identity(config.resolve(), self.name)
        best: list[str] | None = None
        for earlier in reversed(Store.open().all(self.name)):
            reasons = differences(earlier.config, wanted, self.name)
            if earlier.version != self.version:
                reasons.insert(0, f"{self.name} version {earlier.version} → {self.version}")
            reasons += [
                f"{key} changed"
                for key, manifest in inputs.items()
                if earlier.input_contents.get(key) != manifest.content
            ]
            if reasons and (best is None or len(reasons) < len(best)):
                best = reasons
        return "; ".join(best) if best else "never made before"


def stage(
    name: str,
    version: int,
    *,
    retries: int = 1,
    content_addressed: bool = False,
    still_true: Callable[[Manifest], bool] | None = None,
    foresee: Callable[[Any, Store], str] | None = None,
) -> Callable[[Callable[..., Outcome]], Stage[Any]]:
    """Make a function a stage. Raise `version` whenever the same config would give other output.

    `content_addressed` says that the outcome's `content` is known only after it ran. A stage whose
    result stands outside the store (a registered version, a served model) passes `still_true`: a
    manifest that no longer holds counts as missing. What `foresee` says of a run is in its plan.
    """

    def wrap(function: Callable[..., Outcome]) -> Stage[Any]:
        return Stage(function, name, version, retries, content_addressed, still_true, foresee)

    return wrap


def is_worth_retrying(_task: Any, _run: Any, state: State[Any]) -> bool:
    """A person's mistake stays one however often it is tried."""
    try:
        state.result()
    except Unavailable:
        return True
    except UserError:
        return False
    except Exception:
        return True
    return False


def is_full_disk(error: Exception) -> bool:
    """Whether a disk had no room; libraries that write files themselves say so only in words."""
    said = str(error).lower()
    full = "no space left on device" in said or "disk is full" in said
    return full or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def publish(directory: Directory) -> None:
    """Put an artifact's reports on the page of the present Prefect task run."""
    if TaskRunContext.get() is None:
        return
    for report in json.loads(directory.read_bytes(REPORT)):
        key, body, text = report["key"], report["body"], report["description"]
        if report["kind"] == "table":
            create_table_artifact(table=body, key=key, description=text)
        elif report["kind"] == "link":
            create_link_artifact(link=body, key=key, description=text)
        else:
            create_markdown_artifact(markdown=body, key=key, description=text)


def discard(work: Workspace) -> None:
    """Remove what an attempt wrote that cannot be continued."""
    work.remove()
    clean_scratch(work)


def clean_scratch(work: Workspace) -> None:
    for name in {name.split("/")[0] for name in work.names() if name.startswith("_")}:
        location = work.location(name)
        if work.filesystem.get_file_info(location).is_file:
            work.filesystem.delete_file(location)
        else:
            work.filesystem.delete_dir(location)
    shutil.rmtree(work.home / "work" / f"{work.stage}-{work.fingerprint[:16]}", ignore_errors=True)
