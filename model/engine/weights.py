"""Matrices as the engine keeps them: as they are, or as 8-bit integers with a scale per output.

A decode step reads every weight once, so its speed is that of the memory, and a quarter of the
bytes is a quarter of the time. Quantizing is absmax rounding, row by row (weight-only, as LLM.int8
arXiv:2208.07339 without the outlier columns, which small models do not have).
"""

import time
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Literal["float32", "bfloat16", "int8"]
"""How weights are kept. Activations are float32 with the first, bfloat16 with the others."""

PACKED_FOR = 512  # rows; the layout then chosen is within a tenth of the best from 4 to 1,024
TRIALS = 5  # of each product, of which the quickest counts
BLOCK = 16  # inputs that torch's kernel for integers takes at once: of others it reads too many
FEW = 12  # rows up to which multiplying by integers beats expanding them first (measured: 8 to 16)


class Matrix(Protocol):
    """x (T, in) -> (T, out)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + W x, in place of y (T, out) where that is quicker."""
        ...


class Dense:
    """x · Wᵀ.

    On a CPU the weight is kept in the layout of oneDNN's kernels: in bfloat16 it takes half the
    time of the plain one at any number of rows; in float32 two thirds at 4 to 32 rows. For a single
    float32 row, the transposed matrix may be quicker, whose rows are added up side by side; which
    one, is the processor's matter (30 million parameters: 8.1 ms against oneDNN's 10 on an Intel
    Xeon, 4.4 against 3.2 on an AMD EPYC), so both are kept until `settle` has tried them.
    """

    def __init__(self, weight: Tensor) -> None:
        self.plain: Tensor | None = weight  # for a compiled step, which alone reads it
        self.packed = _packed(weight)
        self.transposed = weight.t()
        self.single = self.packed is None
        if self.packed is not None:
            # By name, as finding the one that is meant takes 13 µs at each call.
            self._product = torch.ops.mkldnn._linear_pointwise.default
            self._sum = torch.ops.mkldnn._linear_pointwise.binary
            both = weight.dtype == torch.float32
            self.transposed = self.transposed.contiguous() if both else weight.new_empty(0)

    @property
    def open(self) -> bool:
        """Whether there is a choice."""
        return self.packed is not None and self.transposed.numel() > 0

    def settle(self, single: bool) -> None:
        """single: a single row takes the transposed matrix; without, that is dropped."""
        self.single = single
        if not single:
            self.transposed = self.transposed.new_empty(0)

    def drop_plain(self) -> None:
        """Nobody will read the weight as it was given."""
        self.plain = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.single and (self.packed is None or x.shape[0] == 1):
            return x @ self.transposed
        y: Tensor = self._product(x, self.packed, None, "none", [], "")
        return y

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if self.single and (self.packed is None or x.shape[0] == 1):
            return y.addmm_(x, self.transposed)
        z: Tensor = self._sum(x, y, self.packed, None, "add")
        return z


@torch.inference_mode()
def settle(matrices: Sequence[Matrix], tried: bool = True) -> None:
    """Let float32 matrices keep one product for a single row.

    tried: the one that is quicker here, tried on all matrices one after the other as a step does,
    so that caches hold as much as they will then; else oneDNN's, whatever it takes: a trial may
    end differently another time, and the two round differently.
    """
    dense = [one for one in matrices if isinstance(one, Dense) and one.open]
    times = {True: float("inf"), False: float("inf")}
    rows = [m.transposed.new_ones(1, m.transposed.shape[0]) for m in dense]
    for _ in range(TRIALS if tried else 0):
        for single in times:
            for one in dense:
                one.single = single
            begun = time.perf_counter()
            for one, row in zip(dense, rows, strict=True):
                one(row)
            times[single] = min(times[single], time.perf_counter() - begun)
    for one in dense:
        one.settle(times[True] < times[False])


class Int8:
    """y = (x · qᵀ) · scale with q (out, in) int8 and scale (out,)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.weight = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale = scale.to(dtype)
        whole = weight.device.type == "cpu" and weight.shape[1] % BLOCK == 0
        self.few = FEW if whole else 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self.few:
            return torch._weight_int8pack_mm(x, self.weight, self.scale)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        return y.add_(self(x))


def activation_dtype(weights: Weights) -> torch.dtype:
    return torch.float32 if weights == "float32" else torch.bfloat16


def matrix(weight: Tensor, weights: Weights) -> Matrix:
    """A matrix (out, in) as `weights` says."""
    dtype = activation_dtype(weights)
    return Int8(weight, dtype) if weights == "int8" else Dense(weight.to(dtype))


def usual_rows(count: int) -> int:
    """The next larger of about forty numbers of rows.

    oneDNN makes a kernel for every number of rows it meets: 2 ms and 2.5 MB for each at width 128,
    and steps that read prompts have a new one nearly every time.
    """
    for largest, step in ((16, 1), (64, 8), (256, 32)):
        if count <= largest:
            return -(-count // step) * step
    return -(-count // 128) * 128


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout for some tens of rows; None where torch cannot make it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
    except (AttributeError, RuntimeError):  # a build or a processor without it
        return None
    return packed
