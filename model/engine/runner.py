"""One step of the network over many sequences, in as few operations as the arithmetic allows.

The weights are `model.transformer.Transformer`'s; what differs is the dispatch. At a few million
parameters a decode step spends more time starting operations than computing, so query, key and
value are one matrix product, gate and up another, the norms' weights are multiplied into them,
rotation happens in place, keys and values are written in one scatter, and masks and angles are made
once a step instead of once a layer. Prompts being read and answers being
written go through the matrices together; only attention is computed sequence by sequence, each over
a view of its own keys: no padding, no mask, and no influence on the neighbours.
`tests/model/test_engine.py` holds it equal to the plain forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.engine.experts import ExpertWeights
from model.engine.fixed_steps import FixedSteps
from model.engine.kv_cache import KVCache
from model.engine.layer_weights import LayerWeights, Norm
from model.engine.pages import PAGE
from model.engine.rotation import Turn, angles, rotate_
from model.engine.weights import (
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
    """The part of the cache that a span's queries look at: `count` tokens from place `first`."""

    first: int
    count: int
    mask: Tensor | None  # (t, count), -inf where a query may not look

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """q (t, H, D); keys, values (1, H_kv, places, D) of the whole cache -> (t, H · D)."""
        length, heads, size = q.shape
        kv_heads = keys.shape[1]
        k = keys.narrow(2, self.first, self.count)
        v = values.narrow(2, self.first, self.count)
        if softcap is not None:
            return self._capped(q, k[0], v[0], scale, softcap)
        if length == 1:
            # Query heads that share a key head stand in the place of query positions.
            q = q.view(1, kv_heads, heads // kv_heads, size)
            return F.scaled_dot_product_attention(q, k, v, scale=scale).reshape(1, -1)
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k,
            v,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=kv_heads != heads,
        )
        return y[0].transpose(0, 1).reshape(length, -1)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
        """Gemma 2's scores, softcap · tanh(scores / softcap), for which torch has no kernel."""
        length, size = q.shape[0], q.shape[2]
        q = q.view(length, k.shape[0], -1, size).permute(1, 2, 0, 3)  # (H_kv, H / H_kv, t, D)
        scores = softcapped(scale * (q @ k.mT[:, None]), softcap)
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
    ) -> None:
        """reproducible: choose nothing by a trial that might end differently another time."""
        dtype = activation_dtype(weights)
        self.config = config = model.config
        self.embedding = model.model.embed_tokens.weight.to(dtype)
        self.device = self.embedding.device
        self.positions = None
        if config.positions == "learned":
            self.positions = model.model.embed_positions.weight.to(dtype)
        self.embedding_scale = config.width**0.5 if config.scaled_embeddings else 1.0
        self.output = matrix(model.output_weight, weights)
        self.norm: Norm = model.model.norm
        self.layers = [LayerWeights.of(block, config, weights) for block in model.model.layers]
        matrices = [matrix for layer in self.layers for matrix in layer.matrices]
        settle([*matrices, self.output], tried=not reproducible)
        self.windows = {layer.window for layer in self.layers}
        self.angles = angles(model, dtype)
        self.eps = torch.full((1, 1), config.norm_eps, device=self.device)
        # On a CPU attention takes a bfloat16 query 4 to 8 times as long as a float32 one.
        kept = torch.float32 if self.device.type == "cpu" else dtype
        self.cache = KVCache(config, pages + 1, kept, self.device)
        self.spare = self.place(pages)  # the first of the places that belong to nobody
        # Which experts are chosen is known only as the step goes: no graph can hold that.
        captured = self.device.type == "cuda" and not config.experts
        self.fixed = FixedSteps(self) if captured else None

    @staticmethod
    def place(page: int) -> int:
        """Where a page begins in the cache."""
        return page * PAGE

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Read the tokens of all spans into the cache; the last hidden states of all their tokens,
        normed, (T, C), in the order of the spans.
        """
        if self.fixed is not None and all(len(span.tokens) == 1 for span in spans):
            return self.fixed.forward(spans)
        lengths = [len(span.tokens) for span in spans]
        count = sum(lengths)
        more = usual_rows(count) - count
        positions = torch.tensor([p for s in spans for p in range(s.start, s.end)] + [0] * more)
        offsets = [self.place(s.page) for s in spans for _ in s.tokens] + [self.spare] * more
        tokens = torch.tensor([token for s in spans for token in s.tokens] + [0] * more)
        positions, tokens = positions.to(self.device), tokens.to(self.device)
        places = positions + torch.tensor(offsets).to(self.device)
        turns = [(cos[positions][:, None], sin[positions][:, None]) for cos, sin in self.angles]
        views = {window: [self._view(span, window) for span in spans] for window in self.windows}
        nobody = self.cache.data.new_zeros(more, self.config.heads * self.cache.size)
        softcap = self.config.attention_softcap
        x = self._embed(tokens, positions)
        for index, layer in enumerate(self.layers):
            turn = turns[0 if layer.window is None else -1] if turns else None
            q, pair = (part.to(self.cache.dtype) for part in self._qkv(layer, x, turn))
            self.cache.layers[index].index_copy_(1, places, pair)
            keys, values = self.cache.of(index)
            parts = zip(views[layer.window], q[:count].split(lengths), strict=True)
            y = [view.attend(part, keys, values, layer.scale, softcap) for view, part in parts]
            if more:
                y.append(nobody)
            x = self._finish_block(layer, x, torch.cat(y) if len(y) > 1 else y[0])
        return self.norm(x)[:count]

    @torch.inference_mode()
    def fixed_step(self, inputs: Tensor, length: int) -> Tensor:
        """As `forward` for one token of each of B sequences, without a shape that depends on them.

        inputs: (3, B), of each its token, its position, and the first place of its cache. length:
        places of it that are looked at, more than any position. Hidden states (B, C).
        """
        tokens, positions, first = inputs
        column = torch.arange(length, device=self.device)
        places = (first[:, None] + column).clamp_(max=self.spare)
        turns = [(cos[positions][:, None], sin[positions][:, None]) for cos, sin in self.angles]
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
            q, pair = (part.to(self.cache.dtype) for part in self._qkv(layer, x, turn))
            self.cache.layers[index].index_copy_(1, first + positions, pair)
            k, v = (kind[0][:, places].transpose(0, 1) for kind in self.cache.of(index))
            # Query heads that share a key head stand in the place of query positions.
            q = q.reshape(len(tokens), self.cache.heads, -1, self.cache.size)
            y = self._attended(q, k, v, masks[layer.window], layer.scale)
            x = self._finish_block(layer, x, y.reshape(len(tokens), -1))
        return self.norm(x)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """q (B, H_kv, H / H_kv, D), k and v (B, H_kv, S, D), mask (B, 1, 1, S) -> as q."""
        softcap = self.config.attention_softcap
        if softcap is None:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        scores = softcapped(scale * (q @ k.mT), softcap) + mask
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
        return View(span.page * PAGE + first, span.end - first, mask)

    def _qkv(self, layer: LayerWeights, x: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor]:
        """x (T, C) -> rotated queries (T, H, D); keys and values (2 H_kv, T, D) for the cache, or
        one row that is both (1, T, D).
        """
        qkv = layer.qkv(x).mul_(self._inverse_deviation(x))
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        if layer.latent is not None:
            assert turn is not None  # `ModelConfig` refuses latents without rotation
            return layer.latent.project(qkv, turn)
        heads, size = self.config.heads, self.config.head_size
        rotated = heads + self.config.kv_count
        qkv = qkv.view(x.shape[0], -1, size)
        qk = qkv[:, :rotated]
        if layer.qk_norm is not None:
            qk.copy_(F.rms_norm(qk, (size,), None, self.config.norm_eps) * layer.qk_norm)
        if turn is not None:
            rotate_(qk, turn)
        return qkv[:, :heads], qkv[:, heads:].transpose(0, 1)

    def _inverse_deviation(self, x: Tensor) -> Tensor:
        """What a norm divides by, inverted: (T, C) -> (T, 1) in float32."""
        if self.config.norm == "layer":
            return x.float().var(-1, correction=0, keepdim=True).add_(self.eps).rsqrt_()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()

    def _finish_block(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, feed-forward, both residual additions; may overwrite x (T, C)."""
        attended = attended.to(x.dtype)
        if layer.latent is not None:
            attended = layer.latent.expand(attended)
        x = _added(x, layer.output, attended, layer.output_bias, layer.output_norm)
        mlp = layer.mlp
        if isinstance(mlp, ExpertWeights):
            y = mlp(x)
            return x.add_(y if layer.mlp_norm is None else layer.mlp_norm(y))
        up = mlp.up(x).mul_(self._inverse_deviation(x))
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
