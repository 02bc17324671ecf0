"""The corpus report as one HTML page: no script, no other file, light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

SHOWN = 20  # bars of a plot; the rest is one more
BAR, LABEL, FIGURES = 22, 210, 130  # height of a bar, widths beside it, in pixels
WIDTH = 760

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --quiet: #667085; --paper: #fbfbf9;
  --line: #dfe2e8; --bar: #33658a; --gone: #c8553d; --card: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --quiet: #9aa4b5; --paper: #14171c;
  --line: #2e3540; --bar: #6fa8d6; --gone: #e08a74; --card: #1b2027; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
p.quiet, .quiet { color: var(--quiet); }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem 1rem; min-width: 7.5rem; }
.numbers b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; background: var(--card); }
th, td { text-align: left; padding: .35rem .6rem; border: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; min-width: 3.5rem; }
th { font-weight: 600; overflow-wrap: normal; }
td.n { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
svg { display: block; width: 100%; height: auto; max-width: 760px; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .figure { fill: var(--quiet); } svg .bar { fill: var(--bar); } svg .gone { fill: var(--gone); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; } summary .n { float: right; color: var(--quiet); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: .3rem 0 .8rem;
  color: var(--quiet); border-left: 3px solid var(--line); padding-left: .6rem; }
code { overflow-wrap: anywhere; }
"""


def render(body: Mapping[str, Any]) -> str:
    """The whole page from plain values (`tasks.corpus.report.page_of`)."""
    total = body["total"]
    parts = [
        "<h1>Corpus report</h1>",
        f"<p class=quiet>Corpus <code>{escape(body['corpus'][:12])}</code>, "
        f"made {escape(body['created'][:19].replace('T', ' '))} UTC</p>",
        _numbers(body, total),
        "<h2>From the web to the corpus</h2>",
        _funnel(body["funnel"]),
        "<h2>What was removed, by stage and rule</h2>",
        *(_rules(row) for row in body["funnel"]),
        "<h2>Lengths</h2><p class=quiet>Documents by bytes of text.</p>",
        _bars([(_span(bin), count) for bin, count in _whole_range(body["lengths"])], "documents"),
        "<h2>Languages</h2>",
        _bars(_top(body["language"], "bytes"), "bytes", _size),
        "<h2>Domains</h2>",
        _bars(_top(body["host"], "bytes"), "bytes", _size),
        "<h2>Sources</h2>",
        _table(_amounts(body["source"])),
        "<h2>Held out and trained on</h2>",
        _table(_amounts(body["split"])),
        "<h2>Largest clusters of similar documents</h2>",
        _table(body["clusters"]) if body["clusters"] else "<p class=quiet>None.</p>",
    ]
    if body["crawl"]:
        parts += ["<h2>The crawl, by host</h2>", _table(body["crawl"])]
    facts = [{"question": name, "answer": value} for name, value in body["datasheet"]]
    parts += ["<h2>Datasheet</h2>", _table(facts)]
    parts += ["<h2>Made by</h2>", _table(body["chain"])]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Corpus report</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _numbers(body: Mapping[str, Any], total: Mapping[str, int]) -> str:
    shown = [
        ("documents", f"{total['documents']:,}"),
        ("of text", _size(total["bytes"])),
        ("words", _short(total["words"])),
        ("tokens", _short(total["tokens"])),
        ("hosts", f"{len(body['host']):,}"),
        ("languages", f"{len(body['language']):,}"),
    ]
    cards = [f"<div><b>{value}</b>{name}</div>" for name, value in shown if value != "0"]
    return f"<div class=numbers>{''.join(cards)}</div>"


