"""What the pretraining form means: families, sources by weight, masked tokens, a checkpoint."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.corpus import CorpusParams
from flows.pretrain import train_base
from model.families import family_of
from model.huggingface import save_directory
from model.masking import MaskedLoader
from model.optim import OptimConfig
from model.schedule import Schedule
from model.tokenizer_files import tokenizer_files
from model.train_config import TrainConfig
from model.transformer import Transformer
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Workspace
from tasks.runtime.store import Store
from tasks.tokenizer.shards import shard_sources, source_of
from tasks.tokenizer.train import TokenizerConfig
from tasks.training.data import heldout_data, training_data
from tasks.training.job import PairsData, TrainingJob, impossible
from tasks.training.launch import require_tokenizer_of, require_whole
from tasks.training.options import ModelOptions, RunOptions
from tasks.training.pretrain import PretrainConfig, pretrain
from tasks.training.samples import openings, questions, samples
from tasks.training.shapes import FAMILIES, WINDOWED
from tasks.training.start_from import left_out_of, require_import, require_weights
from tests.foreign_checkpoints import byte_level
from tests.tiny_models import VOCABULARY, tokenizer, transformer

UNEVEN = {"width": 40, "heads": 6, "head_width": 6, "mlp_width": 64, "layers": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_form_has_its_name_outside(family: str) -> None:
    window = 8 if family in WINDOWED else 0
    options = ModelOptions(family=family, width=64, layers=3, sliding_window=window)
    shape = options.config(vocab_size=300)
    assert family_of(shape).model_type.removesuffix("_text") == family
    assert shape.causal == options.causal
    Transformer(shape)


@pytest.mark.peer
@pytest.mark.parametrize(
    "values",
    [
        {"family": "deepseek_v2"},
        {"family": "deepseek_v3"},
        {"family": "deepseek_v3", "mlp_width": 20, "experts": {"per_token": 4}},
        *(
            UNEVEN | {"family": family, "head_width": 8}
            for family in ("llama", "qwen3", "deepseek_v3")
        ),
    ],
    ids=str,
)
def test_transformers_runs_what_the_form_describes(values: dict, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = Transformer(ModelOptions.model_validate(values).config(300)).eval()
    save_directory(tmp_path, model)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
        torch.testing.assert_close(model(ids), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"family": "mistral"}}, "mistral looks through a window: give sliding_window"),
        ({"model": {"experts": {"count": 4}}}, "experts are of the families deepseek_v2 and"),
        ({"model": {"family": "gpt2", "qk_norm": True}}, "learned positions go with neither"),
        ({"model": {"family": "bert", "sliding_window": 4}}, "sliding_window is of causal models"),
        ({"model": {"family": "gemma", "sliding_window": 4}}, "'gemma2', 'gemma3'"),
        ({"model": {"family": "deepseek_v3", "experts": {"per_token": 9}}}, "experts_per_token 9"),
        (
            {"model": {"family": "deepseek_v2", "experts": {"width": 340}}},
            "experts.width 340 is not a multiple of 8, and transformers runs no other experts; "
            "take 336",
        ),
        (
            {"model": {"family": "deepseek_v3", "width": 36, "heads": 2}},
            "width 36 is not a multiple of 8",
        ),
        *(
            (
                {"model": UNEVEN | {"family": family, "sliding_window": 8 * (family in WINDOWED)}},
                rf"the nearest, {family}\w*, needs width = a multiple of heads 6",
            )
            for family in ("gemma2", "gemma3", "deepseek_v2")
        ),
        ({"mask_share": 0.3}, "mask_share is of the family bert"),
        ({"source_weights": {"notes": -1}}, "weight -1.0 of source 'notes' must be a number of at"),
        ({"source_weights": {"notes": 0}}, "leave every source out; give one a weight above 0"),
        ({"spike": 0.5}, "spike 0.5 must be above 1 standard deviation"),
        ({"weights": "best", "heldout_sequences": 0}, "'best' are found by held-out documents"),
        ({"optimizer": {"base_width": 64}}, "base_width needs tied_embeddings False"),
        (
            {"start_from": "/x", "model": {"layers": 9}},
            "start_from brings its own; leave model out",
        ),
        ({"run": {"tensor": 2}}, "run.tensor 2 needs run.workers"),
        ({"run": {"tensor": 2, "workers": 3}}, "3 workers are no groups of run.tensor 2"),
        ({"run": {"tensor": 2, "workers": 4}}, "2 groups of run.tensor 2 workers need run.sharded"),
        ({"run": {"least_workers": 2}}, "least_workers 2 must be at most run.workers 0"),
        ({"run": {"tensor": 3, "workers": 3}}, "heads 4 is not a multiple of tensor 3"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PretrainConfig.model_validate(values)
    assert len(error.value.errors()) == 1


def test_what_the_form_says_reaches_the_loop() -> None:
    run = {"workers": 4, "tensor": 2, "sharded": True, "compiled": True, "keep_checkpoints": 5}
    run |= {"peak_tflops": 181}
    values = {
        "spike": 6.0,
        "heldout_every": 7,
        "heldout_sequences": 9,
        "weights": "best",
        "run": run,
        "model": {"tied_embeddings": False},
        "optimizer": {"base_width": 64},
    }
    loop = PretrainConfig.model_validate(values).loop()
    parts = {"optim": OptimConfig(**loop["optim"]), "schedule": Schedule(**loop["schedule"])}
    config = TrainConfig(**(loop | parts), total_tokens=1)
    assert (config.optim.base_width, config.peak_flops) == (64, 181e12)
    assert (config.tensor, config.sharded, config.compiled) == (2, True, True)
    assert (config.keep_checkpoints, config.keep_best, config.spike) == (5, 1, 6.0)
    assert (config.heldout_every, config.heldout_sequences) == (7, 9)


def test_a_family_that_the_engine_lacks_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match="no model with causal, token_types, masked_head, norm_"):
        PretrainConfig(model=ModelOptions(family="bert")).require_served()
    for family in ("qwen2", "gpt2"):
        assert PretrainConfig(model=ModelOptions(family=family)).require_served().qkv_bias
    for family in ("deepseek_v2", "deepseek_v3"):
        assert PretrainConfig(model=ModelOptions(family=family)).require_served().experts


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Two sources, told apart by their tokens, and held-out text of each."""
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    directory = Store.open(Settings.load()).directory("token-shards", "some-shards")
    entries = []
    for split in ("tokens", "heldout-tokens"):
        for source, token in (("", 300), ("notes-", 400)):
            for part, array in (
                ("", np.full(900, token, np.uint16)),
                (".documents", np.arange(0, 900, 30)),
            ):
                stream = io.BytesIO()
                np.save(stream, array)
                name = f"{split}-{source}00000{part}.npy"
                entries.append(directory.write_bytes(name, stream.getvalue()))
    marks = {"stage": "token-shards", "version": 2, "fingerprint": "some-shards", "content": ""}
    return Manifest(files=tuple(entries), **marks)


