"""A person's mistakes, as typed: one sentence and a failing exit code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import main
from tests.conftest import Stack

Told = Callable[..., list[str]]
CLOCK = re.compile(r"^ *\d+:\d\d ")


def settings_of(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs a command that must fail; what it told the person, without what good ones print too."""

    def run(home: Path, *arguments: str) -> list[str]:
        capsys.readouterr()
        code = main(["--home", str(home), *arguments])
        printed = "".join(capsys.readouterr())
        assert code == 1, printed
        return complaints(printed)

    return run


def complaints(printed: str) -> list[str]:
    lines = [CLOCK.sub("", line) for line in printed.splitlines()]
    usual = ("run ", "its page: ")
    stages = r"[a-z-]+ +(Running|Completed|Cached|Failed|AwaitingRetry|Retrying)\b.*"
    progress = r".* of .*\(\d+%\).*"
    return [
        line.removeprefix("gristmill: ")
        for line in lines
        if line and not line.startswith(usual) and not re.fullmatch(f"{stages}|{progress}", line)
    ]


@pytest.mark.parametrize(
    ("flow", "pairs", "sentence"),
    [
        (
            "pipeline",
            ["tokenizer.vocab=1200"],
            "pipeline has no parameter 'tokenizer.vocab'; did you mean vocab_size?",
        ),
        (
            "pipeline",
            ["pretrain.batch=0"],
            "pretrain.batch = 0 is impossible: input should be greater than or equal to 1",
        ),
        (
            "corpus",
            ["corpus.deduplicate.threshold=7"],
            "corpus.deduplicate.threshold = 7 is impossible: input should be less than or equal "
            "to 1",
        ),
        (
            "pretrain",
            ["pretrain.sequence=512"],
            "sequence 512 is longer than the model's context 256; lower one or raise the other",
        ),
        (
            "pipeline",
            ['corpus.seeds=["nonsense"]'],
            "seed 'nonsense' cannot be crawled",
        ),
    ],
)
def test_what_the_form_can_know_is_told_without_a_stack(
    told: Told, tmp_path: Path, flow: str, pairs: list[str], sentence: str
) -> None:
    (line,) = told(tmp_path, "run", flow, *settings_of(*pairs), "--watch")
    assert sentence in line


def test_an_unknown_flow_and_an_unknown_preset_name_those_there_are(
    told: Told, tmp_path: Path
) -> None:
    (line,) = told(tmp_path, "run", "pipline")
    assert "no flow is called 'pipline'; there are corpus, tokenizer, pretrain" in line
    (line,) = told(tmp_path, "run", "pipeline", "--config", "huge")
    assert "no file 'huge', and no such preset; presets are: " in line


def test_a_fine_tuning_longer_than_the_context_is_refused_before_anything_is_made(
    told: Told, stack: Stack
) -> None:
    pairs = settings_of("finetune.sequence=512")
    (line,) = told(stack.settings.home, "run", "pipeline", *pairs, "--watch")
    assert line == (
        "finetune.sequence 512 is longer than the base model's context 256; "
        "lower it or pretrain with a larger model.context"
    )
