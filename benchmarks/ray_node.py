"""A Ray node of a benchmark's own, with so many CPUs, that may be killed and started again."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

import psutil

from benchmarks.stack import free_ports


class Node:
    """The same address every time it starts; only its processes are ended, by their ids."""

    def __init__(self, workers: int) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self._folder = tempfile.mkdtemp(prefix="gmb-")  # sockets below it: their paths are short
        self._command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address", "127.0.0.1", "--port", str(port), "--temp-dir", self._folder),
            *("--num-cpus", str(workers), "--include-dashboard", "false"),
            *("--object-store-memory", str(256 * 2**20), "--disable-usage-stats"),
        ]
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        with open(Path(self._folder) / "output.txt", "ab") as output:
            self._process = psutil.Popen(
                self._command, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def processes(self) -> list[psutil.Process]:
        """All of the node that live: `ray start`, its daemons and their workers."""
        if self._process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def named(self, *names: str) -> list[psutil.Process]:
        """Those whose command line begins, but for its folder, with one of `names`."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if words and words[0].rpartition("/")[2].startswith(names):
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to every process of the node at once."""
        if self._process is None:
            return
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            started = self.processes()
            self._process.terminate()
            psutil.wait_procs(started, timeout=10)
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
