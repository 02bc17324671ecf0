"""Text out of real pages: as right as bare trafilatura, and hardly slower with every page guarded.

    python benchmarks/extraction.py [--quick]

The 91 pages of the article extraction benchmark, scored as it scores: multisets of runs of four
words, true and false ones as shares of each page, mean precision and recall, their F1. Speed is
pages per CPU second, ours counted with both processes: the parent, and the child that parses under
a time and a memory limit. The peer is `trafilatura.extract(page, fast=True)` in one process. Beside
them the extractor for crawls of millions, `extract.extractor: resiliparse`, guarded the same way.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import trafilatura

from benchmarks.report import Targets, finish
from benchmarks.samples import Sample, samples
from tasks.runtime.killable import KillableChild

TARGETS: Targets = {
    "f1_below_trafilatura": ("<=", 0.002),
    "share_of_trafilatura_speed": (">=", 0.85),
}


def runs(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)))


def f1(pages: list[Sample], texts: list[str]) -> float:
    """The benchmark's own score: means over pages, each page weighing the same."""
    precisions, recalls = [], []
    for page, text in zip(pages, texts, strict=True):
        true, found = runs(page.article), runs(text)
        shared = sum((true & found).values())
        if found:
            precisions.append(shared / sum(found.values()))
        if true:
            recalls.append(shared / sum(true.values()))
    precision, recall = statistics.mean(precisions), statistics.mean(recalls)
    return 2 * precision * recall / (precision + recall)


def bare(pages: list[Sample]) -> list[str]:
    return [
        trafilatura.extract(page.html.decode("utf-8", "replace"), fast=True, include_comments=False)
        or ""
        for page in pages
    ]


class Guarded:
    """The extract stage's way: every page through the child that can be killed."""

    def __init__(self, extractor: str) -> None:
        self.extractor = extractor
        self.child = KillableChild("tasks.corpus.page_text", 20.0, 2048, extractor)

    def __call__(self, pages: list[Sample]) -> list[str]:
        head = {"content_type": "text/html", "extractor": self.extractor}
        answers = [self.child.call(head | {"url": page.url}, page.html) for page in pages]
        return [str(answer.get("text", "")) for answer in answers]


def cpu_seconds() -> float:
    """Of this process and of its living children."""
    own = psutil.Process()
    times = [own.cpu_times(), *(child.cpu_times() for child in own.children())]
    return sum(t.user + t.system for t in times)


def timed(read: Callable[[list[Sample]], list[str]], pages: list[Sample]) -> tuple[float, float]:
    begun, cpu = time.monotonic(), cpu_seconds()
    read(pages)
    return cpu_seconds() - cpu, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three rounds instead of nine")
    rounds = 3 if parser.parse_args().quick else 9
    # Two of the pages say noindex, which the stage honours; here they are read all the same.
    pages = [replace(page, html=page.html.replace(b"noindex", b"index")) for page in samples()]
    guarded, fast = Guarded("trafilatura"), Guarded("resiliparse")
    # and everything is warm
    ours_f1, fast_f1, bare_f1 = (f1(pages, read(pages)) for read in (guarded, fast, bare))
    ours, quick, peer = [], [], []
    for _ in range(rounds):
        ours.append(timed(guarded, pages))
        peer.append(timed(bare, pages))
        quick.append(timed(fast, pages))
    for reader in (guarded, fast):
        reader.child.close()
    ours_cpu, peer_cpu, quick_cpu = (
        statistics.median(cpu for cpu, _ in took) for took in (ours, peer, quick)
    )
    finish(
        "extraction",
        {
            "pages": len(pages),
            "f1": round(ours_f1, 4),
            "trafilatura_f1": round(bare_f1, 4),
            "f1_below_trafilatura": round(bare_f1 - ours_f1, 4),
            "pages_per_cpu_second": round(len(pages) / ours_cpu, 1),
            "trafilatura_pages_per_cpu_second": round(len(pages) / peer_cpu, 1),
            "share_of_trafilatura_speed": round(peer_cpu / ours_cpu, 3),
            "resiliparse_f1": round(fast_f1, 4),
            "resiliparse_pages_per_cpu_second": round(len(pages) / quick_cpu, 1),
            "pages_per_second": round(len(pages) / statistics.median(s for _, s in ours), 1),
        },
        TARGETS,
    )


if __name__ == "__main__":
    main()
