"""/v1/embeddings: the mean of the last hidden states, scaled to length 1.

A language model's hidden states were never trained to compare texts: the vectors tell near
duplicates and topics apart, not much more. The documentation says so.
"""

import base64
from typing import Any

import torch

from model.engine import EngineBusy, EngineClosed, PromptError, Sampling
from serve.completions import failure_of
from serve.errors import ApiError, not_ready, overloaded
from serve.gateway import Meter
from serve.host import ServedModel
from serve.mailbox import Mailbox
from serve.prompts import encode_prompts
from serve.protocol import EmbeddingRequest
from serve.specification import MAX_CHOICES


async def embed(
    request: EmbeddingRequest, served: ServedModel, mailbox: Mailbox, meter: Meter
) -> dict[str, Any]:
    """The response body. Raises ApiError 400 for inputs that cannot be."""
    meter.model = served.spec.system_fingerprint
    inputs = request.prompts()
    if len(inputs) > MAX_CHOICES:
        message = f"input has {len(inputs)} texts; send at most {MAX_CHOICES}"
        raise ApiError(400, message, param="input", code="invalid_value")
    prompts = await encode_prompts(inputs, served.engine, "input")
    work = [(prompt, Sampling(seed=0)) for prompt in prompts]
    vectors: dict[int, torch.Tensor] = {}
    read = sum(map(len, prompts))
    meter.reserve(read, read)
    try:
        with mailbox.open(served.engine, work, streamed=False, embed=True) as mail:
            meter.prompt_tokens = read
            async for index, update in mail.updates():
                if failure := failure_of(update):
                    raise failure
                assert update.embedding is not None
                vectors[index] = update.embedding
    except PromptError as error:
        code = "context_length_exceeded" if "context length" in str(error) else "invalid_value"
        raise ApiError(400, str(error), param="input", code=code) from error
    except EngineBusy as error:
        raise overloaded(str(error)) from error
    except EngineClosed as error:
        raise not_ready(str(error)) from error
    finally:
        meter.settle()
    return {
        "object": "list",
        "model": served.spec.name,
        "system_fingerprint": served.spec.system_fingerprint,
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(vectors[i], request)}
            for i in range(len(prompts))
        ],
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }


def _encoded(vector: torch.Tensor, request: EmbeddingRequest) -> list[float] | str:
    unit = torch.nn.functional.normalize(vector.cpu().float(), dim=0)
    if request.encoding_format == "base64":
        return base64.b64encode(unit.numpy().astype("<f4").tobytes()).decode()
    return list(unit.tolist())
