"""The `corpus` flow: from web addresses to clean, deduplicated, split documents."""

from __future__ import annotations

from typing import Self

from prefect import flow
from pydantic import Field, model_validator

from flows.hooks import HOOKS
from tasks.corpus.boilerplate import BoilerplateConfig, boilerplate
from tasks.corpus.crawl import EMBEDDED, CrawlConfig, CrawlOptions, crawl
from tasks.corpus.decontaminate import DecontaminateConfig, decontaminate
from tasks.corpus.dedup import DeduplicateConfig, deduplicate
from tasks.corpus.earlier import earlier_corpora
from tasks.corpus.extract import ExtractConfig, extract
from tasks.corpus.gather import GatherConfig, gather
from tasks.corpus.language import LanguageConfig, language
from tasks.corpus.line_edits import LinesConfig, edit_lines
from tasks.corpus.measure import MeasureConfig, measure
from tasks.corpus.pii import PIIConfig, drop_pii, pii
from tasks.corpus.quality import QualityConfig, quality
from tasks.corpus.quality_model import (
    QualityModelConfig,
    QualityModelStageConfig,
    ScoreConfig,
    score,
    train_quality_model,
)
from tasks.corpus.report import ReportConfig, report_corpus
from tasks.corpus.signatures import signatures
from tasks.corpus.source_config import SourceConfig
from tasks.corpus.split import SplitConfig, split
from tasks.corpus.tombstoned import forget, standing_tombstones
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage_config import StageConfig


class CorpusParams(StageConfig):
    """Which pages, and which of them stay."""

    seeds: tuple[str, ...] = Field(
        default=(EMBEDDED,),
        description="Addresses to start from. embedded:stdlib is the site that comes along. May be "
        "empty where there are sources.",
    )
    sources: tuple[SourceConfig, ...] = Field(
        default=(),
        description="Text that is already there, beside what is crawled: folders of text, "
        "Markdown, HTML and PDF, JSON Lines, Parquet, WARC files.",
    )
    epoch: int = Field(
        default=0, ge=0, description="A higher number crawls the same seeds anew, conditionally."
    )
    crawl: CrawlOptions = CrawlOptions()
    extract: ExtractConfig = ExtractConfig()
    lines: LinesConfig = LinesConfig()
    language: LanguageConfig = LanguageConfig()
    quality: QualityConfig = QualityConfig()
    quality_model: QualityModelConfig = QualityModelConfig()
    pii: PIIConfig = PIIConfig()
    deduplicate: DeduplicateConfig = DeduplicateConfig()
    boilerplate: BoilerplateConfig = BoilerplateConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    split: SplitConfig = SplitConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _has_something_to_read(self) -> Self:
        if self.seeds:
            self.crawl_config()
        elif not self.sources:
            raise ValueError("there are neither seeds nor sources; give one of them")
        names = [source.name for source in self.sources]
        if len({"seeds", *names}) <= len(names):
            raise ValueError(f"sources are named {names}; each needs its own name, not 'seeds'")
        return self

    def crawl_config(self) -> CrawlConfig:
        return CrawlConfig(seeds=self.seeds, epoch=self.epoch, **self.crawl.model_dump())


def build_corpus(params: CorpusParams) -> Manifest:
    """Each stage is cached by itself; thresholds come last.

    First what is known of one document, of all of them: crawl → extract (sources are gathered after
    it) → measure → signatures; where asked for, lines and pii before measure, scores after it. Then
    the selection, which is all that another threshold runs again: language → quality → deduplicate
    → split; where asked for, pii-drop and forget before deduplicate, boilerplate and decontaminate
    after it.
    """
    inputs: dict[str, Manifest] = {}
    pages: dict[str, Manifest] = {}
    if params.seeds:
        pages["crawl"] = crawl(params.crawl_config())
        inputs["crawled"] = extract(params.extract, **pages)
    if params.sources:
        sources = GatherConfig(sources=params.sources, extract=params.extract)
        documents = gather(sources, **inputs)
    else:
        documents = inputs["crawled"]
    if params.lines.rules:
        documents = edit_lines(params.lines, documents=documents)
    if params.pii.action != "keep":
        documents = masked = pii(params.pii.masking(), documents=documents)
    measured = measure(MeasureConfig(), documents=documents)
    scores: dict[str, Manifest] = {}
    if params.quality_model.examples:
        model = train_quality_model(QualityModelStageConfig(**params.quality_model.model_dump()))
        scores["scores"] = score(ScoreConfig(), documents=documents, model=model)
    signed = signatures(params.deduplicate.signatures(), documents=documents)

    good = language(params.language, documents=documents, attributes=measured)
    good = quality(params.quality, documents=good, attributes=measured, **scores)
    if params.pii.action == "drop":
        good = drop_pii(params.pii.limit(), documents=good, attributes=masked)
    if (forgotten := standing_tombstones()) is not None:
        good = forget(forgotten, documents=good, **pages)
    earlier = earlier_corpora(params.deduplicate, good)
    unique = deduplicate(params.deduplicate, documents=good, signatures=signed, **earlier)
    if params.boilerplate.scope != "off":
        unique = boilerplate(params.boilerplate, documents=unique)
    if params.decontaminate.suites:
        unique = decontaminate(params.decontaminate, documents=unique)
    return split(params.split, documents=unique)


@flow(name="corpus", **HOOKS)
def corpus(corpus: CorpusParams = CorpusParams()) -> None:
    """Crawl, extract, filter, deduplicate and split a corpus."""
    documents = build_corpus(corpus)
    report_corpus(corpus.report, corpus=documents)
