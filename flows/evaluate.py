"""The `evaluate` flow: what the model is worth, beside compressors and with intervals."""

from __future__ import annotations

from prefect import flow

from flows.corpus import CorpusParams
from flows.finetune import Chat, train_chat
from flows.hooks import HOOKS
from tasks.corpus.pairs import PairsConfig
from tasks.evaluation.baseline import BaselineConfig, compression_baseline
from tasks.evaluation.evaluate import EvaluateConfig, evaluate
from tasks.runtime.manifest import Manifest
from tasks.tokenizer.train import TokenizerConfig
from tasks.training.conversations import ConversationsConfig
from tasks.training.finetune import FinetuneConfig
from tasks.training.pretrain import PretrainConfig


def score(params: EvaluateConfig, baseline: BaselineConfig, chat: Chat) -> Manifest:
    """Scores of a model on its corpus, beside what compressors need for the same bytes."""
    compressors = compression_baseline(baseline, corpus=chat.corpus)
    return evaluate(
        params, model=chat.model, corpus=chat.corpus, pairs=chat.pairs, baseline=compressors
    )


@flow(name="evaluate", **HOOKS)
def evaluate_flow(
    corpus: CorpusParams = CorpusParams(),
    tokenizer: TokenizerConfig = TokenizerConfig(),
    pretrain: PretrainConfig = PretrainConfig(),
    pairs: PairsConfig = PairsConfig(),
    finetune: FinetuneConfig = FinetuneConfig(),
    conversations: ConversationsConfig = ConversationsConfig(),
    baseline: BaselineConfig = BaselineConfig(),
    evaluate: EvaluateConfig = EvaluateConfig(),
) -> None:
    """Score the model of these settings: bits per byte, questions in three groups, samples."""
    chat = train_chat(corpus, tokenizer, pretrain, pairs, finetune, conversations)
    score(evaluate, baseline, chat)
