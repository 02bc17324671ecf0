"""Documents artifacts for the tests of the text stages."""

import pyarrow as pa

from tasks.corpus.dedup import DeduplicateConfig, deduplicate
from tasks.corpus.documents import DOCUMENTS, document_id
from tasks.corpus.signatures import signatures
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store


class TextsConfig(StageConfig):
    texts: tuple[tuple[str, str], ...]  # address, text
    per_shard: int = 4
    clusters: tuple[str, ...] = ()
    canonicals: tuple[str, ...] = ()


@stage("tested-documents", version=1, retries=0)
def texts_of(config: TextsConfig, work: Workspace) -> Outcome:
    rows = [
        dict.fromkeys(DOCUMENTS.names, "")
        | {"id": document_id(text), "url": url, "text": text, "language": "en"}
        | {"language_score": 0.0, "bytes": len(text.encode()), "html_bytes": 0, "offset": 0}
        for url, text in config.texts
    ]
    table = pa.Table.from_pylist(rows, DOCUMENTS)
    if config.canonicals:
        place = table.schema.get_field_index("canonical")
        table = table.set_column(place, "canonical", pa.array(config.canonicals))
    if config.clusters:
        table = table.append_column("cluster", pa.array(config.clusters))
    for number, start in enumerate(range(0, len(rows), config.per_shard)):
        shard = table.slice(start, config.per_shard)
        work.write_table(f"documents-{number:05d}.parquet", shard)
    return Outcome(counts={"documents": len(rows)})


def documents(
    texts: dict[str, str], clusters: tuple[str, ...] = (), canonical: dict[str, str] | None = None
) -> Manifest:
    """An artifact of these texts, by address, in shards of four; `canonical` address by address."""
    named = tuple((canonical or {}).get(url, "") for url in texts) if canonical else ()
    pairs = tuple(texts.items())
    return texts_of(TextsConfig(texts=pairs, clusters=clusters, canonicals=named))


def unique(config: DeduplicateConfig, documents: Manifest, **earlier: Manifest) -> Manifest:
    """These documents deduplicated, by signatures made of them."""
    signed = signatures(config.signatures(), documents=documents)
    return deduplicate(config, documents=documents, signatures=signed, **earlier)


def rows(manifest: Manifest, prefix: str = "documents-") -> list[dict]:
    return [row for table in Store.open().tables(manifest, prefix) for row in table.to_pylist()]


def urls(manifest: Manifest, prefix: str = "documents-") -> list[str]:
    return [row["url"] for row in rows(manifest, prefix)]
