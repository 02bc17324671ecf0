"""The stages with a checkpoint of others: its tokenizer, shards, training, answers, export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flows.pretrain import train_base
from model.chat import Tokenizer
from model.engine import Sampling, generate_batch, load_model
from model.foreign_vocabulary import load_for
from tasks.corpus.pairs import PairsConfig, write_instruction_pairs
from tasks.evaluation.baseline import BaselineConfig, compression_baseline
from tasks.evaluation.evaluate import EvaluateConfig, evaluate
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store
from tasks.tokenizer.shards import ShardsConfig, write_token_shards
from tasks.tokenizer.stored import load_tokenizer
from tasks.tokenizer.train import TokenizerConfig, train_tokenizer
from tasks.training.finetune import FinetuneConfig
from tasks.training.options import OptimizerOptions
from tasks.training.pretrain import PretrainConfig, pretrain
from tests.conftest import Stack
from tests.foreign_checkpoints import save_checkpoint
from tests.tasks.api_pages import PagesConfig, split_pages
from tests.tasks.corpus.inline_shards import InlineSession
from tests.tasks.test_evaluation_stages import STAGES
from tests.tasks.training.stage_runs import RUN, bare_losses, losses, trained, training

pytestmark = [pytest.mark.timeout(500), pytest.mark.peer]


@pytest.fixture(scope="module", autouse=True)
def home(stack: Stack) -> Iterator[Path]:
    """The stack's; shard functions run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_HOME", str(stack.settings.home))
        for module in STAGES:
            patch.setattr(f"{module}.ray_session", InlineSession)
        yield stack.settings.home


@pytest.fixture(scope="module")
def theirs(home: Path) -> Path:
    """A directory as Qwen 2's, below the source root."""
    folder = home / "sources" / "theirs"
    save_checkpoint(folder, "qwen2")
    return folder


@pytest.fixture(scope="module")
def corpus(home: Path) -> Manifest:
    return split_pages(PagesConfig())


@pytest.fixture(scope="module")
def tokenizer(corpus: Manifest, theirs: Path) -> Manifest:
    return train_tokenizer(TokenizerConfig(import_from=str(theirs)), corpus=corpus)


@pytest.fixture(scope="module")
def shards(corpus: Manifest, tokenizer: Manifest) -> Manifest:
    return write_token_shards(ShardsConfig(), corpus=corpus, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def config(theirs: Path) -> PretrainConfig:
    return PretrainConfig(
        start_from=str(theirs), tokens=30 * 8 * 64, sequence=64, batch=8, precision="fp32", run=RUN
    )


@pytest.fixture(scope="module")
def base(stack: Stack, config: PretrainConfig, shards: Manifest, tokenizer: Manifest) -> Manifest:
    with training(config, stack, {"shards": shards, "tokenizer": tokenizer}) as process:
        return trained(process)


def test_training_goes_on_from_their_weights_with_our_ids(
    base: Manifest, config: PretrainConfig, shards: Manifest, tokenizer: Manifest, theirs: Path
) -> None:
    names = load_tokenizer(Store.open(), tokenizer)
    assert names.kind == "byte-level" and "tokenizer.model" not in tokenizer.names()
    curve = losses(base)
    expected = bare_losses(config, shards, len(names), load_for(theirs, names))
    assert list(curve.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    assert curve[30] < curve[2]
    # What it leaves is in our layout, and begins another training without moving anything.
    folder = Path(Store.open().of(base).path)
    assert Tokenizer.load(folder).data == names.data
    assert load_model(folder).config.vocab_size == len(names)


def test_it_is_fine_tuned_evaluated_and_answers(
    base: Manifest, corpus: Manifest, stack: Stack
) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    pairs = write_instruction_pairs(PairsConfig(questions_per_group=5, facts=40), corpus=corpus)
    tuning = FinetuneConfig(
        sequence=64, batch=8, run=RUN, precision="fp32", optimizer=OptimizerOptions(kind="adamw")
    )
    with training(tuning, stack, {"base": base, "pairs": pairs}) as process:
        chat = trained(process)
    report = evaluate(
        EvaluateConfig(longest_answer=4, samples=1),
        model=chat,
        corpus=corpus,
        pairs=pairs,
        baseline=compression_baseline(BaselineConfig(), corpus=corpus),
    )
    assert 0 < float(report.metrics["bits_per_byte"] or 0) < 8
    folder = Path(Store.open().of(chat).path)
    read, model = PreTrainedTokenizerFast.from_pretrained(folder), load_model(folder)
    prompt = read("What does json.dumps do? 日本語")["input_ids"]
    assert prompt == [1, *model.tokenizer.encode("What does json.dumps do? 日本語")]
    (said,) = generate_batch(
        model.model, model.tokenizer, [prompt], [Sampling(temperature=0, max_tokens=6)]
    )
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt])).logits
        torch.testing.assert_close(model.model(torch.tensor([prompt])), expected, atol=1e-4, rtol=0)
    assert said.tokens[0] == int(expected[0, -1].argmax())


def test_another_tokenizer_is_refused_before_any_work_and_by_the_stage(
    corpus: Manifest, shards: Manifest, config: PretrainConfig, theirs: Path
) -> None:
    for import_from, message in (
        ("", "set tokenizer.import_from to the same directory"),
        (str(theirs.parent / "gpt2"), "was not made with this run's tokenizer; set tokenizer"),
    ):
        if import_from:
            save_checkpoint(Path(import_from), "gpt2")
        with pytest.raises(UserError, match=message):
            train_base(None, TokenizerConfig(import_from=import_from), config)
    learned = train_tokenizer(TokenizerConfig(vocab_size=600), corpus=corpus)
    with pytest.raises(UserError, match="were written with tokenizer/"):
        pretrain(config, shards=shards, tokenizer=learned)
    its_own = write_token_shards(ShardsConfig(), corpus=corpus, tokenizer=learned)
    with pytest.raises(UserError, match="was not made with this run's tokenizer"):
        pretrain(config, shards=its_own, tokenizer=learned)


def test_the_digest_knows_their_tokenizer(config: PretrainConfig, theirs: Path) -> None:
    before = config.resolve().start_digest
    told = theirs / "tokenizer_config.json"
    body = told.read_text()
    told.write_text(body + "\n")
    assert config.resolve().start_digest != before
    told.write_text(body)
    assert config.resolve().start_digest == before
