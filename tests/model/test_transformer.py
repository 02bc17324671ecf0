"""Who sees whom, caches, sizes, configs, and the written-out backward passes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import flex
from model.attention import attend
from model.config import ConfigError, ModelConfig
from model.flops import count_parameters, training_flops_per_token
from model.layers import RMSNorm, rotate
from model.moe import balance
from model.rope import rope_table
from model.transformer import Transformer

VARIANTS = [
    {},
    {"kv_heads": 1},
    {"sliding_window": 4},
    {"qk_norm": True, "head_dim": 32, "kv_heads": 1},
    {"qkv_bias": True, "tied_embeddings": False},
    {"positions": "learned", "norm": "layer", "gated_mlp": False, "linear_bias": True},
    {
        "norm": "rms+1",
        "norm_placement": "both",
        "sliding_window": 4,
        "full_attention_every": 2,
        "window_rope_theta": 100.0,
        "attention_softcap": 1.0,
        "kv_heads": 1,
    },
    {
        "head_dim": 24,
        "kv_latent": 20,
        "rope_dim": 8,
        "value_dim": 12,
        "experts": 4,
        "experts_per_token": 2,
        "expert_width": 16,
        "shared_experts": 1,
        "dense_layers": 1,
        "routing": "sigmoid",
    },
]


def tiny(**flags) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=80, width=48, layers=2, heads=3, context=64, **flags)
    return Transformer(config).eval()


class GrowingCache:
    """The simplest cache that keeps the contract: column j holds position j."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, layer, keys, values):
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys, values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        self.layers[layer] = keys, values
        return keys, values


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_token_never_sees_the_future(flags: dict, grad: bool) -> None:
    model = tiny(**flags)
    tokens = torch.randint(0, 80, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = torch.randint(0, 80, (2, 8))
    with torch.set_grad_enabled(grad):
        difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:12].max() < 1e-6 < difference[12]


@pytest.mark.parametrize("grad", [False, True])
def test_without_causality_every_token_sees_its_whole_document(grad: bool) -> None:
    model = tiny(causal=False, positions="learned", norm="layer", norm_placement="post")
    tokens = torch.randint(0, 80, (1, 20))
    changed = tokens.clone()
    changed[:, 12] = (tokens[:, 12] + 1) % 80
    segments = torch.tensor([[0] * 8 + [1] * 12])
    with torch.set_grad_enabled(grad):
        whole = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
        packed = model(tokens, segments=segments) - model(changed, segments=segments)
    assert whole.min() > 1e-6
    seen = packed.abs().amax(dim=(0, 2)) > 1e-6
    assert seen.tolist() == [False] * 8 + [True] * 12


def test_activation_checkpointing_changes_no_gradient() -> None:
    tokens = torch.randint(0, 80, (2, 20))
    gradients = []
    for remat in (False, True):
        model = tiny(kv_heads=1)
        model.remat = remat
        model(tokens).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("grad", [False, True])
def test_a_sliding_window_ends_where_it_says(grad: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=80, width=48, layers=1, heads=3, context=64, sliding_window=4)
    model = Transformer(config)
    tokens = torch.randint(0, 80, (1, 20))
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 80
    with torch.set_grad_enabled(grad):
        seen = (model(tokens) - model(changed)).abs().amax(dim=(0, 2)) > 1e-7
    assert seen.nonzero().flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
def test_packed_documents_do_not_see_each_other(flags: dict, grad: bool) -> None:
    model = tiny(**flags)
    tokens = torch.randint(0, 80, (2, 16))
    segments = torch.tensor([0] * 7 + [1] * 9).expand(2, 16)
    positions = torch.cat((torch.arange(7), torch.arange(9))).expand(2, 16)
    with torch.set_grad_enabled(grad):
        packed = model(tokens, positions, segments=segments)
        torch.testing.assert_close(packed[:, :7], model(tokens[:, :7]), atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[:, 7:], model(tokens[:, 7:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("flags", VARIANTS)
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward_pass(flags: dict) -> None:
    model = tiny(**flags)
    tokens = torch.randint(0, 80, (2, 16))
    positions = torch.arange(16).expand(2, 16)
    cache = GrowingCache()
    pieces = [slice(0, 7), slice(7, 10), *(slice(i, i + 1) for i in range(10, 16))]
    steps = [model(tokens[:, p], positions[:, p], cache=cache) for p in pieces]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "flags",
    [
        {"sliding_window": 5},
        {"kv_heads": 2, "attention_softcap": 3.0, "sliding_window": 7, "full_attention_every": 2},
        {"causal": False},
    ],
)
def test_flex_attention_sees_what_the_masks_say(flags: dict, monkeypatch) -> None:
    # Its plain formula, which kernels for GPUs are compiled from; on a CPU it has no backward pass.
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, width=64, layers=2, heads=4, context=48, **flags)
    model = Transformer(config)
    for matrix in (parameter for parameter in model.parameters() if parameter.ndim == 2):
        matrix.data *= 5  # attention that differs from a mean
    tokens = torch.randint(0, 50, (3, 40))
    segments = torch.sort(torch.randint(0, 3, (3, 40))).values
    with torch.no_grad():
        expected = model(tokens, segments=segments), model(tokens)
        monkeypatch.setattr(flex, "usable", lambda device: True)
        found = model(tokens, segments=segments), model(tokens)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_without_a_gpu_flex_attention_is_left_alone() -> None:
    assert not flex.usable("cpu")


def test_logits_can_be_computed_where_they_are_wanted() -> None:
    model = tiny()
    tokens = torch.randint(0, 80, (2, 16))
    wanted = torch.tensor([[3, 15], [0, 8]])
    full = model(tokens)
    expected = torch.stack([full[row, wanted[row]] for row in range(2)])
    torch.testing.assert_close(model(tokens, logits_at=wanted), expected, atol=1e-6, rtol=0)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens is longer than the model's context of 64"):
        tiny()(torch.zeros(1, 65, dtype=torch.long))


def test_rope_keeps_its_precision_in_a_bf16_model() -> None:
    model = tiny().bfloat16()
    assert model.rope_cos.dtype == torch.float32
    assert model(torch.zeros(1, 8, dtype=torch.long)).dtype == torch.bfloat16


@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 4)]),
    width=st.sampled_from([8, 24]),
    tied=st.booleans(),
    qk_norm=st.booleans(),
    qkv_bias=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_counted_parameters_are_the_parameters(layers, heads, width, tied, qk_norm, qkv_bias):
    config = ModelConfig(
        vocab_size=50,
        width=width,
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        tied_embeddings=tied,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
    )
    parameters = Transformer(config).parameters()
    assert count_parameters(config).total == sum(p.numel() for p in parameters)


