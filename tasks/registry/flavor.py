"""How MLflow loads a registered model: plain files and our own engine, no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.chat import encode_chat
from model.engine import Sampling, generate_batch, load_model


class Answerer:
    """`predict(questions)` → greedy answers, laid out by the chat template."""

    def __init__(self, directory: Path) -> None:
        self.loaded = load_model(directory)

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One answer for each row of the column `question` (or of a plain list of questions)."""
        questions = inputs["question"] if hasattr(inputs, "columns") else inputs
        tokenizer = self.loaded.tokenizer
        prompts = [encode_chat([{"role": "user", "content": q}], tokenizer) for q in questions]
        sampling = Sampling(temperature=0.0, max_tokens=int((params or {}).get("max_tokens", 64)))
        answers = generate_batch(self.loaded.model, tokenizer, prompts, sampling)
        return [answer.text for answer in answers]


def _load_pyfunc(path: str) -> Answerer:
    """MLflow's entry point (`loader_module`)."""
    return Answerer(Path(path))
