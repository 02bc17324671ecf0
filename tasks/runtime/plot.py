"""A curve drawn in characters, for pages that show Markdown but no pictures."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT = 52, 15


def plot(xs: Sequence[float], ys: Sequence[float], x: str, y: str) -> str:
    """A Markdown code block with the means of `ys` in WIDTH columns of `xs`; `x`, `y`: labels.

    Both axes are linear and end at the extremes of what is drawn.
    """
    left, right = min(xs), max(xs)
    columns: list[list[float]] = [[] for _ in range(WIDTH)]
    for place, value in zip(xs, ys, strict=True):
        share = (place - left) / (right - left) if right > left else 1.0
        columns[min(int(share * WIDTH), WIDTH - 1)].append(value)
    means = {column: sum(v) / len(v) for column, v in enumerate(columns) if v}
    low, high = min(means.values()), max(means.values())
    canvas = [[" "] * WIDTH for _ in range(HEIGHT)]
    for column, mean in means.items():
        share = (mean - low) / (high - low) if high > low else 0.0
        canvas[round((1 - share) * (HEIGHT - 1))][column] = "•"
    marks = {0: f"{high:.3g}", HEIGHT // 2: f"{(low + high) / 2:.3g}", HEIGHT - 1: f"{low:.3g}"}
    rows = [
        f"{marks.get(number, ''):>8} │{''.join(row)}".rstrip() for number, row in enumerate(canvas)
    ]
    ends = f"{left:,.0f}".ljust(WIDTH - 12) + f"{right:,.0f}".rjust(12)
    return "\n".join(["```", y, *rows, f"{'':>8} └{'─' * WIDTH}", f"{'':10}{ends}  {x}", "```"])
