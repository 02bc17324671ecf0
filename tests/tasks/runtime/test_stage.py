"""A stage is made once, found again, resumed and explained."""

import errno

import pytest
from prefect import flow
from prefect.client.schemas.objects import State, StateType
from prefect.testing.utilities import prefect_test_harness

from tasks.runtime.errors import Unavailable, Unfinished, UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import planning
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace, is_full_disk, is_worth_retrying, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store

calls: list[str] = []


class CutConfig(StageConfig):
    size: int = 3
    workers: int = place(2)


class SumConfig(StageConfig):
    scale: float = 1.0


@stage("cut", version=1, retries=0)
def cut(config: CutConfig, work: Workspace) -> Outcome:
    """Write one file per number."""
    calls.append("cut")
    if config.size < 0:
        raise UserError(f"size {config.size} < 0; give a positive size")
    for number in range(config.size):
        if not work.has(f"part-{number}.json"):
            calls.append(f"part {number}")
            work.write_json(f"part-{number}.json", number)
        if config.size == 7 and number == 4 and calls.count("cut") == 1:
            raise ConnectionError("the machine went away")
        if config.size == 8 and number == 4 and calls.count("cut") == 1:
            raise Unavailable("no cluster answers; start it with: gristmill up")
        if config.size == 10 and number == 4 and calls.count("cut") == 1:
            raise Unfinished("a loss that is no number")
        if config.size == 9 and number == 4 and calls.count("cut") == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
    work.write_json("_state.json", "scratch")
    return Outcome(
        counts={"parts": config.size},
        reports=(Report("cut", "table", [{"parts": config.size}]),),
    )


@stage("sum", version=1, retries=0)
def add(config: SumConfig, work: Workspace, *, parts: Manifest) -> Outcome:
    """Add the numbers up."""
    calls.append("sum")
    directory = work.store.of(parts)
    total = sum(int(directory.read_bytes(name)) for name in parts.names("part-"))
    return Outcome(metrics={"total": total * config.scale})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    calls.clear()
    return tmp_path / "home"


def test_the_same_config_is_made_once_whatever_the_places() -> None:
    first = cut(CutConfig(workers=1))
    second = cut(CutConfig(workers=8))
    assert first == second
    assert calls.count("cut") == 1
    assert cut(CutConfig(size=4)).fingerprint != first.fingerprint


def test_an_artifact_lists_its_files_with_digests_and_no_scratch() -> None:
    manifest = cut(CutConfig())
    assert manifest.names("part-") == ["part-0.json", "part-1.json", "part-2.json"]
    assert not any(name.startswith("_") for name in Store.open().of(manifest).names())
    Store.open().verify(manifest)
    Store.open().of(manifest).write_bytes("part-1.json", b"9")
    with pytest.raises(UserError, match=r"part-1.json differs"):
        Store.open().verify(manifest)


def test_an_interrupted_stage_is_invisible_and_resumes_at_the_shard() -> None:
    with pytest.raises(ConnectionError):
        cut(CutConfig(size=7))
    assert Store.open().all("cut") == []
    manifest = cut(CutConfig(size=7))
    assert manifest.counts["parts"] == 7
    assert [call for call in calls if call.startswith("part")] == [f"part {n}" for n in range(7)]


@pytest.mark.parametrize(("size", "error"), [(8, Unavailable), (10, Unfinished)])
def test_what_was_made_is_kept_where_it_may_be_gone_on_from(
    size: int, error: type[UserError]
) -> None:
    with pytest.raises(error):
        cut(CutConfig(size=size))
    assert Store.open().all("cut") == []
    assert cut(CutConfig(size=size)).counts["parts"] == size
    assert [call for call in calls if call.startswith("part")] == [f"part {n}" for n in range(size)]


def test_a_service_that_does_not_answer_is_worth_another_try_and_a_mistake_is_not() -> None:
    def failed(error: Exception) -> bool:
        return is_worth_retrying(None, None, State(type=StateType.FAILED, data=error))

    assert failed(Unavailable("no cluster answers"))
    assert failed(ConnectionError("the machine went away"))
    assert not failed(UserError("size -1 < 0"))


def test_a_full_disk_is_told_in_a_sentence_and_keeps_what_was_finished() -> None:
    with pytest.raises(UserError, match=r"no space left on the disk of .*cut.*free some"):
        cut(CutConfig(size=9))
    assert Store.open().all("cut") == []
    assert cut(CutConfig(size=9)).counts["parts"] == 9
    assert [call for call in calls if call.startswith("part")] == [f"part {n}" for n in range(9)]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("the machine went away"), False),
    ],
)
def test_a_full_disk_is_known_however_a_library_says_it(error: Exception, full: bool) -> None:
    assert is_full_disk(error) is full


def test_a_users_mistake_leaves_nothing_behind(home) -> None:
    with pytest.raises(UserError, match="size -1 < 0"):
        cut(CutConfig(size=-1))
    assert not [path for path in (home / "store").rglob("*") if path.is_file()]


def test_plan_says_what_is_cached_and_why_something_runs() -> None:
    parts = cut(CutConfig())
    add(SumConfig(), parts=parts)
    with planning() as planned:
        add(SumConfig(scale=2.0), parts=cut(CutConfig()))
        add(SumConfig(), parts=cut(CutConfig(size=5)))
    assert [(p.stage, p.status) for p in planned] == [
        ("cut", "cached"),
        ("sum", "run"),
        ("cut", "run"),
        ("sum", "run"),
    ]
    assert planned[1].why == "sum.scale 1.0 → 2.0"
    assert planned[2].why == "cut.size 3 → 5"
    assert planned[3].why == "parts changed"
    assert calls.count("sum") == 1


def test_a_flow_shows_a_made_stage_as_cached() -> None:
    @flow
    def chain() -> float:
        return float(add(SumConfig(), parts=cut(CutConfig())).metrics["total"] or 0)

    with prefect_test_harness(server_startup_timeout=120):
        assert chain() == 3.0
        state = chain(return_state=True)
        assert state.is_completed()
        names = task_run_states()
    assert calls.count("sum") == 1
    assert sorted(names) == ["Cached", "Cached", "Completed", "Completed"]


def task_run_states() -> list[str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import TaskRunSort

    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(sort=TaskRunSort.ID_DESC, limit=100)
        return [run.state.name for run in runs if run.state]


def test_settings_come_from_the_environment_over_the_file(home, monkeypatch) -> None:
    Settings(home=home, mlflow_url="http://file").save()
    assert Settings.load().mlflow == "http://file"
    monkeypatch.setenv("GRISTMILL_MLFLOW_URL", "http://environment")
    assert Settings.load().mlflow == "http://environment"
    (home / "settings.json").write_text('{"prots": {}}')
    with pytest.raises(UserError, match="prots"):
        Settings.load()
