"""A decode step of one answer as a program of its own, compiled beforehand.

Between its matrices a step starts some ninety operations of 3 to 5 µs, and torch has no product of
one row by 8-bit integers at the speed of memory. torch's ahead-of-time compiler makes one C++
function of the whole step. All that it reads is given to it, so that a program fits every model of
a shape, whatever its weights; `programs` makes and keeps them.

The step is `model.engine.runner`'s, with the same weights. Sums are taken in another order, so that
numbers differ in their last bits, as those of another batch do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.engine.layer_weights import FeedForwardWeights, Norm, gain
from model.engine.weights import Dense, Int8, Matrix
from model.layers import LayerNorm, RMSNorm, activate
from model.losses import softcapped

if TYPE_CHECKING:
    from model.engine.runner import Runner, Span

SHORTEST = 2  # tokens to look at: the compiler takes a length of 1 for a constant
PARTS = 12  # of a layer, see `parts_of`

Part = list[Tensor]
"""The tensors of a matrix, a norm, a bias; empty where the family has none."""


@dataclass(frozen=True)
class Recipe:
    """All that the program of a step depends on."""

    config: ModelConfig
    threads: int
    windows: tuple[int | None, ...]  # the different ones; None: everything is seen
    window_of: tuple[int, ...]  # of each layer, its place in `windows`
    parts: tuple[tuple[tuple[tuple[int, ...], str], ...], ...]  # shapes and dtypes of `parts_of`

    @classmethod
    def of(cls, runner: "Runner", threads: int) -> "Recipe":
        windows = tuple(sorted(runner.windows, key=lambda window: window or 0))
        return cls(
            config=runner.config,
            threads=threads,
            windows=windows,
            window_of=tuple(windows.index(layer.window) for layer in runner.layers),
            parts=tuple(
                tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in part)
                for part in parts_of(runner)
            ),
        )

    def longest(self, window: int | None) -> int:
        """The most tokens that a layer looks at."""
        return min(window or self.config.context, self.config.context)


def written_for(config: ModelConfig) -> bool:
    """Whether `SingleStep` says what such a network does. What a layer sees must vary in length."""
    longest = min(config.sliding_window or config.context, config.context)
    return not config.experts and config.kv_latent is None and longest > SHORTEST


def expressible(runner: "Runner") -> bool:
    """Whether a program can be made of this runner's step."""
    matrices = [matrix for layer in runner.layers for matrix in layer.matrices]
    return (
        runner.on_cpu
        and written_for(runner.config)
        and all(isinstance(one, Int8) or _plain(one) is not None for one in matrices)
    )


def parts_of(runner: "Runner") -> list[Part]:
    """What a step reads and writes: the embeddings of tokens and of positions, the tables of
    rotation, PARTS for each layer, the last norm.
    """
    parts = [
        [runner.embedding],
        _given(runner.positions),
        [torch.view_as_real(table) for table in runner.angles],
    ]
    for layer, cache in zip(runner.layers, runner.cache.layers, strict=True):
        mlp = layer.mlp
        assert isinstance(mlp, FeedForwardWeights)
        parts += [
            [cache],
            _matrix(layer.qkv),
            _given(layer.qkv_bias),
            _given(layer.qk_norm),
            _matrix(layer.output),
            _given(layer.output_bias),
            _norm(layer.output_norm),
            _matrix(mlp.up),
            _given(mlp.up_bias),
            _matrix(mlp.down),
            _given(mlp.down_bias),
            _norm(layer.mlp_norm),
        ]
    return [*parts, _norm(runner.norm)]


