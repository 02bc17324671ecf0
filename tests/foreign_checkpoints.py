"""Checkpoints as others publish them: small random models with a tokenizer of their own, saved by
transformers. Only `byte_level` and `sentence_pieces` do without it."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tests.tasks.corpus.shared_data import shared

# Qwen 2's words, from its tokenizer.json; those of GPT-2 are what ByteLevel finds by itself.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, MARKS = "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]
SIZES = {"num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.15}
LLAMA_SIZES = SIZES | {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}


@functools.cache
def learned_from() -> tuple[str, str]:
    """English and Japanese."""
    names = ("text/tinyshakespeare.txt", "text/wagahaiwa_nekodearu.ja.txt")
    english, japanese = (shared(name).read_text()[:60_000] for name in names)
    return english, japanese


@functools.cache
def byte_level(kind: str) -> tokenizers.Tokenizer:
    """kind: "gpt2" or "qwen2"."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END, *(MARKS if kind == "qwen2" else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(learned_from(), trainer)
    return made


@functools.cache
def sentence_pieces() -> bytes:
    """A model as Llama 2's: BPE with bytes, and a space put before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(learned_from()[0].splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def save_checkpoint(directory: Path, family: str, seed: int = 0, **changed: Any) -> Any:
    """The model of transformers that was saved there, its tokenizer beside it.

    family: "llama", "gpt2", "qwen2". changed: settings of its configuration.
    """
    import transformers

    torch.manual_seed(seed)
    if family == "llama":
        (directory / "made").mkdir(parents=True)
        (directory / "made" / "tokenizer.model").write_bytes(sentence_pieces())
        names = transformers.LlamaTokenizer.from_pretrained(directory / "made")
        settings = transformers.LlamaConfig(
            **LLAMA_SIZES | {"vocab_size": len(names), "num_key_value_heads": 2} | changed
        )
        model = transformers.LlamaForCausalLM(settings)
    else:
        names = transformers.PreTrainedTokenizerFast(
            tokenizer_object=byte_level(family), eos_token=END
        )
        if family == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
            settings = transformers.GPT2Config(
                **sizes | {"vocab_size": len(names), "initializer_range": 0.15} | changed
            )
            model = transformers.GPT2LMHeadModel(settings)
        else:
            # More rows than tokens, as Qwen's have.
            sizes = LLAMA_SIZES | {"num_key_value_heads": 2, "vocab_size": len(names) + 9}
            settings = transformers.Qwen2Config(**sizes | changed)
            model = transformers.Qwen2ForCausalLM(settings)
    names.save_pretrained(directory)
    model.eval().save_pretrained(directory)
    return model
