"""Presets parse and have the size they are named for; forecasts follow formulae and judge runs."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from flows.cli import main
from flows.deployments import parameters
from flows.parameters import PRESETS
from model.flops import count_parameters, training_flops_per_token
from model.huggingface import save_directory
from model.loader import WindowLoader
from model.train import train
from model.transformer import Transformer
from model.width import width_ratio
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import MANIFEST, Store
from tasks.training.forecast import (
    Law,
    _train_config,
    effective_tokens,
    effective_tokens_of,
    forecast,
    quick_run,
    scaled_down,
)
from tasks.training.foreseen import errors, keep
from tasks.training.memory import memory_bytes
from tasks.training.options import ModelOptions, RunOptions
from tasks.training.pretrain import PretrainConfig
from tasks.training.shapes import ExpertOptions
from tests.model.test_initial_weights import peak

FREQUENCIES = 1 / np.arange(1, 301)
FREQUENCIES /= FREQUENCIES.sum()
SIZES = {
    "demo": 5.2e6,
    "tiny": 133e3,
    "gpu-124m": 124e6,
    "gpu-350m": 355e6,
    "cluster-1b": 1.1e9,
    "cluster-8b": 8.05e9,
}


def preset(name: str) -> PretrainConfig:
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    checked = parameters("pipeline", values)
    return checked.pretrain


@pytest.mark.parametrize("name", [path.stem for path in PRESETS.glob("*.yaml")])
def test_a_preset_is_valid_and_as_large_as_it_says(name: str) -> None:
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    checked = parameters("pipeline", values)
    shape = checked.pretrain.require_served()
    assert checked.finetune.sequence <= shape.context
    count = count_parameters(checked.pretrain.model.config(checked.tokenizer.vocab_size))
    assert count.total == pytest.approx(SIZES[name], rel=0.03)


@pytest.mark.parametrize("name", [path.stem for path in PRESETS.glob("*[0-9][mb].yaml")])
def test_a_preset_tells_its_forecast(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text()
    vocabulary = parameters("pipeline", yaml.safe_load(text)).tokenizer.vocab_size
    found = dict(forecast(preset(name), vocabulary, None, device_flops=989e12, mfu=0.4).rows())
    told = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    time = found["time"].partition(",")[0]
    assert (
        f"Forecast: {found['parameters']} parameters, {found['operations']} operations, "
        f"{found['memory of a worker']} a worker, {time} and {found['device hours']} device hours"
    ) in told


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_a_preset_that_brings_its_corpus_tells_its_size_and_its_loss(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text()
    checked = parameters("pipeline", yaml.safe_load(text))
    shape = checked.pretrain.model.config(checked.tokenizer.vocab_size)
    sequence, tokens = checked.pretrain.sequence, checked.pretrain.tokens
    operations = training_flops_per_token(shape, sequence, 1.0) * tokens
    told = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    parameters_told = f"{count_parameters(shape).total:,} parameters, {operations:.3g} operations"
    assert f"Forecast: {parameters_told}" in told
    found = re.search(r"held-out text: ([\d.]+) nats per token, ([\d.]+) bits per byte", told)
    assert found and 0 < float(found[2]) < float(found[1]) / math.log(2)


def test_the_demo_preset_is_the_defaults() -> None:
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    assert parameters("pipeline", values) == parameters("pipeline", {})


def test_the_law_is_found_again_from_its_own_points() -> None:
    law = Law(2.0, 40.0, 90.0)
    points = [(n, d, law.loss(n, d)) for n in (1e5, 4e5, 1e6) for d in (1e5, 1e6)]
    found = Law.fitted(points)
    assert found.loss(1e7, 1e7) == pytest.approx(law.loss(1e7, 1e7))
    # No amount is negative, whatever the runs say.
    odd = Law.fitted([(n, d, 5 - 1e3 / n - 1e3 / d) for n in (1e4, 1e5) for d in (1e4, 1e5)])
    assert min(odd.floor, odd.per_parameters, odd.per_tokens) >= 0


def test_repeated_tokens_count_as_less_than_new_ones() -> None:
    assert effective_tokens(800, 1000) == 800  # not all of it is read
    for passes, worth in ((1, 1.0), (2, 1.97), (4, 3.73), (44, 15.45), (1000, 16.39)):
        assert effective_tokens(passes * 1e9, 1e9) == pytest.approx(worth * 1e9, rel=2e-3)
    config = PretrainConfig(tokens=4000)
    sizes = {"seeds": 1000, "notes": 1000, "mail": 10}
    assert effective_tokens_of(config, sizes, {}) == pytest.approx(effective_tokens(4000, 2010))
    # Weighed sources repeat each by itself, and one that is left out not at all.
    weighed = config.model_copy(update={"source_weights": {"seeds": 1, "notes": 3, "mail": 0}})
    assert effective_tokens_of(weighed, sizes, {}) == 1000 + effective_tokens(3000, 1000)
    for wrong in ({"nots": 1}, {"seeds": 1}):  # before any quick run
        weighed = config.model_copy(update={"source_weights": wrong})
        with pytest.raises(UserError, match="sources are mail, notes, seeds; give every source"):
            effective_tokens_of(weighed, sizes, {})
    assert effective_tokens_of(config, {}, {}) == 0
    # Notes whose weight has written each of them four times are 250 tokens and 750 of copies.
    copied = effective_tokens_of(config.model_copy(update={"tokens": 2010}), sizes, {"notes": 250})
    assert copied == pytest.approx(1010 + effective_tokens(1000, 250))


def test_quick_runs_are_small_copies_of_the_model() -> None:
    experts = {"count": 8, "per_token": 2, "width": 2048, "dense_layers": 3}
    values = {
        "model": {"family": "deepseek_v3", "width": 4096, "heads": 32, "layers": 8}
        | {"context": 4096, "tied_embeddings": False, "experts": experts},
        "optimizer": {"base_width": 1024},
    }
    config = PretrainConfig.model_validate(values)
    small = scaled_down(config, 64, 2)
    shape = small.model.config(300)
    assert (shape.width, shape.layers, shape.experts, shape.expert_width) == (64, 2, 8, 32)
    assert not shape.has_experts(0) and shape.has_experts(1)
    ratios = [
        width_ratio(each.model.config(300), each.optimizer.base_width) for each in (config, small)
    ]
    assert ratios == [0.25, 0.25]
    # Without a width of their own, experts have that of the large model's, narrowed.
    derived = config.model.model_copy(
        update={"mlp_width": 12_288, "experts": ExpertOptions(per_token=2)}
    )
    narrow = scaled_down(config.model_copy(update={"model": derived}), 64, 2)
    assert narrow.model.config(300).expert_width == 64
    assert scaled_down(PretrainConfig(), 64, 2).optimizer == PretrainConfig().optimizer


def test_a_gpu_forecast_is_operations_over_the_rate() -> None:
    config = preset("gpu-124m")
    found = forecast(config, 50_304, None, device_flops=989e12, mfu=0.4)
    assert found.seconds == pytest.approx(found.flops / (989e12 * 0.4))
    assert found.flops == pytest.approx(6 * 124e6 * 2.5e9, rel=0.3)
    assert 10 < found.memory_gb < 80 and found.loss is None
    eight = preset("cluster-8b")
    shape = eight.model.config(131_072)
    whole = eight.model_copy(update={"run": RunOptions(gpu=True, sharded=False)})
    assert memory_bytes(shape, eight, 64) < 40e9 < 100e9 < memory_bytes(shape, whole, 64)


@pytest.mark.parametrize(
    ("vocabulary", "sizes", "optimizer"),
    [
        (40_000, {"width": 128, "mlp_width": 256, "tied_embeddings": False}, "muon"),
        (2000, {"width": 384, "mlp_width": 1024}, "adamw"),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_memory_is_what_steps_allocate(
    vocabulary: int, sizes: dict[str, Any], optimizer: str, precision: str, tmp_path: Path
) -> None:
    tokens = np.random.default_rng(0).integers(0, vocabulary, 5000).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    values = {
        "sequence": 64,
        "batch": 4,
        "precision": precision,
        "model": {"layers": 4, "heads": 4, "context": 64} | sizes,
        "optimizer": {"kind": optimizer},
        "run": {"micro_batch": 2},
    }
    config = PretrainConfig.model_validate(values)
    shape = config.model.config(vocabulary)
    loader = WindowLoader([tmp_path / "tokens.npy"], 64, seed=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        train(Transformer(shape), loader, _train_config(config, tokens=2 * 4 * 64))
    measured = peak(watched.profiler.kineto_results.events(), mapped=0)
    assert memory_bytes(shape, config, 1) == pytest.approx(measured, rel=0.12)


def test_a_run_says_how_wrong_its_forecast_was(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    settings, config = Settings.load(), PretrainConfig(tokens=1000)
    here = Manifest(stage="token-shards", version=1, fingerprint="a", content="a")
    elsewhere = here.model_copy(update={"content": "b"})
    reached = {
        "loss": 3.0,
        "seconds": 15.0,
        "memory_gb": 3.0,
        "device_hours": 30.0,
        "parameters": 7,
        "workers": 2,
    }
    assert errors(config, settings, here, reached) == {}
    foreseen = {"loss": 4.0, "seconds": 10.0, "memory_gb": 2.0, "device_hours": 20.0}
    path = keep(foreseen | {"parameters": 7, "workers": 2}, config, settings, here)
    assert json.loads(path.read_text())["placement"]["workers"] == 2
    of_loss = {"forecast_loss": 4.0, "forecast_loss_error": -0.25}
    assert errors(config, settings, here, reached) == of_loss | {
        "forecast_seconds": 10.0,
        "forecast_seconds_error": 0.5,
        "forecast_memory_gb": 2.0,
        "forecast_memory_gb_error": 0.5,
        "forecast_device_hours": 20.0,
        "forecast_device_hours_error": 0.5,
    }
    # With other workers, or held in memory otherwise, only what does not depend on that is judged.
    assert errors(config, settings, here, reached | {"workers": 8}) == of_loss
    smaller = config.model_copy(update={"run": RunOptions(micro_batch=1)})
    assert errors(smaller, settings, here, reached) == of_loss
    # Another training, another corpus, another vocabulary: nobody asked for a forecast of it.
    assert errors(config.model_copy(update={"tokens": 2000}), settings, here, reached) == {}
    assert errors(config, settings, elsewhere, reached) == {}
    assert errors(config, settings, here, reached | {"parameters": 8}) == {}
    # One made without a corpus is for any of them.
    keep({"seconds": 30.0, "parameters": 7, "workers": 2, "loss": None}, config, settings)
    found = errors(config, settings, elsewhere, reached)
    assert found == {"forecast_seconds": 30.0, "forecast_seconds_error": -0.5}


def test_what_cannot_be_is_not_foreseen(tmp_path: Path, capsys) -> None:
    def told(*arguments: str) -> str:
        assert main(["forecast", "--no-runs", "--home", str(tmp_path), *arguments]) == 1
        return capsys.readouterr().err

    assert "--mfu 0.0 must be a share above 0" in told("--config", "gpu-124m", "--mfu", "0")
    assert "--device-tflops nan must be" in told("--config", "gpu-124m", "--device-tflops", "nan")
    large = ("--config", "cluster-8b", "--set", "pretrain.run.gpu=false")
    assert "GB and cannot be timed here" in told(*large, "--set", "pretrain.model.layers=1000")
    assert not (tmp_path / "forecasts").exists()


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Tokens drawn independently, some of them held out, and their tokenizer's manifest."""
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    store = Store.open(Settings.load())
    marks = {"version": 1, "content": "here"}
    named = Manifest(stage="tokenizer", fingerprint="t", counts={"vocabulary": 300}, **marks)
    store.directory("tokenizer", "t").write_json(MANIFEST, named.model_dump(mode="json"))
    draw = np.random.default_rng(0)
    entries = []
    for name, count in (("tokens-00000.npy", 60_000), ("heldout-tokens-00000.npy", 9000)):
        stream = io.BytesIO()
        np.save(stream, draw.choice(300, count, p=FREQUENCIES).astype(np.uint16))
        entries.append(store.directory("token-shards", "s").write_bytes(name, stream.getvalue()))
    inputs = {"tokenizer": "t"}
    found = {"bytes_per_token": 2.0}
    return Manifest(
        stage="token-shards",
        fingerprint="s",
        files=tuple(entries),
        inputs=inputs,
        metrics=found,
        **marks,
    )


