"""What a crawl hands to the stages after it: a table of pages, each pointing at its WARC record.

A crawl artifact holds
    pages.parquet       one row per document, sorted by url (PAGES)
    urls.parquet        every address ever seen and what became of it (tasks.corpus.addresses.URLS)
    hosts.parquet       one row per host: delay, robots, requests (tasks.corpus.addresses.HOSTS)
    links.parquet       url → links, for pages whose next fetch may answer 304 (LINKS)
    warc/NNNNN.warc.gz  segments; self-contained: an unchanged page's record is copied from the
                        epoch before, beside the revisit record of this one
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.corpus.warc import read_response
from tasks.runtime.store import Directory

PAGES = pa.schema(
    [
        ("url", pa.string()),  # the document's address; embedded://… does not depend on a port
        ("fetch_url", pa.string()),  # the address asked, as in the WARC record
        ("fetched_at", pa.string()),  # of the record that holds the body, ISO 8601 UTC
        ("content_type", pa.string()),  # Content-Type as the server sent it
        ("digest", pa.string()),  # of the body
        ("bytes", pa.int64()),
        ("depth", pa.int32()),
        ("canonical", pa.string()),  # <link rel=canonical>, or empty
        ("warc", pa.string()),  # file name in the artifact
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("record_id", pa.string()),
    ]
)
LINKS = pa.schema([("url", pa.string()), ("links", pa.list_(pa.string()))])


@dataclass(frozen=True)
class CrawledPage:
    """One document with its body, decoded from transfer and content codings."""

    url: str
    fetch_url: str
    fetched_at: str
    content_type: str
    digest: str
    depth: int
    record_id: str
    warc: str
    offset: int
    body: bytes


def page_rows(directory: Directory) -> pa.Table:
    """The table of pages of a crawl artifact (schema PAGES)."""
    return directory.read_table("pages.parquet")


def read_pages(
    directory: Directory, rows: Sequence[dict[str, Any]] | pa.Table
) -> Iterator[CrawledPage]:
    """The pages of some rows of `page_rows`, in their order, without reading any other record.

    A shard function gets a slice of the table. Raises ValueError when a row points at something
    that is not its record.
    """
    if isinstance(rows, pa.Table):
        rows = rows.to_pylist()
    filesystem = directory.filesystem
    name, file = "", None
    try:
        for row in rows:
            if row["warc"] != name:
                if file is not None:
                    file.close()
                name = row["warc"]
                file = filesystem.open_input_file(directory.location(name))
            assert file is not None
            file.seek(row["offset"])
            response = read_response(file.read(row["length"]))
            if response.record_id != row["record_id"]:
                raise ValueError(
                    f"{name} at {row['offset']} holds {response.record_id}, not the record "
                    f"{row['record_id']} of {row['url']}; the crawl artifact is damaged"
                )
            yield CrawledPage(
                row["url"],
                row["fetch_url"],
                row["fetched_at"],
                row["content_type"],
                row["digest"],
                row["depth"],
                row["record_id"],
                name,
                row["offset"],
                response.body,
            )
    finally:
        if file is not None:
            file.close()
