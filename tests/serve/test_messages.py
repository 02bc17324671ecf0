"""What a replica and its engine's process say to each other arrives as it was sent."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.engine import Counters, Sampling, TokenLogprob, Update
from serve.grammar import LIMITS, Grammar
from serve.messages import Abort, Ask, Close, Message, News, Ready, receive, send

TEXT = st.text(st.characters())  # lone surrogates included
IDS = st.lists(st.integers(0, 2**31))
FINITE = st.floats(allow_nan=False, allow_infinity=False)
LOGPROBS = st.lists(st.builds(TokenLogprob, st.integers(0, 9), FINITE, st.just(((3, -0.5),))))
UPDATES = st.builds(
    Update,
    id=TEXT,
    text=TEXT,
    tokens=IDS,
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    prompt_tokens=st.integers(0),
    completion_tokens=st.integers(0),
    logprobs=st.just([]) | LOGPROBS,
    prompt_logprobs=st.just([]) | LOGPROBS,
    total_logprob=FINITE,
    waited=FINITE,
    problem=TEXT,
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 2**70),
    seed=st.integers(-(2**63), 2**64),
    stop=st.lists(TEXT.filter(bool)).map(tuple),
    stop_ids=IDS.map(tuple),
    logit_bias=st.lists(st.tuples(st.integers(0), st.floats(-100, 100))).map(tuple),
    ignore_eos=st.booleans(),
)
GRAMMARS = st.builds(Grammar, st.just("regex"), TEXT, TEXT, st.just(LIMITS))


@contextmanager
def pair() -> Iterator[tuple[Connection, Connection]]:
    one, other = (Connection(end.detach()) for end in socket.socketpair())
    with one, other:
        yield one, other


def arrived(message: Message) -> Any:
    with pair() as (one, other):
        send(one, message)
        return receive(other)


@given(st.builds(Ask, TEXT, IDS, SAMPLINGS, st.none() | GRAMMARS, st.booleans(), st.booleans()))
def test_a_request_arrives_whole(ask: Ask) -> None:
    assert arrived(ask) == ask


@given(st.lists(UPDATES), st.integers(0))
def test_news_arrive_whole(updates: list[Update], steps: int) -> None:
    news = News(updates, Counters(requests=3, steps=steps, steps_of=[1, 2, 3]))
    assert arrived(news) == news


def test_an_embedding_arrives_whole() -> None:
    update = Update("a", "", [], "length", 3, 0, embedding=torch.tensor([0.1, float("nan"), 3.0]))
    (there,) = arrived(News([update], Counters())).updates
    assert torch.equal(there.embedding.isnan(), update.embedding.isnan())
    assert there.embedding[0] == update.embedding[0]


@pytest.mark.parametrize("message", [Abort("x"), Close(), Ready(8, 9, 10, Counters())])
def test_the_rest_arrives_whole(message: Message) -> None:
    assert arrived(message) == message


@pytest.mark.parametrize("kind", [Sampling, Update, Counters])
def test_values_stand_in_the_order_of_parameters(kind: Any) -> None:
    """As they are written and read by position."""
    one = kind() if kind is not Update else Update("a", "", [], None, 1, 2)
    assert list(vars(one)) == [field.name for field in fields(kind)]
