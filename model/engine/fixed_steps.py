"""A decode step of fixed shapes, which a GPU replays as one CUDA graph.

Started one by one, the operations of a step take longer to start than to compute. A graph starts
all at once, but with the shapes and addresses it was captured with: so answers under way are padded
to a batch size and a length from short lists, and keys are gathered from their places instead of
viewed. Rows that stand for nobody read and write a page of their own behind the cache's last.

Without a GPU a step of fixed shapes is computed as it stands; that is how it is tested, and how
far: no GPU has captured one yet.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.engine.runner import Runner, Span

SHORTEST = 256  # tokens; lengths are this, twice this, … up to the context
WARM_UP = 3  # steps before a capture, in which libraries choose their kernels

Replay = Callable[[], Any]


def rounded(count: int, least: int = 1) -> int:
    """The smallest of least, 2 least, 4 least, … that is not below `count`."""
    return least << max(0, -(-count // least) - 1).bit_length()


class FixedSteps:
    """Steps of one runner for answers that each read one token. Not thread-safe."""

    def __init__(self, runner: "Runner") -> None:
        self.runner = runner
        self._steps: dict[tuple[int, int], tuple[Tensor, Tensor, Replay]] = {}
        self._pool: Any = None  # memory that the graphs, of which one runs at a time, share

    @torch.inference_mode()
    def forward(self, spans: Sequence["Span"]) -> Tensor:
        """As `Runner.forward`, for spans of one token each."""
        batch = rounded(len(spans))
        longest = rounded(max(span.end for span in spans), SHORTEST)
        length = min(longest, self.runner.config.context)
        shape = batch, length
        if shape not in self._steps:
            self._steps[shape] = self._prepare(*shape)
        inputs, hidden, replay = self._steps[shape]
        nobody = [0, 0, self.runner.spare]
        rows = [[s.tokens[0], s.start, self.runner.place(s.page)] for s in spans]
        rows += [nobody] * (batch - len(spans))
        inputs.copy_(torch.tensor(rows).T)
        replay()
        return hidden[: len(spans)].clone()

    def _prepare(self, batch: int, length: int) -> tuple[Tensor, Tensor, Replay]:
        """Inputs (3, B): token, position, first place; the hidden states that `replay` fills."""
        device = self.runner.device
        inputs = torch.zeros(3, batch, dtype=torch.int64, device=device)
        inputs[2] = self.runner.spare
        if device.type != "cuda":
            hidden = self.runner.fixed_step(inputs, length)
            return inputs, hidden, lambda: hidden.copy_(self.runner.fixed_step(inputs, length))
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(WARM_UP):
                self.runner.fixed_step(inputs, length)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self.runner.fixed_step(inputs, length)
        self._pool = graph.pool()
        return inputs, hidden, graph.replay
