"""Messages of a conversation as requests have them."""

from typing import Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from serve.tools import CalledTool


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[CalledTool] | None = None
    name: str | None = None  # of the function, where a tool speaks
    tool_call_id: str | None = Field(None, validate_default=True)
    content: str | list[Part] | None = Field(None, validate_default=True)
    # What clients echo of an earlier answer; there is nothing to do with any other value.
    refusal: None = None
    audio: None = None
    annotations: list[Part] | None = Field(None, max_length=0)
    function_call: None = None
    reasoning_content: None = None
    provider_specific_fields: None = None
    parsed: Any = None  # the content once more, as openai-python has read it

    @field_validator("tool_calls")
    @classmethod
    def _of_an_assistant(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") != "assistant":
            raise pydantic_core.PydanticCustomError("tool_calls", "only an assistant calls tools")
        return value

    @field_validator("name")
    @classmethod
    def _of_a_function(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("role") != "tool":
            raise pydantic_core.PydanticCustomError("name", "only allowed with role 'tool'")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_tool(cls, value: Any, info: ValidationInfo) -> Any:
        is_tool = info.data.get("role") == "tool"
        if is_tool and value is None:
            raise pydantic_core.PydanticCustomError("missing", "required by role 'tool'")
        if not is_tool and value is not None:
            raise pydantic_core.PydanticCustomError("tool_call_id", "only allowed with role 'tool'")
        return value

    @field_validator("content")
    @classmethod
    def _without_calls(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise pydantic_core.PydanticCustomError("missing", "required without tool_calls")
        return value

    @property
    def has_tools(self) -> bool:
        """Whether a model must know of tools to read it."""
        return self.role == "tool" or bool(self.tool_calls)

    def layout(self) -> dict[str, Any]:
        """As `model.chat.encode_chat` takes it; "developer" is OpenAI's newer word for system."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        said: dict[str, Any] = {"role": role, "content": text}
        if self.tool_calls:
            said["tool_calls"] = [call.layout() for call in self.tool_calls]
        return said | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})
