"""`gristmill forecast`: what a pretraining will cost and reach."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import identity
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
    vocabulary, as nats a token of another one say nothing. They may be of another corpus than the
    run will have, which need not be there yet: whose they are is said.
    """
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu} must be a share above 0 and at most 1")
    if not 0 < arguments.device_tflops < float("inf"):
        raise UserError(f"--device-tflops {arguments.device_tflops} must be a number above 0")
    config: PretrainConfig = parameters.pretrain
    if not config.tokens:
        raise UserError("pretrain.tokens 0 takes no step, so nothing can be foreseen of it")
    tokenizer: TokenizerConfig = parameters.tokenizer
    shards = None if arguments.no_runs else _tokens_of(tokenizer.resolve(), Store.open(settings))
    if shards is None and not arguments.no_runs:
        say(
            "no tokens of this vocabulary in the store, so no loss is foreseen; make some: "
            "gristmill run tokenizer"
        )
    if shards is not None:
        say(
            f"the loss is that of token-shards/{shards.fingerprint[:12]} of corpus "
            f"{shards.inputs['corpus'][:12]}, {shards.counts.get('tokens', 0):,} tokens"
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
    for shards in reversed(store.all("token-shards")):
        made = store.get("tokenizer", shards.inputs["tokenizer"]).config
        # A setting that did not exist then had its default.
        if identity(TokenizerConfig.model_construct(**made)) == identity(tokenizer):
            return shards
    return None
