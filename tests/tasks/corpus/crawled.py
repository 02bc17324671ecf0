"""Small crawl artifacts for the tests of the stages after the crawl."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.corpus.pages import PAGES
from tasks.corpus.warc import (
    Exchange,
    SegmentWriter,
    metadata_record,
    payload_digest,
    response_records,
)
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig

DATE = "2024-05-01T12:00:00.000000Z"


class Page(StageConfig):
    url: str
    body: str
    status: int = 200
    canonical: str = ""
    content_type: str = "text/html; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class PagesConfig(StageConfig):
    pages: tuple[Page, ...]


class SegmentsConfig(StageConfig):
    segments: tuple[str, ...]


@stage("tested-crawl", version=1, retries=0)
def crawl_of(config: PagesConfig, work: Workspace) -> Outcome:
    """A crawl artifact as the crawl stage writes it: one segment and the table of its pages."""
    path = work.scratch("segment") / "00000.warc.gz"
    path.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    with SegmentWriter(path, software="tests") as writer:
        for number, page in enumerate(config.pages):
            body = page.body.encode()
            digest, identifier = payload_digest(body), f"<urn:uuid:{number}>"
            headers = (("Content-Type", page.content_type), *page.headers)
            exchange = Exchange(
                page.url, b"GET / HTTP/1.1\r\n\r\n", page.status, "", headers, body, "", DATE
            )
            records = [*response_records(exchange, digest, identifier)]
            places = writer.append([*records, metadata_record(page.url, identifier, {})])
            offset, length = places[1]
            rows.append(
                dict.fromkeys(PAGES.names)
                | {
                    "url": page.url,
                    "canonical": page.canonical,
                    "fetched_at": DATE,
                    "bytes": len(body),
                    "warc": "warc/00000.warc.gz",
                    "offset": offset,
                    "length": length,
                    "record_id": identifier,
                }
            )
    work.put(path, "warc/00000.warc.gz")
    work.write_table("pages.parquet", pa.Table.from_pylist(rows, PAGES))
    return Outcome()


@stage("tested-segments", version=1, retries=0)
def segments_of(config: SegmentsConfig, work: Workspace) -> Outcome:
    """Other people's WARC files, without a table of pages."""
    for number, name in enumerate(config.segments):
        work.put(Path(name), f"{number:05d}.warc.gz")
    return Outcome()


def html(title: str, *blocks: str, head: str = "") -> str:
    body = "\n".join(blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"{head}</head><body><main><article><h1>{title}</h1>\n{body}\n</article></main></body></html>"
    )


def crawl(*pages: Page) -> Manifest:
    return crawl_of(PagesConfig(pages=pages))
