"""torch.compile for the blocks of a model, where it can work."""

import importlib.util
import logging
import os
import shutil

import torch
from torch import nn

logger = logging.getLogger("gristmill.training")


def compile_blocks(blocks: nn.ModuleList, device: torch.device) -> bool:
    """Have every block compiled when it first runs; False, with a word why, where that cannot be.

    Block by block rather than the whole: all blocks are alike, so one kernel serves them all, and
    what stands outside (embedding, loss) is written by hand.
    """
    problem = missing_compiler(device.type) or _problem(device)
    if problem is not None:
        logger.warning("not compiled: %s", problem)
        return False
    for block in blocks:
        block.compile(dynamic=False)
    return True


def missing_compiler(device: str) -> str | None:
    """What torch.compile lacks on this machine, or None."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton for a GPU; install it"
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler; install g++"
    return None


def _problem(device: torch.device) -> str | None:
    """What goes wrong with a small function, or None: a compiler may be there and not work."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        said = (str(error).splitlines() or ["without a word"])[0]
        return f"torch.compile fails here ({type(error).__name__}: {said})"
    return None
