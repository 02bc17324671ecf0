"""The evaluation stage: a model's bits per byte beside compressors, its answers, some samples.

Written are, item by item, so that another model can be compared on the same ones:
    documents.parquet          bits, tokens and bytes of each held-out document
    base-documents.parquet     the same of the base model that was fine-tuned, if one was
    answers-seen.parquet …     question, reference, answer, exact, rouge_l for each group
    samples.json               how the model continues documents it never saw
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from tasks.corpus.sampling import Document
from tasks.evaluation.baseline import heldout_documents
from tasks.evaluation.compression import LABELS, METHODS
from tasks.evaluation.intervals import Estimate, bootstrap_ratio, mean, wilson
from tasks.runtime.manifest import Manifest, Scalar
from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store

GROUPS = {
    "seen": "seen facts, phrasings trained",
    "recall": "seen facts, phrasings never trained",
    "unseen": "facts never seen",
}
DOCUMENTS = pa.schema(
    [("id", pa.string()), ("bits", pa.float64()), ("tokens", pa.int64()), ("bytes", pa.int64())]
)
ANSWERS = pa.schema(
    [
        *(
            (name, pa.string())
            for name in ("id", "fact", "kind", "question", "reference", "answer")
        ),
        ("exact", pa.bool_()),
        ("rouge_l", pa.float64()),
    ]
)
DOCUMENT_BYTES_PER_PART = 150_000
QUESTIONS_PER_PART = 400
OPENING, CONTINUATION = 120, 60  # characters shown to the model, tokens it adds
SHOWN = 4  # samples of each group on the run page


class EvaluateConfig(StageConfig):
    """How a model is examined."""

    longest_answer: int = Field(80, ge=1, le=4096)
    """Tokens after which an answer is cut."""
    window: int = Field(0, ge=0)
    """Tokens read at once for bits per byte, no more than the model's context; 0 takes that."""
    samples: int = Field(3, ge=0, le=50)
    """Held-out documents whose opening the model continues."""


@dataclass(frozen=True)
class Part:
    """Work of one Ray task: documents to score, openings to continue, or a group's questions."""

    kind: str  # "documents", "base" (documents, by the base model), "openings" or a group
    items: Sequence[Any]


@stage("evaluate", version=2)
def evaluate(
    config: EvaluateConfig,
    work: Workspace,
    *,
    model: Manifest,
    corpus: Manifest,
    pairs: Manifest,
    baseline: Manifest,
) -> Outcome:
    """Bits per byte on held-out documents, answers in three groups with intervals, samples.

    Fine-tuning towards answers costs some of what pretraining learned of documents, so a model
    that was fine-tuned is scored beside its base, on the same bytes.
    """
    store = work.store
    documents = heldout_documents(store, corpus, baseline)
    parts = _parts(config, store, documents, pairs)
    base = store.get("pretrain", model.inputs["base"]) if "base" in model.inputs else None
    if base is not None:
        parts += [Part("base", part.items) for part in parts if part.kind == "documents"]
    rows: dict[str, list[dict[str, Any]]] = {part.kind: [] for part in parts}
    with ray_session() as session:
        items = [(config, work, base if p.kind == "base" else model, p) for p in parts]
        results = dict(session.map(_score_part, items, label="Evaluation", unit="parts"))
        for index, part in enumerate(parts):
            rows[part.kind] += results[index]
    work.write_table("documents.parquet", pa.Table.from_pylist(rows["documents"], DOCUMENTS))
    if base is not None:
        work.write_table("base-documents.parquet", pa.Table.from_pylist(rows["base"], DOCUMENTS))
    for group in GROUPS:
        work.write_table(
            f"answers-{group}.parquet", pa.Table.from_pylist(rows.get(group, []), ANSWERS)
        )
    work.write_json("samples.json", rows.get("openings", []))
    scores = summarise(rows)
    metrics: dict[str, Scalar] = {}
    for name, (value, low, high) in scores.items():
        metrics |= {name: value, f"{name}_low": low, f"{name}_high": high}
    metrics |= {f"{m}_bits_per_byte": baseline.metrics[f"{m}_bits_per_byte"] for m in METHODS}
    counts = {f"{group}_questions": len(rows.get(group, [])) for group in GROUPS}
    counts |= {"documents": len(documents), "bytes": sum(r["bytes"] for r in rows["documents"])}
    return Outcome(counts=counts, metrics=metrics, reports=_reports(scores, rows, baseline))


def summarise(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Estimate]:
    """Scores with 95% intervals, from scores item by item; a group without questions has none."""
    scores = {
        name: bootstrap_ratio(
            [row["bits"] for row in rows[kind]], [row["bytes"] for row in rows[kind]]
        )
        for name, kind in (("bits_per_byte", "documents"), ("base_bits_per_byte", "base"))
        if kind in rows
    }
    for group in GROUPS:
        if answered := rows.get(group):
            scores[f"{group}_exact"] = wilson(sum(r["exact"] for r in answered), len(answered))
            scores[f"{group}_rouge_l"] = mean([row["rouge_l"] for row in answered])
    return {
        name: Estimate(*(round(number, 5) for number in estimate))
        for name, estimate in scores.items()
    }


