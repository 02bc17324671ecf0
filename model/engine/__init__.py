"""Generation: continuous batching over a key-value cache, in pure PyTorch."""

from model.engine.batch import Generation, generate_batch
from model.engine.core import Core
from model.engine.counters import Counters
from model.engine.engine import Engine, EngineBusy, EngineClosed
from model.engine.loading import LoadedModel, load_model
from model.engine.readable import PromptError
from model.engine.sampling import Constraint, ConstraintError, ConstraintFactory, Sampling
from model.engine.sequence import FinishReason, TokenLogprob, Update

__all__ = [
    "Constraint",
    "ConstraintError",
    "ConstraintFactory",
    "Core",
    "Counters",
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "FinishReason",
    "Generation",
    "LoadedModel",
    "PromptError",
    "Sampling",
    "TokenLogprob",
    "Update",
    "generate_batch",
    "load_model",
]
