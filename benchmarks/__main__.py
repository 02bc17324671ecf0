"""Runs every benchmark: `python -m benchmarks [--quick] [NAME …]`.

Without names it rewrites `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUPPORT = ("__init__", "__main__", "report", "stack")
LIMIT_SECONDS = 3600


def run(name: str, options: list[str]) -> tuple[str, dict[str, Any] | None]:
    """A benchmark's output and the JSON object of its last line; None if it broke off."""
    command = [sys.executable, str(HERE / f"{name}.py"), *options]
    print(f"== {name}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT_SECONDS} s", None
    print(done.stdout, end="", flush=True)
    *lines, last = done.stdout.strip().splitlines() or [""]
    try:
        return "\n".join(lines), json.loads(last)
    except ValueError:
        print(done.stderr, file=sys.stderr)
        return (done.stderr or done.stdout).strip()[-2000:], None


def section(name: str, output: str, result: dict[str, Any] | None) -> str:
    if result is None:
        verdict = "broke off"
    else:
        missed = ", ".join(result["missed"])
        verdict = f"missed: {missed}" if missed else "every target met"
    return f"## {name}: {verdict}\n\n```\n{output.strip()}\n```\n"


def verdict(results: dict[str, tuple[str, dict[str, Any] | None]]) -> int:
    return 0 if all(result and not result["missed"] for _, result in results.values()) else 1


def main() -> int:
    """0 only if every benchmark met every target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="*", help="benchmarks to run (default: all)")
    arguments = parser.parse_args()
    known = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SUPPORT)
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    options = ["--quick"] if arguments.quick else []
    results = {name: run(name, options) for name in arguments.names or known}
    machine: dict[str, Any] = next(
        (result["machine"] for _, result in results.values() if result), {}
    )
    if arguments.names:
        return verdict(results)
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    how = "python -m benchmarks" + (" --quick" if arguments.quick else "")
    parts = [section(name, *outcome) for name, outcome in results.items()]
    text = f"# Benchmark results\n\nWritten by `{how}`. Machine: {about}.\n\n" + "\n".join(parts)
    (HERE / "RESULTS.md").write_text(text)
    return verdict(results)


if __name__ == "__main__":
    sys.exit(main())