def model_directory(store: Store, model: Manifest) -> Path:
    """A local directory with the model's files."""
    paths = [store.local(model, name) for name in model.names()]
    roots = [path.parents[name.count("/")] for path, name in zip(paths, model.names(), strict=True)]
    return roots[0]


def _parts(
    config: EvaluateConfig, store: Store, documents: list[Document], pairs: Manifest
) -> list[Part]:
    """Longest first, so that no worker is left with a long one at the end."""
    parts = []
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= DOCUMENT_BYTES_PER_PART:
            parts.append(Part("documents", block))
            block, size = [], 0
    if block:
        parts.append(Part("documents", block))
    directory = store.of(pairs)
    for group in GROUPS:
        questions = directory.read_table(f"questions-{group}.parquet").to_pylist()
        for at in range(0, len(questions), QUESTIONS_PER_PART):
            parts.append(Part(group, questions[at : at + QUESTIONS_PER_PART]))
    openings = [text[:OPENING] for _, text in documents[: config.samples]]
    return [*parts, Part("openings", openings)] if openings else parts


def _score_part(
    config: EvaluateConfig, work: Workspace, manifest: Manifest, part: Part
) -> list[dict[str, Any]]:
    """In a Ray worker; torch is imported here, so that the flow's process stays small."""
    from model.engine import load_model
    from tasks.evaluation.bits_per_byte import score_documents
    from tasks.evaluation.questions import answers, continuations, judge

    _, model, tokenizer = load_model(model_directory(work.store, manifest))
    if part.kind in ("documents", "base"):
        texts = [text for _, text in part.items]
        scored = score_documents(model, tokenizer, texts, config.window or None)
        return [
            {"id": name, "bits": score.bits, "tokens": score.tokens, "bytes": score.bytes}
            for (name, _), score in zip(part.items, scored, strict=True)
        ]
    if part.kind == "openings":
        added = continuations(model, tokenizer, part.items, CONTINUATION)
        return [
            {"opening": opening, "continuation": text}
            for opening, text in zip(part.items, added, strict=True)
        ]
    given = answers(
        model, tokenizer, [row["question"] for row in part.items], config.longest_answer
    )
    rows = []
    for row, answer in zip(part.items, given, strict=True):
        verdict = judge(row["answer"], answer)
        kept = {name: row[name] for name in ("id", "fact", "kind", "question")}
        rows.append(kept | {"reference": row["answer"], "answer": answer} | vars(verdict))
    return rows


def _reports(
    scores: dict[str, Estimate], rows: dict[str, list[dict[str, Any]]], baseline: Manifest
) -> tuple[Report, ...]:
    named = {"base_bits_per_byte": "its base, before fine-tuning", "bits_per_byte": "this model"}
    compression = [
        {"by": by, "bits per byte": scores[name].value, "95% interval": _span(scores[name])}
        for name, by in named.items()
        if name in scores
    ]
    compression += [
        {
            "by": LABELS[method],
            "bits per byte": baseline.metrics[f"{method}_bits_per_byte"],
            "95% interval": "",
        }
        for method in METHODS
    ]
    examined = []
    for group, meaning in GROUPS.items():
        answered = rows.get(group, [])
        for kind in ("all", *sorted({row["kind"] for row in answered})):
            chosen = [row for row in answered if kind in ("all", row["kind"])]
            exact = wilson(sum(row["exact"] for row in chosen), len(chosen))
            overlap = mean([row["rouge_l"] for row in chosen])
            examined.append(
                {
                    "questions": meaning,
                    "kind": kind,
                    "asked": len(chosen),
                    "exact": f"{exact.value:.1%}",
                    "exact, 95% interval": f"{exact.low:.1%} to {exact.high:.1%}",
                    "ROUGE-L": f"{overlap.value:.3f}",
                    "ROUGE-L, 95% interval": f"{overlap.low:.3f} to {overlap.high:.3f}",
                }
            )
    examples = [
        {
            "questions": meaning,
            "question": row["question"],
            "answer": row["answer"],
            "reference": "the same" if row["exact"] else row["reference"],
        }
        for group, meaning in GROUPS.items()
        for row in rows.get(group, [])[:SHOWN]
    ]
    samples = "\n\n".join(
        f"{_fenced(row['opening'])}\n\ncontinued:\n\n{_fenced(row['continuation'])}"
        for row in rows.get("openings", [])
    )
    reports = (
        Report("bits-per-byte", "table", compression, "Held-out documents; fewer is better"),
        Report("questions", "table", examined, "Answers compared with the documentation"),
        Report("answers", "table", examples, "Some answers"),
        Report("samples", "markdown", samples, "Held-out documents, continued by the model"),
    )
    return tuple(report for report in reports if report.body)


def _span(estimate: Estimate) -> str:
    return f"{estimate.low:.4f} to {estimate.high:.4f}"


def _fenced(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
