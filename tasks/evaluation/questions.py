"""Questions put to a model: greedy answers, compared with the reference.

An answer is exact when it equals the reference once runs of white space count as one space and
those at either end as none. Case, punctuation and everything else must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.chat import Tokenizer, encode_chat
from model.engine import Sampling, generate_batch
from model.transformer import Transformer
from tasks.evaluation.rouge import rouge_l


@dataclass(frozen=True)
class Verdict:
    exact: bool
    rouge_l: float


def judge(reference: str, answer: str) -> Verdict:
    return Verdict(reference.split() == answer.split(), rouge_l(reference, answer))


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    longest: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's answer to each question, the likeliest token at each step, at most `longest`.

    A question that fills the model's context gets an empty answer.
    """
    prompts = [encode_chat([{"role": "user", "content": text}], tokenizer) for text in questions]
    fitting = [n for n, prompt in enumerate(prompts) if len(prompt) < model.config.context]
    given = generate_batch(
        model,
        tokenizer,
        [prompts[number] for number in fitting],
        Sampling(temperature=0.0, seed=0, max_tokens=longest),
        on_progress=on_progress,
    )
    texts = [""] * len(questions)
    for number, generation in zip(fitting, given, strict=True):
        texts[number] = generation.text
    return texts


def continuations(
    model: Transformer, tokenizer: Tokenizer, openings: Sequence[str], longest: int
) -> list[str]:
    """How the model goes on from the opening of a document, greedily."""
    room = model.config.context - longest
    prompts = [[tokenizer.begin, *tokenizer.encode(text)][: max(room, 1)] for text in openings]
    greedy = Sampling(temperature=0.0, seed=0, max_tokens=longest)
    return [g.text for g in generate_batch(model, tokenizer, prompts, greedy)]
