"""Facts that a document states about a named thing, mined from its Markdown text.

API documentation states them by layout: a heading `textwrap.wrap(text, width=70)` and below it what
the function does. Any other page states one: what the first sentence says of its title.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tasks.corpus.stdlib_docs import first_sentence

SHORTEST = 2  # words of a sentence that can be an answer
CHARACTERS_PER_WORD = 8  # above this, the words are not prose

_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*$")
_FENCE = re.compile(r"^(```+|~~~+)")
_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_ENTRY = re.compile(
    rf"^`?(?:(?P<word>class|async|property|exception|method|function) +)?(?P<name>{_NAME})"
    r"(?P<signature>\(.*\))?(?: *-+> *(?P<returns>[^`]*))?`?$"
)
_MODULE = re.compile(rf"^(?:module +)?`?(?P<name>{_NAME})`?$")
_NAVIGATION = re.compile(
    r"^(?:See also|Functions|Classes|Bases|Submodules|Part of the package|Also available as)"
    r"\b[^\n]*`"
)
# … by the replacement repl. repl can be …: a sentence may begin with a name in small letters.
_BEFORE_A_NAME = re.compile(r"^(?:\S+ ){5,}?(\S*\w)\)?\.(?= (?:\w*[(`_]|\1\b))")
_CODE_NAME = re.compile(rf"`({_NAME})`")
_CALL_FORM = re.compile(r"^\W{0,2}[\w.]+\W?(?:\([^\n]*\)|\[[^\n]*\])+`? *-+> ?[^\n]{0,80}$")
_ALIASES = re.compile(r"^Also available as (`[^\n]+`)\.$")
_KINDS = {"class": "class", "exception": "class", "property": "property"}


@dataclass(frozen=True)
class Fact:
    """What is stated of one thing.

    name: its full name, `textwrap.wrap` or a page's title; names: that and shorter or other names
    a person may use, most usual first; sentence: what it is or does, or empty; parameters: their
    names, or None where the signature is unknown; home: the module it is in, or empty.
    """

    name: str
    names: tuple[str, ...]
    kind: str  # module, function, class, method, property, page
    home: str
    sentence: str
    parameters: tuple[str, ...] | None
    document: str  # id


@dataclass(frozen=True)
class Section:
    level: int
    heading: str
    paragraphs: tuple[str, ...]  # prose only: code, lists and tables are left out


def mine_entries(document: str, text: str) -> list[Fact]:
    """The facts of a page of API documentation.

    Such a page is titled by a module's name, and a heading below is a signature or a name in it;
    or it has no other heading and the name is in small letters.
    """
    whole = list(sections(text))
    if not whole or whole[0].level != 1:
        return []
    title = _MODULE.match(whole[0].heading)
    entries = [(section, _ENTRY.match(section.heading)) for section in whole[1:]]
    if title is None:
        return []
    module = title["name"]
    stated = any(m and (m["signature"] or m["name"].startswith(f"{module}.")) for _, m in entries)
    if not stated and (entries or not module.islower()):
        return []
    facts = [_fact(document, module, "module", "", None, whole[0])]
    owner, owner_level = "", 6  # the class whose members may follow, below its level
    for section, match in entries:
        if match is None:
            continue
        name, kind = match["name"], _KINDS.get(match["word"] or "", "function")
        is_member = section.level > owner_level and name.startswith(f"{owner}.")
        if not is_member:
            name = name.removeprefix(f"{module}.")
        if "." in name and not is_member:
            continue  # prose that looks like a name, or a member of something not shown
        if is_member and kind == "function":
            kind = "method"
        elif kind == "class" and not is_member:
            owner, owner_level = name, section.level
        facts.append(_fact(document, name, kind, module, match["signature"], section))
    return facts


def mine_page(document: str, title: str, text: str) -> Fact | None:
    """What a page says first about its title; None when it has no title or no prose."""
    subject = _subject(title)
    if not subject:
        return None
    for section in sections(text):
        for paragraph in section.paragraphs:
            sentence = clean_sentence(paragraph)
            if is_answer(sentence) is None and sentence.lower() != subject.lower():
                return Fact(subject, (subject,), "page", "", sentence, None, document)
    return None


def sections(text: str) -> Iterator[Section]:
    """The text cut at its headings; what stands before the first has level 0."""
    level, heading, fence = 0, "", ""
    lines: list[str] = []
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            fence = "" if line.strip() == fence else fence
            lines.append("")
        elif mark:
            fence = mark[1]
            lines.append("")
        elif match := _HEADING.match(line):
            if heading or any(lines):
                yield Section(level, heading, _paragraphs(lines))
            level, heading, lines = len(match[1]), match[2], []
        else:
            lines.append(line)
    if heading or any(lines):
        yield Section(level, heading, _paragraphs(lines))


def mentions(text: str) -> set[str]:
    """Names that a document writes as code: `re`, `os.path`."""
    return set(_CODE_NAME.findall(text))


def is_answer(sentence: str, longest: int = 30) -> str | None:
    """Why a sentence can't be an answer, as the name of a rule; None when it can.

    longest: words it may have.
    """
    words = sentence.split()
    if not words:
        return "no sentence"
    if len(words) < SHORTEST:
        return "too short"
    if len(words) > longest or len(sentence) > longest * CHARACTERS_PER_WORD:
        return "too long"
    if re.search(r"[a-z]{3}", sentence) is None or re.search(r"->|>>>|\|", sentence):
        return "not a sentence"
    unpaired = any(sentence.count(left) != sentence.count(right) for left, right in ("()", "[]"))
    if sentence.endswith(":") or unpaired:
        return "not a sentence"
    return None


def clean_sentence(paragraph: str) -> str:
    """The first sentence of a Markdown paragraph, its emphasis and links as plain text."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", paragraph)
    text = re.sub(r"(?<!\w)(\*\*?)(\S(?:[^*\n]*\S)?)\1(?!\w)", r"\2", text)
    sentence = first_sentence(text).strip()
    end = _BEFORE_A_NAME.match(sentence)
    return end[0] if end else sentence


