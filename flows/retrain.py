"""The `retrain` flow: the same seeds anew, and a new champion only if it is better.

Schedule it from the dashboard by cron. One at a time: a run that finds another at work ends as
Skipped.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from prefect import flow
from prefect.states import Completed, State

from flows.corpus import CorpusParams
from flows.deploy import DeployConfig, serve_version
from flows.evaluate import score
from flows.finetune import train_chat
from flows.hooks import HOOKS
from flows.promote import PromoteConfig, promote
from tasks.corpus.crawl_state import settings_of
from tasks.corpus.pairs import PairsConfig
from tasks.evaluation.baseline import BaselineConfig
from tasks.evaluation.evaluate import EvaluateConfig
from tasks.registry import models
from tasks.registry.register import RegisterBaseConfig, RegisterConfig, register, register_base
from tasks.runtime.fingerprint import identity
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tasks.state.leases import lease
from tasks.tokenizer.train import TokenizerConfig
from tasks.training.conversations import ConversationsConfig
from tasks.training.finetune import FinetuneConfig
from tasks.training.pretrain import PretrainConfig


def next_epoch(params: CorpusParams) -> int:
    """The epoch after the last committed crawl of these seeds.

    A retrain that died while crawling left no manifest, so the next one continues its epoch.
    """
    if not params.seeds:
        return params.epoch  # sources are known by what they hold, and read anew by themselves
    same = identity(params.crawl_config()) | {"epoch": 0}
    crawls = filter(None, map(settings_of, Store.open().all("crawl")))
    epochs = (crawl.epoch for crawl in crawls if identity(crawl) | {"epoch": 0} == same)
    return max(epochs, default=-1) + 1


def champion_artifact(model: str) -> Manifest | None:
    """The artifact of the model that is served now, if there is one."""
    champion = models.find(model, models.CHAMPION)
    return Store.open().find(champion.stage, champion.fingerprint) if champion else None


@flow(name="retrain", **HOOKS)
def retrain(
    corpus: CorpusParams = CorpusParams(),
    tokenizer: TokenizerConfig = TokenizerConfig(),
    pretrain: PretrainConfig = PretrainConfig(),
    pairs: PairsConfig = PairsConfig(),
    finetune: FinetuneConfig = FinetuneConfig(),
    conversations: ConversationsConfig = ConversationsConfig(),
    baseline: BaselineConfig = BaselineConfig(),
    evaluate: EvaluateConfig = EvaluateConfig(),
    register_as: RegisterConfig = RegisterConfig(),
    promotion: PromoteConfig = PromoteConfig(rule="if_better"),
    deploy: DeployConfig = DeployConfig(),
) -> State[None] | None:
    """Recrawl, rebuild what changed, train, compare with the served model, deploy the better."""
    with ExitStack() as held:
        alone = lease(Settings.load().database_url, f"retrain/{register_as.model}", patience=0)
        try:
            held.enter_context(alone)
        except TimeoutError:
            return Completed(
                name="Skipped",
                message=f"Another retrain of {register_as.model} is at work; one runs at a time.",
            )
        anew = corpus.model_copy(update={"epoch": next_epoch(corpus)})
        chat = train_chat(anew, tokenizer, pretrain, pairs, finetune, conversations)
        register_base(RegisterBaseConfig.beside(register_as), model=chat.base)
        report = score(evaluate, baseline, chat)
        version = register(register_as, model=chat.model, report=report)
        champion = champion_artifact(register_as.model)
        rival = (
            score(evaluate, baseline, replace(chat, model=champion))
            if champion and champion.fingerprint != chat.model.fingerprint
            else None
        )
        serve_version(deploy, promote(promotion, version, report, rival))
    return None
