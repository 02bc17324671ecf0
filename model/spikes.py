"""The guard against loss spikes: a step far worse than those before it is not taken."""

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoint import read_manifest, step_of

# Accepted steps it compares with, and waits for: with many more, the fall of the loss early in a
# run makes their spread so wide that batches of pure noise pass (measured).
WINDOW = 16
LOST = 3  # steps refused in a row after which the weights, not the batches, are at fault


class SpikeGuard:
    """Judges each step by its loss, before the update; the same on every rank, since the loss is.

    A batch of nonsense would throw away what the run has learned; leaving its gradient out costs
    one step. limit: standard deviations above the mean of the accepted losses; None takes all.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.skipped = self.rollbacks = 0
        self.back_to: int | None = None  # step whose weights the last rollback took
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._row = 0
        self._refused: list[int] = []  # since the last record
        self._weights = 0  # steps completed when the weights became what they are
        self._left: list[Sequence[int]] = []  # of each rollback, the steps it went back to and from

    def takes(self, loss: float, step: int) -> bool:
        """Whether to take the step number `step`, which had this loss; counts what it refuses."""
        if self.limit is None:
            return True
        count = len(self._losses)
        if count == WINDOW:
            mean = sum(self._losses) / count
            variance = sum((other - mean) ** 2 for other in self._losses) / count
            # Losses that hardly vary would make a spike of every ripple.
            if loss > mean + self.limit * max(math.sqrt(variance), 0.01 * mean):
                self.skipped += 1
                self._row += 1
                self._refused.append(step)
                return False
        self._losses.append(loss)
        self._row, self._weights = 0, step
        return True

    @property
    def lost(self) -> bool:
        """So many steps refused in a row that older weights should be taken."""
        return self._row >= LOST

    def older(self, checkpoints: Sequence[Path]) -> Path | None:
        """Of checkpoints, that whose weights to take; None: none has other weights, and older ones.

        A fault of the weights begins before it is seen: theirs should be `WINDOW` steps older than
        the present ones. Those that an earlier rollback left are at fault themselves.
        """
        before = [
            path
            for path in checkpoints
            if step_of(path) < self._weights
            and not any(to < step_of(path) <= at for to, at in self._left)
        ]
        clearly = [path for path in before if step_of(path) <= self._weights - WINDOW]
        return max(clearly, key=step_of) if clearly else min(before, key=step_of, default=None)

    def go_back(self, older: Path | None, step: int) -> None:
        """After step number `step`, to the weights of a checkpoint, and to the losses of its time:
        what comes next is judged as it was judged then. With none, judge anew.
        """
        self._losses.clear()
        self._row = 0
        if older is not None:
            self.rollbacks += 1
            self.back_to = self._weights = step_of(older)
            self._left.append((self.back_to, step))
            then = read_manifest(older)["state"].get("guard") or {}
            self._losses.extend(then.get("losses", ()))

    def told(self) -> dict[str, Any]:
        """What the next record of the curve says of it."""
        told = self._counts() | {"refused": self._refused}
        self._refused = []
        return told

    def _counts(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "rollbacks": self.rollbacks, "back_to": self.back_to}

    def state(self) -> dict[str, Any]:
        """JSON, for the checkpoint: a resumed run must judge as the unbroken one."""
        return self._counts() | {
            "losses": list(self._losses),
            "row": self._row,
            "refused": list(self._refused),
            "weights": self._weights,
            "left": list(self._left),
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state`; None: from a checkpoint without it."""
        if state is not None:
            self.skipped, self._row = state["skipped"], state["row"]
            self._losses = deque(state["losses"], maxlen=WINDOW)
            self.rollbacks, self.back_to = state.get("rollbacks", 0), state.get("back_to")
            self._refused = list(state.get("refused", ()))
            self._weights, self._left = state.get("weights", 0), list(state.get("left", ()))