def job(shards: Manifest, **values: object) -> TrainingJob:
    config = PretrainConfig(sequence=16, model=ModelOptions(width=32, heads=2, context=16))
    return TrainingJob(
        **{
            "stage": "pretrain",
            "fingerprint": "",
            "shape": config.model.config(VOCABULARY).to_dict(),
            "loop": config.loop() | {"total_tokens": 1600},
            "sequence": 16,
            "document_masking": True,
            "seed": 0,
            "tokenizer": shards,
            "shards": shards,
            "base": None,
            "pairs": None,
            "run": config.run,
            "tracking_uri": "",
            "run_id": "",
            "judged": True,
            **values,
        }
    )


def test_sources_are_mixed_by_weight_and_judged_apart(shards: Manifest) -> None:
    names, store = tokenizer(), Store.open()
    shape = ModelOptions(width=32, heads=2, context=16).config(VOCABULARY)
    weights = {"notes": 3.0, "seeds": 1.0}
    loader, tokens, counts = training_data(job(shards, source_weights=weights), store, names, shape)
    batch = loader.read(loader.order(0, 40))
    assert (tokens, counts) == (1600, {"corpus_tokens": 1800})
    assert int((batch.tokens[:, 0] == 400).sum()) == 30
    assert batch.segments is not None  # documents do not see each other
    heldout = heldout_data(job(shards), store, names, shape)
    assert {n: int(h.read(h.order(0, 1)).tokens[0, 0]) for n, h in heldout.items()} == {
        "seeds": 300,
        "notes": 400,
    }
    only = job(shards, source_weights={"notes": 1.0, "seeds": 0.0})
    loader, _, counts = training_data(only, store, names, shape)
    assert set(loader.read(loader.order(0, 40)).tokens.flatten().tolist()) == {400}
    assert counts == {"corpus_tokens": 900}
    assert set(heldout_data(only, store, names, shape)) == {"notes"}
    with pytest.raises(ValueError, match="weights are for mail, sources are notes, seeds"):
        training_data(job(shards, source_weights={"mail": 1.0}), store, names, shape)