def _funnel(rows: Sequence[Mapping[str, Any]]) -> str:
    largest = max((row["seen"] for row in rows), default=1) or 1
    room = WIDTH - LABEL - FIGURES
    lines = []
    for number, row in enumerate(rows):
        y = number * BAR
        kept, gone = (room * row[name] / largest for name in ("kept", "removed"))
        lines.append(
            f'<text x="0" y="{y + 15}">{escape(row["stage"])}</text>'
            f'<rect class="bar" x="{LABEL}" y="{y + 3}" width="{kept:.1f}" height="{BAR - 6}"/>'
            f'<rect class="gone" x="{LABEL + kept:.1f}" y="{y + 3}" width="{gone:.1f}" '
            f'height="{BAR - 6}"><title>{row["removed"]:,} removed</title></rect>'
            f'<text class="figure" x="{LABEL + kept + gone + 6:.1f}" y="{y + 15}">'
            f"{row['kept']:,} of {row['seen']:,}</text>"
        )
    return _svg(lines, len(rows) * BAR, "Documents kept and removed by each stage")


def _rules(row: Mapping[str, Any]) -> str:
    if not row["rules"]:
        return ""
    parts = [f"<h3>{escape(row['stage'])}</h3>"]
    for rule in row["rules"]:
        share = 100 * rule["removed"] / max(row["seen"], 1)
        head = (
            f"{escape(rule['rule'])}<span class=n>{rule['removed']:,} &nbsp; {share:.1f} %</span>"
        )
        shown = "".join(
            f"<code>{escape(example['url'])}</code> {escape(example['reason'])}"
            f"<pre>{escape(example['text'])}</pre>"
            for example in rule["examples"]
        )
        parts.append(f"<details><summary>{head}</summary>{shown or 'No example kept.'}</details>")
    return "".join(parts)


def _bars(
    values: Iterable[tuple[str, int]], unit: str, text: Callable[[int], str] = "{:,}".format
) -> str:
    rows = list(values)
    largest = max((value for _, value in rows), default=0) or 1
    room = WIDTH - LABEL - FIGURES
    lines = []
    for number, (name, value) in enumerate(rows):
        y, width = number * BAR, room * value / largest
        label = name if len(name) <= 32 else f"{name[:31]}…"
        lines.append(
            f'<text x="0" y="{y + 15}">{escape(label)}<title>{escape(name)}</title></text>'
            f'<rect class="bar" x="{LABEL}" y="{y + 3}" width="{width:.1f}" height="{BAR - 6}"/>'
            f'<text class="figure" x="{LABEL + width + 6:.1f}" y="{y + 15}">{text(value)}</text>'
        )
    return _svg(lines, len(rows) * BAR, unit)


def _svg(lines: Sequence[str], height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {max(height, 1)}" role="img"><title>{escape(title)}</title>'
        f"{''.join(lines)}</svg>"
    )


def _top(rows: Sequence[Mapping[str, Any]], unit: str) -> list[tuple[str, int]]:
    shown = [(row["name"], row[unit]) for row in rows[:SHOWN]]
    rest = sum(row[unit] for row in rows[SHOWN:])
    return [*shown, (f"{len(rows) - SHOWN:,} others", rest)] if rest else shown


def _whole_range(lengths: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The bins with the empty ones between them."""
    known = dict(lengths)
    if not known:
        return []
    return [(bin, known.get(bin, 0)) for bin in range(min(known), max(known) + 1)]


def _span(bin: int) -> str:
    return f"{_size(2**bin)} to {_size(2 ** (bin + 1))}"


def _amounts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table without columns in which nothing is known."""
    empty = {key for row in rows for key in row if not any(other[key] for other in rows)}
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p class=quiet>None.</p>"
    heads = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    lines = ["<tr>" + "".join(_cell(value) for value in row.values()) + "</tr>" for row in rows]
    return f"<div class=wide><table><tr>{heads}</tr>{''.join(lines)}</table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return f"<td class=n>{text}</td>"
    return f"<td>{escape('' if value is None else str(value))}</td>"


def _size(value: int) -> str:
    """Bytes in the unit that fits."""
    units = ("bytes", "KB", "MB", "GB", "TB", "PB")
    power = min(int(math.log(max(value, 1), 1024)), len(units) - 1)
    number = value / 1024**power
    return (
        f"{number:.0f} {units[power]}"
        if number >= 10 or not power
        else f"{number:.1f} {units[power]}"
    )


def _short(value: int) -> str:
    for size, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " K")):
        if value >= size:
            divisor = 1e3 if name == " K" else size
            return f"{value / divisor:,.1f}{name}"
    return f"{value:,}"
