"""What a model writes while it trains: how it goes on with held-out text, or answers questions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from model.chat import Tokenizer, encode_chat
from model.loader import Loader
from model.transformer import Transformer
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store

SAMPLES, OPENING, CONTINUATION = 3, 24, 40  # prompts, tokens of held-out text shown, tokens added
ASKED = "questions-recall"  # of the pairs: in phrasings that are never trained


def openings(heldout: Mapping[str, Loader]) -> list[list[int]]:
    """The first tokens of some sequences of the first source."""
    source = next(iter(heldout.values()))
    rows: list[list[int]] = source.read(source.order(0, SAMPLES)).tokens[:, :OPENING].tolist()
    return rows


def questions(store: Store, pairs: Manifest, tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Some questions as a chat begins with them, none of more than `longest` tokens."""
    found: list[list[int]] = []
    for table in store.tables(pairs, ASKED, ["question"]):
        for question in table["question"].to_pylist():
            ids = encode_chat([{"role": "user", "content": question}], tokenizer)
            if len(ids) <= longest:
                found.append(ids)
            if len(found) == SAMPLES:
                return found
    return found


def samples(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    compiled: bool = False,
) -> str:
    """Each prompt and what the model says next. Of divided weights every rank must ask."""
    # A compiler would make kernels for a shape that is met nowhere else.
    plain = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with plain:
        said = continued(model, prompts, len(tokenizer))
    lines = []
    for prompt, ids in zip(prompts, said, strict=True):
        ends = [place for place, token in enumerate(ids) if token in tokenizer.stop_ids]
        answer = tokenizer.decode(ids[: ends[0]] if ends else ids)
        lines.append(f"{tokenizer.decode(prompt)} ▶ {answer}")
    return "\n\n".join(lines)


@torch.no_grad()
def continued(
    model: Transformer, prompts: Sequence[Sequence[int]], vocabulary: int
) -> list[list[int]]:
    """The likeliest `CONTINUATION` tokens after each prompt, fewer where the context ends.

    All in one batch of fixed shape, padded at the end, where nothing looks; and always as many
    passes, so that ranks which gather weights together do as many.
    """
    device = model.output_weight.device
    longest = max(map(len, prompts))
    total = min(longest + CONTINUATION, model.config.context)
    tokens = torch.zeros((len(prompts), total), dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    for step in range(total - longest):
        places = starts + step
        logits = model(tokens, logits_at=(places - 1)[:, None])[:, 0, :vocabulary]
        tokens[rows, places] = logits.argmax(-1)
    added = total - longest
    return [
        row[start : start + added]
        for row, start in zip(tokens.tolist(), starts.tolist(), strict=True)
    ]
