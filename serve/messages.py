"""What a replica and its engine's process say to each other.

Once in a step or a request each, but on the way to every token. `pickle` looks up a class and names
every field for each object; `marshal` writes bare values, a sixth of the bytes in a sixth of the
time. Both ends are the same interpreter, which is what marshal asks for.
"""

import marshal
import pickle
import struct
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from model.engine import Counters, Sampling, Update
from serve.grammar import Grammar
from serve.specification import EngineOptions


@dataclass(frozen=True)
class Start:
    """What the process is to serve. draft: the directory of the model that guesses ahead."""

    directory: Path
    options: EngineOptions
    version: str
    draft: Path | None


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    context: int
    vocabulary: int
    parameters: int
    counters: Counters


@dataclass(frozen=True)
class Failed:
    """It could not be loaded; why."""

    message: str


@dataclass(frozen=True)
class Ask:
    """A sequence to be continued. A grammar travels as its text, not as a constraint."""

    id: str
    prompt: list[int]
    sampling: Sampling
    grammar: Grammar | None
    streamed: bool
    embed: bool


@dataclass(frozen=True)
class Abort:
    id: str


@dataclass(frozen=True)
class Close:
    """End what is under way, then the process."""


@dataclass(frozen=True)
class News:
    """Updates of one step, perhaps none, and the engine's counters after it."""

    updates: list[Update]
    counters: Counters


Message = Start | Ready | Failed | Ask | Abort | Close | News


ASK, NEWS, OTHER = range(3)


def send(pipe: Connection, message: Message) -> None:
    """Raises OSError when nobody is there."""
    pipe.send_bytes(_encoded(message))


def framed(message: Message) -> bytes:
    """What `send` writes, for who writes it himself: `Connection`'s length, then the message."""
    written = _encoded(message)
    return struct.pack("!i", len(written)) + written


def receive(pipe: Connection) -> Any:
    """The next message. Raises EOFError or OSError when none will come."""
    kind, *content = marshal.loads(pipe.recv_bytes())
    if kind == ASK:
        id, prompt, sampling, grammar, streamed, embed = content
        asked = pickle.loads(grammar) if grammar else None
        return Ask(id, prompt, Sampling(*sampling), asked, streamed, embed)
    if kind == NEWS:
        updates, counters = content
        return News([Update(*values) for values in updates], Counters(*counters))
    return pickle.loads(content[0])


def _encoded(message: Message) -> bytes:
    try:
        return marshal.dumps(_written(message))
    except ValueError:  # a number of another library's, say
        return marshal.dumps((OTHER, pickle.dumps(message)))


def _written(message: Message) -> tuple[Any, ...]:
    """A message as bare values; what comes seldom, or holds more than these, pickled."""
    if isinstance(message, News) and all(map(_is_bare, message.updates)):
        return NEWS, [_values(update) for update in message.updates], _values(message.counters)
    if isinstance(message, Ask):
        grammar = pickle.dumps(message.grammar) if message.grammar else None
        sampling = _values(message.sampling)
        return ASK, message.id, message.prompt, sampling, grammar, message.streamed, message.embed
    return OTHER, pickle.dumps(message)


def _is_bare(update: Update) -> bool:
    return not (update.logprobs or update.prompt_logprobs) and update.embedding is None


def _values(one: Sampling | Update | Counters) -> tuple[Any, ...]:
    """The fields of a dataclass in the order of its parameters."""
    return tuple(vars(one).values())
