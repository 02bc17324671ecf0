"""The engine against the plain forward pass, over configs drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from model.config import ConfigError, ModelConfig
from model.engine import Sampling, generate_batch
from model.rope_scaling import RopeScaling
from tests.tiny_models import VOCABULARY, transformer

FLAGS = {
    "norm": st.sampled_from(["rms", "rms+1", "layer"]),
    "norm_placement": st.sampled_from(["pre", "both"]),
    "activation": st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    "gated_mlp": st.booleans(),
    "qkv_bias": st.booleans(),
    "linear_bias": st.booleans(),
    "qk_norm": st.booleans(),
    "positions": st.sampled_from(["rope", "rope", "learned"]),
    "rope_scaling": st.sampled_from([None, RopeScaling("linear", 4.0)]),
    "scaled_embeddings": st.booleans(),
    "query_scale": st.sampled_from([None, 20.0]),
    "attention_softcap": st.sampled_from([None, 2.0]),
    "logit_softcap": st.sampled_from([None, 3.0]),
    "sliding_window": st.sampled_from([None, 6]),
    "full_attention_every": st.sampled_from([None, 2]),
    "window_rope_theta": st.sampled_from([None, 500.0]),
    "tied_embeddings": st.booleans(),
    "kv_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([8, 16, 24]),
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.fixed_dictionaries(FLAGS))
def test_every_model_that_can_be_configured_thinks_the_same(flags: dict[str, Any]) -> None:
    try:
        model = transformer(width=32, heads=4, layers=2, context=64, mlp_width=48, **flags)
    except ConfigError:
        reject()
    prompt = torch.randint(20, VOCABULARY, (11,), generator=torch.Generator().manual_seed(1))
    scoring = Sampling(temperature=0.0, max_tokens=5, logprobs=0, prompt_logprobs=True)
    asked = [prompt.tolist(), prompt.tolist()[:4]]
    for answer, ids in zip(generate_batch(model, None, asked, scoring), asked, strict=True):
        tokens = torch.tensor([*ids, *answer.tokens])
        wanted = model(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        told = [*answer.prompt_logprobs[1:], *answer.logprobs]
        found = torch.tensor([each.logprob for each in told])
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def test_a_layer_norm_of_queries_and_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="qk_norm is an RMS norm, and norm is 'layer'; use norm"):
        ModelConfig(norm="layer", qk_norm=True)
