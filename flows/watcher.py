"""Restarts services that die, keeps their logs bounded and ends work that lost its owner.

Started by `gristmill up`, ended by `gristmill down`. Nothing depends on it: killed, it leaves the
services running, and the next `up` starts it again.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from flows.processes import mind_signals
from flows.reaper import Reaper
from flows.supervisor import Busy, Supervisor, cut_log
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings

TICK_SECONDS = 1.0
LOG_SECONDS = 10.0
REAP_SECONDS = 2.0
SERVE_SECONDS = 5.0
SERVE_PATIENCE = 4
"""Checks in a row that Serve's proxy must miss before it is started again."""
LONGEST_PAUSE = 60.0
FORGIVEN_AFTER = 120.0


class Watcher:
    """The state of the watch: who failed how often, and when to look at what again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.supervisor = Supervisor(settings, say)
        self.reaper = Reaper(settings, say)
        self._restarts: dict[str, list[float]] = {}
        self._missed = 0
        self._done: dict[str, float] = {}

    def run(self) -> None:
        """Watch until the stack is no longer wanted or its home is gone."""
        while self.supervisor.wanted:
            self._notice_settings()
            self.tick()
            time.sleep(TICK_SECONDS)

    def _notice_settings(self) -> None:
        """`up` may have moved services to other ports."""
        try:
            settings = Settings.load(self.settings.home)
        except UserError as error:
            say(str(error))
            return
        if settings != self.settings:
            self.settings = settings
            self.supervisor = Supervisor(settings, say)
            self.reaper = Reaper(settings, say)

    def tick(self) -> None:
        self._restart(self.supervisor.dead())
        if self._is_due("serve", SERVE_SECONDS):
            self._check_serve()
        if self._is_due("reap", 0 if self.reaper.hurried else REAP_SECONDS):
            try:
                self.reaper.reap()
            except Exception as error:  # whatever a server in trouble answers, the watch goes on
                say(f"could not look for lost work: {type(error).__name__}: {error}")
        if self._is_due("logs", LOG_SECONDS):
            for log in (self.settings.home / "logs").glob("*.log"):
                cut_log(log)

    def _restart(self, dead: list[str]) -> None:
        now = time.monotonic()
        chosen = [name for name in dead if now >= self._not_before(name)]
        if not chosen:
            return
        for name in chosen:
            self._restarts.setdefault(name, []).append(now)
        say(f"{', '.join(chosen)} died; starting again")
        try:
            self.supervisor.restart(chosen)
        except Busy:
            pass  # `up` or `down` is at work and knows better
        except UserError as error:
            say(str(error))

    def _not_before(self, name: str) -> float:
        """Doubling pauses between restarts; forgotten after two quiet minutes."""
        times = self._restarts.get(name, [])
        if times and time.monotonic() - times[-1] > FORGIVEN_AFTER:
            times.clear()
        return times[-1] + min(2.0 ** (len(times) - 1), LONGEST_PAUSE) if times else 0.0

    def _check_serve(self) -> None:
        known = self.supervisor.services
        if "serve" not in known or "ray" not in known:
            return
        if self.supervisor.is_healthy(known["serve"]) or not self.supervisor.is_healthy(
            known["ray"]
        ):
            self._missed = 0
            return
        self._missed += 1
        if self._missed >= SERVE_PATIENCE:
            self._missed = 0
            self._restart(["serve"])

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now < self._done.get(what, -math.inf) + every:
            return False
        self._done[what] = now
        return True


def say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.watcher", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    mind_signals()
    Watcher(Settings.load(parser.parse_args().home)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
