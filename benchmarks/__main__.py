"""Runs every benchmark and rewrites `benchmarks/RESULTS.md`: `python -m benchmarks [--quick]`."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import machine

FOLDER = Path(__file__).parent
GUARD = '\nif __name__ == "__main__":\n'


def scripts() -> list[Path]:
    """The benchmarks: what can be run. The other files here are their common parts."""
    found = [path for path in sorted(FOLDER.glob("*.py")) if GUARD in path.read_text()]
    return [path for path in found if path.stem != "__main__"]


def run(script: Path, quick: bool) -> tuple[str, bool]:
    """What a benchmark printed, and whether it reached every target."""
    command = [sys.executable, str(script), *(["--quick"] if quick else [])]
    done = subprocess.run(
        command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, timeout=3600, check=False
    )
    print(done.stdout, flush=True)
    return done.stdout, done.returncode == 0


def section(name: str, output: str, reached: bool) -> str:
    """The benchmark's own table, without progress lines before it or the JSON line after it."""
    lines = output.rstrip().splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("metric")]
    table = "\n".join(lines[heads[-1] if heads else 0 : -1])
    verdict = "every target reached" if reached else "**a target was missed**"
    return f"## {name}\n\n{verdict}\n\n```\n{table}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short form of each benchmark")
    quick = parser.parse_args().quick
    sections, missed = [], []
    for script in scripts():
        print(f"== {script.stem}", flush=True)
        output, reached = run(script, quick)
        sections.append(section(script.stem, output, reached))
        if not reached:
            missed.append(script.stem)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = (
        f"# Results\n\nMeasured {today} with `python -m benchmarks{' --quick' * quick}` on "
        f"`{json.dumps(machine())}`.\n"
    )
    (FOLDER / "RESULTS.md").write_text("\n".join([head, *sections]))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
