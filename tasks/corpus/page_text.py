"""One HTML page to Markdown text and what it says about itself. Runs as the killable child.

Text comes from trafilatura in its fast mode. Title, date and language are read here from the same
tree: trafilatura's own metadata pass halves the speed (102 → 56 pages/s on the embedded site).
"""

from __future__ import annotations

import io
import re
from dataclasses import asdict, dataclass
from typing import Any

from lxml import etree
from lxml.html import HtmlComment, HtmlElement, HtmlEntity, HtmlProcessingInstruction
from trafilatura import extract
from trafilatura.utils import HTML_PARSER, load_html

from tasks.corpus.charset import decode
from tasks.corpus.killable import serve
from tasks.corpus.opt_out import meta_reserves
from tasks.corpus.shingles import normalise

PDF_TYPE = "application/pdf"
PLAIN_TYPES = ("text/plain", "text/markdown")
# lxml.html asks a Python function for the class of every element it hands out, to tell forms from
# the rest; nobody here looks at forms. 180,000 calls less on 91 pages; 2% of their time.
HTML_PARSER.set_element_class_lookup(
    etree.ElementDefaultClassLookup(
        element=HtmlElement,
        comment=HtmlComment,
        pi=HtmlProcessingInstruction,
        entity=HtmlEntity,
    )
)
_HEADING = " or ".join(f"self::h{level}" for level in range(1, 7))
# The first heading among the children of each section that has an id.
_SECTION_HEADINGS = etree.XPath(f"(//section[@id] | //div[@id])/*[{_HEADING}][1]")
_FENCE = re.compile(r"^(`{3,})", re.MULTILINE)
_CODE_HEADING = re.compile(r"^(#{1,6} )(`+)(?!`)(.+?)(?<!`)\2$")
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()<>#+\-.!|~\"])")
_DIVIDED = re.compile(r"([a-z])-\n([a-z])")
_MARKED = re.compile(r"[\\*<_]")
_TAG = re.compile(r"(?<!\\)</?(?:u|sup|sub|del|s|b|i|em|strong|mark|small|kbd|var)>")
_EMPHASIS = tuple(
    re.compile(rf"(?<!\\){mark}(?=[^\s*])(.+?)(?<=[^\s\\*]){mark}")
    for mark in (r"\*\*\*", r"\*\*", r"\*", r"(?<!\w)__(?!_)", "~~")
)
_CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)")
_DATE_NAMES = (
    "article:published_time",
    "datepublished",
    "date",
    "dc.date",
    "dc.date.issued",
    "dcterms.date",
    "citation_publication_date",
    "article:modified_time",
)


@dataclass(frozen=True)
class PageText:
    """`language` as the page claims it (primary subtag, or empty); `date` ISO 8601 or empty."""

    text: str = ""
    title: str = ""
    date: str = ""
    language: str = ""
    noindex: bool = False
    mended: tuple[str, ...] = ()
    reserved: str = ""  # how it reserves itself from text mining, or empty


