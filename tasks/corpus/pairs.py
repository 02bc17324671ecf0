"""The instruction pairs stage: questions and answers grounded in the corpus's own documents.

Every answer is a sentence, a module's name or parameter names as a document states them. Facts of
held-out documents are never trained on. Written are
    pairs-train.parquet         facts of the training split, in phrasings of the trained list
    questions-seen.parquet      some of exactly those questions
    questions-recall.parquet    the same facts in phrasings that are never trained
    questions-unseen.parquet    facts of held-out documents that no training document states
    facts.parquet               every fact found, with what became of it
each with columns id, fact, kind, phrasing, question, answer (facts: see `FACTS`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pyarrow as pa
from pydantic import Field

from tasks.corpus.facts import Fact, is_answer, mentions, mine_entries, mine_page
from tasks.corpus.phrasings import Question, Wording, ask, phrasings, trained_questions
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig

PAIRS = pa.schema(
    [(name, pa.string()) for name in ("id", "fact", "kind", "phrasing", "question", "answer")]
)
FACTS = pa.schema(
    [
        ("fact", pa.string()),
        ("kind", pa.string()),
        ("sentence", pa.string()),
        ("document", pa.string()),
        ("split", pa.string()),
        ("fate", pa.string()),  # trained, unseen, or the rule that left it out
    ]
)
T = TypeVar("T")
ENOUGH_ENTRIES = 100  # facts by layout; with fewer, pages' first sentences are taken as well


class PairsConfig(StageConfig):
    """Which questions are asked about the corpus, and how often."""

    facts: int = Field(1800, ge=0)
    """Facts trained at most, those about the most mentioned modules first; 0 takes all."""
    phrasings_per_fact: int = Field(16, ge=1, le=200)
    """Questions trained for what a thing does, each worded otherwise."""
    phrasings_per_detail: int = Field(7, ge=1, le=200)
    """Questions trained for its module, and for its parameters."""
    altered: float = Field(0.4, ge=0, le=1)
    """Share of trained questions in which words around the name are left out or put in."""
    where: bool = True
    """Also ask which module holds a function or class."""
    parameters: bool = True
    """Also ask for the parameters of a function or class."""
    questions_per_group: int = Field(500, ge=1)
    """Questions of each group the model is examined with."""
    longest_sentence: int = Field(24, ge=3, le=200)
    """Words of the longest sentence that is an answer."""
    most_parameters: int = Field(4, ge=1, le=50)
    """Functions with more parameters than this are not asked for them."""
    seed: int = Field(0, ge=0)
    """Chooses wordings and examination questions."""


@dataclass(frozen=True)
class Item:
    """One thing to be asked of one fact."""

    fact: Fact
    question: Question
    answer: str


@dataclass
class Selection:
    """Facts by what becomes of them; `rules` counts those left out, `fates` says it of each."""

    trained: list[Fact] = field(default_factory=list)
    unseen: list[Fact] = field(default_factory=list)
    fates: list[tuple[Fact, str, str]] = field(default_factory=list)

    @property
    def rules(self) -> dict[str, int]:
        kept = ("trained", "unseen")
        return dict(sorted(Counter(fate for *_, fate in self.fates if fate not in kept).items()))


@stage("pairs", version=4)
def write_instruction_pairs(config: PairsConfig, work: Workspace, *, corpus: Manifest) -> Outcome:
    """Ask questions that the corpus's own documents answer."""
    mined: dict[str, list[Fact]] = {"train": [], "heldout": []}
    mentioned: Counter[str] = Counter()
    shards = [
        (work, corpus, split, name)
        for split in mined
        for name in corpus.names(f"{split}-", ".parquet")
    ]
    with ray_session() as session:
        results = dict(session.map(_mine_shard, shards, label="Facts"))
        for index, (_, _, split, _) in enumerate(shards):  # in the order of the shards
            facts, names = results[index]
            mined[split] += facts
            mentioned.update(names)
        candidates = _candidates(mined["heldout"])
        searches = [(work, corpus, name, candidates) for _, _, s, name in shards if s == "train"]
        stated: set[str] = set()
        for _, found in session.map(_stated_shard, searches, label="Facts stated elsewhere"):
            stated |= found
        chosen = select_facts(config, mined["train"], mined["heldout"], stated, mentioned)
        if not chosen.trained:
            documents = corpus.counts.get("train_documents", 0)
            raise UserError(
                f"none of the corpus's {documents} training documents states a fact to ask for: "
                "they have neither signatures under headings nor titles followed by a sentence; "
                "crawl other pages"
            )
        written = session.map(_write, [(config, work, chosen)], label="Pairs", unit="tables")
        sizes, reports = next(result for _, result in written)
    counts = {"facts": len(chosen.trained), "heldout_facts": len(chosen.unseen), **sizes}
    return Outcome(counts=counts, rules=chosen.rules, reports=reports)


