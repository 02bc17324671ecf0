"""The whole text pipeline, WARC to selected Parquet: pages per second and core, stage by stage.

    python benchmarks/corpus.py [--quick]

The real pages of the article extraction benchmark (186 KB of HTML each), replicated with other
words between their tags, stand in a WARC segment as a crawl leaves them. Every stage of the corpus
flow, personal data masked too, runs on a Ray node of its own, with one worker and with two. Pages
per second and core are pages per CPU second of everything that runs: workers, the children that
parse, Ray's own processes, and the process that drives the stages; up to the selected documents
(SELECTION) and, beside it, up to the split. Each node works off a small crawl first, so that
imports are not counted, then the large one three times: told are medians. What two workers gain is
told beside what two plain processes gain, on cores that share caches or are two threads of one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import pyarrow as pa

from benchmarks.one_core import one_core, worker
from benchmarks.ray_node import Node
from benchmarks.report import Targets, finish, table
from benchmarks.samples import pages_without_end, samples
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Stage, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store

SHARD_MB = 8.0
WARM_UP_PAGES = 250
ROUNDS = 3
SELECTION = ("extract", "measure", "language", "quality")
TARGETS: Targets = {
    "trafilatura_pages_per_cpu_second": (">=", 60),
    "resiliparse_pages_per_cpu_second": (">=", 200),
    "two_workers_times_one": (">=", 1.6),
}


class PagesConfig(StageConfig):
    pages: int
    seed: int


@stage("benchmark-crawl", version=1, retries=0)
def crawl_of(config: PagesConfig, work: Workspace) -> Outcome:
    """A crawl artifact as the crawl stage writes it: a segment and the table of its pages."""
    from tasks.corpus.pages import PAGES
    from tasks.corpus.warc import Exchange, SegmentWriter, payload_digest, response_records

    path = work.scratch("segment") / "00000.warc.gz"
    path.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    date = "2026-01-01T00:00:00.000000Z"
    with SegmentWriter(path, software="benchmark") as writer:
        for url, html in islice(pages_without_end(samples(), config.seed), config.pages):
            identifier = f"<urn:uuid:{len(rows)}>"
            body = html.replace(b"noindex", b"index")
            headers = (("Content-Type", "text/html; charset=utf-8"),)
            request = b"GET / HTTP/1.1\r\n\r\n"
            exchange = Exchange(url, request, 200, "OK", headers, body, "", date)
            records = response_records(exchange, payload_digest(body), identifier)
            offset, length = writer.append([*records])[1]
            about = {"url": url, "fetched_at": date, "bytes": len(body), "record_id": identifier}
            place = {"warc": "warc/00000.warc.gz", "offset": offset, "length": length}
            rows.append(dict.fromkeys(PAGES.names) | about | place)
    work.put(path, "warc/00000.warc.gz")
    work.write_table("pages.parquet", pa.Table.from_pylist(rows, PAGES))
    return Outcome(counts={"documents": len(rows), "bytes": sum(row["bytes"] for row in rows)})


def cpu_seconds() -> dict[str, float]:
    """Of this process and everything below it, by what it is; what ended is its parent's."""
    own = psutil.Process()
    spent = {"driver": 0.0, "workers": 0.0, "parsers": 0.0, "ray": 0.0}
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            said = " ".join(process.cmdline())
            kind = "driver" if process == own else "ray"
            kind = "workers" if said.startswith("ray::") else kind
            kind = "parsers" if "tasks.corpus.page_text" in said else kind
            spent[kind] += sum(process.cpu_times()[:4])  # own and waited-for children's
    return spent


def walk(extractor: str, crawl: Manifest, timed: Callable[..., Manifest]) -> None:
    """The corpus flow's stages over one crawl, each called by `timed(stage, config, **inputs)`."""
    from tasks.corpus.dedup import DeduplicateConfig, deduplicate
    from tasks.corpus.extract import ExtractConfig, extract
    from tasks.corpus.language import LanguageConfig, language
    from tasks.corpus.measure import MeasureConfig, measure
    from tasks.corpus.pii import PIIConfig, pii
    from tasks.corpus.quality import QualityConfig, quality
    from tasks.corpus.signatures import signatures
    from tasks.corpus.split import SplitConfig, split

    reading = ExtractConfig(extractor=extractor, shard_megabytes=SHARD_MB)
    documents = timed(extract, reading, crawl=crawl)
    documents = timed(pii, PIIConfig(action="mask").masking(), documents=documents)
    attributes = timed(measure, MeasureConfig(), documents=documents)
    deduplication = DeduplicateConfig()
    signed = timed(signatures, deduplication.signatures(), documents=documents)
    for select, bounds in ((language, LanguageConfig()), (quality, QualityConfig())):
        documents = timed(select, bounds, documents=documents, attributes=attributes)
    documents = timed(deduplicate, deduplication, documents=documents, signatures=signed)
    timed(split, SplitConfig(), documents=documents)


