"""What a prompt must be to be read at all."""

from collections.abc import Sequence

from model.engine.sampling import Sampling


class PromptError(ValueError):
    """A prompt the model cannot read. The message says why and what would do."""


def require_readable(
    prompt: Sequence[int], sampling: Sampling, context: int, vocabulary: int, asks: bool
) -> None:
    """Raise PromptError for a prompt that is empty, holds ids outside the vocabulary, or leaves no
    room in the context. asks: for an answer of one token at least.
    """
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token")
    if len(prompt) + asks > context:
        raise PromptError(
            f"the prompt has {len(prompt)} tokens, this model's maximum context length is "
            f"{context} tokens, the answer included; shorten the prompt"
        )
    mentioned = [*prompt, *sampling.stop_ids, *(token for token, _ in sampling.logit_bias)]
    if min(mentioned) < 0 or max(mentioned) >= vocabulary:
        raise PromptError(
            f"token id {next(t for t in mentioned if not 0 <= t < vocabulary)} is outside "
            f"the vocabulary of {vocabulary}"
        )
