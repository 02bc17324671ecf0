"""The `finetune` flow: a model that answers, from a base model and pairs of the corpus."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows.corpus import CorpusParams
from flows.hooks import HOOKS
from flows.pretrain import train_base
from tasks.corpus.pairs import PairsConfig, write_instruction_pairs
from tasks.runtime.manifest import Manifest
from tasks.tokenizer.train import TokenizerConfig
from tasks.training.conversations import ConversationsConfig, standing_conversations
from tasks.training.finetune import FinetuneConfig, finetune
from tasks.training.pretrain import PretrainConfig


@dataclass(frozen=True)
class Chat:
    """A fine-tuned model, the base model it was made from, and what it is judged with."""

    corpus: Manifest
    base: Manifest
    pairs: Manifest
    model: Manifest


def train_chat(
    corpus: CorpusParams,
    tokenizer: TokenizerConfig,
    pretrain: PretrainConfig,
    pairs: PairsConfig,
    finetuning: FinetuneConfig,
    conversations: ConversationsConfig,
) -> Chat:
    finetuning.require_context(pretrain.require_served().context)  # said before the work
    own = standing_conversations(conversations)
    base = train_base(corpus, tokenizer, pretrain)
    questions = write_instruction_pairs(pairs, corpus=base.corpus)
    model = finetune(finetuning, base=base.model, pairs=questions, **own)
    return Chat(base.corpus, base.model, questions, model)


@flow(name="finetune", **HOOKS)
def finetune_flow(
    corpus: CorpusParams = CorpusParams(),
    tokenizer: TokenizerConfig = TokenizerConfig(),
    pretrain: PretrainConfig = PretrainConfig(),
    pairs: PairsConfig = PairsConfig(),
    finetune: FinetuneConfig = FinetuneConfig(),
    conversations: ConversationsConfig = ConversationsConfig(),
) -> None:
    """Train a model that answers questions about the corpus."""
    train_chat(corpus, tokenizer, pretrain, pairs, finetune, conversations)
