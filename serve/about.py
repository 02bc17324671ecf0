"""What a person should know of a model before asking it, read from the artifacts it was made of."""

import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pyarrow import fs

from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store, open_filesystem

EXAMPLES = 24
LONGEST_EXAMPLE = 70  # characters, to fit a button
QUESTIONS = "pairs-train.parquet"
# Stages whose digests name the data.
DATA = ("crawl", "gather", "split", "tokenizer", "pairs", "conversations")
# Of a corpus that has them, the modules most readers know come first.
FAMILIAR = (
    *("shutil", "os", "json", "random", "re", "math", "pathlib", "datetime", "collections", "csv"),
    *("itertools", "functools", "string", "textwrap", "time", "subprocess", "threading", "heapq"),
    *("statistics", "hashlib", "logging", "sqlite3", "tempfile", "zipfile", "socket", "asyncio"),
)


@dataclass(frozen=True)
class About:
    """What to ask about, what the model was trained on, and questions it was taught; the data it
    comes from.
    """

    title: str = ""
    corpus: str = ""
    examples: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)  # stage → digest of what it made


def about(store: Store, artifact: Manifest) -> About:
    """Walk from a model to its crawl and its questions; what is not found stays empty."""
    title = corpus = ""
    examples: tuple[str, ...] = ()
    data: dict[str, str] = {}
    for manifest in ancestry(store, artifact):
        if manifest.stage == "crawl" and not corpus:
            title, corpus = _of_seeds([str(seed) for seed in manifest.config.get("seeds", ())])
        if QUESTIONS in manifest.names() and not examples:
            table = store.of(manifest).read_table(QUESTIONS, ["fact", "kind", "question"])
            examples = choose_examples(table.to_pylist())
        if manifest.stage in DATA:
            data.setdefault(manifest.stage, manifest.content)
    return About(title, corpus, examples, data)


def ancestry(store: Store, artifact: Manifest) -> Iterator[Manifest]:
    """An artifact and everything it was made from that the store still has, nearest first."""
    filesystem, root = open_filesystem(store.uri)
    found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    stages = [info.base_name for info in found if info.type == fs.FileType.Directory]
    queue, seen = deque([artifact]), {artifact.fingerprint}
    while queue:
        manifest = queue.popleft()
        yield manifest
        for fingerprint in manifest.made_of:
            if fingerprint in seen:
                continue
            seen.add(fingerprint)
            made = (store.find(stage, fingerprint) for stage in stages)
            queue.extend(parent for parent in made if parent is not None)


def choose_examples(rows: list[dict[str, str]]) -> tuple[str, ...]:
    """A few short trained questions (rows of fact, kind, question), of different subjects.

    Of a corpus of code they name a public thing in full. Familiar subjects come first; the same
    rows give the same examples.
    """
    best: dict[str, str] = {}
    for row in rows:
        fact, question = row["fact"], row["question"]
        named = row["kind"] == "what" and fact in question and "._" not in fact
        if named and question.endswith("?") and len(question) <= LONGEST_EXAMPLE:
            best[fact] = min(question, best.get(fact, question), key=_plainness)
    facts = sorted(fact for fact, question in best.items() if question.startswith("What "))
    random.Random(0).shuffle(facts)
    facts.sort(
        key=lambda fact: (_familiarity(_subject(fact)), fact.count(".") != 1, not fact.islower())
    )
    groups: dict[str, list[str]] = {}
    for fact in facts:
        groups.setdefault(_subject(fact), []).append(best[fact])
    rounds = [group[depth] for depth in range(2) for group in groups.values() if depth < len(group)]
    return tuple(rounds[:EXAMPLES])


def _plainness(question: str) -> tuple[bool, bool, int, str]:
    """Orders the phrasings of a question: as a person would put it, then short."""
    return (not question.startswith("What does"), "`" in question, len(question), question)


def _subject(fact: str) -> str:
    """The module a fact is about, or the page."""
    return fact.split(".")[0]


def _familiarity(subject: str) -> int:
    return FAMILIAR.index(subject) if subject in FAMILIAR else len(FAMILIAR)


def _of_seeds(seeds: list[str]) -> tuple[str, str]:
    """(title, corpus) of a crawl's seeds."""
    if seeds and all(seed.startswith("embedded:") for seed in seeds):
        return (
            "Ask about Python's standard library",
            "the documentation of Python's standard library",
        )
    hosts = list(dict.fromkeys(urlsplit(seed).hostname or seed for seed in seeds))
    named = ", ".join(hosts[:3]) + (" and others" if len(hosts) > 3 else "")
    return (f"Ask about {named}", f"pages of {named}") if named else ("", "")
