"""The `tokenizer` flow: a SentencePiece model of the corpus, and the corpus as token shards."""

from __future__ import annotations

from prefect import flow

from flows.corpus import CorpusParams, build_corpus
from flows.hooks import HOOKS
from tasks.corpus.report import report_corpus
from tasks.tokenizer.shards import ShardsConfig, write_token_shards
from tasks.tokenizer.train import TokenizerConfig, train_tokenizer


@flow(name="tokenizer", **HOOKS)
def tokenizer(
    corpus: CorpusParams = CorpusParams(),
    tokenizer: TokenizerConfig = TokenizerConfig(),
) -> None:
    """Train a tokenizer on the corpus and write the corpus as token shards."""
    documents = build_corpus(corpus)
    trained = train_tokenizer(tokenizer, corpus=documents)
    tokens = write_token_shards(ShardsConfig(), corpus=documents, tokenizer=trained)
    report_corpus(corpus.report, corpus=documents, tokens=tokens)
