"""The command `gristmill` as a person types it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killable_stack import KillableStack

from flows.cli import main, with_intervals
from tasks.runtime.settings import Settings

CHECKOUT = Path(__file__).resolve().parents[2]


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "--home", str(home), *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def gristmill(home: Path, *arguments: str) -> tuple[int, str]:
    process = start(home, *arguments)
    output, _ = process.communicate(timeout=120)
    assert "Traceback" not in output, output
    return process.returncode, output


def test_a_watched_run_is_followed_to_its_end(killable: KillableStack) -> None:
    home = killable.settings.home
    code, output = gristmill(home, "run", "sleeper", "--set", "nap.seconds=2", "--watch")
    assert code == 0, output
    assert re.search(r"sleep\S*\s+Completed", output)
    assert re.search(r"run \S+ completed after", output)
    assert f"{killable.settings.prefect_dashboard}/v2/runs/flow-run/" in output


def test_a_failed_run_shows_why_and_where(killable: KillableStack) -> None:
    arguments = ("--set", "fail=true", "--set", "nap.seconds=0", "--watch")
    code, output = gristmill(killable.settings.home, "run", "sleeper", *arguments)
    assert code == 1
    assert "the bed broke" in output
    assert "its page: http" in output


def test_wrong_parameters_start_nothing(killable: KillableStack) -> None:
    home = killable.settings.home
    code, output = gristmill(home, "run", "sleeper", "--set", "nap.second=2")
    assert code == 1
    assert output.strip() == (
        "gristmill: sleeper has no parameter 'nap.second'; did you mean seconds?"
    )


def test_an_interrupted_watch_leaves_the_run_which_can_be_cancelled(
    killable: KillableStack,
) -> None:
    home = killable.settings.home
    watching = start(home, "run", "sleeper", "--set", "nap.seconds=300", "--watch")
    assert watching.stdout is not None
    lines = []
    for line in watching.stdout:
        lines.append(line)
        if re.search(r"sleep\S*\s+Running", line):
            break
    watching.send_signal(signal.SIGINT)
    rest, _ = watching.communicate(timeout=30)
    assert watching.returncode == 130, rest
    told = re.search(r"run (\S+) goes on; cancel it with: gristmill cancel \1", rest)
    assert told, "".join(lines) + rest
    begun = time.monotonic()
    assert gristmill(home, "cancel", told[1]) == (0, f"run {told[1]} cancelled\n")
    assert time.monotonic() - begun < 60
    code, output = gristmill(home, "cancel", told[1])
    assert (code, output) == (1, f"gristmill: run {told[1]} is over already: Cancelled\n")


def test_status_shows_every_service_and_how_to_log_in(killable: KillableStack) -> None:
    code, output = gristmill(killable.settings.home, "status")
    assert code == 0
    for name in ("prefect", "mlflow", "ray", "site", "worker", "serve", "watcher"):
        assert re.search(rf"^{name}\s+healthy", output, re.MULTILINE)
    assert f"cat {killable.settings.ray_token_path}" in output


def test_the_doctor_knows_our_own_ports(killable: KillableStack) -> None:
    code, output = gristmill(killable.settings.home, "doctor")
    assert re.search(rf"{len(killable.settings.ports.model_fields_set)} free or our own", output)
    assert code == 0 or "memory" in output


def test_a_question_without_a_model_says_what_to_do(killable: KillableStack) -> None:
    code, output = gristmill(killable.settings.home, "ask", "why?")
    assert code == 1
    assert "no model is served" in output
    assert "gristmill run pipeline" in output


def test_models_of_an_empty_registry(killable: KillableStack) -> None:
    code, output = gristmill(killable.settings.home, "models")
    assert code == 0
    assert "no model is registered yet" in output


def test_logs_of_one_service(killable: KillableStack) -> None:
    code, output = gristmill(killable.settings.home, "logs", "prefect", "-n", "200")
    assert code == 0
    assert killable.settings.prefect_dashboard in output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("ask", "why?"), "no endpoint answers at http://127.0.0.1:8000; start the stack"),
        (("ask", " "), "the question is empty; ask one"),
        (("models",), "MLflow does not answer at http://127.0.0.1:4201; start it: gristmill up"),
        (("cancel", "some-run"), "Prefect does not answer at http://127.0.0.1:4200/api"),
        (("logs", "mlflow"), "mlflow has not written a log"),
        (("doctor", "--ports", "nope=1"), "is not NAME=NUMBER; names are prefect, mlflow"),
        (("doctor", "--serve-port", "12345"), "among Ray's worker ports 10002-19999"),
        (("doctor", "--serve-port", "4200"), "port 4200 for prefect is given twice"),
        (("doctor", "--serve-port", "70000"), "port 70000 for serve"),
    ],
)
def test_without_a_stack_every_command_says_what_to_do(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    told: str,
) -> None:
    if any(is_taken(port) for port in (4200, 4201, 8000)):
        pytest.skip("somebody's stack is on the default ports of this machine")
    assert main(["--home", str(tmp_path), *arguments]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert len(said.strip().splitlines()) == 1


def is_taken(port: int) -> bool:
    from flows.processes import port_holder

    return port_holder("127.0.0.1", port) is not None


def test_status_of_nothing_fails_and_says_how_to_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--home", str(tmp_path)]) == 1
    assert "start it: gristmill up" in capsys.readouterr().out


def test_ports_are_kept_for_later_commands(tmp_path: Path) -> None:
    import argparse

    from flows.cli import parser, with_ports

    arguments = parser().parse_args(["up", "--base-port", "5300", "--ports", "mlflow=5400"])
    assert isinstance(arguments, argparse.Namespace)
    with_ports(Settings.load(tmp_path), arguments).save()
    ports = Settings.load(tmp_path).ports
    assert (ports.prefect, ports.mlflow, ports.site) == (5300, 5400, 5302)


def test_scores_are_listed_with_their_intervals() -> None:
    scores = {"recall": 0.8361, "recall_low": 0.801, "recall_high": 0.866, "ratio_low": 2.0}
    assert with_intervals(scores) == [
        "recall                 0.8361 [0.801, 0.866]",
        "ratio_low              2",
    ]
