"""All text stages over one small crawl: the whole walk, what each stage makes, and Ray."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from crawled import Page, PagesConfig, crawl_of, html
from documents_of import documents, rows, urls
from inline_shards import stages_inline

from tasks.corpus.decontaminate import DecontaminateConfig, decontaminate
from tasks.corpus.dedup import DeduplicateConfig, deduplicate
from tasks.corpus.extract import ExtractConfig, extract
from tasks.corpus.language import LanguageConfig, language
from tasks.corpus.measure import MeasureConfig, measure
from tasks.corpus.pii import PIIConfig, pii
from tasks.corpus.quality import QualityConfig, quality
from tasks.corpus.signatures import signatures
from tasks.corpus.split import SplitConfig, split
from tasks.corpus.suites import SuiteConfig
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store

ROOT = Path(__file__).parents[3]
THINGS = ("queue", "stack", "heap", "tree", "graph", "table", "list", "set", "ring", "trie")
VERBS = ("append", "remove", "rotate", "search", "merge", "split", "count", "clear")


ITEM = (
    "Rotate the items of the given queue, and return how many of its heaps have been changed by 0."
)

# A find of every kind, and what only looks like one.
PERSONAL = {
    "http://e.org/found": "jane@company.io, 4111 1111 1111 1111, DE89 3704 0044 0532 0130 00, "
    "8.8.8.8, 2a00:1450:4001:82f::200e, +49 30 901820, 0044 20 7946 0018, 415-555-2671, "
    "030 901820, hf_" + "aBcDe" * 7 + "; 4111111111111111,5500005555555559; foo@münchen.de",
    "http://e.org/nothing": "someone@example.com 4111 1111 1111 1112, DE00 3704 0044 0532 0130 00, "
    "127.0.0.1, 2001:db8::1, ISBN 0-306-40615-2, 2024-05-01 12:00:00, hf_hub_download",
}


def module(number: int, thing: str) -> str:
    blocks = [f"<p>A {thing} that keeps its items in the order of module {number}.</p>"]
    for place, verb in enumerate(VERBS):
        word = f"{verb}_{thing}"
        blocks += [
            f'<section id="{word}"><h2><code>{thing}s.{word}(items, limit={place})</code></h2>',
            f"<p>{verb.title()} the items of the given {thing}, and return how many of its "
            f"{THINGS[(number + place) % 10]}s have been changed by {number * place}.</p>",
            f"<pre><code>&gt;&gt;&gt; {word}([1, 2], limit={place})\n{number}</code></pre>",
            "</section>",
        ]
    return html(f"{thing}s", *blocks)


def site() -> PagesConfig:
    base = "embedded://stdlib"
    pages = [
        Page(url=f"{base}/library/{thing}s.html", body=module(number, thing))
        for number, thing in enumerate(THINGS)
    ]
    copy = pages[3].body
    # A near duplicate: one of some 250 words is another.
    near = pages[4].body.replace("A graph that keeps", "A graph which keeps")
    entries = "".join(
        f"<li><code>{thing}s.{verb}_{thing}</code>: {verb} of the {thing} and what it returns</li>"
        for thing in THINGS
        for verb in VERBS
    )
    german = html(
        "Brücke", "<p>" + "Die Brücke über den Fluss war im Winter gesperrt. " * 8 + "</p>"
    )
    hidden = html("n", "<p>text</p>", head='<meta name="robots" content="noindex">')
    return PagesConfig(
        pages=(
            *pages,
            Page(url=f"{base}/latest/trees.html", body=copy),
            Page(url=f"{base}/mirror/graphs.html", body=near),
            Page(url=f"{base}/index.html", body=html("Index", f"<ul>{entries}</ul>")),
            Page(url=f"{base}/de.html", body=german),
            Page(url=f"{base}/hidden.html", body=hidden),
            Page(url=f"{base}/gone.html", body="gone", status=410),
        )
    )


def build() -> dict[str, Manifest]:
    crawled = crawl_of(site())
    extracted = extract(ExtractConfig(shard_megabytes=0.01), crawl=crawled)
    measured = measure(MeasureConfig(), documents=extracted)
    identified = language(LanguageConfig(), documents=extracted, attributes=measured)
    good = quality(QualityConfig(), documents=identified, attributes=measured)
    deduplication = DeduplicateConfig()
    signed = signatures(deduplication.signatures(), documents=extracted)
    unique = deduplicate(deduplication, documents=good, signatures=signed)
    divided = split(SplitConfig(seed=0, common_groups=5), documents=unique)
    suite = Path(os.environ["GRISTMILL_HOME"]) / "sources" / "items.txt"
    suite.parent.mkdir(parents=True, exist_ok=True)
    suite.write_text(ITEM)
    items = SuiteConfig(name="items", path=str(suite), format="text")
    clean = decontaminate(DecontaminateConfig(suites=(items,), action="cut"), documents=unique)
    masked = pii(PIIConfig().masking(), documents=documents(PERSONAL))
    made = (extracted, measured, identified, good, unique, divided, clean, masked)
    return {manifest.stage: manifest for manifest in made}


@pytest.fixture
def built(tmp_path, monkeypatch):
    with stages_inline(monkeypatch, tmp_path / "home"):
        yield build()


def digest(manifest: Manifest) -> str:
    """Of every row of an artifact's tables; not of times, places and floating-point scores."""
    told = hashlib.sha256()
    for prefix in ("documents-", "train-", "heldout-", "rejected-", "attributes-", "cut-"):
        for row in rows(manifest, prefix):
            kept = {
                k: round(v, 6) if isinstance(v, float) else v
                for k, v in row.items()
                if k not in ("offset", "digest", "fetched_at", "language_score")
            }
            told.update(json.dumps([prefix, kept], sort_keys=True, ensure_ascii=False).encode())
    return told.hexdigest()[:16]


