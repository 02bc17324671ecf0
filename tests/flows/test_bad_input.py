"""A person's mistakes, as typed: one sentence, a failing exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killable_stack import settings_with_free_ports

from flows.cli import main
from flows.parameters import read_config
from tasks.runtime.store import MANIFEST
from tests.conftest import CHECKOUT, Stack
from tests.tasks.corpus.loopback_site import LoopbackSite, page

pytestmark = pytest.mark.timeout(400)

FEW = (
    'corpus.crawl.include=["*/library/[ab]*", "*/index.html", "*/robots.txt", "*/"]',
    "corpus.crawl.max_pages=150",
)
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


def half_written(stack: Stack, stage: str) -> list[Path]:
    """Directories of artifacts of a stage that were begun and never finished."""
    begun = (stack.settings.home / "store" / stage).glob("*")
    return [path for path in begun if not (path / MANIFEST).exists()]


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


def test_a_seed_that_nobody_answers_at_is_named(told: Told, stack: Stack) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        seed = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    pairs = settings_of(f'corpus.seeds=["{seed}"]', "corpus.crawl.retries=0")
    (line,) = told(stack.settings.home, "run", "corpus", *pairs, "--watch")
    assert line.startswith(f"crawl: the crawl found no page at {seed} (")
    assert line.endswith("check the addresses and the network, or set other crawl seeds")
    assert half_written(stack, "crawl") == []


def test_a_site_that_forbids_everything_leaves_no_crawl(told: Told, stack: Stack) -> None:
    with LoopbackSite({"/": page("/a")}, robots="User-agent: *\nDisallow: /\n") as site:
        pairs = settings_of(f'corpus.seeds=["{site.url}/"]')
        (line,) = told(stack.settings.home, "run", "corpus", *pairs, "--watch")
        assert set(site.paths) <= {"/robots.txt", "/sitemap.xml"}
    assert f"the crawl found no page at {site.url}/ (" in line and "robots" in line
    assert half_written(stack, "crawl") == []


def test_a_vocabulary_larger_than_the_corpus_supports_says_what_would_do(
    told: Told, stack: Stack, tmp_path: Path
) -> None:
    tiny = read_config("tiny")["corpus"]  # other tests use the same corpus
    preset = tmp_path / "large.json"
    preset.write_text(json.dumps({"corpus": tiny, "tokenizer": {"vocab_size": 400_000}}))
    arguments = ("run", "tokenizer", "--config", str(preset), "--watch")
    (line,) = told(stack.settings.home, *arguments)
    assert re.match(
        r"tokenizer: vocab_size 400000 is larger than the corpus supports \(\d+ pieces\); lower it",
        line,
    )
    assert half_written(stack, "tokenizer") == []


def test_a_missing_model_and_a_missing_alias_are_named(told: Told, stack: Stack) -> None:
    pairs = settings_of("model=nobody", "version=staging")
    (line,) = told(stack.settings.home, "run", "deploy", *pairs, "--watch")
    assert "model 'nobody' has no version or alias 'staging'; " in line


def test_a_taken_port_stops_up_before_it_starts_anything(stack: Stack, tmp_path: Path) -> None:
    taken = stack.settings.ports.prefect
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    settings_with_free_ports(tmp_path).save()
    command = ("--home", str(tmp_path), "up", "--prefect-port", str(taken))
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *command],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("gristmill: ")]
    assert f"port {taken} for prefect is taken by process" in told
    assert str(stack.settings.home) in told and "--ports prefect=PORT" in told
    assert not list((tmp_path / "run").glob("*.json"))


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A filesystem of one megabyte."""
    place = Path(tempfile.mkdtemp(prefix="gristmill-disk-"))
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "gristmill-test", str(place)]
    mounted = subprocess.run(options, capture_output=True, text=True)
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"no small filesystem can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=False)
    place.rmdir()


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(
    stack: Stack, small_disk: Path
) -> None:
    """The store is what fills; with room again, the same command completes."""
    home = Path(tempfile.mkdtemp(prefix="gristmill-full-"))
    names = settings_with_free_ports(home).model_copy(update={"runner": "flows.deployments"})
    full = Stack(names.model_copy(update={"store": str(small_disk / "store")}))
    full.settings.save()
    pairs = settings_of(*FEW)
    try:
        full.gristmill("up", timeout=240)
        done = full.command("run", "corpus", *pairs, "--watch", timeout=300)
        assert done.returncode == 1
        (line,) = complaints(done.stdout + done.stderr)
        assert re.search(r"no space left on the disk of .*; free some there and run again", line)
        store = small_disk / "store"
        assert [path for path in store.rglob("*") if ".partial-" in path.name] == []
        subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
        full.gristmill("run", "corpus", *pairs, "--watch", timeout=300)
        assert list(store.glob("split/*/manifest.json"))
    finally:
        full.command("down", timeout=120)