def read_page(body: bytes, content_type: str = "", url: str = "") -> PageText:
    """Extract one page or PDF file. Plain text and Markdown are taken as they are.

    A page without text gives an empty one. Raises what the parser raises for what is no page.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == PDF_TYPE:
        return pdf_text(body)
    html, mended = decode(body, content_type)
    if kind in PLAIN_TYPES:
        return PageText(html.replace("\r\n", "\n").strip(), mended=mended)
    tree = load_html(html) if html.strip() else None
    if tree is None:
        return PageText(mended=mended)
    title, date, language, noindex, reserved = _about(tree)
    if noindex:
        return PageText("", title, date, language, True, mended, reserved)
    return PageText(main_text(tree, url), title, date, language, False, mended, reserved)


def main_text(tree: HtmlElement, url: str = "") -> str:
    """The main text of a parsed page as tidy Markdown, empty when there is none.

    Changes `tree`. trafilatura drops elements whose id speaks of sharing, cookies, comments and so
    on, and took the documentation of `SharedMemory` for share buttons; an id that only repeats its
    section's heading is an anchor, and goes before.
    """
    for heading in _SECTION_HEADINGS(tree):
        section = heading.getparent()
        anchor = section.get("id")
        if anchor and normalise(anchor) in normalise(heading.text_content()):
            del section.attrib["id"]
    text = extract(
        tree, url=url or None, fast=True, output_format="markdown", include_comments=False
    )
    return tidy_markdown(text or "")


def tidy_markdown(text: str) -> str:
    """Undo what serves only a renderer.

    Backslash escapes in prose go (a model would learn `\\*args`), and so do emphasis and tags like
    `<sup>`; a heading that is one code span loses its marks; fences stand apart from their
    surroundings. Code is left as it is.
    """
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            lines.append(line.rstrip())
            if mark and line.strip() == fence:
                fence = ""
                lines.append("")
        elif mark and "`" not in line[mark.end() :]:
            fence = mark.group(1)
            lines += ["", line.rstrip()]
        else:
            lines.append(_prose_line(line.rstrip()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _prose_line(line: str) -> str:
    heading = _CODE_HEADING.match(line)
    if heading and heading.group(2) not in heading.group(3):
        return heading.group(1) + heading.group(3).strip()
    if not _MARKED.search(line):
        return line
    spans = [span.group() for span in _CODE_SPAN.finditer(line)]
    plain = _TAG.sub("", _CODE_SPAN.sub("\x00", line))
    for emphasis in _EMPHASIS:
        plain = emphasis.sub(r"\1", plain)
    plain = _ESCAPE.sub(r"\1", plain)
    for span in spans:
        plain = plain.replace("\x00", span, 1)
    return plain


def pdf_text(body: bytes) -> PageText:
    """The text layer of a PDF file; words that a line break divides are joined.

    A scan has no text layer and gives no text. Raises ValueError for what cannot be read.
    """
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(body))
        pages = [page.extract_text() for page in reader.pages]
        about = reader.metadata
        title = str(about.title or "") if about else ""
        written = about.creation_date if about else None
    except PyPdfError as error:
        raise ValueError(str(error)) from error
    text = "\n\n".join(page.strip() for page in pages if page.strip()).replace("\x00", "")
    text = _DIVIDED.sub(r"\1\2", text)
    return PageText(text, title[:500], written.date().isoformat() if written else "")


def _about(tree: HtmlElement) -> tuple[str, str, str, bool, str]:
    title = language = reserved = ""
    dates: dict[str, str] = {}
    noindex = False
    for element in tree.iter("html", "title", "meta", "time", "h1"):
        tag = element.tag
        if tag == "html":
            language = element.get("lang") or element.get("xml:lang") or language
        elif tag in ("title", "h1"):
            # an SVG may hold further titles; the first of either tag is the page's
            title = title or " ".join(element.text_content().split())
        elif tag == "time":
            dates.setdefault("time", element.get("datetime") or "")
        else:
            name = (element.get("name") or element.get("property") or "").lower()
            content = element.get("content") or ""
            reserved = reserved or meta_reserves(name, content)
            if name in ("robots", "gristmill"):
                words = {word.strip() for word in content.lower().split(",")}
                noindex = noindex or bool(words & {"noindex", "none"})
            elif name in _DATE_NAMES:
                dates.setdefault(name, content)
            elif (element.get("http-equiv") or "").lower() == "content-language":
                language = language or content
    stated = (dates.get(name, "") for name in (*_DATE_NAMES, "time"))
    date = next((match.group() for match in map(_DATE.match, stated) if match), "")
    language = re.split(r"[-_,; ]", language.strip().lower())[0][:8]
    return title[:500], date, language, noindex, reserved


def _answer(head: dict[str, Any], body: bytes) -> dict[str, Any]:
    try:
        return asdict(read_page(body, head["content_type"], head["url"]))
    except MemoryError:
        return {"failure": "memory-limit", "reason": "needs more memory than one document may"}
    except RecursionError:
        return {"failure": "too-deep", "reason": "elements nested deeper than the parser follows"}
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, etree.LxmlError) as error:
        return {"failure": "not-parsed", "reason": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    serve(_answer)