def select_facts(
    config: PairsConfig,
    train: Iterable[Fact],
    heldout: Iterable[Fact],
    stated: set[str],
    mentioned: Counter[str],
) -> Selection:
    """Decide what becomes of each fact.

    stated: names of held-out facts that some training document states as well; mentioned: how many
    documents speak of a name.
    """
    result = Selection()
    kept: dict[str, list[Fact]] = {}
    train, heldout = list(train), list(heldout)
    names_held_out = {fact.name for fact in heldout}
    longest = config.longest_sentence
    by_layout = sum(f.kind != "page" and is_answer(f.sentence, longest) is None for f in train)
    pages = by_layout < ENOUGH_ENTRIES
    for split, facts in (("train", train), ("heldout", heldout)):
        seen: set[str] = set()
        kept[split] = []
        for fact in facts:
            rule = is_answer(fact.sentence, longest)
            if fact.kind == "page" and not pages:
                rule = "page beside documented names"
            elif rule is None and fact.name in seen:
                rule = "duplicate"
            elif rule is None and split == "train" and fact.name in names_held_out:
                rule = "also in a held-out document"
            elif rule is None and split == "heldout" and fact.name in stated:
                rule = "also in a training document"
            if rule is None:
                seen.add(fact.name)
                kept[split].append(fact)
            else:
                result.fates.append((fact, split, rule))
    unambiguous = _unambiguous(train + heldout)
    for split, facts in kept.items():
        named = []
        for fact in facts:
            names = tuple(name for name in fact.names if unambiguous.get(name) == fact.name)
            if names:
                named.append(replace(fact, names=names))
            else:
                result.fates.append((fact, split, "ambiguous name"))
        named.sort(key=lambda fact: _rank(fact, mentioned))
        cut = config.facts if config.facts and split == "train" else len(named)
        result.fates += [(fact, split, "beyond the number asked for") for fact in named[cut:]]
        (result.trained if split == "train" else result.unseen).extend(named[:cut])
    result.fates += [(fact, "train", "trained") for fact in result.trained]
    result.fates += [(fact, "heldout", "unseen") for fact in result.unseen]
    return result


def items_of(fact: Fact, config: PairsConfig) -> list[Item]:
    """What is asked about a fact."""
    items = [Item(fact, "what", fact.sentence)]
    if fact.kind not in ("function", "class"):
        return items
    short = fact.name.rpartition(".")[2]
    if config.where and short in fact.names and fact.home != "builtins":
        # The first is as people know it: `asyncio.sleep`, though it is written in asyncio.tasks.
        items.append(Item(fact, "where", fact.names[0].rpartition(".")[0]))
    if config.parameters and fact.parameters and len(fact.parameters) <= config.most_parameters:
        items.append(Item(fact, "parameters", ", ".join(fact.parameters)))
    return items


def make_tables(config: PairsConfig, chosen: Selection) -> dict[str, pa.Table]:
    """The four tables; a function of the config and the facts."""
    trained = [item for fact in chosen.trained for item in items_of(fact, config)]
    unseen = [item for fact in chosen.unseen for item in items_of(fact, config)]
    wordings = [_wordings(config, item) for item in trained]
    draw = random.Random(f"{config.seed}/groups")
    size = config.questions_per_group
    asked = _sample(draw, list(zip(trained, wordings, strict=True)), size)
    seen = [
        _row(item, draw.choice([w for w in ways if not w.altered] or ways)) for item, ways in asked
    ]
    recall = [_asked(config.seed, "recall", item) for item in _sample(draw, trained, size)]
    new = [_asked(config.seed, "unseen", item) for item in _sample(draw, unseen, size)]
    return {
        "pairs-train": pa.Table.from_pylist(
            [
                _row(item, wording)
                for item, ways in zip(trained, wordings, strict=True)
                for wording in ways
            ],
            PAIRS,
        ),
        "questions-seen": pa.Table.from_pylist(seen, PAIRS),
        "questions-recall": pa.Table.from_pylist(recall, PAIRS),
        "questions-unseen": pa.Table.from_pylist(new, PAIRS),
    }


def _wordings(config: PairsConfig, item: Item) -> list[Wording]:
    """How an item is asked in training; the same question is not asked twice."""
    count = config.phrasings_per_fact if item.question == "what" else config.phrasings_per_detail
    draw = _draw(config.seed, "train", item)
    ways = trained_questions(item.question, item.fact, count, draw, config.altered)
    return list({wording.text: wording for wording in ways}.values())


def _asked(seed: int, group: str, item: Item) -> dict[str, str]:
    """Recall asks in phrasings never trained; unseen facts are asked as trained ones are."""
    draw = _draw(seed, group, item)
    ways = phrasings(item.question, item.fact)
    phrasing = draw.choice(ways.never_trained if group == "recall" else ways.trained)
    text = ask(phrasing, item.question, item.fact, draw)
    return _row(item, Wording(phrasing, text, altered=False))


def _row(item: Item, wording: Wording) -> dict[str, str]:
    text = f"{item.fact.name}\n{item.question}\n{wording.text}"
    return {
        "id": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "fact": item.fact.name,
        "kind": item.question,
        "phrasing": wording.phrasing,
        "question": wording.text,
        "answer": item.answer,
    }


