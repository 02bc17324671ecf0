"""What is known of a module: plain data, and the small rules of reading a docstring."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class FunctionDoc:
    """`signature` starts at the parenthesis, `(text, width=70)`; a property has none."""

    name: str
    kind: str  # "function", "coroutine", "method", "class method", "static method", "property"
    signature: str
    doc: str
    also: tuple[str, ...] = ()  # other full names it is reached by


@dataclass(frozen=True)
class Inherited:
    """The methods a class has from one of its bases; `base` is a full name."""

    base: str
    methods: tuple[FunctionDoc, ...]


@dataclass(frozen=True)
class ClassDoc:
    name: str
    bases: tuple[str, ...]
    signature: str
    doc: str
    methods: tuple[FunctionDoc, ...]
    also: tuple[str, ...] = ()
    inherited: tuple[Inherited, ...] = ()


@dataclass(frozen=True)
class Export:
    """`from origin import original as name`; both are `*` for everything public.

    `import origin as name` has an empty `original`.
    """

    name: str
    origin: str
    original: str


@dataclass(frozen=True)
class ModuleDoc:
    name: str
    doc: str
    functions: tuple[FunctionDoc, ...]
    classes: tuple[ClassDoc, ...]
    imports: tuple[str, ...] = ()
    exports: tuple[Export, ...] = ()
    public: frozenset[str] = frozenset()  # `__all__` as far as it is spelled out
    source: str | None = field(default=None, repr=False)

    @property
    def summary(self) -> str:
        return first_sentence(self.doc)

    @cached_property
    def own_names(self) -> frozenset[str]:
        return frozenset({f.name for f in self.functions} | {c.name for c in self.classes})

    @property
    def is_empty(self) -> bool:
        return not (self.doc or self.functions or self.classes)


def first_sentence(doc: str) -> str:
    """The docstring's first sentence on one line, or its first paragraph when it has no full stop.

    Lines that only repeat a call form, `max(arg1, arg2, *args, *[, key=func]) -> value`, are passed
    over.
    """
    text = (
        re.sub(r"\A(?:\s*(?:async )?[\w.]+\([^\n]*\)(?: *-+> ?[^\n]*)?(?:\n|\Z))+", "", doc) or doc
    )
    text = " ".join(text.strip().split("\n\n", 1)[0].split())
    for end in re.finditer(r"[.!?](?=\s+[A-Z(\[`\"']|$)", text):
        sentence = text[: end.end()]
        if not re.search(r"\b(?:e\.g|i\.e|etc|vs|cf)\.$", sentence):
            return sentence
    return text


def clean_doc(doc: str) -> str:
    """Without indentation and control characters."""
    text = inspect.cleandoc(doc)
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and c != "\x7f")).strip()


def is_public_name(name: str) -> bool:
    return not name.startswith("_")


def split_signature(name: str, doc: str) -> tuple[str, str]:
    """Old docstrings open with their own signature: `getattr(object, name[, default]) -> value`.

    Returns (signature, rest of the docstring); signature is empty where there is none.
    """
    head, _, rest = doc.partition("\n")
    if f"{name}(" not in head:
        return "", doc
    while head.count("(") > head.count(")") and rest:
        line, _, rest = rest.partition("\n")
        head = f"{head} {line.strip()}"
    match = re.match(rf"(?:\w+\.)*{re.escape(name)}(\(.*\).*)$", head)
    if match is None:
        return "", doc
    signature = match.group(1).rstrip(" :.").replace("-->", "->")
    described = re.match(r"(\([^()]*\)(?: ?->[^:.]*?)?)(?:\s+--?|:)\s+(.+)$", match.group(1))
    if described:
        return described.group(1).strip(), f"{described.group(2)}\n{rest}".strip()
    if re.match(r"\(.*\)\s*(?:->.*)?$", signature) is None:
        return "", doc  # a sentence that happens to begin with a call
    return signature, rest.strip() or doc
