"""The model behind the endpoint: loaded in the background, swapped in when warm.

A request leases the model that is current when it arrives and keeps it to its end, so a swap
disturbs nobody. A version that cannot be loaded changes nothing; why is said in `state()`.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.engine import Engine, Sampling, load_model
from serve.specification import ModelSpec

log = logging.getLogger(__name__)

WARM_UP_SECONDS = 120


class NotReady(Exception):
    """No model is served yet; the message says why."""


@dataclass(eq=False)
class ServedModel:
    """A warm model. `leases` counts the requests that use it."""

    spec: ModelSpec
    engine: Engine
    parameters: int
    since: float = field(default_factory=time.time)
    leases: int = 0


class ModelHost:
    """Holds the served model; `fetch` brings a spec's files to a local directory."""

    def __init__(self, fetch: Callable[[ModelSpec], Path]) -> None:
        self._fetch = fetch
        self._lock = threading.Condition()  # reentrant
        self._current: ServedModel | None = None
        self._wanted: ModelSpec | None = None
        self._failures: dict[str, str] = {}  # system fingerprint → reason
        self._loader: threading.Thread | None = None
        self._closed = False

    def want(self, spec: ModelSpec) -> None:
        """Serve this model as soon as it is loaded; returns at once. The latest wish wins."""
        with self._lock:
            self._wanted = spec
            self._failures.pop(spec.system_fingerprint, None)
            if self._loader is None:
                self._loader = threading.Thread(target=self._load, name="loader", daemon=True)
                self._loader.start()

    def acquire(self) -> ServedModel:
        """The current model, which stays usable until `release`. Raises NotReady."""
        with self._lock:
            if self._current is None:
                raise NotReady(self.why_not_ready())
            self._current.leases += 1
            return self._current

    def release(self, served: ServedModel) -> None:
        with self._lock:
            served.leases -= 1
            self._lock.notify_all()

    def why_not_ready(self) -> str:
        wanted = self._wanted
        failure = wanted and self._failures.get(wanted.system_fingerprint)
        return failure or "no model is served yet; try again in a moment"

    @property
    def current(self) -> ServedModel | None:
        return self._current

    @property
    def healthy(self) -> bool:
        served = self._current
        return served is None or served.engine.healthy

    def state(self) -> dict[str, Any]:
        """What is served, what is being loaded and what failed to load, in JSON."""
        with self._lock:
            served, wanted = self._current, self._wanted
            loading = self._loader is not None and wanted is not None
            return {
                "status": "ok" if served and served.engine.healthy else "no model is served",
                "model": served.spec.name if served else None,
                "version": served.spec.version if served else None,
                "serving": served.spec.system_fingerprint if served else None,
                "since": served.since if served else None,
                "request": wanted.request if wanted else None,
                "loading": wanted.system_fingerprint if loading and wanted else None,
                "failed": dict(self._failures),
            }

    def close(self, timeout: float = 5.0) -> None:
        """Stop the engine; requests under way end with finish_reason "abort"."""
        with self._lock:
            self._closed = True
            served, self._current = self._current, None
            self._lock.notify_all()
        if served is not None:
            served.engine.close(timeout)

    def _load(self) -> None:
        """Load what is wanted until nothing else is wanted; one at a time."""
        while True:
            with self._lock:
                wanted, served = self._wanted, self._current
                if self._closed or wanted is None or (served and served.spec.same_model(wanted)):
                    self._loader = None
                    return
                if wanted.system_fingerprint in self._failures:
                    self._loader = None
                    return
            try:
                fresh = self._warm(wanted)
            except Exception as error:
                log.exception("model %s cannot be served", wanted.system_fingerprint)
                with self._lock:
                    reason = str(error) or type(error).__name__
                    self._failures[wanted.system_fingerprint] = reason
                continue
            with self._lock:
                if self._closed:
                    old: ServedModel | None = fresh
                else:
                    old, self._current = self._current, fresh
            log.info("serving %s", wanted.system_fingerprint)
            if old is not None:
                threading.Thread(target=self._retire, args=(old,), daemon=True).start()

    def _warm(self, spec: ModelSpec) -> ServedModel:
        """Load a model and generate with it once, so that the first user does not wait."""
        loaded = load_model(self._fetch(spec))
        engine = Engine(
            loaded.model,
            loaded.tokenizer,
            slots=spec.slots,
            max_waiting=spec.max_waiting,
            threads=spec.threads,
        )
        finished = threading.Event()
        prompt = [loaded.tokenizer.begin, loaded.tokenizer.roles["user"]]
        engine.submit(prompt, Sampling(max_tokens=4), lambda _: finished.set(), streamed=False)
        if not finished.wait(WARM_UP_SECONDS) or not engine.healthy:
            engine.close()
            raise RuntimeError(f"the engine gave no token within {WARM_UP_SECONDS} s")
        parameters = sum(p.numel() for p in loaded.model.parameters())
        return ServedModel(spec, engine, parameters)

    def _retire(self, old: ServedModel) -> None:
        """End an engine when the last request that leased it is answered."""
        with self._lock:
            self._lock.wait_for(lambda: old.leases == 0 or self._closed)
        old.engine.close()