def test_workers_are_as_many_as_the_cluster_has_gpus(shards: Manifest) -> None:
    for cpus, gpus, gpu, workers in ((4, 0, False, 2), (4, 1, True, 1), (4, 8, True, 2)):
        left_open = job(shards, run=RunOptions(gpu=gpu))
        assert impossible(left_open, cpus, gpus) is None
        assert left_open.with_workers(cpus, gpus).run.workers == workers
    for run, sentence in (
        ({}, "a GPU for every worker, 1 in all, and the Ray cluster has 0; lower"),
        ({"workers": 3}, "a GPU for every worker, 3 in all"),
        ({"workers": 9, "least_workers": 2}, "a GPU for every worker, 2 in all"),
    ):
        assert sentence in str(impossible(job(shards, run=RunOptions(gpu=True, **run)), 4, 0))


def test_bert_guesses_masked_tokens(shards: Manifest) -> None:
    names = tokenizer()
    shape = ModelOptions(family="bert", width=32, heads=2, context=16).config(VOCABULARY)
    masked = job(shards, mask_share=0.25)
    loader, _, _ = training_data(masked, Store.open(), names, shape)
    assert isinstance(loader, MaskedLoader) and loader.targets(loader.order(0, 2)) == 8
    assert all(
        isinstance(source, MaskedLoader)
        for source in heldout_data(masked, Store.open(), names, shape).values()
    )


def test_samples_show_an_opening_and_what_the_model_adds(shards: Manifest) -> None:
    model, names = transformer(context=16), tokenizer()
    heldout = heldout_data(job(shards), Store.open(), names, model.config)
    prompts = openings(heldout)
    assert prompts == [[300] * 16] * 3
    prompts = [[300] * 7, [400] * 12, [300]]  # as if each were alone
    lines = samples(model, names, prompts).split("\n\n")
    for prompt, line in zip(prompts, lines, strict=True):
        ids = list(prompt)
        for _ in range(16 - 12):
            ids.append(int(model(torch.tensor([ids]))[0, -1, : len(names)].argmax()))
        added = ids[len(prompt) :]
        ends = [place for place, token in enumerate(added) if token in names.stop_ids]
        added = added[: ends[0]] if ends else added
        assert line == f"{names.decode(prompt)} ▶ {names.decode(added)}"


def test_fine_tuning_is_judged_by_questions_it_is_not_taught(shards: Manifest) -> None:
    names, store = tokenizer(), Store.open()
    directory = store.directory("pairs", "some-pairs")
    tables = {
        "pairs-train": ["what is grist?"] * 5,
        "questions-recall": ["and grist?", "and " * 200, "and what is a mill?"],
        "questions-unseen": ["what is a quern?"],
    }
    entries = [
        directory.write_table(
            f"{name}.parquet", pa.table({"question": asked, "answer": ["corn"] * len(asked)})
        )
        for name, asked in tables.items()
    ]
    marks = {"stage": "pairs", "version": 1, "fingerprint": "some-pairs", "content": ""}
    pairs = Manifest(files=tuple(entries), **marks)
    shape = ModelOptions(width=32, heads=2, context=64).config(VOCABULARY)
    data = PairsData(pairs=pairs, passes=1, replay=0.0)
    tuning = job(shards, pairs=data, sequence=64).model_copy(update={"shards": None})
    judges = heldout_data(tuning, store, names, shape)
    assert set(judges) == {"recall", "unseen"}
    answer = len(names.encode("corn")) + 1  # and the end of the turn
    assert judges["unseen"].targets(judges["unseen"].order(0, 1)) == answer
    both = job(shards, pairs=data, sequence=64)
    assert set(heldout_data(both, store, names, shape)) == {"recall", "unseen", "seeds", "notes"}
    assert heldout_data(job(shards, pairs=data, judged=False), store, names, shape) == {}
    asked = [names.decode(ids) for ids in questions(store, pairs, names, 50)]
    assert len(asked) == 2 and "and grist?" in asked[0] and "a mill?" in asked[1]


