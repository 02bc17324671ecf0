"""One step of the network over many sequences, in as few operations as the arithmetic allows.

The weights are `model.transformer.Transformer`'s; what differs is the dispatch. At a few million
parameters a decode step spends more time starting operations than computing, so query, key and
value are one matrix product, gate and up another, the norms' weights and the attention's scale are
multiplied into them, rotation is one product of complex numbers in place, keys and values are
written in one scatter, and views, masks and angles are made once a step instead of once a layer.
Prompts being read and answers being written go through the matrices together; only attention is
computed sequence by sequence, each over a view of its own keys: no padding, no mask, and no
influence on the neighbours.
`tests/model/test_engine.py` holds it equal to the plain forward.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.engine.experts import ExpertWeights
from model.engine.fixed_steps import FixedSteps
from model.engine.kv_cache import KVCache
from model.engine.layer_weights import LayerWeights, Norm, gain
from model.engine.pages import PAGE
from model.engine.rotation import angles, turn_
from model.engine.single_step import CompiledStep, written_for
from model.engine.weights import (
    Dense,
    Matrix,
    Weights,
    activation_dtype,
    matrix,
    settle,
    usual_rows,
)
from model.layers import activate
from model.losses import softcapped
from model.transformer import Transformer

log = logging.getLogger(__name__)

COPIED = 2 << 30  # bytes of weights up to which a compiled step may have its own copy


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence to be read: the first stands at position `start`, and the sequence's
    cache begins at page `page`.
    """

    page: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class View:
    """The part of the cache that a span's queries look at: of `count` tokens."""

    keys: Sequence[Tensor]  # of each layer, (H_kv, count, D)
    values: Sequence[Tensor]
    mask: Tensor | None  # (t, count), -inf where a query may not look

    def attend(self, layer: int, q: Tensor, softcap: float | None) -> Tensor:
        """q (H, t, D) -> (t, H · D)."""
        heads, length, size = q.shape
        k, v = self.keys[layer], self.values[layer]
        kv_heads = k.shape[0]
        if softcap is not None:
            return self._capped(q, k, v, softcap)
        if length == 1 and k.dtype == torch.float32:
            # Query heads that share a key head stand in the place of query positions. torch's
            # kernel, which never holds all scores, has nothing to save here and starts later; but
            # in other dtypes it alone does not round the scores.
            scores = torch.bmm(q.reshape(kv_heads, heads // kv_heads, size), k.mT)
            return torch.bmm(scores.softmax(-1), v).reshape(1, -1)
        y = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=self.mask,
            is_causal=self.mask is None and length > 1,
            scale=1.0,
            enable_gqa=kv_heads != heads,
        )
        return y[0].transpose(0, 1).reshape(length, -1)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
        """Gemma 2's scores, softcap · tanh(scores / softcap), for which torch has no kernel."""
        length = q.shape[1]
        q = q.unflatten(0, (k.shape[0], -1))  # (H_kv, H / H_kv, t, D)
        scores = softcapped(q @ k.mT[:, None], softcap)
        if self.mask is not None:
            scores = scores + self.mask
        elif length > 1:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1)
            scores = scores.masked_fill(later, float("-inf"))
        y = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v[:, None]
        return y.permute(2, 0, 1, 3).reshape(length, -1)


