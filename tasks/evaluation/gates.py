"""Whether a model is better than the one that is served, judged on the same items.

A challenger is better when it is worse in nothing and better in something, beyond noise. Looked at
are bits per byte on the held-out documents and exact answers in each group of questions. Noise is
the 95% bootstrap interval of the paired difference: items are resampled, both models' scores of an
item together, so that what makes an item hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.evaluation.intervals import Estimate, bootstrap_ratio
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store

NAMES = {
    "seen": "seen questions",
    "recall": "recall questions",
    "unseen": "questions on unseen facts",
}


@dataclass(frozen=True)
class Decision:
    """`reason` is a clause that stands after "because"."""

    moved: bool
    reason: str


@dataclass(frozen=True)
class Scores:
    """One model's scores. documents: id → (bits, bytes); exact: group → question id → right."""

    documents: Mapping[str, tuple[float, int]]
    exact: Mapping[str, Mapping[str, bool]]


def is_better(report: Manifest, champion_report: Manifest) -> Decision:
    """`compare` of two evaluation artifacts."""
    for items in ("pairs", "baseline"):
        ours, theirs = (r.input_contents.get(items) for r in (report, champion_report))
        if ours != theirs:
            return Decision(False, f"the two models were scored with different {items}")
    store = Store.open()
    return compare(read_scores(store, report), read_scores(store, champion_report))


def compare(challenger: Scores, champion: Scores) -> Decision:
    """Decide; a pure function of the scores."""
    bits = _bits_difference(challenger, champion)
    if bits is None:
        return Decision(False, "the two models have no scored document in common")
    better, worse = [], []
    described = f"{abs(bits.value):.4f} bits per byte"
    if bits.high < 0:
        better.append(f"needs {described} less")
    elif bits.low > 0:
        worse.append(f"needs {described} more")
    for group, name in NAMES.items():
        gain = _exact_difference(challenger.exact.get(group, {}), champion.exact.get(group, {}))
        if gain is None:
            continue
        described = f"{abs(gain.value):.1%} of {name}"
        if gain.low > 0:
            better.append(f"answers {described} more exactly")
        elif gain.high < 0:
            worse.append(f"answers {described} less exactly")
    if worse:
        return Decision(False, f"it {_list(worse)} than the champion, beyond noise")
    if better:
        return Decision(True, f"it {_list(better)} than the champion, and is worse in nothing")
    return Decision(False, "it differs from the champion in nothing beyond noise")


def read_scores(store: Store, report: Manifest) -> Scores:
    """The item scores of an evaluation artifact."""
    directory = store.of(report)
    documents = directory.read_table("documents.parquet", ["id", "bits", "bytes"]).to_pylist()
    exact = {}
    for group in NAMES:
        table = directory.read_table(f"answers-{group}.parquet", ["id", "exact"])
        exact[group] = {row["id"]: row["exact"] for row in table.to_pylist()}
    return Scores({row["id"]: (row["bits"], row["bytes"]) for row in documents}, exact)


def _bits_difference(challenger: Scores, champion: Scores) -> Estimate | None:
    """Bits per byte of the challenger minus the champion's."""
    shared = sorted(challenger.documents.keys() & champion.documents.keys())
    if not shared:
        return None
    bits = [challenger.documents[name][0] - champion.documents[name][0] for name in shared]
    return bootstrap_ratio(bits, [challenger.documents[name][1] for name in shared])


def _exact_difference(
    challenger: Mapping[str, bool], champion: Mapping[str, bool]
) -> Estimate | None:
    """Share of questions answered exactly by the challenger minus the champion's."""
    shared = sorted(challenger.keys() & champion.keys())
    if not shared:
        return None
    gains = [float(challenger[name]) - float(champion[name]) for name in shared]
    return bootstrap_ratio(gains, [1.0] * len(gains))


def _list(clauses: Sequence[str]) -> str:
    return clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + " and " + clauses[-1]
