"""The one convention of all benchmarks: a table, then one JSON line, then the exit status."""

from __future__ import annotations

import json
import operator
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}

Targets = Mapping[str, tuple[str, float]]


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    flags = information.read_text() if information.exists() else ""
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "amx_bf16": "amx_bf16" in flags,
        "python": platform.python_version(),
    }


def table(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as aligned columns."""
    if not rows:
        return "(no rows)"
    heads = list(rows[0])
    cells = [[_text(row.get(head)) for head in heads] for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
    lines = ["  ".join(h.ljust(w) for h, w in zip(heads, widths, strict=True))]
    lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def finish(name: str, metrics: Mapping[str, float | None], targets: Targets) -> NoReturn:
    """Print every metric beside its target and the JSON line; exit 0 only if none is missed."""
    missed = [
        key
        for key, (comparison, bound) in targets.items()
        if (value := metrics.get(key)) is None or not COMPARISONS[comparison](value, bound)
    ]
    rows: list[dict[str, object]] = [
        {
            "metric": key,
            "value": value,
            "target": " ".join(map(str, targets[key])) if key in targets else "",
            "": "missed" if key in missed else "",
        }
        for key, value in metrics.items()
    ]
    print(table(rows))
    body = {
        "name": name,
        "metrics": dict(metrics),
        "targets": {key: list(target) for key, target in targets.items()},
        "missed": missed,
        "machine": machine(),
    }
    print(json.dumps(body), flush=True)
    sys.exit(1 if missed else 0)


def _text(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else "" if value is None else str(value)
