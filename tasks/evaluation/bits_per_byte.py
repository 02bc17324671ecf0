"""Bits per byte: how well a model predicts text, comparable across tokenizers and with compressors.

A loss per token says little, as a larger vocabulary has fewer and harder tokens. So the bits of
all tokens of a document are added up and divided by its length in UTF-8 bytes. Counted is every
token of the text, once; the begin mark is given and the end-of-document mark is left out, since
compressors are not asked for it either. A document longer than the model's context is read in
windows that overlap by half: each token is predicted from at least half a context of what stands
before it in its document, or from all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.chat import Tokenizer
from model.transformer import Transformer

TOKENS_PER_BATCH = 4096
# Lengths and numbers of rows are rounded up to these: every new shape costs the CPU a new kernel.
LENGTH_GRAIN, ROW_GRAIN = 64, 128


@dataclass(frozen=True)
class Score:
    """What one document costs."""

    bits: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Window:
    """ids[start:end+1] of a document are read, its tokens number `first` to `end` predicted."""

    document: int
    start: int
    first: int
    end: int


def windows(document: int, length: int, context: int) -> list[Window]:
    """Windows that predict tokens 1..length-1 of a document of `length` ids, each exactly once."""
    found = []
    first, last = 1, length - 1
    while first <= last:
        # The first window predicts all it reads; later ones the second half of what they read.
        end = min(context, last) if first == 1 else min(first + context - context // 2 - 1, last)
        found.append(Window(document, max(end - context, 0), first, end))
        first = end + 1
    return found


@torch.inference_mode()
def score_documents(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context: int | None = None,
    on_progress: Callable[[int], None] = lambda windows: None,
) -> list[Score]:
    """The cost of each text. context: tokens read at once, the model's own when None.

    Raises ValueError for a context the model does not have.
    """
    context = context or model.config.context
    if not 2 <= context <= model.config.context:
        raise ValueError(
            f"context {context} is not between 2 and the model's {model.config.context} tokens"
        )
    ids = [torch.tensor([tokenizer.begin, *tokenizer.encode(text)]) for text in texts]
    todo = [w for number, i in enumerate(ids) for w in windows(number, len(i), context)]
    todo.sort(key=lambda window: window.end - window.start)
    nats = [0.0] * len(texts)
    rows = max(TOKENS_PER_BATCH // context, 1)
    for at in range(0, len(todo), rows):
        batch = todo[at : at + rows]
        longest = max(window.end - window.start for window in batch)
        length = min(-(-longest // LENGTH_GRAIN) * LENGTH_GRAIN, context)
        tokens = torch.full((len(batch), length + 1), tokenizer.pad)
        counted = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, window in enumerate(batch):
            size = window.end - window.start
            tokens[row, : size + 1] = ids[window.document][window.start : window.end + 1]
            counted[row, window.first - window.start - 1 : size] = True
        # Padding stands at the end, where causality hides it from what is counted.
        hidden = model.hidden(tokens[:, :-1])[counted]
        targets = tokens[:, 1:][counted]
        hidden = F.pad(hidden, (0, 0, 0, -len(targets) % ROW_GRAIN))
        logits = model.logits(hidden)[: len(targets)]
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        begun = 0
        for window in batch:
            count = window.end - window.first + 1
            nats[window.document] += float(losses[begun : begun + count].double().sum())
            begun += count
        on_progress(at + len(batch))
    return [
        Score(cost / math.log(2), len(i) - 1, len(text.encode("utf-8", "replace")))
        for cost, i, text in zip(nats, ids, texts, strict=True)
    ]