def test_balancing_raises_the_bias_of_idle_experts_and_lowers_that_of_busy_ones() -> None:
    model = tiny(**VARIANTS[-1]).train()
    assert balance(model, 0.1) is None  # no token has passed yet
    router = model.model.layers[1].mlp.gate
    uneven = []
    for _ in range(30):
        model(torch.randint(0, 80, (4, 32)))
        uneven.append(balance(model, 0.002))
    assert router.e_score_correction_bias.abs().max() > 0
    assert sum(uneven[-5:]) < sum(uneven[:5])
    assert router.load is None
    model.eval()(torch.randint(0, 80, (4, 32)))
    assert balance(model, 0.1) is None


def test_experts_are_the_sum_over_each_token_of_its_own() -> None:
    model = tiny(**VARIANTS[-1])
    layer = model.model.layers[1].mlp
    x = torch.randn(7, 48)
    chosen, weights = layer.gate(x)
    expected = layer.shared_experts(x)
    for token in range(7):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ x[token]).chunk(2)
            expected[token] += weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(layer(x), expected)


def test_counted_operations_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(kv_heads=1)
    tokens = torch.randint(0, 80, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    # torch's counter charges causal attention for all T keys: ours for (T + 1) / 2.
    attention = 3 * 4 * 2 * 48 * (32 - 33 / 2)
    assert counter.get_total_flops() == pytest.approx(
        32 * (training_flops_per_token(model.config, 32) + attention), rel=0.02
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width": 50}, "width 50 is not a multiple of heads 3"),
        ({"kv_heads": 2}, "heads 3 is not a multiple of kv_heads 2"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
        ({"sliding_window": 0}, "sliding_window 0 must be at least 1"),
        ({"layers": 0}, "layers 0 must be at least 1"),
        ({"norm": "batch"}, "norm 'batch' is not one of rms, rms\\+1, layer"),
        ({"window_rope_theta": 1e4}, "window_rope_theta 10000.0 means nothing without full_att"),
        ({"kv_latent": 16, "rope_dim": 64}, "rope_dim 64 must be below head_dim 64"),
        ({"kv_latent": 16, "rope_dim": 8, "kv_heads": 1}, "kv_heads must equal heads"),
        ({"experts": 4, "experts_per_token": 5, "expert_width": 8}, "experts_per_token 5 must be"),
        ({"shared_experts": 1}, "shared_experts 1 means nothing without experts"),
        ({"causal": False, "sliding_window": 4}, "sliding_window is of causal models"),
        ({"masked_head": True, "tied_embeddings": False}, "masked_head needs tied_embeddings"),
    ],
)
def test_impossible_configs_are_named(flags: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**flags)


def test_config_round_trips_and_refuses_unknown_keys() -> None:
    config = ModelConfig(kv_heads=1, qk_norm=True)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown model setting 'depth'"):
        ModelConfig.from_dict({"depth": 3})


def test_rms_norm_and_its_gradient_are_the_formula() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(12, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 12, requires_grad=True)
    reference = F.rms_norm(x, (12,), norm.weight, 1e-5)
    inputs = x, norm.weight
    upstream = torch.randn(3, 5, 12)
    expected = torch.autograd.grad(reference, inputs, upstream)
    torch.testing.assert_close(norm(x), reference)
    torch.testing.assert_close(torch.autograd.grad(norm(x), inputs, upstream), expected)


@pytest.mark.parametrize("batched", [False, True])
def test_rotation_and_its_gradient_are_the_formula(batched: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    cos, sin = rope_table(9, 8, 10_000.0)
    places = torch.randint(0, 9, (2, 5)) if batched else torch.arange(5)
    cos, sin = cos[places], sin[places]
    if batched:
        cos, sin = cos[:, None], sin[:, None]
    heads = x.transpose(1, 2)
    reference = heads * cos + torch.cat((-heads[..., 4:], heads[..., :4]), -1) * sin
    upstream = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(rotate(x, cos, sin), reference)
    torch.testing.assert_close(
        torch.autograd.grad(rotate(x, cos, sin), x, upstream),
        torch.autograd.grad(reference, x, upstream),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_training_is_sdpa(masked: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 10, 8, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 10, 8, requires_grad=True) for _ in range(2))
    segments = torch.tensor([0] * 4 + [1] * 6)
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    visible = (causal & (segments[:, None] == segments))[None, None] if masked else None
    reference = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible if masked else causal[None, None], enable_gqa=True
    )
    upstream = torch.randn_like(reference)
    ours = attend(q, k, v, visible, scale=q.shape[-1] ** -0.5)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(reference, (q, k, v), upstream),
    )
