"""A training of seconds, for tests of the loop."""

from dataclasses import replace

import torch

from model.config import ModelConfig
from model.train_config import TrainConfig
from model.transformer import Transformer

TEXT = (b"the quick brown fox jumps over the lazy dog and the dog sleeps on. " * 60)[:3000]
CONFIG = TrainConfig(
    total_tokens=12 * 8 * 32, batch=8, micro_batch=3, checkpoint_every=4, log_every=1
)


TINY = ModelConfig(vocab_size=128, width=32, layers=2, heads=2, context=32)


def tiny_model(context: int = 32) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(TINY, context=context))


class Killed(BaseException):
    """As abrupt as an exception can be."""