class Runner:
    """The network and its cache. Not thread-safe: one thread owns it."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        pages: int,
        weights: Weights = "float32",
        reproducible: bool = False,
        compiled: bool = False,
    ) -> None:
        """reproducible: choose nothing by a trial that might end differently another time.
        compiled: keep what the program of a single step reads (`single_step`).
        """
        dtype = activation_dtype(weights)
        self.config = config = model.config
        self.embedding = model.model.embed_tokens.weight.to(dtype)
        self.device = self.embedding.device
        self.on_cpu = self.device.type == "cpu"
        self.positions = None
        if config.positions == "learned":
            self.positions = model.model.embed_positions.weight.to(dtype)
        self.embedding_scale = config.width**0.5 if config.scaled_embeddings else 1.0
        self.output = matrix(model.output_weight, weights)
        self.norm: Norm = model.model.norm
        plain = config.norm != "layer" and dtype == torch.float32
        self.gain = gain(model.model.norm) if plain else None
        self.layers: list[LayerWeights] = []
        copied = 0 if compiled and self.on_cpu and written_for(config) else COPIED + 1
        for block in model.model.layers:
            self.layers.append(LayerWeights.of(block, config, weights))
            dense = [one for one in self.layers[-1].matrices if isinstance(one, Dense)]
            copied += sum(one.plain.nbytes for one in dense if one.plain is not None)
            if copied > COPIED:
                self.drop_plain()
        matrices = [matrix for layer in self.layers for matrix in layer.matrices]
        settle([*matrices, self.output], tried=not reproducible)
        if isinstance(self.output, Dense):
            self.output.drop_plain()
        self.single: CompiledStep | None = None  # another thread may set it
        self.windows = {layer.window for layer in self.layers}
        self.angles = angles(model)
        self.eps = torch.full((1, 1), config.norm_eps, device=self.device)
        # On a CPU attention takes a bfloat16 query 4 to 8 times as long as a float32 one.
        kept = torch.float32 if self.on_cpu else dtype
        self.cache = KVCache(config, pages + 1, kept, self.device)
        self.spare = self.place(pages)  # the first of the places that belong to nobody
        # Which experts are chosen is known only as the step goes: no graph can hold that.
        captured = self.device.type == "cuda" and not config.experts
        self.fixed = FixedSteps(self) if captured else None

    def drop_plain(self) -> None:
        """No compiled step will read the matrices as they were given."""
        for layer in self.layers:
            for one in layer.matrices:
                if isinstance(one, Dense):
                    one.drop_plain()

    @staticmethod
    def place(page: int) -> int:
        """Where a page begins in the cache."""
        return page * PAGE

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Read the tokens of all spans into the cache; the last hidden states of all their tokens,
        normed, (T, C), in the order of the spans.
        """
        if (single := self.single) is not None and single.takes(spans):
            try:
                return single(spans[0])
            except RuntimeError as error:  # the step is taken below, over whatever it had written
                log.warning("answers go on uncompiled, as a program failed: %s", error)
                self.single = None
        if self.fixed is not None and all(len(span.tokens) == 1 for span in spans):
            return self.fixed.forward(spans)
        lengths = [len(span.tokens) for span in spans]
        count = sum(lengths)
        more = usual_rows(count) - count
        tokens, positions, places = self._inputs(spans, more)
        turns = [table.index_select(0, positions) for table in self.angles]
        views = {window: [self._view(span, window) for span in spans] for window in self.windows}
        nobody = self.cache.data.new_zeros(more, self.config.heads * self.cache.size)
        softcap = self.config.attention_softcap
        x = self._embed(tokens, positions)
        for index, layer in enumerate(self.layers):
            turn = turns[0 if layer.window is None else -1] if turns else None
            q, pair = self._qkv(layer, x, turn)
            self.cache.layers[index].index_copy_(1, places, pair)
            looking = views[layer.window]
            if len(looking) == 1 and not more:
                y = looking[0].attend(index, q, softcap)
            else:
                parts = zip(looking, q[:, :count].split(lengths, dim=1), strict=True)
                each = [view.attend(index, part, softcap) for view, part in parts]
                y = torch.cat([*each, nobody] if more else each)
            x = self._finish_block(layer, x, y)
        x = self._last_norm(x)
        return x[:count] if more else x

    def _inputs(self, spans: Sequence[Span], more: int) -> Tensor:
        """Of each token of the spans its id, its position and its place in the cache, (3, T); then
        `more` that belong to nobody.
        """
        tokens = [token for span in spans for token in span.tokens]
        positions = [at for span in spans for at in range(span.start, span.end)]
        places = [
            self.place(span.page) + at for span in spans for at in range(span.start, span.end)
        ]
        nobody = [0] * more
        rows = [*tokens, *nobody, *positions, *nobody, *places, *[self.spare] * more]
        return torch.tensor(rows).to(self.device).view(3, -1)

    @torch.inference_mode()
    def fixed_step(self, inputs: Tensor, length: int) -> Tensor:
        """As `forward` for one token of each of B sequences, without a shape that depends on them.

        inputs: (3, B), of each its token, its position, and the first place of its cache. length:
        places of it that are looked at, more than any position. Hidden states (B, C).
        """
        tokens, positions, first = inputs
        column = torch.arange(length, device=self.device)
        places = (first[:, None] + column).clamp_(max=self.spare)
        turns = [table.index_select(0, positions) for table in self.angles]
        masks = {}
        for window in self.windows:
            unseen = column > positions[:, None]
            if window is not None:
                unseen |= column <= positions[:, None] - window
            mask = torch.zeros(unseen.shape, dtype=self.cache.dtype, device=self.device)
            masks[window] = mask.masked_fill_(unseen, float("-inf"))[:, None, None]
        x = self._embed(tokens, positions)
        for index, layer in enumerate(self.layers):
            turn = turns[0 if layer.window is None else -1] if turns else None
            q, pair = self._qkv(layer, x, turn)
            self.cache.layers[index].index_copy_(1, first + positions, pair)
            whole = self.cache.keys[index], self.cache.values[index]
            k, v = (kind[:, places].transpose(0, 1) for kind in whole)
            # Query heads that share a key head stand in the place of query positions.
            q = q.transpose(0, 1).reshape(len(tokens), self.cache.heads, -1, self.cache.size)
            y = self._attended(q, k, v, masks[layer.window])
            x = self._finish_block(layer, x, y.reshape(len(tokens), -1))
        return self._last_norm(x)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q (B, H_kv, H / H_kv, D), k and v (B, H_kv, S, D), mask (B, 1, 1, S) -> as q."""
        softcap = self.config.attention_softcap
        if softcap is None:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        scores = softcapped(q @ k.mT, softcap) + mask
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, C) as `forward` gives it -> (n, V) in float32."""
        count = len(hidden)
        if more := usual_rows(count) - count:
            hidden = F.pad(hidden, (0, 0, 0, more))
        return softcapped(self.output(hidden)[:count].float(), self.config.logit_softcap)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens and positions (T,) -> (T, C)."""
        x = F.embedding(tokens, self.embedding)
        if self.embedding_scale != 1:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)
        return x if self.positions is None else x + F.embedding(positions, self.positions)

    def _view(self, span: Span, window: int | None) -> View:
        """What a span's tokens see; a mask only where its tokens have different pasts."""
        length = len(span.tokens)
        first = 0 if window is None else max(0, span.start - window + 1)
        mask = None
        if length > 1 and (span.start > 0 or (window is not None and window < span.end)):
            row = torch.arange(span.start, span.end, device=self.device)[:, None]
            column = torch.arange(first, span.end, device=self.device)
            hidden = column > row
            if window is not None:
                hidden |= column <= row - window
            mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=self.device)
            mask.masked_fill_(hidden, float("-inf"))
        return View(*self.cache.seen(self.place(span.page) + first, span.end - first), mask)

    def _qkv(self, layer: LayerWeights, x: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (T, C) -> rotated queries (H, T, D); keys and values (2 H_kv, T, D) for the cache, or
        one row that is both (1, T, D); in the dtype of the cache.
        """
        qkv = layer.qkv(self._normed(x))
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        if layer.latent is not None:
            assert turn is not None  # `ModelConfig` refuses latents without rotation
            q, both = layer.latent.project(qkv, turn)
            return _cast(q, self.cache.dtype), _cast(both, self.cache.dtype)
        heads, size = self.config.heads, self.config.head_size
        rotated = heads + self.config.kv_count
        qkv = _cast(qkv, torch.float32).view(x.shape[0], -1, size).transpose(0, 1)
        if layer.qk_norm is not None:
            qk = qkv[:rotated]
            qk.copy_(F.rms_norm(qk, (size,), None, self.config.norm_eps) * layer.qk_norm)
        if turn is not None:
            turn_(qkv[:rotated], turn)
        qkv = _cast(qkv, self.cache.dtype)
        return qkv[:heads], qkv[heads:]

    def _normed(self, x: Tensor) -> Tensor:
        """x (T, C) through a norm whose gain and offset are in the matrix behind it."""
        if self.config.norm == "layer":
            scale = x.float().var(-1, correction=0, keepdim=True).add_(self.eps).rsqrt_()
        elif x.shape[0] == 1 and self.on_cpu:  # plain numbers start no operations
            norm = torch.linalg.vector_norm(x, dtype=torch.float32).item()
            return x * (norm * norm / x.shape[1] + self.config.norm_eps) ** -0.5
        else:
            norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            scale = torch.addcmul(self.eps, norms, norms, value=1 / x.shape[1]).rsqrt_()
        return _cast(x * scale, x.dtype)

    def _last_norm(self, x: Tensor) -> Tensor:
        """The hidden states behind the last block as the output matrix reads them."""
        return self.norm(x) if self.gain is None else self._normed(x).mul_(self.gain)

    def _finish_block(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, feed-forward, both residual additions; may overwrite x (T, C)."""
        attended = _cast(attended, x.dtype)
        if layer.latent is not None:
            attended = layer.latent.expand(attended)
        x = _added(x, layer.output, attended, layer.output_bias, layer.output_norm)
        mlp = layer.mlp
        if isinstance(mlp, ExpertWeights):
            y = mlp(x)
            return x.add_(y if layer.mlp_norm is None else layer.mlp_norm(y))
        up = mlp.up(self._normed(x))
        if mlp.up_bias is not None:
            up += mlp.up_bias
        if self.config.gated_mlp:
            gate, up = up.chunk(2, dim=-1)
            up = activate(gate, self.config.activation).mul_(up)
        else:
            up = activate(up, self.config.activation)
        return _added(x, mlp.down, up, mlp.down_bias, layer.mlp_norm)


def _added(
    x: Tensor, matrix: Matrix, read: Tensor, bias: Tensor | None, norm: Norm | None
) -> Tensor:
    """x + norm(W read + bias); may overwrite x."""
    if norm is not None:
        y = matrix(read)
        return x + norm(y if bias is None else y + bias)
    x = matrix.add_to(x, read)
    return x if bias is None else x.add_(bias)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype; where it is so already `Tensor.to` takes ten times as long to see it."""
    return x if x.dtype == dtype else x.to(dtype)
