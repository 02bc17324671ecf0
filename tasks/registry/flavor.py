"""How MLflow loads a registered model: plain files and our own engine, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.chat import encode_chat
from model.engine import Sampling, generate_batch, load_model


class Answerer:
    """`predict(questions)` → greedy answers, laid out by the chat template; of a base model
    `predict(texts)` → how it continues them.
    """

    def __init__(self, directory: Path, base: bool) -> None:
        self.loaded = load_model(directory)
        self.column = "text" if base else "question"

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One answer for each row of the column `question` or `text` (or of a plain list)."""
        given = inputs[self.column] if hasattr(inputs, "columns") else inputs
        tokenizer = self.loaded.tokenizer
        prompts = [self._prompt(text) for text in given]
        sampling = Sampling(temperature=0.0, max_tokens=int((params or {}).get("max_tokens", 64)))
        answers = generate_batch(self.loaded.model, tokenizer, prompts, sampling)
        return [answer.text for answer in answers]

    def _prompt(self, text: str) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if self.column == "text":
            return [tokenizer.begin, *tokenizer.encode(text)]
        return encode_chat([{"role": "user", "content": text}], tokenizer)


def _load_pyfunc(path: str, config: Mapping[str, Any] | None = None) -> Answerer:
    """MLflow's entry point (`loader_module`); config: whether it is a base model."""
    return Answerer(Path(path), bool((config or {}).get("base")))
