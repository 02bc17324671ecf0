"""Placeholder text and pages that are mostly notices.

C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2): pages with "lorem ipsum" go; lines about
JavaScript, cookies and terms go. Here such lines are counted, and a page made of them is removed;
C4's rule against curly brackets would remove every page with code and is not used.
"""

import re

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

_NOTICES = re.compile(
    r"enable javascript|javascript is (?:disabled|required)|terms of (?:use|service)"
    r"|privacy policy|cookie policy|uses? cookies|use of cookies|all rights reserved",
    re.IGNORECASE,
)
# The expression needs one of these; it is slow, and most pages have none.
_HINTS = ("javascript", "terms of", "policy", "cookies", "rights reserved")


def _is_hinted(lowered: str) -> bool:
    return any(word in lowered for word in _HINTS)


def lorem_ipsum(reading: Reading) -> float:
    return reading.lowered.count("lorem ipsum")


def notice_share(reading: Reading) -> float | None:
    if not reading.prose:
        return None
    if not _is_hinted(reading.lowered):
        return 0.0
    notices = sum(
        _is_hinted(line.lower()) and bool(_NOTICES.search(line)) for line in reading.prose
    )
    return notices / len(reading.prose)


LOREM_IPSUM = Rule("lorem_ipsum", lorem_ipsum, high="max_lorem_ipsum")
NOTICES = Rule("notice_lines", notice_share, high="max_notice_lines")
