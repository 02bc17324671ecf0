"""Curves drawn in characters."""

from __future__ import annotations

from tasks.runtime.plot import HEIGHT, WIDTH, plot


def rows(text: str) -> list[str]:
    return [line.split("│")[1].ljust(WIDTH) for line in text.splitlines() if "│" in line]


def test_a_falling_line_falls_from_corner_to_corner() -> None:
    text = plot(range(1000), [1000 - n for n in range(1000)], "tokens", "loss")
    canvas = rows(text)
    assert len(canvas) == HEIGHT
    assert canvas[0][0] == canvas[-1][-1] == "•"
    assert [sum(row[n] == "•" for row in canvas) for n in range(WIDTH)] == [1] * WIDTH
    assert "loss" in text and text.rstrip("`\n").endswith("tokens")


def test_values_in_one_column_are_averaged_and_marked() -> None:
    text = plot([0, 0, 10], [1.0, 3.0, 4.0], "x", "y")
    assert " 2 │" in text and " 4 │" in text and " 3 │" in text


def test_one_point_and_a_flat_line_can_be_drawn() -> None:
    assert "•" in plot([5], [1.0], "x", "y")
    assert sum(row.count("•") for row in rows(plot([1, 2], [7.0, 7.0], "x", "y"))) == 2