def test_a_damaged_shard_is_named_before_anything_is_learned(shards: Manifest, tmp_path) -> None:
    store = Store.open()
    place = store.of(shards)
    work = Workspace(place.uri, place.path, "pretrain", "x", tmp_path)
    require_whole(work, [shards])
    path = Path(place.location("tokens-00000.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"tokens-00000\.npy differs from its manifest; remove"):
        require_whole(work, [shards])


def test_shards_of_another_tokenizer_are_refused_before_anything_is_learned(
    shards: Manifest,
) -> None:
    def named(mark: str) -> Manifest:
        counts = {"vocabulary": VOCABULARY}
        return Manifest(stage="tokenizer", version=1, fingerprint=mark, content=mark, counts=counts)

    written = shards.model_copy(
        update={"inputs": {"tokenizer": "theirs"}, "counts": {"tokens": 1800}}
    )
    with pytest.raises(UserError, match="written with tokenizer/theirs, not with tokenizer/ours;"):
        pretrain(PretrainConfig(), shards=written, tokenizer=named("ours"))
    require_tokenizer_of(written, named("theirs"))


def test_shards_are_found_by_source() -> None:
    names = ["tokens-00000.npy", "tokens-00000.documents.npy", "tokens-my-notes-00001.npy"]
    names += ["heldout-tokens-00000.npy", "report.json"]
    assert shard_sources(names, "tokens") == {
        "seeds": ["tokens-00000.npy"],
        "my-notes": ["tokens-my-notes-00001.npy"],
    }
    assert (source_of("warc/00000.warc.gz"), source_of("notes:a/b.txt")) == ("seeds", "notes")


def test_what_is_left_out_of_a_checkpoint_is_said_in_the_log(tmp_path, caplog) -> None:
    shape = ModelOptions(family="bert", width=32, heads=2, context=16).config(300)
    save_directory(tmp_path / "theirs", Transformer(shape))
    assert left_out_of(tmp_path / "theirs") == "" and not caplog.records
    file = tmp_path / "theirs" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(weights | {"bert.pooler.dense.bias": torch.ones(3)}, file)
    assert left_out_of(tmp_path / "theirs") == "bert.pooler (1 tensor)"
    (record,) = caplog.records
    assert record.getMessage() == "of theirs is left out: bert.pooler (1 tensor)"


def test_weights_that_cannot_be_gone_on_from_are_refused_before_any_work(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", str(tmp_path))
    folder, names = tmp_path / "theirs", tokenizer()
    save_directory(folder, transformer())
    for name, data in tokenizer_files(names).items():
        (folder / name).write_bytes(data)
    require_import(str(folder), str(folder))
    file, config = folder / "model.safetensors", PretrainConfig(start_from=str(folder))
    whole = file.read_bytes()
    for data, message in ((whole[: len(whole) // 2], "is damaged"), (None, "holds no model.safe")):
        file.unlink() if data is None else file.write_bytes(data)
        told = rf"^pretrain\.start_from: .*{message}"
        with pytest.raises(UserError, match=told):
            train_base(CorpusParams(), TokenizerConfig(import_from=str(folder)), config)
        with pytest.raises(UserError, match=told):
            require_weights(folder, names.data)
    file.write_bytes(whole)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("64", "32"))
    with pytest.raises(UserError, match=r"has shape .* config.json asks for"):
        require_weights(folder, names.data)
    # Told by another tokenizer's file what its special tokens are.
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(byte_level("gpt2").to_str())
    save_directory(folder, transformer())
    (folder / "special_tokens_map.json").write_text("[]")
    with pytest.raises(UserError, match=r"special_tokens_map\.json is no JSON object"):
        require_import(str(folder), str(folder))


def test_a_checkpoint_to_start_from_is_known_by_its_content(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", str(tmp_path / "sources"))
    folder = tmp_path / "sources" / "theirs"
    torch.manual_seed(0)
    shape = ModelOptions(width=32, heads=2, context=64).config(500)
    save_directory(folder, Transformer(shape))
    config = PretrainConfig(start_from=str(folder), sequence=64)
    assert config.shape(500) == shape
    assert (PretrainConfig().resolve().start_digest, len(config.resolve().start_digest)) == ("", 64)
    with pytest.raises(UserError, match="the tokenizer has 501 pieces, the checkpoint in"):
        config.shape(501)
    # One with a tokenizer in another layout gets the rows that ours needs.
    (folder / "tokenizer.json").write_text(byte_level("gpt2").to_str())
    assert config.shape(501) == replace(shape, vocab_size=501)
    with pytest.raises(UserError, match="sequence 256 is longer than the context 64"):
        PretrainConfig(start_from=str(folder)).shape(500)
    with pytest.raises(UserError, match="lies outside the directories"):
        PretrainConfig(start_from=str(tmp_path)).resolve()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        PretrainConfig(start_from=str(folder.parent)).resolve()