def test_the_loss_foreseen_of_random_text_is_its_entropy(shards: Manifest, monkeypatch) -> None:
    sizes = ((32, 1, 30_000), (32, 1, 120_000), (64, 1, 30_000), (64, 2, 120_000))
    monkeypatch.setattr("tasks.training.forecast.QUICK_RUNS", sizes)
    options = ModelOptions(width=64, layers=2, heads=2, context=128, mlp_width=0)
    run = RunOptions(workers=2, tensor=2)  # what a quick run, in one process, must not ask for
    config = PretrainConfig(sequence=128, tokens=150_000, model=options, run=run)
    found = forecast(config, 300, shards, device_flops=1.0, mfu=1.0)
    entropy = -float((FREQUENCIES * np.log(FREQUENCIES)).sum())  # no model can do better
    assert found.loss == pytest.approx(entropy, rel=0.05)
    assert found.effective_tokens == effective_tokens(150_000, 60_000) < 150_000
    assert "as if of new text" in dict(found.rows())
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 2)
    short = shards.model_copy(update={"files": shards.files[:1]})
    with pytest.raises(UserError, match=r"no quick runs on this corpus: .* or pass --no-runs"):
        quick_run(config, 32, 1, 1000, short)


def test_no_law_is_fitted_for_a_run_that_goes_on_from_a_checkpoint(
    shards: Manifest, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", str(tmp_path / "sources"))
    folder = tmp_path / "sources" / "theirs"
    torch.manual_seed(0)
    save_directory(folder, Transformer(ModelOptions(width=32, heads=2, context=64).config(300)))
    config = PretrainConfig(start_from=str(folder), sequence=64, run=RunOptions(gpu=True))
    said: list[str] = []
    found = forecast(config, 300, shards, device_flops=1e12, mfu=0.4, say=said.append)
    assert found.loss is None and said == [
        "no loss is foreseen of a run that goes on from a checkpoint"
    ]


def test_the_time_on_a_cpu_is_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    options = ModelOptions(width=32, layers=1, heads=2, context=32)
    config = PretrainConfig(sequence=32, batch=2, tokens=10_000, model=options)
    found = forecast(config, 300, None, device_flops=1.0, mfu=1.0)
    assert found.seconds > 0 and "measured here" in found.rate
    assert torch.get_num_threads() == threads