def parameter_names(signature: str | None) -> tuple[str, ...] | None:
    """`(text, width=70, *, tabs: int = 8)` → names in order; None when it cannot be read."""
    if signature is None:
        return None
    try:
        definition = ast.parse(f"def f{signature}: pass").body[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    arguments = definition.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return tuple(names)


def _fact(
    document: str, name: str, kind: str, module: str, signature: str | None, section: Section
) -> Fact:
    full = f"{module}.{name}" if module else name
    prose = [
        paragraph
        for paragraph in section.paragraphs
        if not _NAVIGATION.match(paragraph) and not _CALL_FORM.match(paragraph)
    ]
    also = [
        alias
        for paragraph in section.paragraphs
        if (match := _ALIASES.match(paragraph))
        for alias in re.findall(r"`([^`]+)`", match[1])
    ]
    # People write `len`, not `builtins.len`.
    known = [name] if module == "builtins" else [*also, full]
    if kind != "module":
        parts = name.split(".")
        known += [".".join(parts[start:]) for start in range(len(parts))]
    return Fact(
        full,
        tuple(dict.fromkeys(known)),
        kind,
        module,
        clean_sentence(prose[0]) if prose else "",
        parameter_names(signature),
        document,
    )


def _paragraphs(lines: list[str]) -> tuple[str, ...]:
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip())
    listed = re.compile(r"^\s*(?:[-*+] |\d+[.)] |\||>)")
    return tuple(b.strip() for b in blocks if b.strip() and not listed.match(b))


def _subject(title: str) -> str:
    """A page's title without the name of its site."""
    subject = re.split(r"\s+[|–—·»]\s+|\s+-\s+|: ", title.strip())[0].strip()
    return subject if 2 <= len(subject) <= 100 else ""
