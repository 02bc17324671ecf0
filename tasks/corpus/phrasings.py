"""How a person may ask: phrasings that are trained, and others that never are.

`{x}` is the thing's name as someone would write it, `{kind}` what it is. The two lists of a kind of
question share no phrasing, so that answers in a phrasing never trained show what was understood of
the question, not its wording.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tasks.corpus.facts import Fact

Question = Literal["what", "where", "parameters"]


@dataclass(frozen=True)
class Phrasings:
    trained: tuple[str, ...]
    never_trained: tuple[str, ...]


_WHAT = Phrasings(
    (
        "What does {x} do?",
        "What does {x} do in Python?",
        "What does the {kind} {x} do?",
        "What is {x}?",
        "What's {x}?",
        "What is {x} for?",
        "What is {x} used for?",
        "What is the purpose of {x}?",
        "Explain {x}.",
        "Explain what {x} does.",
        "Can you explain {x}?",
        "Describe {x}.",
        "Describe the {kind} {x}.",
        "Tell me about {x}.",
        "Tell me what {x} does.",
        "Can you tell me what {x} does?",
        "I want to know what {x} does.",
        "How does {x} work?",
        "What happens when I call {x}?",
        "What can I do with {x}?",
        "When would I use {x}?",
        "Help me understand {x}.",
        "Give me a short description of {x}.",
        "I don't understand {x}. What does it do?",
        "Hi, what does {x} do?",
        "Documentation for {x}, please.",
        "Meaning of {x}",
        "Define {x}",
        "I saw {x} somewhere. What is that?",
        "While reading code I met {x}; what does it do?",
        "A colleague uses {x}. What is it?",
        "There is {x} in this file. What does that do?",
        "Just wondering, what does {x} do?",
        "Remind me what {x} does.",
        "Tell me in a few words what {x} does.",
        "Short answer only: what does {x} do?",
        "In short, what is {x}?",
        "One line about {x}, please.",
        "Sum up {x}.",
        "Give me an overview of {x}.",
        "What is the use of {x}?",
        "What is the idea behind {x}?",
        "What job does {x} do?",
        "What task has the {kind} {x}?",
        "Give a summary of {x} in one sentence.",
        "What would I need {x} for?",
        "Why does {x} exist?",
        "Why do people call {x}?",
        "Is {x} useful, and for what?",
        "What's the benefit of {x}?",
        "Who needs {x}, and why?",
        "Would you tell me about {x}?",
        "Can you describe {x} for me?",
        "Put {x} in a nutshell.",
        "Condense {x} into a phrase.",
        "Fast one: {x}, what is that?",
        "I came across {x} today. What does it do?",
        "Somebody wrote {x} here. What is that for?",
        "I have to use {x}. What will it do?",
        "So what does {x} actually do?",
        "Any idea what {x} does?",
        "Say what {x} does.",
        "The {kind} {x}: what is it for?",
        "help({x})",
        "{x}?",
        "{x}",
        "Could you explain what {x} does?",
        "I keep seeing {x} in code. What is it for?",
        "Summarise {x} in one sentence.",
        "What's the point of {x}?",
        "In Python, what does {x} do?",
        "How would you describe {x}?",
        "Do you know what {x} does?",
        "Why would somebody use {x}?",
        "Please tell me what {x} is about.",
        "What exactly does {x} do?",
        "Quick question: what is {x} good for?",
        "What is the job of the {kind} {x}?",
        "I found {x} in a script; what does it do?",
    ),
    (
        "Mind telling me what {x} does?",
        "What can {x} be used for?",
        "I need to know what {x} is for.",
        "What will {x} do for me?",
        "Would you explain {x} to me?",
        "{x} - what does it do?",
        "What is {x} meant to do?",
        "Give me the gist of {x}.",
        "What is {x} supposed to do?",
        "Have you got an explanation of {x}?",
        "Please describe {x} briefly.",
        "Could I get an explanation of {x}?",
        "I don't know {x}, what is it?",
    ),
)
_MODULE = Phrasings(
    (
        "What is {x}?",
        "What's {x}?",
        "What is {x} for?",
        "What does {x} do?",
        "What is the module {x} for?",
        "What does the module {x} do?",
        "What does the {x} module do?",
        "What is the {x} module used for?",
        "What is in the module {x}?",
        "Describe the module {x}.",
        "Explain the {x} module.",
        "Tell me about the module {x}.",
        "Tell me about {x}.",
        "When would I import {x}?",
        "This file imports {x}. What is that?",
        "What does the package {x} offer?",
        "Sum up the {x} module.",
        "Remind me what {x} is for.",
        "One line about the module {x}, please.",
        "import {x}",
        "{x}",
        "What can I use the {x} module for?",
        "Summarise the module {x} in one sentence.",
        "What's the point of the module {x}?",
        "Why would somebody import {x}?",
        "How would you describe the {x} module?",
        "Could you explain what the module {x} is for?",
    ),
    (
        "What can the module {x} do?",
        "Give me the gist of the {x} module.",
        "What would I use the {x} module for?",
        "Could you tell me about the module {x}?",
        "Would you explain the {x} module to me?",
        "What can {x} be used for?",
    ),
)
_PAGE = Phrasings(
    (
        "What is {x}?",
        "What is said about {x}?",
        "Tell me about {x}.",
        "Explain {x}.",
        "Describe {x}.",
        "What do you know about {x}?",
        "What does the page {x} say?",
        "{x}?",
        "{x}",
    ),
    (
        "Could you explain {x}?",
        "Summarise {x} in one sentence.",
        "What can you tell me about {x}?",
        "How would you describe {x}?",
        "I came across {x}. What is it?",
    ),
)
_WHERE = Phrasings(
    (
        "Which module holds {x}?",
        "Which module is {x} in?",
        "In which module do I find {x}?",
        "What module does {x} belong to?",
        "Which module do I import to use {x}?",
        "Where is {x} defined?",
        "Where does {x} come from?",
        "Where is {x}?",
        "From which module can I get {x}?",
        "What do I import for {x}?",
        "I want to use {x}. Which import is that?",
        "{x} lives in which module?",
        "Name the module of {x}.",
        "To use {x}, which module do I need?",
        "Which library module has {x}?",
        "What has to be imported before I use {x}?",
        "Who provides {x}?",
        "Where do I get {x} from?",
        "{x}: which module?",
        "Module of {x}?",
        "What should I import to get {x}?",
        "Which module provides {x}?",
        "Where can I find {x}?",
        "{x} is part of which module?",
    ),
    (
        "Which module has {x}?",
        "What is the module of {x}?",
        "Tell me the module that contains {x}.",
        "Which module should I import for {x}?",
    ),
)
_PARAMETERS = Phrasings(
    (
        "What are the parameters of {x}?",
        "Which parameters does {x} take?",
        "Which arguments does {x} take?",
        "What arguments does {x} accept?",
        "List the parameters of {x}.",
        "How do I call {x}?",
        "What is the signature of {x}?",
        "What do I pass to {x}?",
        "What input does {x} need?",
        "What must I give to {x}?",
        "What goes into {x}?",
        "Which inputs does {x} take?",
        "What does {x} expect as input?",
        "What can be passed to {x}?",
        "Which values do I give {x}?",
        "Tell me the arguments of {x}.",
        "I want to call {x}. What can be given to it?",
        "Inputs of {x}?",
        "Which values does {x} want?",
        "What values can be handed to {x}?",
        "{x} takes what?",
        "Say what {x} is called with.",
        "What can {x} be given?",
        "Enumerate the arguments of {x}.",
        "Parameters of {x}",
        "Which inputs does {x} expect?",
        "What can I pass to {x}?",
        "Name the arguments of {x}.",
        "What parameters does {x} have?",
    ),
    (
        "What parameters are accepted by {x}?",
        "Which arguments can I give {x}?",
        "Show me the parameters of {x}.",
        "What does {x} take as arguments?",
        "With which arguments do I call {x}?",
    ),
)


def phrasings(question: Question, fact: Fact) -> Phrasings:
    """The ways to ask this question about this fact."""
    if question == "where":
        return _WHERE
    if question == "parameters":
        return _PARAMETERS
    return {"module": _MODULE, "page": _PAGE}.get(fact.kind, _WHAT)


@dataclass(frozen=True)
class Wording:
    """One question as it is trained; `altered` when words around the name were changed."""

    phrasing: str
    text: str
    altered: bool


def trained_questions(
    question: Question, fact: Fact, count: int, draw: random.Random, alter: float = 0.0
) -> Iterator[Wording]:
    """`count` wordings; every trained phrasing is used before one comes again.

    alter: share of them in which words come or go. It teaches that the name decides and not the
    frame around it: without, 58% of trained phrasings and 35% of others were answered exactly.
    """
    order: list[str] = []
    for _ in range(count):
        if not order:
            order = list(phrasings(question, fact).trained)
            draw.shuffle(order)
        phrasing = order.pop()
        altered = _altered(phrasing, draw) if draw.random() < alter else phrasing
        text = ask(altered, question, fact, draw)
        yield Wording(phrasing, text, altered != phrasing)


def ask(phrasing: str, question: Question, fact: Fact, draw: random.Random) -> str:
    """One question in the words and the spelling of some person.

    The name comes in full or short, plain, called or as code; three in ten questions are typed
    carelessly (small first letter, no mark at the end).
    """
    text = phrasing.replace("{kind}", fact.kind)
    if draw.random() < 0.3:
        text = text if text.startswith("{x}") else text[0].lower() + text[1:]
        if draw.random() < 0.6:
            text = text.rstrip("?.")
    return text.replace("{x}", _written(question, fact, draw))


_COMMON_WORDS = """
a about access according add added address after again all already also always an and another any
anyone are arg as ask at attribute attributes available away back base based be because been
before being best between binary bit block both buffer but by byte bytes call callable callback
called calling calls can cannot case change character characters check child class classes code
come command commands connection contain containing contains content context copy could count
create created current currently data day def default defaults defined descriptor dict dictionary
different directory do document does doesn doing done down each easy either element elements else
empty encoded encoding end entry equivalent error errors even event ever every example except
exception existing explain expr fact false few file filename files final find first flag flags
following foo for form format found frame from function functions generated get give go good group
guess had handle handler has have header headers hear help her here him his host how i idea
identifier if in including index instance instances instead int integer interface internal into is
it item items iterable iterator its just keep key keyword kind know last learn least left length
let level library like limit line lines link list little local logging look loop lot make many
mapping match matches matching maximum may maybe me mean means memory message method methods might
mind minute mode moment more most msg much multiple must my name named names need negative never
new newline next nice no node non not now number object objects of off offset often ok old on once
one only open option optional options or order original other otherwise our out output over own
package page parent parse parser part path pattern people person place please point port position
possible prefix problem process program protocol provided provides python question queue quick
quite raise raised raises read reading really reason relative remember request response result
results return returned returns right root run said same say screen script search second section
see seems sense sequence server set she should show since single size small so socket some someone
something soon sort source specific specified specifies stack standard start state still str
stream strict string strings sub subclass such supplied support supported supports sure system tag
take talk target tell test text than thank thanks that the their them then there these they thing
think this those though thread through time timeout to today token told too tree true try trying
tuple turtle two type types under underlying understand until up us use used useful user uses
using value values variable variables version very want was way we well were what when whether
while who whole why widget width will window wish with within without wonder word work works would
write written wrong yes yet you your zero
""".split()  # noqa: SIM905 (hundreds of quoted words read worse)


def _altered(phrasing: str, draw: random.Random) -> str:
    """The phrasing with words left out, and common words put in, before or after it."""
    often = draw.random() * 0.35
    words = draw.choices(_COMMON_WORDS, k=draw.randint(1, 5)) if draw.random() < 0.35 else []
    for word in phrasing.split(" "):
        if "{x}" in word or draw.random() >= 0.2:
            words.append(word)
        if draw.random() < often:
            words.append(draw.choice(_COMMON_WORDS))
    if draw.random() < 0.3:
        words += draw.choices(_COMMON_WORDS, k=draw.randint(1, 5))
    text = " ".join(words)
    return text.rstrip("?.") + draw.choice("?.! ").strip() if draw.random() < 0.4 else text


def _written(question: Question, fact: Fact, draw: random.Random) -> str:
    names = fact.names
    if question == "where":
        name = names[-1]  # the full name would tell the answer
    else:
        name = names[0] if len(names) == 1 or draw.random() < 0.5 else draw.choice(names)
    if fact.kind == "page":
        return name
    style = draw.random()
    called = fact.kind in ("function", "method") and "(" not in name
    if style < 0.35:
        return name
    if style < 0.55:
        return f"{name}()" if called else name
    if style < 0.80:
        return f"`{name}`"
    return f"`{name}()`" if called else f"`{name}`"
