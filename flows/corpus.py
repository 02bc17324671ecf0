"""The `corpus` flow: from web addresses to clean, deduplicated, split documents."""

from __future__ import annotations

from typing import Self

from prefect import flow
from pydantic import Field, model_validator

from flows.hooks import HOOKS
from tasks.corpus.crawl import EMBEDDED, CrawlConfig, CrawlOptions, crawl
from tasks.corpus.dedup import DeduplicateConfig, deduplicate
from tasks.corpus.extract import ExtractConfig, extract
from tasks.corpus.language import LanguageConfig, language
from tasks.corpus.quality import QualityConfig, quality
from tasks.corpus.split import SplitConfig, split
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import StageConfig


class CorpusParams(StageConfig):
    """Which pages, and which of them stay."""

    seeds: tuple[str, ...] = Field(
        default=(EMBEDDED,),
        min_length=1,
        description="Addresses to start from. embedded:stdlib is the site that comes along.",
    )
    epoch: int = Field(
        default=0, ge=0, description="A higher number crawls the same seeds anew, conditionally."
    )
    crawl: CrawlOptions = CrawlOptions()
    extract: ExtractConfig = ExtractConfig()
    language: LanguageConfig = LanguageConfig()
    quality: QualityConfig = QualityConfig()
    deduplicate: DeduplicateConfig = DeduplicateConfig()
    split: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _seeds_can_be_crawled(self) -> Self:
        self.crawl_config()
        return self

    def crawl_config(self) -> CrawlConfig:
        return CrawlConfig(seeds=self.seeds, epoch=self.epoch, **self.crawl.model_dump())


def build_corpus(params: CorpusParams) -> Manifest:
    """crawl → extract → language → quality → deduplicate → split, each cached by itself."""
    crawled = crawl(params.crawl_config())
    extracted = extract(params.extract, crawl=crawled)
    identified = language(params.language, documents=extracted)
    good = quality(params.quality, documents=identified)
    unique = deduplicate(params.deduplicate, documents=good)
    return split(params.split, documents=unique)


@flow(name="corpus", **HOOKS)
def corpus(corpus: CorpusParams = CorpusParams()) -> None:
    """Crawl, extract, filter, deduplicate and split a corpus."""
    build_corpus(corpus)
