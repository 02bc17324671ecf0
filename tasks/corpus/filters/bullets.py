"""Pages that are nothing but lists: indexes, menus, link collections.

Gopher (Rae et al. 2021, appendix A.1.1): at most 90% of the lines start with a bullet. On a site of
documentation this is what removes the letter pages of its index, whose entries repeat other pages.
"""

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading


def bullet_share(reading: Reading) -> float | None:
    return reading.bullet_lines / len(reading.lines) if reading.lines else None


BULLETS = Rule("bullet_lines", bullet_share, high="max_bullet_lines")
