"""The models behind the endpoint: loaded in the background, swapped in when warm, and loaded again
when their engine is lost.

A request leases the model that is current when it arrives and keeps it to its end, so a swap
disturbs nobody. A version that cannot be loaded changes nothing; why is said in `state()`.
"""

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.chat import Tokenizer
from model.engine import Sampling
from model.tokenizer_files import calls_tools
from serve.engine_process import EngineProcess
from serve.grammar_check import GrammarCheck
from serve.metrics import RequestMetrics
from serve.specification import EngineOptions, ModelSpec

log = logging.getLogger(__name__)

WARM_UP_SECONDS = 120


class NotReady(Exception):
    """No model is served yet; the message says why."""


class UnknownModel(Exception):
    """Nothing is served under this name; the message says what is."""


@dataclass(eq=False)
class ServedModel:
    """A warm model. `leases` counts the requests that use it."""

    spec: ModelSpec
    engine: EngineProcess
    grammars: GrammarCheck
    calls_tools: bool = False  # it was trained to
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    since: float = field(default_factory=time.time)
    leases: int = 0

    def close(self, timeout: float = 10.0) -> None:
        """End its processes; requests under way end with finish_reason "abort"."""
        self.engine.close(timeout)
        self.grammars.close()


class ModelHost:
    """Holds the served models; `fetch` brings a spec's files to a local directory."""

    def __init__(self, fetch: Callable[[ModelSpec], Path]) -> None:
        self._fetch = fetch
        self._lock = threading.Condition()  # reentrant
        self._served: tuple[ServedModel, ...] = ()  # the main version first
        self._swapped: tuple[ModelSpec, ...] = ()  # the same, and those whose engine is lost
        self._wanted: ModelSpec | None = None
        self._failures: dict[str, str] = {}  # system fingerprint → reason
        self._loader: threading.Thread | None = None
        self._reviving = False  # a lost engine is being replaced
        self._lost = False  # and that failed
        self._closed = False

    def want(self, spec: ModelSpec) -> None:
        """Serve this version, and those beside it, as soon as all are loaded; returns at once. The
        latest wish wins.
        """
        with self._lock:
            self._wanted = spec
            self._reviving = self._lost = False
            for one in spec.everything:
                self._failures.pop(one.system_fingerprint, None)
            self._begin_loading()

    def wait(self) -> None:
        """Return when something is served, or nothing is being loaded any more."""
        with self._lock:
            self._lock.wait_for(lambda: self._served or self._loader is None or self._closed)

    def acquire(
        self, name: str, client: str | None = None, *, by_share: bool = True
    ) -> ServedModel:
        """The model for a request, which stays usable until `release`.

        A bare name that several versions share goes to each by its share, one `client` always to
        the same; or, not `by_share`, to the first. Raises NotReady or UnknownModel.
        """
        with self._lock:
            chosen = self.find(name, client) if by_share else self.first(name)
            chosen.leases += 1
            return chosen

    def first(self, name: str | None) -> ServedModel:
        """The first version under a bare name, or of all; else as `find`. It is always the same
        one, whatever the shares: numbers of several versions do not go together.
        """
        with self._lock:
            for spec in self._swapped:
                if name in (None, spec.name):
                    return self.find(spec.names[0])
            if name is None:
                raise NotReady(self.why_not_ready())
            return self.find(name)

    def find(self, name: str, client: str | None = None) -> ServedModel:
        """As `acquire`, without a lease."""
        with self._lock:
            served, swapped = self._served, self._swapped
        if not served:
            raise NotReady(self.why_not_ready())
        for one in served:
            if name in one.spec.names:
                return one
        sharing = [one for one in served if one.spec.name == name]
        if not sharing:
            for spec in swapped:
                if name in (spec.name, *spec.names):
                    anew = f"{name} is being started anew; try again in a moment"
                    raise NotReady(self._failures.get(spec.system_fingerprint, anew))
            known = dict.fromkeys(one.spec.name for one in served)
            raise UnknownModel(
                f"The model {name!r} does not exist; this endpoint serves "
                f"{', '.join(map(repr, known))}"
            )
        return _by_share(sharing, client)

    def release(self, served: ServedModel) -> None:
        with self._lock:
            served.leases -= 1
            self._lock.notify_all()

    def why_not_ready(self) -> str:
        wanted = self._wanted
        for one in wanted.everything if wanted else ():
            if failure := self._failures.get(one.system_fingerprint):
                return failure
        return "no model is served yet; try again in a moment"

    @property
    def served(self) -> tuple[ServedModel, ...]:
        return self._served

    @property
    def current(self) -> ServedModel | None:
        """The main version."""
        served = self._served
        return served[0] if served else None

    @property
    def healthy(self) -> bool:
        """Whether every engine works; one that is being replaced does not count against it."""
        return not self._lost and all(served.engine.healthy for served in self._served)

    def state(self) -> dict[str, Any]:
        """What is served, what is being loaded and what failed to load, in JSON."""
        with self._lock:
            served, wanted = self.current, self._wanted
            loading = self._loader is not None and wanted is not None
            return {
                "status": "ok" if served and self.healthy else "no model is served",
                "model": served.spec.name if served else None,
                "version": served.spec.version if served else None,
                "serving": served.spec.system_fingerprint if served else None,
                "shares": {s.spec.system_fingerprint: s.spec.share for s in self._served},
                "aliases": {s.spec.system_fingerprint: list(s.spec.aliases) for s in self._served},
                "engines": {s.spec.system_fingerprint: s.spec.engine_state() for s in self._served},
                "since": served.since if served else None,
                "request": wanted.request if wanted else None,
                "loading": wanted.system_fingerprint if loading and wanted else None,
                "failed": dict(self._failures),
            }

    def close(self, timeout: float = 5.0) -> None:
        """Stop the engines; requests under way end with finish_reason "abort"."""
        with self._lock:
            self._closed = True
            served, self._served = self._served, ()
            self._lock.notify_all()
        for one in served:
            one.close(timeout)

    def _begin_loading(self) -> None:
        if self._loader is None:
            self._loader = threading.Thread(target=self._load, name="loader", daemon=True)
            self._loader.start()

    def _revive(self, lost: ServedModel) -> None:
        """Load a model again whose engine's process has ended; until then, nobody gets it."""
        with self._lock:
            if self._closed or lost not in self._served:
                return
            log.error("the engine of %s is lost; it is started anew", lost.spec.system_fingerprint)
            self._served = tuple(one for one in self._served if one is not lost)
            self._reviving = True
            self._begin_loading()
        threading.Thread(target=self._retire, args=(lost,), daemon=True).start()

    def _load(self) -> None:
        """Load what is wanted until nothing else is wanted; one at a time."""
        while True:
            with self._lock:
                wanted, served = self._wanted, self._served
                failed = wanted is not None and any(
                    one.system_fingerprint in self._failures for one in wanted.everything
                )
                if self._closed or wanted is None or failed or self._is_served(wanted):
                    self._loader = None
                    self._lock.notify_all()
                    return
            fresh: list[ServedModel] = []
            try:
                for spec in wanted.everything:
                    if _same(served, spec) is None:
                        fresh.append(self._warm(spec))
            except Exception as error:
                log.exception("model %s cannot be served", spec.system_fingerprint)
                with self._lock:
                    reason = str(error) or type(error).__name__
                    self._failures[spec.system_fingerprint] = reason
                    self._lost = self._reviving
                for one in fresh:
                    one.close()
                continue
            self._swap(wanted, fresh)

    def _is_served(self, wanted: ModelSpec) -> bool:
        return [one.spec for one in self._served] == list(wanted.everything)

    def _swap(self, wanted: ModelSpec, fresh: Sequence[ServedModel]) -> None:
        """Serve exactly what is wanted; what is no longer, ends with its last request."""
        with self._lock:
            before = self._served
            after = []
            for spec in wanted.everything:
                one = _same(before, spec) or _same(fresh, spec)
                if one is not None:  # else its engine was lost meanwhile, and it is loaded next
                    after.append(one)
            self._reviving = len(after) < len(wanted.everything)
            if not self._closed:
                for one in after:
                    one.spec = next(s for s in wanted.everything if one.spec.same_model(s))
                self._served, self._swapped = tuple(after), wanted.everything
                self._lock.notify_all()
            gone = [one for one in (*before, *fresh) if one not in self._served]
        log.info("serving %s", ", ".join(one.spec.system_fingerprint for one in after))
        for one in gone:
            threading.Thread(target=self._retire, args=(one,), daemon=True).start()

    def _warm(self, spec: ModelSpec) -> ServedModel:
        """Load a model and generate with it once, so that the first user does not wait."""
        directory = self._fetch(spec)
        draft = None
        if spec.draft is not None:
            draft = self._fetch(spec.model_copy(update={"artifact": spec.draft}))
            if Tokenizer.load(draft).data != Tokenizer.load(directory).data:
                raise ValueError(f"the draft model {spec.draft} has another tokenizer")
        options = EngineOptions(
            **{name: getattr(spec, name) for name in EngineOptions.model_fields}
        )
        engine = EngineProcess(directory, options, spec.system_fingerprint, draft)
        finished = threading.Event()
        prompt = [engine.tokenizer.begin, engine.tokenizer.roles["user"]]
        engine.submit(prompt, Sampling(max_tokens=4), lambda _: finished.set(), streamed=False)
        if not finished.wait(WARM_UP_SECONDS) or not engine.healthy:
            engine.close()
            raise RuntimeError(f"the engine gave no token within {WARM_UP_SECONDS} s")
        served = ServedModel(spec, engine, GrammarCheck(directory), calls_tools(directory))
        engine.when_lost(lambda: self._revive(served))
        return served

    def _retire(self, old: ServedModel) -> None:
        """End an engine when the last request that leased it is answered."""
        with self._lock:
            self._lock.wait_for(lambda: old.leases == 0 or self._closed)
        old.close()


def _same(served: Sequence[ServedModel], spec: ModelSpec) -> ServedModel | None:
    return next((one for one in served if one.spec.same_model(spec)), None)


def _by_share(sharing: Sequence[ServedModel], client: str | None) -> ServedModel:
    """One of several versions, each as often as its share says."""
    if len(sharing) == 1:
        return sharing[0]
    shares = [one.spec.share for one in sharing]
    if client is None:
        draw = random.random()
    else:
        draw = int.from_bytes(hashlib.sha256(client.encode()).digest()[:8], "big") / 2**64
    draw *= sum(shares)
    for one, share in zip(sharing, shares, strict=True):
        if draw < share:
            return one
        draw -= share
    return sharing[0]
