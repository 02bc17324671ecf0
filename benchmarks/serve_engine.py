"""Our engine beside transformers and llama.cpp: one Llama of 30 M parameters, fp32, one thread.

Figures are tokens per second of processor time (of the whole process), so that other work on the
machine disturbs them little. We, transformers and llama.cpp have a process each, with the allocator
that our engine's process has (large pages); they take turns, and medians are compared. Peers that
are not installed leave their rows empty, and their targets missed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.llama_cpp import LlamaCpp
from benchmarks.report import finish
from model.config import ModelConfig
from model.engine import Core, Sampling, generate_batch
from model.engine.weights import Weights
from model.huggingface import SpecialTokens, save_directory
from model.transformer import Transformer
from serve.engine_process import ALLOCATOR

CONFIG = ModelConfig(vocab_size=8192, width=512, layers=8, heads=8, context=2048)
PROMPT = 32  # tokens
TARGETS = {
    "single_vs_llama_cpp": (">=", 0.95),
    "single_vs_transformers": (">=", 2.0),
    "batch8_vs_transformers": (">=", 2.0),
    "batch32_vs_transformers_continuous": (">=", 4.0),
    "bf16_vs_fp32": (">", 1.0),
    "int8_vs_fp32": (">=", 1.6),
    "prefix_reuse_speedup": (">=", 5.0),
}


def prompts(count: int, length: int = PROMPT) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(3, CONFIG.vocab_size) for _ in range(length)] for _ in range(count)]


def ours(
    model: Transformer,
    batch: int,
    new: int,
    weights: Weights = "float32",
    compiled: bool = False,
) -> Callable[[], None]:
    core = Core(
        model,
        None,
        slots=batch,
        kv_tokens=max(2048, batch * 256),
        weights=weights,
        reuse=False,
        compiled=compiled,
    )
    if core.program is not None and not core.program.wait():
        print(f"{weights}: the step is not compiled here", file=sys.stderr)
    sampling = Sampling(max_tokens=new)

    def run() -> None:
        for number, prompt in enumerate(prompts(batch)):
            core.add(core.sequence(str(number), prompt, sampling, streamed=False))
        while core.has_work:
            core.step()

    return run


def matrices_alone(model: Transformer, new: int) -> Callable[[], None]:
    """A row times every matrix for each token, and nothing else: what no step can undercut."""
    runner = Core(model, None, slots=1, kv_tokens=2048).runner
    x = torch.randn(1, CONFIG.width)
    hidden = torch.randn(1, CONFIG.mlp_size)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(new):
            for layer in runner.layers:
                layer.qkv(x)
                layer.output(x)
                layer.mlp.up(x)
                layer.mlp.down(hidden)
            runner.output(x)

    return run


def of_transformers(directory: Path, batch: int, new: int) -> Callable[[], None]:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor(prompts(batch))

    def run() -> None:
        peer.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    return run


def of_transformers_continuous(directory: Path, batch: int, new: int) -> Callable[[], None]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    peer = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run() -> None:
        peer.generate_batch(inputs=prompts(batch), generation_config=config)

    return run


def of_llama_cpp(peer: LlamaCpp, new: int) -> Callable[[], None]:
    (prompt,) = prompts(1)

    def run() -> None:
        peer.generate(prompt, new)

    return run


def contenders(whose: str, new: int, directory: Path) -> dict[str, Callable[[], None]]:
    """What one process runs, by name; the number behind a name is its batch."""
    if whose == "transformers":
        return {
            "transformers_1": of_transformers(directory, 1, new),
            "transformers_8": of_transformers(directory, 8, new),
            "transformers_continuous_32": of_transformers_continuous(directory, 32, new),
        }
    model = the_model()
    if whose == "llama_cpp":
        eight_bits = LlamaCpp.of(model, eight_bits=True)
        return {
            "llama_cpp_1": of_llama_cpp(LlamaCpp.of(model), new),
            "llama_cpp_8bit_1": of_llama_cpp(eight_bits, new),
        }
    return {
        "ours_1": ours(model, 1, new, compiled=True),
        "ours_uncompiled_1": ours(model, 1, new),
        "ours_8": ours(model, 8, new),
        "ours_32": ours(model, 32, new),
        "ours_matrices_alone_1": matrices_alone(model, new),
        "ours_bf16_1": ours(model, 1, new, "bfloat16", compiled=True),
        "ours_int8_1": ours(model, 1, new, "int8", compiled=True),
    }


def the_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval().requires_grad_(False)


def worker(whose: str, new: int, directory: Path) -> None:
    """Run what standard input names, a line each; tell the processor seconds of this process."""
    torch.set_num_threads(1)
    runs = contenders(whose, new, directory)
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what peers print
    print(*runs, file=told)
    for line in sys.stdin:
        started = time.process_time()
        runs[line.strip()]()
        print(time.process_time() - started, file=told)


def measure(peers: Sequence[str], new: int, directory: Path, rounds: int) -> dict[str, float]:
    """Tokens per processor second: contenders in alternation, the median of the rounds."""
    processes = {
        whose: subprocess.Popen(
            [sys.executable, __file__, "--worker", whose, str(new), str(directory)],
            env=os.environ | ALLOCATOR,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for whose in ("ours", *peers)
    }

    def ask(process: subprocess.Popen[str], name: str | None = None) -> str:
        assert process.stdin is not None and process.stdout is not None
        if name is not None:
            print(name, file=process.stdin, flush=True)
        if not (line := process.stdout.readline()):
            raise SystemExit(f"a contender failed: {process.args}")
        return line

    names = {whose: ask(process).split() for whose, process in processes.items()}
    rates: dict[str, list[float]] = {name: [] for each in names.values() for name in each}
    for turn in range(rounds + 1):
        for whose, process in processes.items():
            for name in names[whose]:
                spent = float(ask(process, name))
                if turn:  # the first warms up
                    rates[name].append(int(name.rpartition("_")[2]) * new / spent)
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    for process in processes.values():
        process.communicate()
    return {name: statistics.median(values) for name, values in rates.items()}


def prefix_reuse(model: Transformer) -> float:
    """How much sooner the first token of a second prompt comes that shares 1,000 tokens."""
    ratios = []
    for seed in range(3):
        core = Core(model, None, slots=1)
        shared = prompts(1, 1000)[0][seed:] + [seed + 5] * seed
        spent = []
        for tail in prompts(2, 8):
            core.add(core.sequence("x", shared + tail, Sampling(max_tokens=1)))
            started = time.process_time()
            while core.has_work:
                core.step()
            spent.append(time.process_time() - started)
        ratios.append(spent[0] / spent[1])
    return statistics.median(ratios)


def quantization_loss(model: Transformer, weights: str) -> float:
    """Mean difference of logprobs (nats per token) against fp32, on the model's own answers."""
    asked = prompts(4)
    answers = generate_batch(
        model, None, asked, Sampling(temperature=1.0, seed=1, max_tokens=32, ignore_eos=True)
    )
    texts = [prompt + answer.tokens for prompt, answer in zip(asked, answers, strict=True)]
    scoring = Sampling(max_tokens=0, logprobs=0, prompt_logprobs=True)
    whole, small = (
        generate_batch(model, None, texts, scoring, weights=kind) for kind in ("float32", weights)
    )
    losses = [
        one.logprob - other.logprob
        for a, b in zip(whole, small, strict=True)
        for one, other in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True)
        if one is not None and other is not None
    ]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        whose, new, directory = arguments.worker
        worker(whose, int(new), Path(directory))
        return
    new, rounds = (32, 3) if arguments.quick else (128, 5)
    torch.set_num_threads(1)
    model = the_model()
    needs = {"transformers": ("transformers",), "llama_cpp": ("xllamacpp", "gguf")}
    peers = [whose for whose, all_of in needs.items() if all(map(find_spec, all_of))]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_directory(directory, model, SpecialTokens(bos=1, eos=(2,), pad=0))
        rates = measure(peers, new, directory, rounds)

    def ratio(one: str, other: str) -> float | None:
        return rates[one] / rates[other] if other in rates else None

    metrics: dict[str, float | None] = {
        f"{name}_tokens_per_cpu_second": rate for name, rate in rates.items()
    }
    metrics |= {
        "single_vs_llama_cpp": ratio("ours_1", "llama_cpp_1"),
        "single_vs_transformers": ratio("ours_1", "transformers_1"),
        "matrices_alone_vs_transformers": ratio("ours_matrices_alone_1", "transformers_1"),
        "batch8_vs_transformers": ratio("ours_8", "transformers_8"),
        "batch32_vs_transformers_continuous": ratio("ours_32", "transformers_continuous_32"),
        "bf16_vs_fp32": ratio("ours_bf16_1", "ours_1"),
        "int8_vs_fp32": ratio("ours_int8_1", "ours_1"),
        "int8_vs_llama_cpp_8bit": ratio("ours_int8_1", "llama_cpp_8bit_1"),
        "bf16_loss_nats_per_token": quantization_loss(model, "bfloat16"),
        "int8_loss_nats_per_token": quantization_loss(model, "int8"),
        "prefix_reuse_speedup": prefix_reuse(model),
    }
    finish("serve_engine", metrics, TARGETS)


if __name__ == "__main__":
    main()
