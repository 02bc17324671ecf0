"""Personal data and secrets in a text: found with their checksums, replaced or counted.

Patterns are narrow on purpose, because a number in documentation is mostly no telephone: cards need
a known first digit and Luhn's check digit (ISO/IEC 7812-1, annex B), account numbers the remainder
of ISO 13616, telephone numbers one of the forms of `tasks.corpus.telephones`, IP addresses of both
versions lie on the public internet, keys and tokens carry their issuer's own prefix (as listed by
the secret scanners of code hosts) or stand behind their name. Example domains (RFC 2606, RFC 6761)
name nobody.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tasks.corpus.telephones import (
    DIALLED,
    INTERNATIONAL,
    NATIONAL,
    NORTH_AMERICAN,
    is_dialled,
    is_international,
    is_national,
    is_north_american,
)

_EXAMPLE = re.compile(
    r"@(?:[\w.-]+\.)?(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Kind:
    """`pattern` proposes, `accept` decides; what is found, or its group `value`, becomes `mask`."""

    name: str
    mask: str
    pattern: re.Pattern[str]
    accept: Callable[[str], bool]
    hints: Iterable[str]  # a text without any of these holds none of the kind


def luhn(number: str) -> bool:
    """The check digit of payment cards."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [digit * 2 - 9 if digit > 4 else digit * 2 for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def is_card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def are_cards(found: str) -> bool:
    return all(map(is_card, found.split(",")))


