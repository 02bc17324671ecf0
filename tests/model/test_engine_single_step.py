"""A step that was compiled computes what the runner does, and whoever cannot have one goes on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.engine import Core, Sampling, generate_batch, programs
from model.engine.programs import KEPT, Program, directory
from model.engine.runner import Span
from model.engine.single_step import Recipe, SingleStep, expressible, parts_of, written_for
from model.engine.weights import Dense
from tests.model.test_engine import GREEDY, VARIANTS, continued, prompts
from tests.tiny_models import DEEPSEEK2, GEMMA2, GEMMA3, GPT2, transformer

PLAIN = [flags for flags in VARIANTS if not {"kv_latent", "experts"} & set(flags)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def core_of(weights: str = "float32", **flags: object) -> Core:
    return Core(transformer(**flags), None, slots=3, weights=weights, compiled=True)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("flags", PLAIN)
def test_the_step_as_it_is_written_for_the_compiler(flags: dict, weights: str) -> None:
    runner = core_of(weights, **flags).runner
    recipe = Recipe.of(runner, threads=1)
    step, parts = SingleStep(recipe), parts_of(runner)
    (tokens,) = prompts(1, longest=200, seed=2)
    page = 2  # another sequence's pages lie before it
    runner.forward([Span(page, 0, tokens[:3])])
    place = runner.place(page)
    with torch.inference_mode():
        for position, token in enumerate(tokens[3:], start=3):
            counts = [min(position + 1, window or position + 1) for window in recipe.windows]
            found = step(
                torch.tensor([[token], [position], [place + position]]),
                torch.tensor([place + position + 1 - count for count in counts]),
                [torch.zeros(count) for count in counts],
                parts,
            )
            wanted = runner.forward([Span(page, position, [token])])
            assert found.shape == wanted.shape and found.dtype == wanted.dtype
            near = 1e-5 if weights == "float32" else 0.05
            assert (found - wanted).abs().max() <= near * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "flags"),
    [
        ("float32", {"heads": 4, "kv_heads": 2, "sliding_window": 8}),
        ("float32", GPT2),
        ("bfloat16", GEMMA3),
        ("int8", GEMMA2),
    ],
)
def test_a_compiled_step_answers_the_same(weights: str, flags: dict) -> None:
    model = transformer(**flags)
    core = Core(model, None, slots=3, weights=weights, compiled=True)
    runner = core.runner
    assert core.program is not None and core.program.wait()
    assert runner.single is not None
    one, other = prompts(2, longest=30)
    if weights == "float32":
        core.add(core.sequence("1", one, GREEDY, streamed=False))
        answers = {}
        while core.has_work:
            answers |= {update.id: update.tokens for update in core.step()}
        assert answers["1"] == continued(model, one, GREEDY.max_tokens or 0)
    runner.forward([Span(0, 0, other)])
    for position in range(len(other), len(other) + 40):
        (found, wanted) = (step(runner, Span(0, position, [31])) for step in (compiled, uncompiled))
        near = 1e-5 if weights == "float32" else 0.05
        assert (found - wanted).abs().max() <= near * wanted.abs().max()


def compiled(runner, span: Span) -> torch.Tensor:
    assert runner.single.takes([span])
    return runner.forward([span])


def uncompiled(runner, span: Span) -> torch.Tensor:
    single, runner.single = runner.single, None
    try:
        return runner.forward([span])
    finally:
        runner.single = single


@pytest.mark.slow
def test_a_program_is_made_once_and_found_again() -> None:
    """It is of a shape, not of weights; and what lies there damaged is made again."""
    first = core_of()
    assert first.program is not None and first.program.wait()
    torch.manual_seed(5)
    again = core_of()
    assert again.runner.single is not None
    assert core_of(width=128).runner.single is None
    old = [directory() / f"old{number}.so" for number in range(KEPT)]
    for file in old:
        file.touch()
        os.utime(file, (0, 0))
    other = core_of(width=128)
    assert other.program is not None and other.program.wait()
    assert sum(file.exists() for file in old) == KEPT - 2
    (file,) = directory().glob(f"{first.program.name}*.so")
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.unlink()  # which those keep that have loaded it
    file.write_bytes(half)
    damaged = core_of()
    assert damaged.runner.single is None and not file.exists()
    (prompt,) = prompts(1)
    damaged.add(damaged.sequence("1", prompt, Sampling(max_tokens=3)))
    while damaged.has_work:
        damaged.step()


def test_steps_make_it_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.programs.WORTH_IT", 20)
    started = []
    monkeypatch.setattr(Program, "start", lambda self: started.append(self))
    core = core_of()
    for count in (10, 20):
        core.add(core.sequence(str(count), [30, 31], Sampling(max_tokens=count)))
        while core.has_work:
            core.step()
        assert bool(started) == (count == 20)
    assert started == [core.program]


def test_without_a_compiler_answers_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    core = core_of()
    with caplog.at_level(logging.WARNING):
        assert core.program is not None and not core.program.wait()
    assert "answers go on uncompiled" in caplog.text and "compiler" in caplog.text
    assert not list(directory().iterdir())
    assert not kept_plain(core)
    with monkeypatch.context() as later:  # the child's number may be another's by now
        later.setattr(os, "killpg", lambda *of: pytest.fail(f"killed {of}"))
        core.close()
    (prompt,) = prompts(1)
    core.add(core.sequence("1", prompt, GREEDY))
    while core.has_work:
        core.step()


class Failing:
    """A program that cannot run here."""

    def __init__(self) -> None:
        self.asked = 0

    def takes(self, spans: list[Span]) -> bool:
        return len(spans) == 1 and len(spans[0].tokens) == 1

    def __call__(self, span: Span) -> torch.Tensor:
        self.asked += 1
        raise RuntimeError("run_func_(...) API call failed")


def test_a_program_that_fails_is_left_and_its_answer_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, (prompt,) = transformer(), prompts(1)
    core = Core(model, None, slots=3, compiled=True)
    failing = Failing()
    monkeypatch.setattr(core.runner, "single", failing)
    core.add(core.sequence("1", prompt, GREEDY))
    answer: list[int] = []
    with caplog.at_level(logging.WARNING):
        while core.has_work:
            answer += [token for update in core.step() for token in update.tokens]
    assert answer == continued(model, prompt, len(answer)) and answer
    assert failing.asked == 1 and core.runner.single is None
    assert "answers go on uncompiled, as a program failed: run_func_" in caplog.text


def kept_plain(core: Core) -> int:
    """Matrices that are kept as they were given, too."""
    matrices = [matrix for layer in core.runner.layers for matrix in layer.matrices]
    return sum(isinstance(one, Dense) and one.plain is not None for one in matrices)


def without_a_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (Path, "home", without_a_home, "Could not determine home directory"),
        (programs.os, "access", lambda *asked: False, "steps cannot be written"),
    ],
)
def test_without_a_place_for_programs_answers_go_on(
    owner: object,
    name: str,
    value: object,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(programs, "_child", lambda *told: pytest.fail("compiles for nothing"))
    core = core_of()
    with caplog.at_level(logging.WARNING):
        assert core.program is not None and not core.program.wait()
    assert said in caplog.text
    core.add(core.sequence("1", [30, 31], GREEDY))
    while core.has_work:
        core.step()


def test_matrices_are_kept_twice_only_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []  # of the layers and of the output, when all are made
    monkeypatch.setattr(
        "model.engine.runner.settle",
        lambda matrices, tried: at_once.append(sum(one.plain is not None for one in matrices)),
    )
    assert kept_plain(core_of(layers=3)) == 3 * 4
    Core(transformer(layers=3), None, slots=2)
    assert not kept_plain(core_of(**DEEPSEEK2))
    monkeypatch.setattr("model.engine.runner.COPIED", 1)
    assert not kept_plain(core_of(layers=3))
    assert at_once == [3 * 4 + 1, 1, 1, 1]


def test_a_program_is_named_by_all_the_code_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.of(core_of().runner, 1)
    names = {programs._digest(recipe)}
    for function in ("activate", "softcapped", "compile_step"):
        with monkeypatch.context() as changed:
            changed.setattr(programs, function, without_a_home)
            names.add(programs._digest(recipe))
    assert len(names) == 4


def test_the_compiler_says_why_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_end_with", lambda parent: None)
    monkeypatch.setattr(programs.json, "load", lambda stream: {})  # an error that says nothing
    monkeypatch.setattr(programs, "_recipe", lambda told: next(iter(())))
    monkeypatch.setattr(sys, "argv", ["-c", "name"])
    with pytest.raises(SystemExit, match="StopIteration"):
        programs.main()


def test_a_compiler_that_is_killed_ends_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(name: str, scratch: str) -> subprocess.Popen[bytes]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(["sh", "-c", "echo a warning >&2; kill -9 $$"], **pipes)

    monkeypatch.setattr(programs, "_child", killed)
    core = core_of()
    with caplog.at_level(logging.WARNING):
        assert core.program is not None and not core.program.wait()
    assert "answers go on uncompiled: the compiler was killed by signal 9" in caplog.text
    core.add(core.sequence("1", [30, 31], GREEDY))
    while core.has_work:
        core.step()


def test_a_compiler_left_alone_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, ended = tmp_path / "scratch", []
    (scratch / "deep").mkdir(parents=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(scratch))
    monkeypatch.setattr(os, "killpg", lambda *of: ended.append(of))
    programs._end_with(parent=-1)
    assert ended and not scratch.exists()


def test_closing_ends_the_compiler() -> None:
    core = core_of()
    assert core.program is not None
    core.program.start()
    deadline = time.monotonic() + 60
    while core.program._child is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = core.program._child
    core.close()
    assert child.wait(10) < 0
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    assert core.runner.single is None


def test_who_cannot_have_one() -> None:
    assert not expressible(Core(transformer(**DEEPSEEK2), None, compiled=True).runner)
    assert not expressible(Core(transformer(), None, compiled=False).runner)
    assert Core(transformer(), None, compiled=True, deterministic=True).program is None
    for flags in ({"sliding_window": 2}, {"context": 2}):  # nothing varies in length
        assert not written_for(ModelConfig(**flags))
    assert written_for(ModelConfig(sliding_window=3))
    with_latents = Core(transformer(**DEEPSEEK2), None, slots=2, compiled=True)
    assert with_latents.program is not None and not with_latents.program.wait()
    (answer,) = generate_batch(transformer(**DEEPSEEK2), None, [[30, 31]], GREEDY, compiled=True)
    assert len(answer.tokens) == 24


def test_recipes_tell_shapes_apart() -> None:
    one = Recipe.of(core_of().runner, 1)
    assert one == Recipe.of(core_of().runner, 1)
    for flags in ({"width": 128}, {"qk_norm": True}, {"layers": 1}):
        assert Recipe.of(core_of(**flags).runner, 1) != one
    assert Recipe.of(core_of("int8").runner, 1) != one
    assert isinstance(one.config, ModelConfig)
