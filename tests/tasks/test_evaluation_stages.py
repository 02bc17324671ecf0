"""Tokenizer, token shards, pairs, baseline and evaluation as stages, on a small real corpus."""

import io
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from model.chat import Tokenizer
from model.config import ModelConfig
from model.huggingface import SpecialTokens, save_directory
from model.transformer import Transformer
from tasks.corpus.pairs import PairsConfig, write_instruction_pairs
from tasks.evaluation.baseline import BaselineConfig, compression_baseline
from tasks.evaluation.evaluate import EvaluateConfig, evaluate
from tasks.evaluation.gates import is_better
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store
from tasks.tokenizer.shards import ShardsConfig, write_token_shards
from tasks.tokenizer.train import TokenizerConfig, train_tokenizer
from tests.tasks.api_pages import HELDOUT, TRAIN, PagesConfig, documents, page, split_pages
from tests.tasks.corpus.inline_shards import InlineSession

STAGES = (
    "tasks.tokenizer.train",
    "tasks.tokenizer.shards",
    "tasks.corpus.pairs",
    "tasks.evaluation.baseline",
    "tasks.evaluation.evaluate",
)


class ModelSettings(StageConfig):
    seed: int = 0


@stage("untrained", version=1)
def untrained(config: ModelSettings, work: Workspace, *, tokenizer: Manifest) -> Outcome:
    """A model directory with random weights."""
    import torch

    torch.manual_seed(config.seed)
    proto = work.store.of(tokenizer).read_bytes("tokenizer.model")
    names = Tokenizer(proto)
    size = ModelConfig(vocab_size=len(names), width=32, layers=1, heads=2, context=64)
    directory = work.scratch("model")
    special = SpecialTokens(names.begin, names.stop_ids, names.pad)
    save_directory(directory, Transformer(size), special)
    for path in directory.iterdir():
        work.put(path, path.name)
    work.write_bytes("tokenizer.model", proto)
    return Outcome()


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Gristmill home; shard functions run in this process (the chain's test runs them on Ray)."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("GRISTMILL_HOME", str(home))
        for module in STAGES:
            patch.setattr(f"{module}.ray_session", InlineSession)
        yield home


@pytest.fixture(scope="module")
def corpus(home: Path) -> Manifest:
    return split_pages(PagesConfig())


@pytest.fixture(scope="module")
def tokenizer(corpus: Manifest) -> Manifest:
    return train_tokenizer(TokenizerConfig(vocab_size=600), corpus=corpus)


@pytest.fixture(scope="module")
def pairs(corpus: Manifest) -> Manifest:
    return write_instruction_pairs(PairsConfig(questions_per_group=20), corpus=corpus)


@pytest.fixture(scope="module")
def baseline(corpus: Manifest) -> Manifest:
    return compression_baseline(BaselineConfig(), corpus=corpus)


def test_the_vocabulary_is_learned_from_the_training_split(
    corpus: Manifest, tokenizer: Manifest
) -> None:
    names = Tokenizer.load(Store.open().local(tokenizer, "tokenizer.model"))
    assert len(names) == 600
    assert 1.5 < float(tokenizer.metrics["bytes_per_token"] or 0) < 4
    text = page(HELDOUT[0])
    assert names.decode(names.encode(text)) == text
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(tokenizer.names())


def test_a_vocabulary_beyond_the_corpus_is_one_clear_sentence(corpus: Manifest) -> None:
    with pytest.raises(
        UserError, match=r"vocab_size 60000 is larger than the corpus supports \(\d"
    ):
        train_tokenizer(TokenizerConfig(vocab_size=60_000), corpus=corpus)
    assert all(m.config["vocab_size"] != 60_000 for m in Store.open().all("tokenizer"))


def test_token_shards_hold_every_document_of_their_split(
    corpus: Manifest, tokenizer: Manifest
) -> None:
    shards = write_token_shards(ShardsConfig(), corpus=corpus, tokenizer=tokenizer)
    store = Store.open()
    names = Tokenizer.load(store.local(tokenizer, "tokenizer.model"))
    wanted = {"tokens": set(map(page, TRAIN)), "heldout-tokens": set(map(page, HELDOUT))}
    for prefix, texts in wanted.items():
        found = set()
        for name in shards.names(prefix, ".documents.npy"):
            starts = load(store, shards, name)
            ids = load(store, shards, name.replace(".documents", ""))
            assert ids.dtype == np.uint16 and starts.dtype == np.int64
            for document in np.split(ids, starts[1:]):
                assert (document[0], document[-1]) == (names.begin, names.end_of_document)
                found.add(names.decode(document.tolist()))
        assert found == texts
    assert shards.counts["documents"] == len(TRAIN)
    assert shards.counts["bytes"] == sum(len(page(name).encode()) for name in TRAIN)
    assert shards.counts["heldout_documents"] == len(HELDOUT)


def load(store: Store, manifest: Manifest, name: str) -> np.ndarray:
    return np.load(io.BytesIO(store.of(manifest).read_bytes(name)))


def test_no_fact_of_a_held_out_page_is_trained(pairs: Manifest) -> None:
    rows = tables(pairs)
    homes = {fact.split(".")[0] for fact in facts_of(rows["pairs-train"])}
    assert homes <= set(TRAIN)
    assert {f.split(".")[0] for f in facts_of(rows["questions-unseen"])} <= set(HELDOUT)
    assert rows["questions-unseen"]


def test_recall_questions_ask_trained_facts_in_phrasings_never_trained(pairs: Manifest) -> None:
    rows = tables(pairs)
    trained = {row["phrasing"] for row in rows["pairs-train"]}
    assert not trained & {row["phrasing"] for row in rows["questions-recall"]}
    asked = {(row["fact"], row["kind"]) for row in rows["questions-recall"]}
    assert asked <= {(row["fact"], row["kind"]) for row in rows["pairs-train"]}
    texts = {row["question"] for row in rows["pairs-train"]}
    assert {row["question"] for row in rows["questions-seen"]} <= texts
    assert not {row["question"] for row in rows["questions-recall"]} & texts


def test_pairs_of_the_same_seed_are_the_same(corpus: Manifest, pairs: Manifest) -> None:
    again = write_instruction_pairs.function(
        PairsConfig(questions_per_group=20), scratch_workspace("again"), corpus=corpus
    )
    assert again.counts == pairs.counts
    for name in ("pairs-train", "questions-recall"):
        assert (
            scratch_workspace("again").read_table(f"{name}.parquet").to_pylist()
            == (tables(pairs)[name])
        )


def scratch_workspace(name: str) -> Workspace:
    store = Store.open()
    directory = store.directory("pairs", name)
    return Workspace(directory.uri, directory.path, "pairs", name, store.cache.parent)


def tables(pairs: Manifest) -> dict[str, list[dict[str, str]]]:
    directory = Store.open().of(pairs)
    names = ("pairs-train", "questions-seen", "questions-recall", "questions-unseen")
    return {name: directory.read_table(f"{name}.parquet").to_pylist() for name in names}


def facts_of(rows: list[dict[str, str]]) -> set[str]:
    return {row["fact"] for row in rows}


def test_compressors_are_conditioned_on_the_training_text(
    corpus: Manifest, baseline: Manifest
) -> None:
    alone = len(lzma.compress("".join(map(page, HELDOUT)).encode()))
    unconditional = 8 * alone / baseline.counts["bytes"]
    for method in ("ppmd5", "ppmd8", "xz"):
        assert 0.5 < float(baseline.metrics[f"{method}_bits_per_byte"] or 0) < unconditional
    assert baseline.counts["bytes"] == sum(len(page(name).encode()) for name in HELDOUT)


def test_an_evaluation_scores_the_same_bytes_and_every_question(
    corpus: Manifest, tokenizer: Manifest, pairs: Manifest, baseline: Manifest
) -> None:
    reports = [
        evaluate(
            EvaluateConfig(longest_answer=8, samples=1),
            model=untrained(ModelSettings(seed=seed), tokenizer=tokenizer),
            corpus=corpus,
            pairs=pairs,
            baseline=baseline,
        )
        for seed in (0, 1)
    ]
    report = reports[0]
    assert report.counts["bytes"] == baseline.counts["bytes"]
    # Random weights at initialisation are nearly uniform over the vocabulary.
    tokens = sum(Store.open().of(report).read_table("documents.parquet")["tokens"].to_pylist())
    uniform = tokens * np.log2(600) / report.counts["bytes"]
    assert float(report.metrics["bits_per_byte"] or 0) == pytest.approx(uniform, rel=0.02)
    for group in ("seen", "recall", "unseen"):
        assert report.counts[f"{group}_questions"] == 20
        assert report.metrics[f"{group}_exact"] == 0
        assert 0 < float(report.metrics[f"{group}_exact_high"] or 0) < 0.2
    assert report.metrics["ppmd5_bits_per_byte"] == baseline.metrics["ppmd5_bits_per_byte"]
    assert not is_better(report, report).moved
    assert is_better(*reports).reason


def test_a_corpus_without_facts_says_so() -> None:
    empty = split_pages(PagesConfig(train=("keyword",), heldout=("token",)))
    directory = Store.open().of(empty)
    for name in empty.names("", ".parquet"):
        directory.write_table(name, documents({"": "no heading, no title"}))
    with pytest.raises(UserError, match="training documents states a fact to ask for"):
        write_instruction_pairs(PairsConfig(), corpus=empty)