def is_iban(found: str) -> bool:
    """ISO 13616: the rearranged number, letters as 10 to 35, leaves 1 when divided by 97."""
    compact = found.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def is_public_address(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def is_somebody(found: str) -> bool:
    return not _EXAMPLE.search(found)


def _always(_: str) -> bool:
    return True


# Behind the first digit of a card.
_CARD = (
    r"\d{3}(?:(?:[ -]?\d{4}){2}[ -]?\d{1,7}|(?:\.\d{4}){3}"
    r"|(?<=3[47]\d\d)(?:[ -]\d{6}[ -]\d{5}|\.\d{6}\.\d{5}))"
)
# Patterns that begin with a class of characters are searched in C; one that begins with a look
# behind or a choice is tried at every place, for five times the time.
# In this order: what one kind took is not looked at by the next.
KINDS: tuple[Kind, ...] = (
    Kind(
        "secrets",
        "<secret>",
        re.compile(
            r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----(?:(?:(?!-----)[\s\S])*"
            r"-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
            # Clipped before its last line: as far as there are lines of a key.
            r"|(?:(?:\s|\\n)+[A-Za-z-]+: [^\n\\]*)*(?:(?:\s|\\n)+[A-Za-z0-9+/=]{40,})*"
            r"(?:(?:\s|\\n)+(?<=[n\n])[ \t]*[A-Za-z0-9+/=]+\s*\Z|(?<=[A-Za-z0-9+/=]{40})))"
            r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
            # A bare secret key of AWS is any 40 characters: only its name tells it.
            r"|(?i:secret[_ ]?access[_ ]?key)[\"'\s:=>]{1,8}(?P<value>[A-Za-z0-9/+]{40})(?![\w/+=])"
            r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{60,}\b"
            r"|\bgl(?:pat|dt|rt|ptt|ft|cbt|soat)-[\w-]{20,}\b"
            r"|\bxox[abeprs]-[A-Za-z0-9-]{20,}\b|\bxapp-\d-[A-Za-z0-9-]{20,}\b"
            r"|\bhooks\.slack\.com/services/T\w{8,}/B\w{8,}/\w{20,}"
            r"|\bAIza[\w-]{35}(?![\w-])|\bGOCSPX-[\w-]{28}(?![\w-])|\bya29\.[\w-]{30,}"
            r"|\b[sr]k_live_[A-Za-z0-9]{20,}\b|\bsk-(?:proj-|ant-)?[\w-]{32,}\b"
            r"|\bhf_[A-Za-z0-9]{30,}\b|\bnpm_[A-Za-z0-9]{36}\b"
            # From the start of a run, or one of many hyphens is read again from each.
            r"|(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}"
        ),
        _always,
        (
            *("-----BEGIN", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
            *("glpat-", "gldt-", "glrt-", "glptt-", "glft-", "glcbt-", "glsoat-", "npm_", "ya29."),
            *("xox", "xapp-", "hooks.slack", "AIza", "GOCSPX-", "k_live_", "sk-", "hf_", "eyJ"),
            *("ccessKey", "ccess_key", "ccess_Key", "CCESS_KEY", "ccesskey", "CCESSKEY"),
            *("ccess key", "ccess Key", "CCESS KEY"),
        ),
    ),
    Kind(
        "emails",
        "<email>",
        re.compile(
            r"(?<![\w.+/-])[A-Za-z0-9_][\w.+-]{0,63}@(?:(?:[^\W_]|-){1,63}\.){1,5}"
            r"(?:[A-Za-z]{2,24}(?!_*[A-Za-z0-9])|(?:(?![A-Za-z])[^\W\d_]){2,24}\b)"
        ),
        is_somebody,
        "@",
    ),
    Kind(
        "ibans",
        "<iban>",
        re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
        is_iban,
        "0123456789",
    ),
    Kind(
        "cards",
        "<card>",
        re.compile(
            # Beside a comma stands a decimal, or a list of nothing but cards.
            rf"[2-6](?<![\d.,-][2-6]){_CARD}(?:,[2-6]{_CARD})*(?![.,-]*\d)"
        ),
        are_cards,
        "23456",
    ),
    Kind(
        "ip_addresses",
        "<ip>",
        re.compile(r"\d(?<![\w.:-]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w.-]*\w)"),
        is_public_address,
        ".",
    ),
    Kind(
        # Of the range that is given out (2000::/3); no time of day, scope or MAC address begins so.
        "ip_addresses",
        "<ip>",
        re.compile(
            r"[23](?<![\w.:-][23])[0-9A-Fa-f]{3}:(?:(?:[0-9A-Fa-f]{1,4}:){2,6}:(?!/)"
            r"|(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4})(?![\w.:-]*\w)"
        ),
        is_public_address,
        ":",
    ),
    Kind("telephones", "<telephone>", INTERNATIONAL, is_international, "+"),
    Kind("telephones", "<telephone>", DIALLED, is_dialled, ("00",)),
    Kind("telephones", "<telephone>", NORTH_AMERICAN, is_north_american, "23456789"),
    Kind("telephones", "<telephone>", NATIONAL, is_national, "0"),
)


def find(text: str) -> Iterator[tuple[Kind, int, int]]:
    """(kind, start, end) of everything found, kind by kind. No-break spaces count as spaces."""
    text = text.replace("\u00a0", " ").replace("\u202f", " ")
    taken: list[tuple[int, int]] = []  # in order, none overlaps another
    for kind in KINDS:
        if not any(hint in text for hint in kind.hints):
            continue
        found: list[tuple[int, int]] = []
        for match in kind.pattern.finditer(text):
            start, end = match.span("value" if match.lastgroup == "value" else 0)
            before = bisect_left(taken, (end, 0)) - 1  # the last that begins before this one's end
            if before >= 0 and taken[before][1] > start:
                continue
            if kind.accept(match.group()):
                found.append((start, end))
                yield kind, start, end
        taken = sorted(taken + found)


def count(text: str) -> dict[str, int]:
    """How often each kind stands in the text."""
    counts = {kind.name: 0 for kind in KINDS}
    for kind, _, _ in find(text):
        counts[kind.name] += 1
    return counts


def mask(text: str, kinds: frozenset[str]) -> tuple[str, dict[str, int]]:
    """The text with every find of these kinds replaced by its mask, and how many there were."""
    found = [(start, end, kind) for kind, start, end in find(text) if kind.name in kinds]
    spans = sorted(found, key=lambda item: item[0])
    counts: dict[str, int] = {}
    parts, position = [], 0
    for start, end, kind in spans:
        parts += [text[position:start], kind.mask]
        position = end
        counts[kind.name] = counts.get(kind.name, 0) + 1
    return "".join([*parts, text[position:]]), counts
