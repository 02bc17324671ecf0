"""Labelled examples: texts that a person called good or not, from JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field

from tasks.corpus.source_config import SourceConfig, files_of
from tasks.corpus.source_rows import text_lines
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.settings import Settings
from tasks.runtime.stage_config import StageConfig


@dataclass(frozen=True)
class Example:
    text: str
    good: bool


class LabelledConfig(StageConfig):
    """Where labelled examples lie. They are known by their content; the path is a place."""

    examples: str = place("")
    """JSON Lines file, or a directory of them, below a root that sources may be read from; a row
    has a text and a label. Empty: none."""
    text_field: str = "text"
    """Field that holds an example's text."""
    label_field: str = "label"
    """Field that holds its label."""
    good_labels: tuple[str, ...] = Field(("1", "true", "good"), min_length=1)
    """Labels of good examples, in lower case; every other label is not good."""

    def source(self) -> SourceConfig:
        return SourceConfig(name="examples", path=self.examples, format="jsonl")


def examples_of(config: LabelledConfig, settings: Settings) -> Iterator[Example]:
    """All examples. Raises UserError naming file and line of what is none."""
    labels = set(config.good_labels)
    for path in files_of(config.source(), settings):
        for number, line in text_lines(path, "labelled examples"):
            try:
                row = json.loads(line)
                text, label = row[config.text_field], row[config.label_field]
            except (ValueError, TypeError, KeyError, RecursionError):
                text = label = None
            if not isinstance(text, str) or label is None:
                raise UserError(
                    f"{path.name}, line {number}, is no object with {config.text_field!r} and "
                    f"{config.label_field!r}; mend it, or name the fields in quality_model"
                )
            yield Example(text, str(label).lower() in labels)
