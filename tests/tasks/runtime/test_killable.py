"""A child that hangs, dies or eats memory costs one answer, never the parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.runtime.killable import ChildDied, ChildTimeout, KillableChild


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[KillableChild]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    running = KillableChild("odd_child", seconds=2, megabytes=1024)
    yield running
    running.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_that_hangs_is_killed_and_replaced(child: KillableChild) -> None:
    first = child.call({"do": "answer"}, b"")["pid"]
    begun = time.monotonic()
    with pytest.raises(ChildTimeout):
        child.call({"do": "hang"}, b"")
    assert time.monotonic() - begun < 60
    assert not is_alive(first)
    assert child.call({"do": "answer"}, b"x" * 300_000)["length"] == 300_000


def test_a_child_that_dies_says_how(child: KillableChild) -> None:
    with pytest.raises(ChildDied) as death:
        child.call({"do": "die"}, b"")
    assert death.value.args[0] == -signal.SIGSEGV
    with pytest.raises(ChildDied) as death:
        child.call({"do": "exit"}, b"")
    assert death.value.args[0] == 3
    assert child.call({"do": "answer"}, b"")["length"] == 0


ORPHANING = """
import sys
from tasks.runtime.killable import KillableChild
child = KillableChild("odd_child", seconds=0.5, megabytes=1024)
print(child.call({"do": "answer"}, b"")["pid"], flush=True)
child.seconds = 600
child.call({"do": "hang"}, b"")
"""


def test_a_hanging_child_whose_parent_was_killed_ends_by_itself() -> None:
    here, root = Path(__file__).parent, Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANING],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{here}"},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.2)  # the request to hang is on its way
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_memory_beyond_the_limit_is_refused(child: KillableChild) -> None:
    assert child.call({"do": "eat"}, b"") == {"failure": "memory"}


def test_what_a_library_prints_does_not_break_the_frames(child: KillableChild) -> None:
    pids = {child.call({"do": "print"}, b"")["pid"] for _ in range(3)}
    assert len(pids) == 1


def test_a_child_is_replaced_after_its_share_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    child = KillableChild("odd_child", seconds=20, megabytes=1024, requests=2)
    try:
        pids = [child.call({"do": "answer"}, b"")["pid"] for _ in range(3)]
    finally:
        child.close()
    assert pids[0] == pids[1] != pids[2]
    assert not is_alive(pids[2])