def _draw(seed: int, purpose: str, item: Item) -> random.Random:
    """Randomness of its own for each item, so that one fact more changes no other's questions."""
    return random.Random(f"{seed}/{purpose}/{item.question}/{item.fact.name}")


def _sample(draw: random.Random, population: list[T], size: int) -> list[T]:
    return draw.sample(population, min(size, len(population)))


def _rank(fact: Fact, mentioned: Counter[str]) -> tuple[int, int, str]:
    """What people ask about first: few dots in the name they use, then a module much mentioned."""
    home = fact.home or fact.name
    return fact.names[0].count("."), -mentioned[home], fact.name


def _unambiguous(facts: list[Fact]) -> dict[str, str]:
    """The names that mean one fact only → its full name. A full name means its own fact, and a
    bare name of a built-in the built-in, whatever else is called so."""
    meanings: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        for name in fact.names:
            meanings[name].add(fact.name)
    chosen = {name: next(iter(found)) for name, found in meanings.items() if len(found) == 1}
    for fact in facts:
        chosen[fact.name] = fact.name
        if fact.home == "builtins":
            chosen[fact.names[0]] = fact.name
    return chosen


def _candidates(heldout: list[Fact]) -> dict[str, list[tuple[str, str]]]:
    """Held-out facts by the first three words of their sentence: (name, sentence)."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for fact in heldout:
        if is_answer(fact.sentence) is None:
            found[_opening(fact.sentence.split())].append((fact.name, fact.sentence))
    return dict(found)


def _opening(words: list[str]) -> str:
    return " ".join(words[:3])


def _mine_shard(
    work: Workspace, corpus: Manifest, split: str, name: str
) -> tuple[list[Fact], Counter[str]]:
    """In a Ray worker: the facts of one shard, and how many of its documents mention a name."""
    table = work.store.of(corpus).read_table(name, ["id", "title", "text"])
    facts: list[Fact] = []
    mentioned: Counter[str] = Counter()
    for row in table.to_pylist():
        entries = mine_entries(row["id"], row["text"])
        if entries:
            mentioned.update(mentions(row["text"]))
        page = mine_page(row["id"], row["title"] or "", row["text"])
        facts += entries or ([page] if page else [])
    return facts, mentioned


def _stated_shard(
    work: Workspace, corpus: Manifest, name: str, candidates: dict[str, list[tuple[str, str]]]
) -> set[str]:
    """In a Ray worker: names of candidates that a document of this shard states too.

    It does when it holds the sentence and, anywhere, the last part of the name: the source of a
    function states what its documentation does.
    """
    table = work.store.of(corpus).read_table(name, ["text"])
    stated: set[str] = set()
    for text in table.column("text").to_pylist():
        words = text.split()
        joined = " ".join(words)
        openings = {_opening(words[at : at + 3]) for at in range(len(words))}
        for opening in openings & candidates.keys():
            stated.update(
                name
                for name, sentence in candidates[opening]
                if sentence in joined and _last_part(name).search(joined)
            )
    return stated


def _last_part(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(name.rpartition('.')[2])}(?!\w)")


def _write(
    config: PairsConfig, work: Workspace, chosen: Selection
) -> tuple[dict[str, int], tuple[Report, ...]]:
    """In a Ray worker: write all tables; their sizes and what a person reads of them."""
    tables = make_tables(config, chosen)
    for name, table in tables.items():
        work.write_table(f"{name}.parquet", table)
    work.write_table("facts.parquet", _fact_table(chosen))
    sizes = {name.replace("-", "_"): table.num_rows for name, table in tables.items()}
    return sizes, _reports(tables, chosen)


def _fact_table(chosen: Selection) -> pa.Table:
    rows = [
        {
            "fact": fact.name,
            "kind": fact.kind,
            "sentence": fact.sentence,
            "document": fact.document,
            "split": split,
            "fate": fate,
        }
        for fact, split, fate in chosen.fates
    ]
    return pa.Table.from_pylist(rows, FACTS)


def _reports(tables: dict[str, pa.Table], chosen: Selection) -> tuple[Report, ...]:
    groups = []
    for name, table in tables.items():
        kinds = Counter(table.column("kind").to_pylist())
        asked = {kind: kinds[kind] for kind in ("what", "where", "parameters")}
        groups.append({"group": name, "questions": table.num_rows, **asked})
    rules = [{"rule": rule, "facts left out": count} for rule, count in chosen.rules.items()]
    draw = random.Random(0)
    examples = [
        {"group": name} | {key: row[key] for key in ("question", "answer")}
        for name, table in tables.items()
        for row in _sample(draw, table.to_pylist(), 4)
    ]
    reports = (
        Report("pairs", "table", groups, "Questions by group and kind"),
        Report("pairs-left-out", "table", rules, "Facts left out, by rule"),
        Report("pairs-examples", "table", examples, "Some questions and their answers"),
    )
    return tuple(report for report in reports if report.body)
