"""The base of every stage's configuration, which is also its form in the dashboard."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

FORM_MARK = "__prefect_kind"


def title(name: str, _field: object) -> str:
    """A field's label in the form; without it a group of fields is labelled with its class."""
    return name.replace("_", " ").capitalize()


class StageConfig(BaseModel):
    """Base of every stage's configuration: frozen, unknown keys refused, described fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        field_title_generator=title,
    )

    @model_validator(mode="before")
    @classmethod
    def _without_marks_of_the_dashboard(cls, values: Any) -> Any:
        """Prefect 3.8's dialog for schedules writes a mark among the keys of every object, which
        only hurts where the keys are a person's.
        """
        if not isinstance(values, dict):
            return values
        return {
            name: {k: v for k, v in value.items() if k != FORM_MARK}
            if isinstance(value, dict)
            else value
            for name, value in values.items()
            if name != FORM_MARK
        }

    def resolve(self) -> StageConfig:
        """The config with every `auto` replaced by what it means here; identity is taken of it."""
        return self