def run(crawls: Path, extractor: str, workers: int) -> list[dict[str, Any]]:
    """The pipeline over the larger of two crawls: a row for each stage, medians of ROUNDS."""
    rows: dict[str, list[dict[str, Any]]] = {}

    def timed(step: Stage[Any], config: StageConfig, **inputs: Manifest) -> Manifest:
        begun, cpu = time.monotonic(), cpu_seconds()
        manifest = step(config, **inputs)
        kept = manifest.counts.get("documents", manifest.counts.get("train_documents"))
        seconds = time.monotonic() - begun
        spent = {kind: total - cpu[kind] for kind, total in cpu_seconds().items()}
        took = {"seconds": seconds, "cpu_seconds": sum(spent.values())}
        rows.setdefault(step.name, []).append({"documents": kept} | took | spent)
        return manifest

    with Node(workers) as node, home_of(crawls) as home:
        os.environ |= {"GRISTMILL_HOME": str(home), "GRISTMILL_RAY_ADDRESS": node.address}
        for crawled in rounds(home):
            walk(extractor, crawled, timed)
    return [
        {"stage": stage} | {field: median(one[field] for one in found[1:]) for field in found[0]}
        for stage, found in rows.items()
    ]


@contextlib.contextmanager
def home_of(crawls: Path) -> Iterator[Path]:
    """A fresh home whose store holds the crawls of another."""
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as directory:
        home = Path(directory)
        (home / "store").mkdir()
        (home / "store" / "benchmark-crawl").symlink_to(crawls / "store" / "benchmark-crawl")
        yield home


def rounds(home: Path) -> Iterator[Manifest]:
    """The small crawl once, then the large one ROUNDS times; between them all else is removed."""
    small, large = sorted(
        Store.open().all("benchmark-crawl"), key=lambda made: made.counts["documents"]
    )
    for crawled in [small, *[large] * ROUNDS]:
        yield crawled
        for made in (home / "store").iterdir():
            if not made.is_symlink():
                shutil.rmtree(made)


def plain(crawls: Path, extractor: str, workers: int) -> float:
    """Pages per second of the same stages in so many processes without Ray, each over all pages.

    What one of two cores loses to the other (threads of one core, memory, heat) is lost here too.
    """
    context = multiprocessing.get_context("spawn")
    together, told = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_alone, args=(crawls, extractor, together, told))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    rates = [told.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return workers * min(rates)


def _alone(crawls: Path, extractor: str, together: Any, told: Any) -> None:
    def timed(step: Stage[Any], config: StageConfig, **inputs: Manifest) -> Manifest:
        return step(config, **inputs)

    rates = []
    with home_of(crawls) as home, one_core(home):
        for crawled in rounds(home):
            together.wait(600)
            begun = time.monotonic()
            walk(extractor, crawled, timed)
            rates.append(crawled.counts["documents"] / (time.monotonic() - begun))
    told.put(median(rates[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pages")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, extractor, workers = options.worker
        print(json.dumps({"rows": run(Path(folder), extractor, int(workers))}))
        return
    count = 800 if options.quick else 3000
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as directory:
        with one_core(Path(directory)):
            crawl_of(PagesConfig(pages=WARM_UP_PAGES, seed=1))
            megabytes = crawl_of(PagesConfig(pages=count, seed=2)).counts["bytes"] / 1e6
        plain_rates = {n: plain(Path(directory), "trafilatura", n) for n in (1, 2)}
        passes = {
            (extractor, workers): worker(__file__, directory, extractor, str(workers))["rows"]
            for extractor in ("trafilatura", "resiliparse")
            for workers in (1, 2)
        }
    for (extractor, workers), rows in passes.items():
        print(f"\n{extractor}, {workers} worker{'s' * (workers > 1)}")
        milliseconds = [{"ms_per_page": 1000 * row["cpu_seconds"] / count} for row in rows]
        print(table([row | more for row, more in zip(rows, milliseconds, strict=True)]))
    print()

    def rate(extractor: str, workers: int, what: str, selected: bool = False) -> float:
        rows = passes[extractor, workers]
        took = [row[what] for row in rows if not selected or row["stage"] in SELECTION]
        return round(count / sum(took), 1)

    metrics: dict[str, float | None] = {"pages": count, "html_mb": round(megabytes, 1)}
    for extractor in ("trafilatura", "resiliparse"):
        metrics |= {
            f"{extractor}_pages_per_cpu_second": rate(extractor, 1, "cpu_seconds", True),
            f"{extractor}_to_split_pages_per_cpu_second": rate(extractor, 1, "cpu_seconds"),
            f"{extractor}_pages_per_second_one_worker": rate(extractor, 1, "seconds"),
            f"{extractor}_pages_per_second_two_workers": rate(extractor, 2, "seconds"),
        }
    one, two = (rate("trafilatura", workers, "seconds") for workers in (1, 2))
    metrics |= {
        "two_workers_times_one": round(two / one, 2),
        "two_plain_processes_times_one": round(plain_rates[2] / plain_rates[1], 2),
    }
    finish("corpus", metrics, TARGETS)


if __name__ == "__main__":
    main()
