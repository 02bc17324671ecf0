"""An exported version: whole or not at all, with its card, and other programs say the same."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import main
from model.chat import TOOL_CHAT_TEMPLATE, encode_chat
from model.config import ModelConfig
from model.engine import Sampling, generate_batch, load_model
from model.huggingface import FormatError
from model.rope_scaling import RopeScaling
from model.tokenizer_files import tokenizer_files
from model.transformer import Transformer
from tasks.export.card import card
from tasks.export.gguf_file import architecture, begin, write_gguf
from tasks.registry import models, tracking
from tasks.registry.register import RegisterBaseConfig, register_base
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tests.tasks.made_artifacts import commit
from tests.tiny_models import BERT, model_directory, tokenizer, transformer

# Blocks of Unicode: Latin, Greek and Cyrillic, Hebrew and Arabic, Devanagari, Thai, kana and CJK,
# Hangul, symbols, emoji.
SCRIPTS = (
    *((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x6FF), (0x900, 0x980)),
    *((0xE00, 0xE5C), (0x3040, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F600, 0x1F650)),
)
QUESTION = [{"role": "user", "content": "What does json.dumps do?"}]


def texts(count: int = 60) -> list[str]:
    draw = random.Random(0)
    drawn = []
    for number in range(count):
        low, high = SCRIPTS[number % len(SCRIPTS)]
        letters = [chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 40))]
        spaced = [draw.choice(("", " ", "  ", "\n", "\t")) + letter for letter in letters]
        drawn.append("".join(spaced))
    return [*drawn, "def f(x):\n\treturn 1_0", " a  b\n\n", "日本語 🎉\x00", json.dumps(QUESTION)]


@pytest.fixture
def registered(home: Path) -> models.Version:
    """Version 1 of `tiny`, with what it was made from."""
    folder = model_directory(home / "made", qk_norm=True)
    for name, body in tokenizer_files(tokenizer(), context=128).items():
        (folder / name).write_bytes(body)
    gathered = {
        "config": {"sources": [{"name": "notes", "licence": "CC BY 4.0"}, {"name": "mail"}]},
        "counts": {"documents_notes": 1234, "documents_mail": 5},
        "rules": {"too-short": 7},
    }
    source = commit("gather", {}, {}, **gathered)
    sizes = ("train_documents", "train_bytes", "heldout_documents", "heldout_bytes")
    corpus = commit(
        "split", {}, {"documents": source.fingerprint}, counts=dict.fromkeys(sizes, 1100)
    )
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"curve.parquet": b"x"}
    counts = {"steps": 4, "tokens": 4096}
    model = commit("pretrain", files, {"corpus": corpus.fingerprint}, counts=counts)
    report = commit("evaluate", {}, {"model": model.fingerprint})
    scores = {"bits_per_byte": 1.5, "bits_per_byte_low": 1.25, "bits_per_byte_high": 1.75}
    scores |= {"unseen_exact": 0.002, "ppmd5_bits_per_byte": 1.6}
    lineage = {"report": f"evaluate/{report.fingerprint}"}
    run_id = tracking.open_run("pretrain", model.fingerprint, {}, {})
    mark = f"pretrain/{model.fingerprint}"
    version = models.register("tiny", run_id, folder, mark, scores, lineage)
    models.set_alias("tiny", models.CHAMPION, version.version)
    return version


def test_a_version_leaves_as_a_directory_with_its_card(registered, home, capsys) -> None:
    assert main(["export", "tiny@1", "--out", str(home / "out")]) == 0
    assert capsys.readouterr().out.strip().endswith("out")
    names = {path.name for path in (home / "out").iterdir()}
    expected = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    expected |= {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "README.md"}
    assert names == expected
    card = (home / "out" / "README.md").read_text()
    for said in (
        "# tiny, version 1",
        "| architecture | Qwen3ForCausalLM |",
        "| pretrained on | 4,096 tokens in 4 steps |",
        "Source `notes`: 1,234 documents. Licence: CC BY 4.0.",
        "Source `mail`: 5 documents. Licence: not stated",
        "| gather | too-short | 7 |",
        "Left for training: 1,100 documents",
        "| bits per byte of held-out documents | 1.5 | 1.25 to 1.75 |",
        "| bits per byte of PPMd, order 5 | 1.6 |  |",
        "Of facts it was never taught it answered 0.2% exactly",
        "| evaluate | `evaluate-made-fo` |",
    ):
        assert said in card


def test_a_card_names_what_was_made_elsewhere(registered, home) -> None:
    def made(stage: str, config: dict[str, Any], **counts: int) -> Manifest:
        marks = {"version": 1, "fingerprint": stage, "content": stage}
        marks["metrics"] = {"left_out": "vision_tower (7 tensors)"}
        return Manifest(stage=stage, config=config, counts=counts, **marks)

    theirs = {"start_from": "/sources/theirs", "start_digest": "ab" * 32}
    words = {"import_from": "/sources/theirs/tokenizer.json", "import_digest": "cd" * 32}
    language = made("language", {"languages": ["en"]})
    talk = made("conversations", {"licence": "CC0"}, conversations=12, with_calls=3)
    lineage = [made("pretrain", theirs, steps=4, tokens=4096), made("tokenizer", words), language]
    lineage.append(talk)
    told = card(registered, home / "made", lineage)
    for said in (
        "It goes on from the checkpoint `theirs` (SHA-256 `abababababababab`…), which was made",
        "Left out of that checkpoint: vision_tower (7 tensors).",
        "Its vocabulary is that of `tokenizer.json` (SHA-256 `cdcdcdcdcdcdcdcd`…), which was made",
        "Licence: not known here; its owner's terms hold for this model, too.",
        "Conversations of its makers: 12, of which 3 call tools. Licence: CC0.",
        "- What `theirs` had read before is not known here.",
        "- It read text in en here.",
    ):
        assert said in told
    assert "has read little" not in told and "nothing else" not in told
    own = card(registered, home / "made", [made("pretrain", {}, steps=4, tokens=4096), language])
    assert "has read little" in own and "and nothing else" in own and "elsewhere" not in own


def pretrained(folder: Path, **config: Any) -> models.Version:
    """The newest version of `tiny-base`, registered by the stage from a pretraining's artifact."""
    for name, body in tokenizer_files(tokenizer(), context=128).items():
        (folder / name).write_bytes(body)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = {"loss": 2.5, "heldout_loss": 2.75, "tokens_per_second": 900.0}
    counts = {"steps": 4, "tokens": 4096}
    model = commit("pretrain", files, {}, counts=counts, metrics=said, config=config)
    register_base(RegisterBaseConfig(model="tiny-base"), model=model)
    return models.named("tiny-base")


