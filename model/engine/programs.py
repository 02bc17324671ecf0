"""Where the compiled steps (`single_step`) are made and kept.

A program is a library, `<XDG_CACHE_HOME>/gristmill/steps/<of what>-<of its bytes>.so`: digests of
its recipe, of torch, of the processor and of the code it is made of, and of the file, as the
system's loader takes a file cut short for a whole one and dies of it. It is made by a process of
its own, at the lowest priority, once enough steps were taken to be worth it; until then, and where
there is no C++ compiler, the engine goes on without.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.config import ModelConfig
from model.engine import single_step
from model.engine.single_step import SHORTEST, CompiledStep, Recipe, SingleStep, expressible
from model.layers import activate
from model.losses import softcapped
from model.rope_scaling import RopeScaling

if TYPE_CHECKING:
    from model.engine.runner import Runner

log = logging.getLogger(__name__)

WORTH_IT = 2000  # single steps: some seconds of one stream, after which a compilation is
TIMEOUT = 600  # seconds for a compilation
NICE = "19"
KEPT = 100  # programs, of some 2 MB, those used last
LOOKED = 1.0  # seconds, between looks whether the engine still lives
OPTIONS = {"assert_indirect_indexing": False, "aot_inductor.compile_wrapper_opt_level": "O1"}


class Program:
    """The program of one runner's step: found, or made in the background, and put to use."""

    def __init__(self, runner: "Runner", threads: int = 1) -> None:
        self.runner = runner
        self.recipe = Recipe.of(runner, threads) if expressible(runner) else None
        self.name = _digest(self.recipe) if self.recipe else None
        self._steps = 0
        self._lock = threading.Lock()
        self._maker: threading.Thread | None = None  # guarded by _lock
        self._child: subprocess.Popen[bytes] | None = None  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._use()

    def stepped(self) -> None:
        """A single step was taken without the program."""
        self._steps += 1
        if self._steps == WORTH_IT:
            self.start()

    def start(self) -> None:
        """Make the program in the background, where it can be made and is not there."""
        with self._lock:
            if self.name is None or self.runner.single or self._maker or self._closed:
                return
            self._maker = threading.Thread(target=self._make, name="step-compiler", daemon=True)
            self._maker.start()

    def wait(self) -> bool:
        """Make it now; whether it is in use then."""
        self.start()
        if self._maker is not None:
            self._maker.join()
        return self.runner.single is not None

    def close(self) -> None:
        """Make it no more."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                _kill(self._child)
        if self._maker is not None:
            self._maker.join()

    def _make(self) -> None:
        assert self.recipe is not None and self.name is not None
        try:
            cache = directory()
            cache.mkdir(parents=True, exist_ok=True)
            if not os.access(cache, os.W_OK):
                raise PermissionError(f"{cache} cannot be written")
            told = json.dumps(dataclasses.asdict(self.recipe)).encode()
            with tempfile.TemporaryDirectory(prefix="gristmill-step-") as scratch:
                with self._lock:
                    if self._closed:
                        return
                    self._child = _child(self.name, scratch)
                _, errors = self._child.communicate(told, timeout=TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            if self._child is not None:
                _kill(self._child)
            self._give_up(str(error))
            return
        if self._closed:
            return
        if (code := self._child.returncode) < 0:
            self._give_up(f"the compiler was killed by signal {-code}")
            return
        if code:
            words = errors.decode(errors="replace").strip().splitlines() or ["without a word"]
            self._give_up(f"the compiler ended: {words[-1]}")
            return
        self._use()
        if self.runner.single is None:
            self._give_up("what was made cannot be loaded")

    def _give_up(self, reason: str) -> None:
        log.warning("answers go on uncompiled: %s", reason)
        self.runner.drop_plain()

    def _use(self) -> None:
        """Load the program if it is there; a file that is damaged is removed."""
        if self.recipe is None:
            return
        paths: list[Path] = []
        with contextlib.suppress(OSError):
            paths += directory().glob(f"{self.name}-*.so")
        for path in paths:
            try:
                if not path.stem.endswith(_of_bytes(path)):
                    raise RuntimeError("it is not as it was written")
                self.runner.single = CompiledStep(self.runner, self.recipe, path)
                with contextlib.suppress(OSError):
                    os.utime(path)  # for whoever keeps the latest
                return
            except (OSError, RuntimeError) as error:
                log.warning("%s is removed, as it cannot be loaded: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()


def directory() -> Path:
    """Raises OSError for a user who has no home."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(f"there is nowhere to keep a program: {error}") from error
    return Path(cache) / "gristmill" / "steps"


def compile_step(recipe: Recipe, name: str) -> None:
    """Make the program of a recipe. Raises what the compiler raises."""
    parts = [
        [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in part]
        for part in recipe.parts
    ]
    columns = [torch.arange(SHORTEST + 1) for _ in recipe.windows]
    starts = torch.zeros(len(recipe.windows), dtype=torch.int64)
    arguments = (torch.zeros(3, 1, dtype=torch.int64), starts, columns, parts)
    lengths = [
        {0: torch.export.Dim(f"seen{number}", min=SHORTEST, max=recipe.longest(window))}
        for number, window in enumerate(recipe.windows)
    ]
    shapes = (None, None, lengths, [[None] * len(part) for part in parts])
    with torch.no_grad():
        program = torch.export.export(SingleStep(recipe), arguments, dynamic_shapes=shapes)
        made = torch._inductor.aot_compile(
            program.module(), arguments, options={"cpp.threads": recipe.threads, **OPTIONS}
        )
    assert isinstance(made, str)
    part = directory() / f"{name}.{os.getpid()}.part"
    part.write_bytes(Path(made).read_bytes())
    part.replace(directory() / f"{name}-{_of_bytes(part)}.so")
    for old in sorted(directory().iterdir(), key=lambda path: -path.stat().st_mtime)[KEPT:]:
        old.unlink(missing_ok=True)


def main() -> None:
    """The child: a recipe on stdin, the program's name as argument."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    try:
        compile_step(_recipe(json.load(sys.stdin)), sys.argv[1])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])


def _child(name: str, scratch: str) -> "subprocess.Popen[bytes]":
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        ["nice", "-n", NICE, sys.executable, "-c", f"from {__name__} import main; main()", name],
        cwd=root,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": scratch, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """The child and the compilers it has started; once it has ended, its id may be another's."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _end_with(parent: int) -> None:
    """End this process and those it started when its parent ends, which cannot tidy up then."""
    while os.getppid() == parent:
        time.sleep(LOOKED)
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _recipe(told: dict[str, Any]) -> Recipe:
    config = told["config"]
    if config["rope_scaling"] is not None:
        config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
    parts = [[(tuple(shape), dtype) for shape, dtype in part] for part in told["parts"]]
    return Recipe(
        ModelConfig(**config),
        told["threads"],
        tuple(told["windows"]),
        tuple(told["window_of"]),
        tuple(map(tuple, parts)),
    )


def _digest(recipe: Recipe) -> str:
    known = [
        json.dumps(dataclasses.asdict(recipe), sort_keys=True),
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        _processor(),
        inspect.getsource(single_step),
        *(inspect.getsource(made_of) for made_of in (activate, softcapped, compile_step)),
        json.dumps(OPTIONS),
    ]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:32]


def _of_bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _processor() -> str:
    """What this processor can do: programs are made for it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
