"""A child process that answers one request after another and may be killed at any of them.

Parsers of other people's files loop, recurse and leak in C, where no Python timeout reaches. The
child works under a memory limit; the parent waits for at most a given time, kills it, starts
another and goes on. Requests and answers are frames on pipes: two lengths, JSON, bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">II")
_PIPE_BYTES = 1 << 20
_START_SECONDS = 120.0  # imports on a loaded machine
ROOT = Path(__file__).parents[2]


class ChildTimeout(Exception):
    """The child did not answer in time and was killed."""


class ChildDied(Exception):
    """The child ended without an answer; `args[0]` is its exit status (negative: a signal)."""


class NeverBegan(ChildDied):
    """The child did not come to its first request: the fault is ours, or the machine's."""


class KillableChild:
    """The parent's side. Not for use by several threads."""

    def __init__(
        self,
        module: str,
        seconds: float,
        megabytes: int,
        *arguments: str,
        requests: int = 10_000,
    ) -> None:
        """`arguments` follow the limits on the child's command line.

        `requests` bounds what a leak can add up to: after so many the child is replaced.
        """
        self.module, self.seconds, self.megabytes = module, seconds, megabytes
        self.arguments, self.requests = arguments, requests
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = 0

    def call(self, head: dict[str, Any], body: bytes) -> dict[str, Any]:
        """The answer to one request. Raises ChildTimeout or ChildDied (NeverBegan); the next works
        again.
        """
        if self._answered >= self.requests:
            self.close()
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            write_frame(process.stdin, head, body)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        answer = self._read(self.seconds)
        self._answered += 1
        return answer

    def kill(self) -> None:
        """From any thread: whoever waits for an answer finds that the child died."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", self.module, str(self.seconds), str(self.megabytes)),
                *self.arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        )
        self._answered = 0
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a whole page at once saves switching to and fro
            fcntl.fcntl(self._process.stdin.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            self._read(_START_SECONDS)
        except ChildTimeout:
            raise NeverBegan(-signal.SIGKILL) from None
        except ChildDied as death:
            raise NeverBegan(*death.args) from None
        return self._process

    def _read(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        head, body = _LENGTHS.unpack(self._exactly(_LENGTHS.size, deadline))
        answer: dict[str, Any] = json.loads(self._exactly(head, deadline))
        self._exactly(body, deadline)
        return answer

    def _exactly(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        parts = []
        while size:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                self.close()
                raise ChildTimeout
            part = os.read(descriptor, min(size, 1 << 20))
            if not part:
                raise self._died()
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _died(self) -> ChildDied:
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        status = process.returncode
        self.close()
        return ChildDied(status)


def serve(answer: Callable[[dict[str, Any], bytes], dict[str, Any]]) -> None:
    """The child's side: answer requests until the parent is gone.

    The alarm is for an orphan: without a parent to kill it, a child that hangs ends by itself.
    """
    seconds, megabytes = float(sys.argv[1]), int(sys.argv[2])
    limit = megabytes << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between frames
    write_frame(sink, {}, b"")
    while True:
        lengths = source.read(_LENGTHS.size)
        if len(lengths) < _LENGTHS.size:
            return
        head_size, body_size = _LENGTHS.unpack(lengths)
        head, body = json.loads(source.read(head_size)), source.read(body_size)
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
        reply = answer(head, body)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(sink, reply, b"")


def write_frame(stream: BinaryIO | Any, head: dict[str, Any], body: bytes) -> None:
    data = json.dumps(head).encode()
    stream.write(_LENGTHS.pack(len(data), len(body)) + data)
    stream.write(body)
    stream.flush()
