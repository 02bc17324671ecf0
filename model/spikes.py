"""The guard against loss spikes: a step far worse than those before it is not taken."""

import math
from collections import deque
from typing import Any

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

    def takes(self, loss: float) -> bool:
        """Whether to take the step that had this loss; counts what it refuses."""
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
                return False
        self._losses.append(loss)
        self._row = 0
        return True

    @property
    def lost(self) -> bool:
        """So many steps refused in a row that older weights should be taken."""
        return self._row >= LOST

    def reset(self, back_to: int | None) -> None:
        """Begin to judge anew; what was skipped stays counted. back_to: step of the checkpoint
        whose weights were taken; None: there was none.
        """
        if back_to is not None:
            self.rollbacks += 1
            self.back_to = back_to
        self._losses.clear()
        self._row = 0

    def told(self) -> dict[str, Any]:
        """What a record of the curve says of it."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks, "back_to": self.back_to}

    def state(self) -> dict[str, Any]:
        """JSON, for the checkpoint: a resumed run must judge as the unbroken one."""
        return self.told() | {"losses": list(self._losses), "row": self._row}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state`; None: from a checkpoint without it."""
        if state is not None:
            self.skipped, self._row = state["skipped"], state["row"]
            self._losses = deque(state["losses"], maxlen=WINDOW)
            self.rollbacks, self.back_to = state.get("rollbacks", 0), state.get("back_to")
