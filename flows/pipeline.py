"""The `pipeline` flow: from web addresses to a served model."""

from __future__ import annotations

from prefect import flow

from flows.corpus import CorpusParams
from flows.deploy import DeployConfig, serve_version
from flows.evaluate import score
from flows.finetune import train_chat
from flows.hooks import HOOKS
from flows.promote import PromoteConfig, promote
from tasks.corpus.pairs import PairsConfig
from tasks.evaluation.baseline import BaselineConfig
from tasks.evaluation.evaluate import EvaluateConfig
from tasks.registry.register import RegisterBaseConfig, RegisterConfig, register, register_base
from tasks.tokenizer.train import TokenizerConfig
from tasks.training.conversations import ConversationsConfig
from tasks.training.finetune import FinetuneConfig
from tasks.training.pretrain import PretrainConfig


@flow(name="pipeline", **HOOKS)
def pipeline(
    corpus: CorpusParams = CorpusParams(),
    tokenizer: TokenizerConfig = TokenizerConfig(),
    pretrain: PretrainConfig = PretrainConfig(),
    pairs: PairsConfig = PairsConfig(),
    finetune: FinetuneConfig = FinetuneConfig(),
    conversations: ConversationsConfig = ConversationsConfig(),
    baseline: BaselineConfig = BaselineConfig(),
    evaluate: EvaluateConfig = EvaluateConfig(),
    register_as: RegisterConfig = RegisterConfig(),
    promotion: PromoteConfig = PromoteConfig(rule="always"),
    deploy: DeployConfig = DeployConfig(),
) -> None:
    """Crawl, clean, train, fine-tune, evaluate, register, promote and serve a model."""
    chat = train_chat(corpus, tokenizer, pretrain, pairs, finetune, conversations)
    register_base(RegisterBaseConfig.beside(register_as), model=chat.base)
    report = score(evaluate, baseline, chat)
    version = register(register_as, model=chat.model, report=report)
    serve_version(deploy, promote(promotion, version, report))