# Where one of these changes, the stage makes something else of the same input: raise its version
# in @stage, then write the new digest here.
GOLDEN: dict[str, tuple[int, str]] = {
    "extract": (7, "02b69b40f7fe1b6b"),
    "measure": (3, "ea0bb70d0d9ed05a"),
    "language": (1, "7c08c7f0596464cb"),
    "quality": (3, "11a80c6beab3e6e8"),
    "deduplicate": (3, "ad6352b2716f6056"),
    "split": (2, "913ed04a15c7ca75"),
    "decontaminate": (2, "47ff18bd7a052020"),
    "pii": (5, "947e2adc228646a1"),
}


def test_each_stage_removes_what_it_should(built: dict[str, Manifest]) -> None:
    assert built["extract"].rules == {"noindex": 1, "status": 1}
    assert built["language"].rules == {"language-other": 1}
    assert built["quality"].rules == {"bullet_lines": 1}
    assert built["deduplicate"].rules == {"exact-duplicate": 1, "near-duplicate": 1}
    assert built["decontaminate"].metrics["documents_contaminated"] == 1
    assert sum(built["pii"].metrics.values()) == 12
    final = built["split"]
    kept = [*urls(final, "train-"), *urls(final, "heldout-")]
    assert sorted(kept) == sorted(f"embedded://stdlib/library/{t}s.html" for t in THINGS)
    assert final.counts["train_documents"] + final.counts["heldout_documents"] == 10
    train = rows(final, "train-")[0]["text"].split("\n")
    signature = next(line for line in train if line.startswith("## "))
    assert signature.endswith(", limit=0)") and "`" not in signature
    assert train[train.index(signature) + 2].startswith("Append the items of the given")
    assert "```" in train


def test_every_stage_reports_a_table_of_its_rules(built: dict[str, Manifest]) -> None:
    for manifest in built.values():
        reports = json.loads(Store.open().of(manifest).read_bytes("report.json"))
        tables = [report for report in reports if report["kind"] == "table"]
        assert tables and all(report["body"] for report in tables)
        assert all(report["key"] == report["key"].lower() for report in reports)


def test_what_a_stage_makes_changes_only_with_its_version(built: dict[str, Manifest]) -> None:
    found = {name: (manifest.version, digest(manifest)) for name, manifest in built.items()}
    assert found == GOLDEN


@pytest.mark.peer
def test_other_programs_open_a_corpus_directly(built: dict[str, Manifest], tmp_path: Path) -> None:
    import duckdb
    import pandas
    from datasets import load_dataset

    directory = Path(Store.open().of(built["split"]).path)
    texts = sorted(row["text"] for row in rows(built["split"], "train-"))
    files = sorted(map(str, directory.glob("train-*.parquet")))
    frame = pandas.concat(map(pandas.read_parquet, files))
    assert sorted(frame["text"]) == texts
    found = duckdb.sql(f"SELECT text FROM '{directory}/train-*.parquet' ORDER BY text").fetchall()
    assert [text for (text,) in found] == texts
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert sorted(loaded["text"]) == texts


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_corpus_chain import build, digest
print(json.dumps({name: digest(manifest) for name, manifest in build().items()}))
"""


def test_ray_workers_make_the_same(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    environment = os.environ | {
        "GRISTMILL_HOME": str(tmp_path / "home"),
        "GRISTMILL_RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{here}",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, here],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {name: expected for name, (_, expected) in GOLDEN.items()}
