"""Several processes of one script, as ranks of a gloo group."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn


def run_ranks(script: str, count: int, *words: str) -> list[dict[str, Any]]:
    """What each process says in its last line, run with these words."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, script, *words]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    said = []
    try:
        for process in ranks:
            out, _ = process.communicate(timeout=180)
            assert process.returncode == 0
            said.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
    return said


def end_rank(said: dict[str, Any]) -> NoReturn:
    """Ends this rank with what it says.

    At once, without the interpreter's own end: torch keeps the mesh of divided weights, and with it
    the process group and its threads, for as long as the process lives, and such a thread that
    wants the interpreter as it shuts down aborts the process ("terminate called without an active
    exception").
    """
    print(json.dumps(said), flush=True)
    os._exit(0)
