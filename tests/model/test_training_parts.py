"""Losses, schedules and optimisers against independent references."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model import losses
from model.config import ConfigError, ModelConfig
from model.flops import forward_flops
from model.loader import Batch
from model.losses import bits_per_byte, cross_entropy_sum
from model.meter import device_peak, known_peak, seen_keys
from model.optim import OptimConfig, Optimizer, orthogonalise
from model.precision import resolve_precision
from model.schedule import Schedule
from model.transformer import Transformer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [7, 64])
def test_the_chunked_loss_and_its_gradients_are_torchs(masked, rows, monkeypatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", rows)  # 30 rows: several uneven chunks, or one
    torch.manual_seed(0)
    hidden = torch.randn(3, 10, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    targets = torch.randint(0, 20, (3, 10))
    mask = torch.rand(3, 10) < 0.5 if masked else None
    kept = targets if mask is None else targets.masked_fill(~mask, -100)
    reference = F.cross_entropy((hidden @ weight.T).flatten(0, 1), kept.flatten(), reduction="sum")
    ours = cross_entropy_sum(hidden, weight, targets, mask)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours / 7, (hidden, weight)),
        torch.autograd.grad(reference / 7, (hidden, weight)),
    )


def test_the_loss_with_output_bias_and_softcap_is_torchs() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((3, 10, 8), (20, 8), (20,))]
    hidden, weight, bias = inputs
    targets = torch.randint(0, 20, (3, 10))
    logits = 2.0 * torch.tanh((hidden @ weight.T + bias) / 2.0)
    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    ours = cross_entropy_sum(hidden, weight, targets, output_bias=bias, softcap=2.0)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours / 7, inputs), torch.autograd.grad(reference / 7, inputs)
    )


def test_the_loss_in_bf16_is_near_the_loss_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 64, 32), 0.2 * torch.randn(500, 32)
    targets = torch.randint(0, 500, (4, 64))
    with torch.autocast("cpu", torch.bfloat16):
        rough = cross_entropy_sum(hidden, weight, targets)
    exact = cross_entropy_sum(hidden, weight, targets)
    assert rough.dtype == torch.float32
    assert abs(rough - exact) / exact < 2e-3


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_nearly_known_has_loss_and_gradient_in_bf16(masked: bool) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 64, (1, 300))  # in three slices
    known = torch.tensor([0.5, 0.9, 0.99, 0.9985, 0.9999]).repeat(60)
    logits = torch.zeros(1, 300, 64).scatter_(
        2, targets[..., None], (known / (1 - known) * 63).log()[None, :, None]
    )
    mask = torch.arange(300)[None] < 290 if masked else None
    hidden = logits.bfloat16().float().requires_grad_()  # the output matrix changes nothing
    kept = targets if mask is None else targets.masked_fill(~mask, -100)
    reference = F.cross_entropy(hidden[0], kept[0], reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        ours = cross_entropy_sum(hidden, torch.eye(64), targets, mask)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)
    found, expected = (torch.autograd.grad(loss, hidden)[0] for loss in (ours, reference))
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)


def test_the_loss_does_not_change_with_sharding() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 10, 8), torch.randn(20, 8)
    targets, mask = torch.randint(0, 20, (4, 10)), torch.rand(4, 10) < 0.3
    whole = cross_entropy_sum(hidden, weight, targets, mask)
    parts = [cross_entropy_sum(*part) for part in _halves(hidden, weight, targets, mask)]
    torch.testing.assert_close(sum(parts), whole)


def _halves(hidden, weight, targets, mask):
    return [(hidden[h], weight, targets[h], mask[h]) for h in (slice(0, 1), slice(1, 4))]


def test_bits_per_byte_of_a_coin_is_one_eighth() -> None:
    assert bits_per_byte(1000 * math.log(2), 8000) == pytest.approx(1 / 8)


@given(
    kind=st.sampled_from(["wsd", "cosine", "linear"]),
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.4),
    decay=st.floats(0, 0.6),
    floor=st.floats(0, 0.5),
)
def test_schedules_rise_then_never_rise_again(kind, steps, warmup, decay, floor) -> None:
    schedule = Schedule(kind, warmup, decay, floor)
    values = [schedule.multiplier(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    top = math.ceil(warmup * steps)
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert all(value >= floor - 1e-12 for value in values[top:])


def test_schedule_shapes() -> None:
    wsd = Schedule("wsd", warmup=0.1, decay=0.2, floor=0.0)
    assert [wsd.multiplier(step, 100) for step in (0, 9, 10, 80, 90, 99)] == pytest.approx(
        [0.1, 1, 1, 1, 0.5, 0.05]
    )
    cosine = Schedule("cosine", warmup=0, floor=0.2)
    assert cosine.multiplier(50, 100) == pytest.approx(0.6)
    with pytest.raises(ConfigError, match=r"warmup 0.5 \+ decay 0.6 is more than the whole run"):
        Schedule("wsd", 0.5, 0.6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 16), (2, 16, 40)])
def test_newton_schulz_finds_the_orthogonal_factor(shape) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    approximate = orthogonalise(matrices, dtype=torch.float32)
    # Same singular vectors, singular values pushed near 1 (not to 1: see NEWTON_SCHULZ).
    inside = u.mT @ approximate @ vt.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-3, rtol=0)
    rough = orthogonalise(matrices).float()
    assert (rough - approximate).norm() / approximate.norm() < 0.1


def model_with_gradients() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=30, width=16, layers=2, heads=2, context=8))
    model(torch.randint(0, 30, (2, 8))).square().sum().backward()
    return model


def test_adamw_is_torchs_reference_and_decays_matrices_only() -> None:
    ours, theirs = model_with_gradients(), model_with_gradients()
    config = OptimConfig(kind="adamw", learning_rate=0.01, weight_decay=0.1, eps=1e-8)
    optimizer = Optimizer(ours, config)
    groups = [
        {
            "params": [p for p in theirs.parameters() if (p.ndim < 2) == scales],
            "weight_decay": decay,
        }
        for scales, decay in ((True, 0.0), (False, 0.1))
    ]
    reference = torch.optim.AdamW(groups, 0.01, (0.9, 0.95), 1e-8, foreach=False, fused=False)
    for multiplier in (1.0, 0.5):
        optimizer.step(multiplier)
        for group in reference.param_groups:
            group["lr"] = 0.01 * multiplier
        reference.step()
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p)


def test_muon_is_its_definition_one_matrix_at_a_time() -> None:
    model = model_with_gradients()
    config = OptimConfig(muon_learning_rate=0.1, muon_momentum=0.9, weight_decay=0.2)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(model.named_parameters())[name]
    gradient, expected = weight.grad.clone(), weight.detach().clone()
    momentum = torch.zeros_like(gradient)
    optimizer = Optimizer(model, config, bf16=False)
    for _ in range(3):
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalise((0.1 * gradient + 0.9 * momentum)[None], dtype=torch.float32)[0]
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * (64 / 16) ** 0.5 * update
        optimizer.step(1.0)
    torch.testing.assert_close(weight.detach(), expected, atol=2e-4, rtol=0)


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    model = model_with_gradients()
    optimizer = Optimizer(model, OptimConfig())
    names = {name for group, _, _ in optimizer.muon.groups for name in group}
    assert len(names) == 2 * 7 and "model.embed_tokens.weight" not in names
    assert names | set(optimizer.names) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_optimizer_state_goes_through_tensors(kind) -> None:
    models = [model_with_gradients() for _ in range(2)]
    config = OptimConfig(kind=kind)
    first, second = (Optimizer(model, config) for model in models)
    first.step(1.0)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state({name: t.clone() for name, t in first.state().items()})
    for optimizer in (first, second):
        optimizer.step(0.7)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_clipping_is_torchs() -> None:
    ours, theirs = model_with_gradients(), model_with_gradients()
    norm = Optimizer(ours, OptimConfig()).clip(0.5)
    reference = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    torch.testing.assert_close(norm, reference)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_precision_is_resolved() -> None:
    assert resolve_precision("fp32") == "fp32" and resolve_precision("bf16") == "bf16"
    assert resolve_precision("auto") in ("bf16", "fp32")
    if not torch.cuda.is_available():  # as on the machine that sends a run to others with GPUs
        assert resolve_precision("auto", "cuda") == "bf16"
    with pytest.raises(ConfigError, match="precision 'fp8'"):
        resolve_precision("fp8")


def test_the_peak_of_a_device_is_stated_or_known_by_its_name() -> None:
    assert known_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("NVIDIA GeForce RTX 4090") is None
    assert device_peak(3e12, torch.device("cpu")) == 3e12
    assert device_peak(None, torch.device("cpu")) is None


def test_operations_of_a_loss_on_some_targets_are_what_torch_counts() -> None:
    config = ModelConfig(vocab_size=900, width=32, layers=2, heads=2, context=64)
    torch.manual_seed(0)
    model, tokens = Transformer(config), torch.randint(0, 900, (4, 64))
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, ::2] = True  # 128 of 256
    with FlopCounterMode(display=False) as counter:
        cross_entropy_sum(model.hidden(tokens), model.output_weight, tokens, mask).backward()
    # torch's counter charges causal attention for all keys.
    ours = 3 * forward_flops(config, tokens=256, counted=128, keys=2 * 256 * 64)
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, (5, 1, 10)])
def test_keys_seen_are_those_of_the_mask(causal: bool, lengths: tuple[int, ...] | None) -> None:
    windows = {"sliding_window": 4, "full_attention_every": 3} if causal else {}
    config = ModelConfig(50, 32, 4, 16, heads=2, causal=causal, **windows)
    rows = torch.zeros(2, 16, dtype=torch.int64)
    here = torch.cat([torch.arange(length) for length in lengths or (16,)])
    document = (here == 0).cumsum(0)
    expected = 0
    for layer in range(4):
        window = config.window(layer) or 16
        for query in range(16):
            for key in range(16):
                near = not causal or 0 <= query - key < window
                expected += 2 * int(near and document[query] == document[key])
    packed = {"positions": here.expand(2, 16), "segments": document.expand(2, 16)}
    batch = Batch(rows, rows, **(packed if lengths else {}))
    assert seen_keys(config, batch) == pytest.approx(expected)
