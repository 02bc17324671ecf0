"""Retraining: what it costs when nothing is new, what runs when something is, and who is served.

    python benchmarks/retrain.py [--quick]

The site is a copy of some pages of the embedded one, served here on loopback so that pages can
change. Retrained are: the site unchanged; some pages changed; and, without `--quick`, a training
cut so short that it must lose, and one so much longer that it should win. Somebody asks the
endpoint all the while.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import sqlite3
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish, table
from benchmarks.runs import FlowRuns, chat
from benchmarks.stack import Home, home

CHANGED = 12
TARGETS: Targets = {
    "nothing_new_seconds": ("<=", 60),
    "nothing_new_stages_run": ("<=", 2),
    "changed_stages_run": (">=", 10),
    "failed_requests": ("<=", 0),
    "alias_moves_against_the_decision": ("<=", 0),
    "retrains_that_left_another_version_served": ("<=", 0),
}


class Site:
    """Static pages on loopback, with Last-Modified and 304 for conditional requests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        handler = functools.partial(_Quiet, directory=str(root))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    @property
    def seed(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/index.html"

    @classmethod
    @contextlib.contextmanager
    def of(cls, rendered: Path, root: Path) -> Iterator[Site]:
        """The pages of the modules a to d of the embedded site, and an index that links them."""
        (root / "library").mkdir(parents=True)
        for page in sorted((rendered / "pages" / "library").glob("[a-d]*.html")):
            shutil.copy2(page, root / "library" / page.name)
        names = sorted(page.name for page in (root / "library").iterdir())
        links = "\n".join(f'<li><a href="/library/{name}">{name}</a></li>' for name in names)
        (root / "index.html").write_text(f"<title>Modules</title><h1>Modules</h1><ul>{links}</ul>")
        (root / "robots.txt").write_text("User-agent: *\nCrawl-delay: 0.005\n")
        site = cls(root)
        threading.Thread(target=site.server.serve_forever, daemon=True).start()
        try:
            yield site
        finally:
            site.server.shutdown()

    def change(self, count: int) -> None:
        """Say something new on some pages, in their own words so that no filter removes it."""
        pages = sorted((self.root / "library").glob("*.html"), key=lambda p: p.stat().st_size)
        middle = len(pages) // 2
        for number, page in enumerate(pages[middle : middle + count]):
            text = page.read_text()
            said = (
                f"<p>This page was revised in edition {number + 2}. The functions of "
                f"{page.stem} are described again here, with the order of their arguments and "
                "the errors that they raise when an argument has the wrong type.</p>"
            )
            page.write_text(text.replace("</h1>", f"</h1>{said}", 1))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Asker(threading.Thread):
    """Asks the endpoint twice a second; counts answers and what went wrong."""

    def __init__(self, fresh: Home) -> None:
        super().__init__(daemon=True)
        self.fresh = fresh
        self.answers, self.failures, self.slowest = 0, list[str](), 0.0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.5):
            begun = time.monotonic()
            try:
                chat(self.fresh, "What does abs do?", tokens=8)
                self.answers += 1
            except (OSError, ValueError, KeyError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(120)


def champion(fresh: Home) -> int:
    """The version the alias points to, asked of MLflow itself."""
    query = urllib.parse.urlencode({"name": "gristmill", "alias": "champion"})
    url = f"{fresh.settings.mlflow}/api/2.0/mlflow/registered-models/alias?{query}"
    with urllib.request.urlopen(url, timeout=30) as response:
        return int(json.loads(response.read())["model_version"]["version"])


def served(fresh: Home) -> int:
    """The version the endpoint answers with."""
    with urllib.request.urlopen(f"{fresh.settings.serve}/health", timeout=30) as response:
        return int(json.loads(response.read())["serving"].rsplit("-", 2)[1])


def decisions(fresh: Home) -> list[tuple[int, bool, str]]:
    """(challenger, moved, reason) of every decision, oldest first."""
    with contextlib.closing(sqlite3.connect(fresh.settings.home / "state.db")) as database:
        rows = database.execute("select challenger, moved, reason from gate_decisions order by id")
        return [(int(version), bool(moved), reason) for version, moved, reason in rows]


def retrain(fresh: Home, runs: FlowRuns, label: str, *settings: str) -> dict[str, object]:
    """One run of the flow: seconds, what ran, and whether alias and endpoint agree with it."""
    before, decided = champion(fresh), len(decisions(fresh))
    begun = time.monotonic()
    run = runs.trigger("retrain", *settings)
    runs.finish(run)
    seconds = time.monotonic() - begun
    states = runs.states(run)
    new = decisions(fresh)[decided:]
    expected = new[-1][0] if new and new[-1][1] else before
    now = champion(fresh)
    row: dict[str, object] = {
        "retrain": label,
        "seconds": round(seconds, 1),
        "ran": ", ".join(s for s, state in states.items() if state != "Cached"),
        "champion": f"{before} → {now}",
        "agrees": now == expected,
        "served": served(fresh) == now,
        "because": new[-1][2] if new else "nothing new was registered",
    }
    print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="unchanged and changed pages only")
    quick = parser.parse_args().quick
    with home() as fresh:
        fresh.run("up")
        runs = FlowRuns(fresh)
        copy = fresh.settings.home / "bench-site"
        shutil.rmtree(copy, ignore_errors=True)
        with Site.of(fresh.settings.home / "site", copy) as site:
            seeds = (f'corpus.seeds=["{site.seed}"]', "corpus.crawl.delay=0")
            runs.finish(runs.trigger("pipeline", *seeds))
            asker = Asker(fresh)
            asker.start()
            rows = [retrain(fresh, runs, "nothing new", *seeds)]
            site.change(CHANGED)
            rows.append(retrain(fresh, runs, f"{CHANGED} pages changed", *seeds))
            if not quick:
                worse = retrain(fresh, runs, "cut short", *seeds, "pretrain.tokens=4096")
                longer = ("pretrain.tokens=1500000", "finetune.passes=8")
                better = retrain(fresh, runs, "much longer", *seeds, *longer)
                rows += [worse, better]
            asker.stop()
    print(table(rows))
    for failure in sorted(set(asker.failures))[:10]:
        print(failure)
    ran = [str(row["ran"]).split(", ") if row["ran"] else [] for row in rows]
    metrics: dict[str, float | None] = {
        "nothing_new_seconds": float(str(rows[0]["seconds"])),
        "nothing_new_stages_run": len(ran[0]),
        "changed_seconds": float(str(rows[1]["seconds"])),
        "changed_stages_run": len(ran[1]),
        "answered_requests": asker.answers,
        "failed_requests": len(asker.failures),
        "slowest_answer_seconds": round(asker.slowest, 2),
        "alias_moves_against_the_decision": sum(not row["agrees"] for row in rows),
        "retrains_that_left_another_version_served": sum(not row["served"] for row in rows),
    }
    targets = {**TARGETS}
    if not quick:
        metrics["worse_model_promoted"] = int(moved(rows[2]))
        metrics["better_model_promoted"] = int(moved(rows[3]))
        targets |= {"worse_model_promoted": ("<=", 0), "better_model_promoted": (">=", 1)}
    finish("retrain", metrics, targets)


def moved(row: dict[str, object]) -> bool:
    before, _, after = str(row["champion"]).partition(" → ")
    return before != after


if __name__ == "__main__":
    main()
