"""The `pretrain` flow: a base model of the corpus."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows.corpus import CorpusParams, build_corpus
from flows.hooks import HOOKS
from tasks.corpus.report import report_corpus
from tasks.registry.register import RegisterBaseConfig, register_base
from tasks.runtime.manifest import Manifest
from tasks.tokenizer.shards import ShardsConfig, write_token_shards
from tasks.tokenizer.train import TokenizerConfig, train_tokenizer
from tasks.training.pretrain import PretrainConfig, pretrain
from tasks.training.start_from import require_import


@dataclass(frozen=True)
class Base:
    """A pretrained model and what it was made from."""

    corpus: Manifest
    tokenizer: Manifest
    model: Manifest


def train_base(corpus: CorpusParams, tokenizer: TokenizerConfig, model: PretrainConfig) -> Base:
    require_import(model.start_from, tokenizer.import_from)  # said before the work
    documents = build_corpus(corpus)
    trained = train_tokenizer(tokenizer, corpus=documents)
    tokens = write_token_shards(ShardsConfig(), corpus=documents, tokenizer=trained)
    report_corpus(corpus.report, corpus=documents, tokens=tokens)
    return Base(documents, trained, pretrain(model, shards=tokens, tokenizer=trained))


@flow(name="pretrain", **HOOKS)
def pretrain_flow(
    corpus: CorpusParams = CorpusParams(),
    tokenizer: TokenizerConfig = TokenizerConfig(),
    pretrain: PretrainConfig = PretrainConfig(),
    register_as: RegisterBaseConfig = RegisterBaseConfig(),
) -> None:
    """Train a base model on the corpus, from whatever stage is not made yet, and register it."""
    base = train_base(corpus, tokenizer, pretrain)
    register_base(register_as, model=base.model)
