"""Generation: continuous batching over a key-value cache, in pure PyTorch."""

from model.engine.core import Core, Counters, Generation, PromptError, Update, generate_batch
from model.engine.engine import Engine, EngineBusy, EngineClosed
from model.engine.loading import LoadedModel, load_model
from model.engine.sampling import Sampling

__all__ = [
    "Core",
    "Counters",
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "Generation",
    "LoadedModel",
    "PromptError",
    "Sampling",
    "Update",
    "generate_batch",
    "load_model",
]
