"""`gristmill forecast`: what a pretraining will cost and reach."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tasks.tokenizer.train import TokenizerConfig
from tasks.training.forecast import Forecast, forecast
from tasks.training.foreseen import keep
from tasks.training.pretrain import PretrainConfig


def foresee(
    settings: Settings,
    parameters: Any,
    arguments: argparse.Namespace,
    say: Callable[[str], None],
) -> Forecast:
    """The forecast for the pretraining among a flow's parameters; it is kept for the run to judge.

    The loss needs tokens to try small models on: the newest in the store that are of this run's
    vocabulary, as nats a token of another one say nothing.
    """
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu} must be a share above 0 and at most 1")
    if not 0 < arguments.device_tflops < float("inf"):
        raise UserError(f"--device-tflops {arguments.device_tflops} must be a number above 0")
    config: PretrainConfig = parameters.pretrain
    tokenizer: TokenizerConfig = parameters.tokenizer
    shards = None if arguments.no_runs else _tokens_of(tokenizer.resolve(), Store.open(settings))
    if shards is None and not arguments.no_runs:
        say(
            "no tokens of this vocabulary in the store, so no loss is foreseen; make some: "
            "gristmill run tokenizer"
        )
    found = forecast(
        config,
        tokenizer.vocabulary(),
        shards,
        device_flops=arguments.device_tflops * 1e12,
        mfu=arguments.mfu,
        say=say,
    )
    keep(asdict(found), config, settings, shards)
    return found


def _tokens_of(tokenizer: TokenizerConfig, store: Store) -> Manifest | None:
    """The newest token shards of a vocabulary asked for in the same words."""
    wanted = tokenizer.vocab_size, tokenizer.import_digest
    for shards in reversed(store.all("token-shards")):
        made = TokenizerConfig.model_construct(
            **store.get("tokenizer", shards.inputs["tokenizer"]).config
        )
        if (made.vocab_size, made.import_digest) == wanted:
            return shards
    return None