class SingleStep(nn.Module):
    """The step as the compiler reads it: one token of one sequence, no shape but lengths."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.config = recipe, recipe.config

    def forward(
        self, at: Tensor, starts: Tensor, columns: list[Tensor], parts: list[Part]
    ) -> Tensor:
        """The token's last hidden state, normed, (1, C); its keys and values go into the cache.

        at: (3, 1), the token, its position, its place in the cache. starts: (W,), of each window
        the first place that is seen. columns: of each window a tensor as long as what is seen.
        """
        token, position, place = at
        x = parts[0][0].index_select(0, token)[0].float()
        if self.config.scaled_embeddings:
            x = x * self.config.width**0.5
        if parts[1]:
            x = x + parts[1][0].index_select(0, position)[0].float()
        turns = [table.index_select(0, position)[0] for table in parts[2]]
        seen = []
        for start, column in zip(starts, columns, strict=True):
            first, count = start.item(), column.shape[0]
            torch._check(first >= 0)
            torch._check(first + count <= parts[3][0].shape[1])
            seen.append((first, count))
        for layer, which in enumerate(self.recipe.window_of):
            own = parts[3 + layer * PARTS : 3 + (layer + 1) * PARTS]
            turn = turns[0 if self.recipe.windows[which] is None else -1] if turns else None
            x = self._block(x, place, turn, seen[which], own)
        return self._last(x, parts[-1]).to(parts[0][0].dtype)[None]

    def _block(
        self, x: Tensor, place: Tensor, turn: Tensor | None, seen: tuple[int, int], own: list[Part]
    ) -> Tensor:
        """x (C,) through one layer."""
        (cache,), qkv, qkv_bias, qk_norm, output, output_bias, output_norm, *mlp = own
        config = self.config
        heads, kv_heads, size = config.heads, config.kv_count, config.head_size
        rows = _plus(_product(qkv, self._normed(x)), qkv_bias).view(-1, size)
        read, values = rows.split((heads + kv_heads, kv_heads))
        if qk_norm:
            read = F.rms_norm(read, (size,), None, config.norm_eps) * qk_norm[0][:, 0]
        if turn is not None:
            read = _turned(read, turn)
        cache.index_copy_(1, place, torch.cat((read[heads:], values))[:, None])
        keys, values = cache.narrow(1, *seen).unflatten(0, (2, kv_heads, 1)).unbind(0)
        queries = _made(read[:heads].view(kv_heads, -1, 1, size))
        scores = softcapped((queries * keys).sum(-1), config.attention_softcap)
        shares = _made(scores.softmax(-1))
        y = (shares[..., None] * values).sum(2).flatten()
        x = x + self._after(_plus(_product(output, _made(y)), output_bias), output_norm)

        up, up_bias, down, down_bias, mlp_norm = mlp
        y = _plus(_product(up, self._normed(x)), up_bias)
        if config.gated_mlp:
            gate, y = y.chunk(2)
            y = activate(gate, config.activation) * y
        else:
            y = activate(y, config.activation)
        return x + self._after(_plus(_product(down, _made(y)), down_bias), mlp_norm)

    def _normed(self, x: Tensor) -> Tensor:
        """As `Runner._normed`."""
        layer = self.config.norm == "layer"
        spread = x.var(-1, correction=0) if layer else x.square().mean(-1)
        return _made(x * torch.rsqrt(spread + self.config.norm_eps))

    def _after(self, y: Tensor, norm: Part) -> Tensor:
        """y through a norm behind a sublayer, where there is one."""
        return self._last(y, norm) if norm else y

    def _last(self, x: Tensor, norm: Part) -> Tensor:
        """x (C,) through a norm with its own gain, and offset."""
        if len(norm) == 2:
            weight, bias = norm
            return F.layer_norm(x, x.shape, weight.float(), bias.float(), self.config.norm_eps)
        return self._normed(x) * norm[0].float()


class CompiledStep:
    """A loaded program, tied to a runner's weights and cache. Not thread-safe."""

    def __init__(self, runner: "Runner", recipe: Recipe, program: Path) -> None:
        """Raises RuntimeError when the file is no program that can be loaded here."""
        self.recipe = recipe
        self._place = runner.place
        self._program: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(program), 1)
        self._column = torch.arange(recipe.config.context)
        self._parts = [tensor for part in parts_of(runner) for tensor in part]

    def takes(self, spans: Sequence["Span"]) -> bool:
        return len(spans) == 1 and len(spans[0].tokens) == 1 and spans[0].end >= SHORTEST

    @torch.inference_mode()
    def __call__(self, span: "Span") -> Tensor:
        """As `Runner.forward` for a span that it `takes`, (1, C)."""
        place = self._place(span.page)
        counts = [min(span.end, window or span.end) for window in self.recipe.windows]
        at = torch.tensor(((span.tokens[0],), (span.start,), (place + span.start,)))
        starts = torch.tensor([place + span.end - count for count in counts])
        columns = [self._column[:count] for count in counts]
        hidden: Tensor = self._program.run([at, starts, *columns, *self._parts])[0]
        return hidden


def _product(matrix: Part, x: Tensor) -> Tensor:
    """W x: a reduction of products, which the compiler makes one loop over W of."""
    if len(matrix) == 2:
        weight, scale = matrix
        return (weight.float() * x).sum(1) * scale.float()
    return (matrix[0].float() * x).sum(1)


def _plus(x: Tensor, bias: Part) -> Tensor:
    return x + bias[0].float() if bias else x


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """x (H, D) by `rotation.turn_`, with turn (D / 2, 2)."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.unbind(-1)
    pairs = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(pairs, -1).flatten(-2)


def _made(x: Tensor) -> Tensor:
    """x, computed once: without a view of this kind the compiler computes it anew for each row of
    the matrix that reads it.
    """
    return x.as_strided(x.shape, x.stride())


def _given(tensor: Tensor | None) -> Part:
    return [] if tensor is None else [tensor]


def _matrix(matrix: Matrix) -> Part:
    if isinstance(matrix, Int8):
        return [matrix.weight, matrix.scale]
    plain = _plain(matrix)
    assert plain is not None
    return [plain]


def _plain(matrix: Matrix) -> Tensor | None:
    return matrix.plain if isinstance(matrix, Dense) else None


def _norm(norm: Norm | None) -> Part:
    if isinstance(norm, LayerNorm):
        return [norm.weight, norm.bias]
    return [gain(norm)] if isinstance(norm, RMSNorm) else []
