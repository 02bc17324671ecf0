"""A classifier of documents, learned from labelled examples: good text and text that is none.

In the manner of fastText (Joulin et al. 2016, arXiv:1607.01759) without its hidden layer: a bag of
hashed words and pairs of words, weighed by logistic regression. With a hundred thousand weights and
no deep features it sees vocabulary and turns of phrase, not truth; what it is worth on examples
held out of training stands in the manifest, with intervals.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from tasks.corpus.arrays import read_array, write_array
from tasks.corpus.documents import document_shards
from tasks.corpus.labelled import Example, LabelledConfig, examples_of
from tasks.corpus.sharding import run_shards
from tasks.corpus.shingles import Words, normalise
from tasks.corpus.source_config import content_digest
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

WEIGHTS = "weights.npy"  # (buckets + 1,): one for each hashed feature, the bias last
LONGEST = 50_000  # characters of a document that are looked at
RESAMPLES = 1000
FEWEST = 20  # held-out examples of each label: below, a score says nothing
SHOWN = 15  # words told for either label


class QualityModelConfig(LabelledConfig):
    """A scorer of documents, learned from labelled examples; without examples there is none."""

    buckets: int = Field(2**18, ge=2**10, le=2**24)
    """Weights: words and pairs of words are hashed to so many."""
    strength: float = Field(10.0, gt=0)
    """Inverse of the regularisation (scikit-learn's C); more follows the examples more closely."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the examples that judge the model and are not learned from."""
    seed: int = 0
    """Which examples these are."""


class QualityModelStageConfig(QualityModelConfig):
    """The examples are known by their content."""

    digest: str = ""

    def resolve(self) -> Self:
        return self.model_copy(update={"digest": content_digest(self.source(), Settings.load())})


class ScoreConfig(StageConfig):
    """How documents are scored: by the model alone."""


@dataclass(frozen=True)
class Judgement:
    """What a model is worth on held-out examples; intervals hold 95%."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    auc: float
    auc_low: float
    auc_high: float
    majority: float  # accuracy of always naming the commoner label


def features(text: str, buckets: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(buckets, values) of a text: 1 + log of the counts, as a vector of length 1."""
    words = Words.of(normalise(text[:LONGEST]))
    hashes = np.concatenate([words.grams(1), words.grams(2)]) % np.uint64(buckets)
    places, counts = np.unique(hashes.astype(np.int64), return_counts=True)
    values = 1 + np.log(counts)
    return places, values / max(float(np.sqrt(values @ values)), 1e-12)


def probability(text: str, weights: NDArray[np.float32]) -> float:
    """The model's probability that a text is good."""
    places, values = features(text, len(weights) - 1)
    return float(1 / (1 + np.exp(-(values @ weights[places] + weights[-1]))))


@stage("quality-model", version=1)
def train_quality_model(config: QualityModelStageConfig, work: Workspace) -> Outcome:
    """Learn to tell good documents from others; judge that on examples held out."""
    learned, held = divide(config, list(examples_of(config, Settings.load())))
    weights = fit(config, learned)
    scores = np.array([probability(example.text, weights) for example in held])
    judged = judge(np.array([example.good for example in held]), scores, config.seed)
    write_array(work, WEIGHTS, weights)
    rows = [
        {
            "measure": "accuracy",
            "value": round(judged.accuracy, 4),
            "95% interval": f"{judged.accuracy_low:.3f} to {judged.accuracy_high:.3f}",
            "without a model": round(judged.majority, 4),
        },
        {
            "measure": "area under the ROC curve",
            "value": round(judged.auc, 4),
            "95% interval": f"{judged.auc_low:.3f} to {judged.auc_high:.3f}",
            "without a model": 0.5,
        },
    ]
    told = f"On {len(held):,} held-out examples, learned from {len(learned):,} others"
    return Outcome(
        counts={"examples": len(learned), "held_out": len(held)},
        metrics={name: round(value, 4) for name, value in vars(judged).items()},
        reports=(
            Report("quality-model", "table", rows, told),
            Report("telling-words", "table", telling_words(learned, weights), "What it goes by"),
        ),
    )


def divide(
    config: QualityModelConfig, examples: list[Example]
) -> tuple[list[Example], list[Example]]:
    """(to learn from, held out): by a hash of the text, so that copies fall on one side.

    Raises UserError when either label is too rare among the held-out examples.
    """
    learned: list[Example] = []
    held: list[Example] = []
    for example in examples:
        told = f"{config.seed}:{normalise(example.text)}".encode("utf-8", "replace")
        draw = int.from_bytes(hashlib.sha256(told).digest()[:8]) / 2**64
        (held if draw < config.held_out else learned).append(example)
    good = sum(example.good for example in held)
    if min(good, len(held) - good) < FEWEST:
        raise UserError(
            f"{good} good and {len(held) - good} other examples are held out, and {FEWEST} of each "
            "are needed to judge a model; give more examples or raise quality_model.held_out"
        )
    return learned, held


def fit(config: QualityModelConfig, examples: list[Example]) -> NDArray[np.float32]:
    """Weights and bias, float32: (buckets + 1,). Labels weigh the same however many they are."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    parts = [features(example.text, config.buckets) for example in examples]
    bounds = np.cumsum([0, *(len(places) for places, _ in parts)])
    columns = np.concatenate([places for places, _ in parts])
    values = np.concatenate([values for _, values in parts])
    matrix = csr_matrix((values, columns, bounds), (len(parts), config.buckets))
    model = LogisticRegression(C=config.strength, class_weight="balanced", max_iter=1000)
    model.fit(matrix, [example.good for example in examples])
    return np.append(model.coef_[0], model.intercept_).astype(np.float32)


def judge(good: NDArray[np.bool_], scores: NDArray[np.float64], seed: int) -> Judgement:
    """Accuracy with Wilson's interval, area under the ROC curve with a bootstrap interval."""
    accuracy = float(np.mean((scores >= 0.5) == good))
    low, high = _wilson(accuracy, len(good))
    rng = np.random.default_rng(seed)
    areas: list[float] = []
    while len(areas) < RESAMPLES:
        rows = rng.integers(0, len(good), len(good))
        if 0 < good[rows].sum() < len(rows):
            areas.append(area(good[rows], scores[rows]))
    least, most = (float(np.quantile(areas, part)) for part in (0.025, 0.975))
    share = float(good.mean())
    majority = max(share, 1 - share)
    return Judgement(accuracy, low, high, area(good, scores), least, most, majority)


def area(good: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Chance that a good example scores above another; ties count half (Mann and Whitney)."""
    _, rank, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    positive = int(good.sum())
    above = middle[rank][good].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(good) - positive)))


def _wilson(share: float, number: int, z: float = 1.96) -> tuple[float, float]:
    centre = share + z * z / (2 * number)
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    whole = 1 + z * z / number
    return (centre - spread) / whole, (centre + spread) / whole


def telling_words(examples: list[Example], weights: NDArray[np.float32]) -> list[dict[str, Any]]:
    """The words that speak most for either label, among those of three examples or more."""
    seen: dict[str, int] = {}
    for example in examples:
        for word in set(normalise(example.text[:LONGEST]).split()):
            seen[word] = seen.get(word, 0) + 1
    words = sorted(word for word, count in seen.items() if count >= 3)
    weighed = [(float(weights[features(word, len(weights) - 1)[0]].sum()), word) for word in words]
    weighed.sort()
    best, worst = weighed[::-1][:SHOWN], weighed[:SHOWN]
    return [
        {"for good": f"{word} {weight:+.2f}", "against": f"{other} {against:+.2f}"}
        for (weight, word), (against, other) in zip(best, worst, strict=True)
    ]


@stage("score", version=1)
def score(config: ScoreConfig, work: Workspace, *, documents: Manifest, model: Manifest) -> Outcome:
    """Score every document by the quality model: `attributes-NNNNN.parquet` (id, url, score)."""
    where, learned = work.store.of(documents), work.store.of(model)
    items = [(where, name, learned) for name in document_shards(documents)]
    seen = run_shards(work, "scored", score_shard, items, label="Score")
    deciles = np.sum([shard["deciles"] for shard in seen], axis=0).tolist() if seen else []
    rows = [
        {"score": f"{place / 10:.1f} to {(place + 1) / 10:.1f}", "documents": int(number)}
        for place, number in enumerate(deciles)
    ]
    return Outcome(
        counts={"documents": sum(shard["documents"] for shard in seen)},
        reports=(Report("scores", "table", rows, "Documents by the quality model's score"),),
    )


def score_shard(
    work: Workspace, number: int, where: Directory, name: str, model: Directory
) -> dict[str, Any]:
    table = where.read_table(name, ["id", "url", "text"])
    weights = read_array(model, WEIGHTS)
    scores = np.array([probability(text, weights) for text in table["text"].to_pylist()])
    columns = {"id": table["id"], "url": table["url"], "score": pa.array(scores, pa.float64())}
    work.write_table(f"attributes-{number:05d}.parquet", pa.table(columns))
    deciles = np.histogram(scores, bins=10, range=(0, 1))[0].tolist()
    return {"documents": table.num_rows, "deciles": deciles}
