"""Telephone numbers as people write them: international (+ or 00), North American, trunk 0.

Patterns propose, functions decide. A number in a text about software is mostly no telephone, so
only numbers in groups are taken: with +, with 00 and the code of a country, with an area code in
brackets or behind hyphens or dots, or with an area code that begins with the trunk prefix 0, as in
Britain, Germany or France.
"""

from __future__ import annotations

import re

# Patterns that begin with a class of characters are searched in C, and look behind it.
INTERNATIONAL = re.compile(
    r"""
    \+(?<![\w+.=-]\+)
    (?: [1-9]\d{0,2} [ .-]? (?: \(0?\d{1,4}\) [ .-]? )? \d{1,4} (?: [ .-]\d{2,8} ){1,4}
    | [1-9]\d{9,14} )
    (?![\w-])
    """.replace("[ ", r"[\ "),
    re.VERBOSE,
)
NORTH_AMERICAN = re.compile(
    r"""
    [(1-9](?<![\w+.=/-][(1-9])
    (?: (?<=\() [2-9][0-8]\d \)[ ]?
    | (?<=1) (?: [ .-]?\([2-9][0-8]\d\)[ ]? | [.-][2-9][0-8]\d[.-] )
    | (?<=[2-9]) [0-8]\d[.-] )
    [2-9]\d\d [ .-] \d{4}
    (?![\w-])
    """.replace("[ ", r"[\ "),
    re.VERBOSE,
)
NATIONAL = re.compile(
    r"""
    [(0](?<![\w+.,=/:#$-][(0])(?<!\d[ ][(0])
    (?: (?<=\() 0[1-9]\d{0,4} \) [ /-]{0,3}
    | (?<=0) [1-9]\d{0,4} (?: [ ]?[/-][ ]? | [ .] ) )
    \d{2,8} (?: [ .-]\d{2,8} ){0,4}
    (?! [\w-] | [ .,]\w?\d | [ ][0-9a-f]{2}[ ][0-9a-f]{2}\b )
    """.replace("[ ", r"[\ "),
    re.VERBOSE,
)
DIALLED = re.compile(
    r"""
    0(?<![\w+.,=/:#$-]0)(?<!\d[ ]0)
    0[ ]?[1-9]\d{0,2} (?: [ ]?\(0\) [ ]? \d{1,5} )? (?: [ ./-] \d{1,8} ){2,5}
    (?! [\w-] | [ .,]\w?\d )
    """.replace("[ ", r"[\ "),
    re.VERBOSE,
)
COUNTRY = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|2[1-689]\d|3[578]\d|42\d|5[09]\d|6[7-9]\d|8[0578]\d|9[679]\d"
)  # ITU-T E.164, the codes assigned and their spare neighbours
MOST_DIGITS = 15  # ITU-T E.164


def is_international(found: str) -> bool:
    return 10 <= len(re.sub(r"\D", "", found)) <= MOST_DIGITS


def is_dialled(found: str) -> bool:
    """0049 30 901820, 00 33 1 23 45 67 89: the code stands alone, the groups differ in length."""
    country, *rest = re.findall(r"\d+", found.replace("(0)", " ").replace("00 ", "00", 1))
    digits = len(country) - 2 + sum(map(len, rest))
    same = len({len(group) for group in [country, *rest]}) == 1
    return bool(COUNTRY.fullmatch(country[2:])) and 9 <= digits <= MOST_DIGITS and not same


def is_north_american(found: str) -> bool:
    """No area code and no exchange ends in 11."""
    digits = re.sub(r"\D", "", found)[-10:]
    return digits[1:3] != "11" and digits[4:6] != "11"


def is_national(found: str) -> bool:
    """020 7946 0018, (0161) 496 0000, 030/90 18 20, 01 23 45 67 89.

    Dates, codes and padded numbers also begin with 0: three groups or more of one length are a
    column of those, and pairs alone are a number only in France, where there are five.
    """
    groups = re.findall(r"\d+", found)
    between = re.findall(r"(?<=\d)\D+(?=\d)", found)
    area, *rest = groups
    if len(set(between[1:])) > 1 or len(set("".join(groups))) < 4:
        return False
    if len(area) == 2:
        return [len(group) for group in groups] == [2] * 5 and set(between) <= {between[-1]}
    same = len(groups) > 2 and len({len(group) for group in groups}) == 1
    digits = sum(map(len, rest))
    return 9 <= len(area) + digits <= 12 and digits >= 5 and not same and "." not in found
