"""Near-duplicate removal: found where planted, at which speed, in how much memory.

    python benchmarks/dedup.py [--quick]

Real articles are replicated and perturbed until no two resemble each other; beside some of them
stand copies with some words edited, whose Jaccard similarity J (sets of five-word runs) is computed
here in plain Python. At threshold t the stage must remove one of a pair with J ≥ t + .05 and none
for a pair with J ≤ t − .02. The peer is datatrove's MinHash pipeline (signatures, buckets, cluster,
filter) with its default 14 bands of 8, on the same documents, words cut at blanks, which is faster
than its default tokenizer. Speeds are per CPU second on one core, both from Parquet to Parquet;
ours, too, on pages made of one template, of which all pairs are candidates.
Memory is the peak of the driver and that of a worker, in processes of their own, on an input and on
one ten times as large.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.one_core import (
    InlineSession,
    OneWorkerSession,
    Stopwatch,
    one_core,
    peak_mb,
    worker,
)
from benchmarks.report import Targets, finish
from benchmarks.samples import articles, samples, vocabulary

THRESHOLD = 0.8
SHARD_BYTES = 1_000_000
TARGETS: Targets = {
    "recall_above": (">=", 0.95),
    "removed_below": ("<=", 0),
    "mb_per_cpu_second": (">=", 5),
    "times_datatrove": (">=", 4),
    "memory_ratio_tenfold": ("<=", 1.15),
}


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def true_jaccard(a: str, b: str) -> float:
    """|a ∩ b| / |a ∪ b| of the sets of five-word runs, without anything of ours."""
    first, second = (
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        for words in (words_of(a), words_of(b))
    )
    return len(first & second) / len(first | second)


def edited(text: str, changes: int, rng: random.Random) -> str:
    words = text.split(" ")
    for place in rng.sample(range(len(words)), min(changes, len(words))):
        words[place] = f"x{rng.randrange(10**9)}"
    return " ".join(words)


def write_documents(folder: Path, megabytes: float, pairs: int, seed: int) -> None:
    """`documents-NNNNN.parquet` of about so many megabytes, planted pairs spread among them."""
    rng = random.Random(seed)
    texts = articles(samples(), seed)
    rows: list[dict[str, object]] = []
    size = 0
    for number in itertools.count():
        text = next(text for text in texts if len(words_of(text)) > 150)
        rows.append({"url": f"http://a.example/{number}", "text": text, "j": -1.0})
        if number < pairs:
            words = len(text.split(" "))
            # k edits far apart change 5k of n runs: J = (n − 5k) / (n + 5k) from .99 down to .5.
            copy = edited(text, rng.randint(1, max(words // 15, 2)), rng)
            j = true_jaccard(text, copy)
            rows.append({"url": f"http://b.example/copy/{number}", "text": copy, "j": j})
        size += len(text.encode())
        if size >= megabytes * 1e6 and number >= pairs:
            break
    rng.shuffle(rows)
    write_shards(folder, rows)


def write_templated(folder: Path, count: int, seed: int) -> None:
    """Pages of 20 paragraphs of 40 words, four fifths of them a template's: no two are duplicates
    (J is about .6), and all are candidates."""
    rng, words = random.Random(seed), vocabulary(samples())

    def paragraph() -> str:
        return " ".join(rng.choices(words, k=40))

    template = [paragraph() for _ in range(20)]
    rows: list[dict[str, object]] = []
    for number in range(count):
        own = set(rng.sample(range(20), 4))
        text = "\n\n".join(paragraph() if n in own else template[n] for n in range(20))
        rows.append({"url": f"http://t.example/{number}", "text": text, "j": -1.0})
    write_shards(folder, rows)


def write_shards(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True)
    start, filled, shard = 0, 0, 0
    for end, row in enumerate(rows, 1):
        filled += len(str(row["text"]).encode())
        if filled >= SHARD_BYTES or end == len(rows):
            table = pa.Table.from_pylist(rows[start:end])
            pq.write_table(table, folder / f"documents-{shard:05d}.parquet")
            start, filled, shard = end, 0, shard + 1


def run_ours(folder: Path, session: type[InlineSession] = InlineSession) -> dict[str, Any]:
    """Signatures and the deduplicate stage, from Parquet to Parquet, in a process of its own."""
    from tasks.corpus.dedup import DeduplicateConfig, deduplicate
    from tasks.corpus.documents import DOCUMENTS, document_id
    from tasks.corpus.signatures import signatures
    from tasks.runtime.stage import Outcome, Workspace, stage
    from tasks.runtime.stage_config import StageConfig
    from tasks.runtime.store import Store

    class FolderConfig(StageConfig):
        folder: str

    @stage("benchmark-documents", version=1, retries=0)
    def folder_of(config: FolderConfig, work: Workspace) -> Outcome:
        for path in sorted(Path(config.folder).glob("documents-*.parquet")):
            rows = [
                dict.fromkeys(DOCUMENTS.names)
                | {"id": document_id(row["text"]), "url": row["url"], "text": row["text"]}
                | {"bytes": len(row["text"].encode())}
                for row in pq.read_table(path).to_pylist()
            ]
            work.write_table(path.name, pa.Table.from_pylist(rows, DOCUMENTS))
        return Outcome()

    home = Path(tempfile.mkdtemp(prefix="gristmill-bench-"))
    try:
        with one_core(home, session):
            documents = folder_of(FolderConfig(folder=str(folder)))
            config = DeduplicateConfig(threshold=THRESHOLD)
            with Stopwatch() as watch:
                signed = signatures(config.signatures(), documents=documents)
                manifest = deduplicate(config, documents=documents, signatures=signed)
            removed = [
                url
                for table in Store.open().tables(manifest, "rejected-", ["url"])
                for url in table["url"].to_pylist()
            ]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return {"cpu": watch.cpu, "peak_mb": peak_mb(), "removed": removed}


def run_memory(folder: Path) -> dict[str, Any]:
    """Peaks of driver and worker."""
    result = run_ours(folder, OneWorkerSession)
    return {"driver_mb": result["peak_mb"], "worker_mb": OneWorkerSession.peak_mb()}


def run_datatrove(folder: Path) -> dict[str, object]:
    """The four steps of datatrove's own example, one task after another in this process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Split(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    logger.remove()
    out = Path(tempfile.mkdtemp(prefix="gristmill-bench-"))
    config = MinhashConfig()
    signature = MinhashDedupSignature(str(out / "signatures"), config, language=Split())

    def reader() -> ParquetReader:
        return ParquetReader(str(folder), glob_pattern="documents-*.parquet", id_key="url")

    buckets = MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config)
    cluster = MinhashDedupCluster(str(out / "buckets"), str(out / "remove"), config=config)
    removed = ParquetWriter(str(out / "removed"))
    filtered = MinhashDedupFilter(str(out / "remove"), exclusion_writer=removed)
    steps = [
        ([reader(), signature], 1),
        ([buckets], config.num_buckets),
        ([cluster], 1),
        ([reader(), filtered, ParquetWriter(str(out / "kept"))], 1),
    ]
    try:
        with Stopwatch() as watch:
            for number, (pipeline, tasks) in enumerate(steps):
                LocalPipelineExecutor(
                    pipeline, tasks=tasks, workers=1, logging_dir=str(out / f"logs{number}")
                ).run()
        tables = [pq.read_table(path) for path in (out / "removed").rglob("*.parquet")]
        gone = [url for table in tables for url in table["id"].to_pylist()]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return {"cpu": watch.cpu, "peak_mb": peak_mb(), "removed": gone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer documents, one round")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run = {"ours": run_ours, "memory": run_memory, "datatrove": run_datatrove}[
            options.worker[0]
        ]
        print(json.dumps(run(Path(options.worker[1]))))
        return
    megabytes, pairs, rounds = (24.0, 300, 1) if options.quick else (90.0, 1000, 3)
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as directory:
        small, large, alike = (Path(directory) / name for name in ("small", "large", "alike"))
        write_templated(alike, 500 if options.quick else 2000, seed=3)
        write_documents(small, megabytes / 10, pairs // 10, seed=1)
        write_documents(large, megabytes, pairs, seed=2)
        input_mb = {
            folder: sum(
                len(text.encode())
                for path in folder.iterdir()
                for text in pq.read_table(path, columns=["text"])["text"].to_pylist()
            )
            / 1e6
            for folder in (small, large, alike)
        }
        tenth, whole = (worker(__file__, "memory", str(folder)) for folder in (small, large))
        ours, peers, templated = [], [], []
        for _ in range(rounds):
            templated.append(worker(__file__, "ours", str(alike)))
            ours.append(worker(__file__, "ours", str(large)))
            peers.append(worker(__file__, "datatrove", str(large)))
        truth = {
            row["url"].rpartition("/")[2]: row["j"]
            for path in large.iterdir()
            for row in pq.read_table(path, columns=["url", "j"]).to_pylist()
            if row["j"] >= 0
        }

    def judged(result: dict[str, Any]) -> tuple[float, int]:
        gone = {url.rpartition("/")[2] for url in result["removed"]}
        above = [pair for pair, j in truth.items() if j >= THRESHOLD + 0.05]
        below = [pair for pair, j in truth.items() if j <= THRESHOLD - 0.02]
        unplanted = gone - truth.keys()
        return len(gone & set(above)) / len(above), len(gone & set(below)) + len(unplanted)

    recall, wrong = judged(ours[-1])
    peer_recall, peer_wrong = judged(peers[-1])
    ours_cpu = statistics.median(float(run["cpu"]) for run in ours)
    peer_cpu = statistics.median(float(run["cpu"]) for run in peers)
    finish(
        "dedup",
        {
            "input_mb": round(input_mb[large], 1),
            "planted_pairs": len(truth),
            "recall_above": round(recall, 4),
            "removed_below": wrong,
            "datatrove_recall_above": round(peer_recall, 4),
            "datatrove_removed_below": peer_wrong,
            "mb_per_cpu_second": round(input_mb[large] / ours_cpu, 2),
            "datatrove_mb_per_cpu_second": round(input_mb[large] / peer_cpu, 2),
            "times_datatrove": round(peer_cpu / ours_cpu, 2),
            "templated_mb_per_cpu_second": round(
                input_mb[alike] / statistics.median(float(run["cpu"]) for run in templated), 2
            ),
            "driver_mb": round(whole["driver_mb"]),
            "driver_mb_tenth": round(tenth["driver_mb"]),
            "worker_mb": round(whole["worker_mb"]),
            "worker_mb_tenth": round(tenth["worker_mb"]),
            "memory_ratio_tenfold": round(sum(whole.values()) / sum(tenth.values()), 3),
        },
        TARGETS,
    )


if __name__ == "__main__":
    main()