def test_a_base_model_leaves_without_an_alias_and_its_card_says_what_it_is(home) -> None:
    version = pretrained(model_directory(home / "made", tied_embeddings=False))
    assert version.is_base and not version.aliases
    assert version.scores == {"final_loss": 2.5, "final_heldout_loss": 2.75}
    assert main(["export", "tiny-base", "--out", "out"]) == 0
    card = (home / "out" / "README.md").read_text()
    for said in (
        "# tiny-base, version 1",
        "This is a base model: it was pretrained only. It continues a text",
        "| pretrained on | 4,096 tokens in 4 steps |",
        "| loss on held-out documents at the end of training, nats per token | 2.75 |",
        'tokenizer("…", return_tensors="pt")',
    ):
        assert said in card
    assert "apply_chat_template" not in card
    assert load_model(home / "out").model.config.width == 64


def test_a_base_model_that_looks_both_ways_says_how_it_is_used(home) -> None:
    pretrained(model_directory(home / "made", **BERT))
    assert main(["export", "tiny-base@1", "--out", "out"]) == 0
    card = (home / "out" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "It guesses masked words of a text" in card
    assert "AutoModelForMaskedLM" in card and "generate" not in card


@pytest.mark.peer
def test_a_base_model_leaves_as_gguf(home) -> None:
    pretrained(model_directory(home / "made", tied_embeddings=False))
    assert main(["export", "tiny-base", "--format", "gguf"]) == 0
    found = {path.name for path in (home / "tiny-base-1-gguf").iterdir()}
    assert found == {"tiny-base-1.gguf", "README.md"}
    card = (home / "tiny-base-1-gguf" / "README.md").read_text()
    assert 'llama-cli -m tiny-base-1.gguf -no-cnv -p "…"' in card


def test_what_cannot_be_exported_is_said_and_leaves_nothing(registered, home, capsys) -> None:
    def told(*arguments: str) -> str:
        assert main(["export", *arguments]) == 1
        return capsys.readouterr().err

    assert "has no version or alias '9'; it has: 1 (champion)" in told("tiny@9")
    (home / "full").mkdir()
    (home / "full" / "file").touch()
    assert "exists and is not empty; give another directory" in told("tiny", "--out", "full")
    assert "Not a directory; give another" in told("tiny", "--out", "full/file/below")
    store = Store.open(Settings.load())
    weights = Path(store.directory(registered.stage, registered.fingerprint).path)
    weights = weights / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert "model.safetensors differs from its manifest" in told("tiny", "--out", "new")
    assert not list(home.glob("*new*"))


def test_a_family_that_llama_cpp_was_not_compared_with_is_refused() -> None:
    flags = {"positions": "learned", "norm": "layer", "activation": "gelu_tanh"}
    gpt2 = ModelConfig(gated_mlp=False, qkv_bias=True, linear_bias=True, **flags)
    with pytest.raises(FormatError, match="a gpt2 model is not written as GGUF, only llama"):
        architecture(gpt2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rope_scaling": RopeScaling("dynamic", 2.0)}, "llama model with rope_scaling dynamic"),
        (
            {"rope_scaling": RopeScaling("yarn", 2.0, 64, attention_factor=2.0)},
            "rope_scaling yarn attention_factor is not written as GGUF",
        ),
        ({"qkv_bias": True, "rope_scaling": RopeScaling("llama3", 8.0, 64, 1.0, 4.0)}, "a qwen2"),
    ],
)
def test_positions_that_llama_cpp_would_stretch_otherwise_are_refused(
    tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        begin(tmp_path / "model.gguf", ModelConfig(**flags), "tiny")


def ask(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


@pytest.mark.peer
@pytest.mark.parametrize(
    "flags",
    [
        {"kv_heads": 1, "head_dim": 16, "rope_theta": 5e5},
        {"tied_embeddings": False},
        {"sliding_window": 64, "kv_heads": 1, "tied_embeddings": False},
        {"qkv_bias": True, "vocab_size": 530},
        {"qk_norm": True, "head_dim": 48, "kv_heads": 1},
        {"rope_scaling": RopeScaling("llama3", 8.0, 64, 1.0, 4.0)},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"qkv_bias": True, "rope_scaling": RopeScaling("yarn", 4.0, 64, beta_fast=8.0)},
    ],
    ids=["llama", "llama-untied", "mistral", "qwen2-padded", "qwen3", "llama3", "linear", "yarn"],
)
def test_llama_cpp_says_the_same_tokens(tmp_path: Path, flags: dict[str, Any]) -> None:
    from benchmarks.llama_cpp import LlamaCpp

    model, names = transformer(seed=3, context=256, **flags), tokenizer()
    write_gguf(tmp_path / "tiny.gguf", model, names, "tiny")
    peer = LlamaCpp(tmp_path / "tiny.gguf", min(256, flags.get("sliding_window", 256))).server
    for text in texts():
        said = ask(peer, "/tokenize", {"content": text, "parse_special": False})
        assert said["tokens"] == names.encode(text)
    prompt = encode_chat(QUESTION, names)
    template = ask(peer, "/apply-template", {"messages": QUESTION})["prompt"]
    read = ask(peer, "/tokenize", {"content": template, "add_special": True, "parse_special": True})
    assert read["tokens"] == prompt
    greedy = Sampling(temperature=0.0, max_tokens=24)
    (ours,) = generate_batch(model, names, [prompt], greedy)
    options = {"temperature": 0, "top_k": 1, "n_predict": 24, "return_tokens": True}
    theirs = ask(peer, "/completion", {"prompt": prompt, "cache_prompt": False, **options})
    assert theirs["tokens"] == list(ours.tokens)[: len(theirs["tokens"])]
    assert len(theirs["tokens"]) >= len(ours.tokens) - 1  # the end itself is not told


@pytest.mark.peer
def test_transformers_loads_what_was_exported(registered, home) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["export", "tiny@champion", "--out", "out"]) == 0
    names = AutoTokenizer.from_pretrained(home / "out")
    for text in texts():
        assert names(text, add_special_tokens=False)["input_ids"] == tokenizer().encode(text)
        assert names.decode(tokenizer().encode(text)) == text
    ids = names.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    theirs = AutoModelForCausalLM.from_pretrained(home / "out")(ids).logits
    ours: Transformer = load_model(home / "out").model
    torch.testing.assert_close(theirs, ours(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.peer
def test_a_version_leaves_as_gguf(registered, home) -> None:
    assert main(["export", "tiny", "--format", "gguf"]) == 0
    found = {path.name for path in (home / "tiny-1-gguf").iterdir()}
    assert found == {"tiny-1.gguf", "README.md"}
    assert "llama-cli -m tiny-1.gguf" in (home / "tiny-1-gguf" / "README.md").read_text()


@pytest.mark.peer
def test_llama_cpp_lays_tools_out_as_we_do(tmp_path: Path) -> None:
    from benchmarks.llama_cpp import LlamaCpp

    names = tokenizer()
    write_gguf(tmp_path / "tiny.gguf", transformer(context=512), names, "tiny", TOOL_CHAT_TEMPLATE)
    peer = LlamaCpp(tmp_path / "tiny.gguf", 512).server
    properties = {"place": {"type": "string"}}
    function = {"name": "weather", "description": "of a place", "parameters": {}}
    function["parameters"] = {"type": "object", "properties": properties}
    tools = [{"type": "function", "function": function}]
    called = {"name": "weather", "arguments": '{"place": "Oslo"}'}
    calls = [{"id": "c", "type": "function", "function": called}]
    talk = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "snow"},
    ]
    for messages in (QUESTION, talk):
        asked = {"messages": messages, "tools": tools}
        template = ask(peer, "/apply-template", asked)["prompt"]
        options = {"add_special": True, "parse_special": True}
        read = ask(peer, "/tokenize", {"content": template, **options})
        assert read["tokens"] == encode_chat(messages, names, tools=tools)
