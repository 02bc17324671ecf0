"""One page or file to Markdown text and what it says about itself. Runs as the killable child.

    python -m tasks.corpus.page_text SECONDS MEGABYTES EXTRACTOR

Plain text and Markdown are taken as they are, PDF files by their text layer, HTML by the extractor
(`trafilatura_text`, `resiliparse_text`); only the one that is used is imported.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lxml import etree

from tasks.corpus.charset import decode
from tasks.runtime.killable import serve

Extractor = Literal["trafilatura", "resiliparse"]
PDF_TYPE = "application/pdf"
PLAIN_TYPES = ("text/plain", "text/markdown")
_DIVIDED = re.compile(r"([a-z])-\n([a-z])")


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
    licence: str = ""  # what it says of its licence: an address or a sentence, or empty
    canonical: str = ""  # the canonical address it names, or empty


def read_page(
    body: bytes, content_type: str = "", url: str = "", extractor: Extractor = "trafilatura"
) -> PageText:
    """Extract one page or PDF file. Plain text and Markdown are taken as they are.

    A page without text gives an empty one. Raises what the parser raises for what is no page.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == PDF_TYPE:
        return pdf_text(body)
    html, mended = decode(body, content_type)
    if kind in PLAIN_TYPES:
        return PageText(html.replace("\r\n", "\n").strip(), mended=mended)
    about, text = _module(extractor).read_html(html, url)
    return PageText(
        text,
        about.title,
        about.date,
        about.language,
        about.noindex,
        (*mended, "nested-too-deep") if about.clipped else mended,
        about.reserved,
        about.licence,
        about.canonical(url),
    )


def _module(extractor: str) -> Any:
    return importlib.import_module(f"tasks.corpus.{extractor}_text")


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


def _answer(head: dict[str, Any], body: bytes) -> dict[str, Any]:
    try:
        return asdict(read_page(body, head["content_type"], head["url"], head["extractor"]))
    except MemoryError:
        return {"failure": "memory-limit", "reason": "needs more memory than one document may"}
    except RecursionError:
        return {"failure": "too-deep", "reason": "elements nested deeper than the parser follows"}
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, etree.LxmlError) as error:
        return {"failure": "not-parsed", "reason": f"{type(error).__name__}: {error}"[:200]}


if __name__ == "__main__":
    _module(sys.argv[3])  # before the first page, whose seconds are counted
    serve(_answer)
