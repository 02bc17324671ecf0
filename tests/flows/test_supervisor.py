"""The supervisor against real services: started, killed, healed, stopped."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from killable_stack import KillableStack, is_over, settings_with_free_ports, until

from flows import processes
from flows.processes import Record
from flows.supervisor import Busy, Supervisor, cut_log
from tasks.runtime.errors import UserError
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings


def processes_of(settings: Settings) -> list[psutil.Process]:
    """Everything that names the home in its command line or environment, besides this test."""
    wanted = str(settings.home).encode()
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            command = "\0".join(process.cmdline()).encode()
        except psutil.Error:
            continue
        if wanted in command + b"\0".join(processes.environment_of(process.pid)):
            found.append(process)
    return found


# The whole stack


def test_everything_is_healthy_and_listens_only_on_loopback(killable: KillableStack) -> None:
    assert set(killable.states().values()) == {"healthy"}
    for status in killable.supervisor.status():
        if status.pid is None:
            continue
        record = killable.record(status.name)
        for process in processes.members(record, killable.supervisor.mark(status.name)):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    address = connection.laddr.ip.removeprefix("::ffff:")
                    assert address == "127.0.0.1", (status.name, process, connection)


def test_up_again_changes_nothing(killable: KillableStack) -> None:
    names = [status.name for status in killable.supervisor.status()]
    before = {name: killable.record(name) for name in names}
    Supervisor(killable.settings).up()
    assert {name: killable.record(name) for name in names} == before


def test_the_ray_dashboard_wants_the_token_and_its_file_is_private(killable: KillableStack) -> None:
    settings = killable.settings
    assert stat.S_IMODE(settings.ray_token_path.stat().st_mode) == 0o600
    jobs = f"{settings.ray_dashboard}/api/jobs/"
    with pytest.raises(Refused):
        call(jobs)
    assert isinstance(call(jobs, token=settings.ray_token_path.read_text()), list)


def test_prefect_answers_no_other_origin(killable: KillableStack) -> None:
    import urllib.error
    import urllib.request

    def allowed(origin: str) -> str | None:
        request = urllib.request.Request(
            f"{killable.settings.prefect_api}/flow_runs/filter",
            method="OPTIONS",
            headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                return str(response.headers["Access-Control-Allow-Origin"])
        except urllib.error.HTTPError as error:
            return error.headers["Access-Control-Allow-Origin"]

    assert allowed("https://elsewhere.example") is None
    assert allowed(killable.settings.prefect_dashboard) == killable.settings.prefect_dashboard


def test_services_can_be_interrupted_and_hold_no_lock(killable: KillableStack) -> None:
    for name in ("prefect", "mlflow", "site", "worker", "watcher"):
        pid = killable.record(name).pid
        status = Path(f"/proc/{pid}/status").read_text()
        ignored = int(status.split("SigIgn:")[1].split()[0], 16)
        assert not ignored & 1 << (signal.SIGINT - 1), name
        targets = {entry.readlink() for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert killable.settings.home / "run" / "lock" not in targets


def test_the_watcher_restarts_killed_services(killable: KillableStack) -> None:
    before = {name: killable.record(name).pid for name in ("worker", "site", "mlflow")}
    for name in before:
        killable.kill(name)
    until(
        lambda: all(
            (record := killable.supervisor.record(name)) is not None
            and record.pid != pid
            and killable.states()[name] == "healthy"
            for name, pid in before.items()
        )
    )
    assert set(killable.states().values()) == {"healthy"}


def test_up_heals_what_died_while_nobody_watched(killable: KillableStack) -> None:
    killable.kill("watcher")
    killable.kill("site")
    frozen = psutil.Process(killable.record("worker").pid)
    (killable.settings.home / "run" / "worker.json").write_text("{half a rec")
    assert killable.states()["site"] == "crashed"
    killable.supervisor.up()
    assert set(killable.states().values()) == {"healthy"}
    assert is_over(frozen)  # without a record it was found by its mark


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["raylet", "gcs_server", "haproxy"])
def test_the_watcher_mends_the_inside_of_ray(killable: KillableStack, victim: str) -> None:
    record = killable.record("ray")
    for process in processes.members(record, killable.supervisor.mark("ray")):
        if victim in process.name():
            process.kill()
            break
    else:
        raise AssertionError(f"no {victim} is running")
    time.sleep(3)
    until(lambda: set(killable.states().values()) == {"healthy"}, 180)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefect", "mlflow", "ray", "site", "worker", "watcher"])
def test_up_heals_any_kill(killable: KillableStack, name: str) -> None:
    killable.kill("watcher")
    if name != "watcher":
        killable.kill(name)
    killable.supervisor.up()
    assert set(killable.states().values()) == {"healthy"}


@pytest.mark.slow
def test_up_restarts_a_service_that_hangs(killable: KillableStack) -> None:
    stopped = killable.record("mlflow")
    for process in processes.members(stopped, killable.supervisor.mark("mlflow")):
        process.suspend()
    killable.supervisor.up()
    assert killable.record("mlflow").pid != stopped.pid
    assert set(killable.states().values()) == {"healthy"}


def test_down_leaves_nothing(killable: KillableStack) -> None:
    from flows.runs import Runs
    from flows.services import ray_directory

    runs = Runs(killable.settings)
    until(lambda: killable.states()["worker"] == "healthy")
    run = runs.trigger("sleeper", {"nap": {"seconds": 300}})
    until(lambda: runs.ask(f"flow_runs/{run['id']}")["state_type"] == "RUNNING")
    assert processes_of(killable.settings)
    killable.supervisor.down()
    assert processes_of(killable.settings) == []
    assert set(killable.states().values()) == {"stopped"}
    assert not ray_directory(killable.settings).exists()
    for port in killable.settings.ports.model_dump().values():
        assert processes.port_holder(killable.settings.host, port) is None
    killable.supervisor.down()  # harmless


# Its parts


def test_a_taken_port_names_its_holder_and_starts_nothing(
    tmp_path: Path, listener: socket.socket
) -> None:
    settings = settings_with_free_ports(tmp_path / "home")
    port = listener.getsockname()[1]
    ports = settings.ports.model_copy(update={"mlflow": port})
    supervisor = Supervisor(settings.model_copy(update={"ports": ports}))
    with pytest.raises(UserError) as told:
        supervisor.up()
    assert f"port {port} for mlflow" in str(told.value)
    assert f"process {os.getpid()} (" in str(told.value)
    assert "--ports mlflow=PORT" in str(told.value)
    assert {status.state for status in supervisor.status()} == {"stopped"}


def test_a_service_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    settings = settings_with_free_ports(tmp_path / "home")
    prefect, mlflow, ray = "http://127.0.0.1:1/api", "http://127.0.0.1:1", "127.0.0.1:1"
    elsewhere = settings.model_copy(
        update={
            "prefect_api_url": prefect,
            "mlflow_url": mlflow,
            "ray_address": ray,
            "runner": "flows.no_such_runner",
        }
    )
    supervisor = Supervisor(elsewhere)
    assert set(supervisor.services) == {"site", "worker"}  # the rest stands elsewhere
    try:
        with pytest.raises(UserError, match=r"No module named flows\.no_such_runner"):
            supervisor.up()
    finally:
        supervisor.down()


def test_only_one_changes_a_home_at_a_time(tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(home=tmp_path))
    with supervisor.lock():
        with pytest.raises(Busy, match=f"process {os.getpid()}"), supervisor.lock(patience=0):
            pass
        with pytest.raises(UserError, match="has been changing"), supervisor.lock(patience=0.3):
            pass
    with supervisor.lock(patience=0):
        pass


def test_a_recycled_pid_is_not_ours(
    tmp_path: Path, ended: Callable[[psutil.Popen], psutil.Popen]
) -> None:
    stranger = ended(psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
    path = tmp_path / "run" / "mlflow.json"
    Record(stranger.pid, "1", processes.boot_id(), 0.0, ("mlflow",), ()).write(path)
    supervisor = Supervisor(Settings(home=tmp_path))
    assert supervisor.record("mlflow") is not None
    assert {status.state for status in supervisor.status()} == {"stopped", "crashed"}
    supervisor.down()
    assert not is_over(stranger)


def test_a_service_ends_with_its_children_in_other_sessions(tmp_path: Path) -> None:
    child = "import subprocess as s; s.run(['sleep', '77'], start_new_session=True)"
    program = f"import subprocess as s, sys; s.run([sys.executable, '-c', {child!r}])"
    record = processes.spawn(
        [sys.executable, "-c", program], {}, os.environ, "home#it", tmp_path / "it.log", tmp_path
    )
    until(lambda: len(processes.members(record, "home#it")) == 3)
    assert processes.members(record, "home#another") != []  # by its session
    processes.terminate(record, "home#it", 1)
    assert processes.members(record, "home#it") == []
    assert not record.alive


def test_another_service_started_by_a_member_is_no_member(tmp_path: Path) -> None:
    inner = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = (
        "import os, subprocess as s; "
        f"s.run({inner!r}, env=os.environ | {{{processes.MARK!r}: 'home#inner'}}, "
        "start_new_session=True)"
    )
    outer = [sys.executable, "-c", program]
    record = processes.spawn(outer, {}, os.environ, "home#outer", tmp_path / "log", tmp_path)
    until(lambda: len(processes.members(None, "home#inner")) == 1)
    assert [process.pid for process in processes.members(record, "home#outer")] == [record.pid]
    assert processes.marks_of_home("home") == {"home#outer", "home#inner"}
    processes.terminate(None, "home#inner", 1)
    processes.terminate(record, "home#outer", 1)


def test_a_log_is_cut_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    program = "import sys; [print(i, flush=True) for i in iter(lambda: sys.stdin.readline(), '')]"
    with log.open("ab") as output:
        writer = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=output, text=True
        )
    assert writer.stdin is not None
    writer.stdin.write("first\n")
    writer.stdin.flush()
    until(lambda: b"first" in log.read_bytes())
    cut_log(log, 0)
    writer.stdin.write("second\n")
    writer.stdin.close()
    writer.wait()
    assert b"first" in (tmp_path / "it.log.1").read_bytes()
    assert log.read_bytes().strip() == b"second"
