"""What a training reads and is judged by: token shards and question pairs as loaders."""

from __future__ import annotations

import math

from model.chat import Tokenizer, encode_example
from model.config import ModelConfig
from model.loader import DataError, Loader, Place, WindowLoader
from model.masking import MaskedLoader
from model.mixing import MixedLoader, WeightedLoader
from model.packing import Example, PackedLoader
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store
from tasks.tokenizer.shards import shard_sources
from tasks.training.conversations import TOO_LONG, read_conversations
from tasks.training.job import TrainingJob
from tasks.training.samples import ASKED

UNSEEN = "questions-unseen"  # of the pairs: about facts that no training document states


def training_data(
    job: TrainingJob, store: Store, tokenizer: Tokenizer, shape: ModelConfig
) -> tuple[Loader, int, dict[str, int]]:
    """(the data, tokens of the whole run, counts for the manifest)."""
    windows: Loader | None = None
    counts: dict[str, int] = {}
    if job.shards is not None:
        sources = _windows(job, store, job.shards, "tokens", len(tokenizer), apart=True)
        if job.source_weights:
            # A source too short for one sequence has no windows; with a weight it was refused.
            short = set(shard_sources(job.shards.names(), "tokens")) - set(sources)
            weights = {n: weight for n, weight in job.source_weights.items() if n not in short}
            windows = WeightedLoader(sources, weights)
            sources = {name: source for name, source in sources.items() if weights[name]}
        else:
            (windows,) = _windows(job, store, job.shards, "tokens", len(tokenizer)).values()
        counts = {"corpus_tokens": sum(source.tokens for source in sources.values())}
        windows = _masked(job, windows, tokenizer, shape)
    if job.pairs is None:
        assert windows is not None
        return windows, int(job.loop["total_tokens"]), counts
    examples, too_long = read_examples(store, job.pairs.pairs, tokenizer, job.sequence)
    counts = {"examples": len(examples), "examples_too_long": too_long}
    if job.pairs.conversations is not None:
        own, said = own_examples(store, job.pairs.conversations, tokenizer, job.sequence)
        examples += own
        counts |= said
    packed = PackedLoader(examples, job.sequence, job.seed, pad=tokenizer.pad)
    rows = packed.rows(job.pairs.passes)
    counts |= {"rows": rows}
    if windows is None or job.pairs.replay == 0:
        return packed, rows * job.sequence, counts
    batch = int(job.loop["batch"])
    mixed = MixedLoader(packed, windows, job.pairs.replay, block=batch)
    steps = math.ceil(math.ceil(rows / batch) / (1 - job.pairs.replay))
    return mixed, steps * batch * job.sequence, counts


def heldout_data(
    job: TrainingJob, store: Store, tokenizer: Tokenizer, shape: ModelConfig
) -> dict[str, Loader]:
    """What a training is judged by while it goes on, by name: held-out documents of each source
    that has a sequence of them, and in fine-tuning the answers to questions in phrasings that are
    never trained (recall) and about facts that are not (unseen).
    """
    if not job.judged:
        return {}
    judges: dict[str, Loader] = {}
    if job.pairs is not None:
        for table in (ASKED, UNSEEN):
            examples, _ = read_examples(store, job.pairs.pairs, tokenizer, job.sequence, table)
            if examples:
                name = table.removeprefix("questions-")
                judges[name] = PackedLoader(examples, job.sequence, job.seed, pad=tokenizer.pad)
    if job.shards is None:
        return judges
    found = _windows(job, store, job.shards, "heldout-tokens", len(tokenizer), apart=True)
    return judges | {
        name: _masked(job, windows, tokenizer, shape)
        for name, windows in found.items()
        if job.source_weights.get(name, 1)
    }


def _masked(job: TrainingJob, source: Loader, tokenizer: Tokenizer, shape: ModelConfig) -> Loader:
    """The data as the model's objective wants it: some tokens hidden from one that looks ahead."""
    if shape.causal:
        return source
    return MaskedLoader(
        source,
        mask=tokenizer.mask,
        vocab_size=len(tokenizer),
        seed=job.seed,
        share=job.mask_share,
    )


def _windows(
    job: TrainingJob,
    store: Store,
    shards: Manifest,
    split: str,
    vocabulary: int,
    *,
    apart: bool = False,
) -> dict[str, WindowLoader]:
    """The windows of a split of the corpus: all together, or each source's apart."""
    sources = shard_sources(shards.names(), split)
    if not apart:
        sources = {"all": [name for names in sources.values() for name in names]}
    for name in shards.names(f"{split}-", ".documents.npy"):
        store.local(shards, name)  # beside its shard, wherever that is read from
    loaders = {}
    for source, names in sources.items():
        paths = [store.local(shards, name) for name in names]
        try:
            loaders[source] = WindowLoader(
                paths,
                job.sequence,
                job.seed,
                document_masking=job.document_masking,
                vocab_size=vocabulary,
            )
        except DataError:
            if split == "tokens" and (not apart or job.source_weights.get(source)):
                raise
    return loaders


def read_examples(
    store: Store, pairs: Manifest, tokenizer: Tokenizer, sequence: int, name: str = "pairs-train"
) -> tuple[list[Example], int]:
    """(pairs as conversations, how many were left out as longer than `sequence`)."""
    examples, too_long = [], 0
    for file in pairs.names(name, ".parquet"):
        table = store.of(pairs).read_table(file, ["question", "answer"])
        for number, row in enumerate(table.to_pylist()):
            messages = [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            place = Place(file, number, 1)
            example = Example(*encode_example(messages, tokenizer), place)
            if len(example.ids) > sequence + 1:
                too_long += 1
            else:
                examples.append(example)
    return examples, too_long


def own_examples(
    store: Store, conversations: Manifest, tokenizer: Tokenizer, sequence: int
) -> tuple[list[Example], dict[str, int]]:
    """(a person's own conversations, each as often as its config says; how many there are, how many
    call tools, how many were left out as longer than `sequence`). Raises DataError where that
    leaves none."""
    examples: list[Example] = []
    counts = dict.fromkeys(("conversations", "conversations_with_calls", TOO_LONG), 0)
    for file, number, messages, tools in read_conversations(store, conversations):
        example = Example(*encode_example(messages, tokenizer, tools), Place(file, number, 1))
        if len(example.ids) > sequence + 1:
            counts[TOO_LONG] += 1
            continue
        examples += [example] * int(conversations.config["repeat"])
        counts["conversations"] += 1
        counts["conversations_with_calls"] += any(m.get("tool_calls") for m in messages)
    if not examples:
        raise DataError(
            f"all {counts[TOO_LONG]} conversations are longer than finetune.sequence {sequence} "
            "tokens; raise it, up to the model's context, or give shorter ones"
        )
    return examples, counts
