"""A person at the Prefect dashboard: reads its pages, presses what is labelled, fills in forms."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from flows.runs import BUSY
from tasks.runtime.rest import Refused, call
from tests.browser import Page
from tests.conftest import Stack

FINDERS = """
window.seen = element => {
  const box = element.getBoundingClientRect()
  return box.width > 0 && box.height > 0 && getComputedStyle(element).visibility !== 'hidden'
}
window.shown = selector => [...document.querySelectorAll(selector)].filter(seen)
window.labelled = text => {
  const wanted = 'button, a, [role=menuitem], [role=tab], [role=switch]'
  const name = element => (element.ariaLabel || element.innerText || '').trim()
  const found = shown(wanted).filter(element => name(element) === text)
  const dialog = shown('[role=dialog], [role=alertdialog]').at(-1)
  return found.find(element => dialog?.contains(element)) ?? found[0]
}
window.field = path => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  const rest = [...path]
  let node
  while (rest.length && (node = walker.nextNode())) {
    const text = node.textContent.replace('(Optional)', '').trim()
    if (text === rest[0] && seen(node.parentElement)) rest.shift()
  }
  const comesAfter = element => node.compareDocumentPosition(element) & 4
  return rest.length ? undefined : shown('input, textarea').find(comesAfter)
}
window.centre = element => {
  element.scrollIntoView({block: 'center'})
  const box = element.getBoundingClientRect()
  return [box.x + box.width / 2, box.y + box.height / 2]
}
"""


class Dashboard:
    """One tab. What is pressed is found by its label, a field by the labels that lead to it."""

    def __init__(self, page: Page, stack: Stack) -> None:
        self.page, self.stack = page, stack
        page.send("Page.addScriptToEvaluateOnNewDocument", source=FINDERS)

    def open(self, path: str) -> None:
        self.page.open(f"{self.stack.settings.prefect_dashboard}/v2/{path}")

    def open_deployment(self, flow: str) -> str:
        """The page of `FLOW/local`; returns its id."""
        deployment: dict[str, Any] = self.ask(f"deployments/name/{flow}/local")
        self.open(f"deployments/deployment/{deployment['id']}")
        self.see("Deployment Version")
        return str(deployment["id"])

    def open_run(self, run: str) -> None:
        self.open(f"runs/flow-run/{run}")
        self.see("Task Runs")

    def see(self, text: str, seconds: float = 60) -> None:
        """Until the page shows a text."""
        self.page.wait(f"document.body.innerText.includes({json.dumps(text)})", seconds)

    def press(self, label: str) -> None:
        """Click what has this label: in the open dialog if it is there, else anywhere."""
        self._click(f"labelled({json.dumps(label)})")

    def fill(self, *path: str, value: object) -> None:
        """Type into the field after these labels, as `fill("pretrain", "Tokens", value=1)`."""
        place = f"field({json.dumps(path)})"
        self._click(place)
        self.page.run("document.activeElement.select()")
        self.page.type(str(value))
        typed = self.page.run(f"{place}.value")
        assert typed == str(value), f"{path} holds {typed!r}"

    def custom_run(self, flow: str) -> None:
        """The form of a flow."""
        self.open_deployment(flow)
        self.press("Run")
        self.press("Custom run")
        self.see("Parameters")
        self.see("Submit")

    def submit(self, flow: str) -> str:
        """Send the form; returns the id of the run it started."""
        before = self.newest(flow)
        self.press_until("Submit", lambda: not self.page.run("location.pathname.endsWith('/run')"))
        return self.started_after(before, flow)

    def press_until(self, label: str, done: Callable[[], object]) -> None:
        """Press as a person would whose click was ignored: a form that is still checking a value,
        or a page that is being drawn again, does that.
        """
        deadline = time.monotonic() + 120
        while not done():
            assert time.monotonic() < deadline, f"pressing {label} does nothing"
            with contextlib.suppress(AssertionError):  # gone, because it has worked by now
                self.press(label)
            for _ in range(60):
                if done():
                    return
                time.sleep(0.25)

    def quick_run(self, flow: str) -> str:
        before = self.newest(flow)
        self.open_deployment(flow)
        self.press("Run")
        self.press("Quick run")
        return self.started_after(before, flow)

    def cancel(self, run: str) -> None:
        """Press Cancel in the menu of a run's page, and mean it."""
        self.open_run(run)
        self.press("Open menu")
        self.press("Cancel")
        self.press("Cancel Flow Run")

    # What Prefect says

    def newest(self, flow: str) -> str | None:
        query = {
            "flows": {"name": {"any_": [flow]}},
            "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}},
            "sort": "START_TIME_DESC",
            "limit": 1,
        }
        found = self.ask("flow_runs/filter", query)
        return found[0]["id"] if found else None

    def started_after(self, before: str | None, flow: str, seconds: float = 120) -> str:
        """The id of the next run of a flow that starts."""
        deadline = time.monotonic() + seconds
        while (run := self.newest(flow)) is None or run == before:
            assert time.monotonic() < deadline, f"no run of {flow} started: {self.story(flow)}"
            time.sleep(0.3)
        return run

    def story(self, flow: str) -> str:
        """What is known of a flow that does not start: its schedules, its runs, the last logs."""
        schedules = self.ask(f"deployments/name/{flow}/local")["schedules"]
        query = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 5}
        runs = [
            (run["name"], run["state_name"], run["expected_start_time"])
            for run in self.ask("flow_runs/filter", query)
        ]
        logs = self.stack.settings.home / "logs"
        ends = [(logs / f"{name}.log").read_text()[-3000:] for name in ("worker", "prefect")]
        return "\n".join(map(str, (schedules, runs, *ends, self.page.errors[-3:])))

    def run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"flow_runs/{run}")
        return found

    def tasks(self, run: str) -> dict[str, str]:
        """Stage → name of its state."""
        query = {"flow_runs": {"id": {"any_": [run]}}, "limit": 100}
        rows = self.ask("task_runs/filter", query)
        return {row["name"]: row["state_name"] for row in rows}

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """Key → artifact of a run."""
        query = {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return {row["key"]: row for row in self.ask("artifacts/filter", query)}

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """An answer of Prefect's; on a machine that is busy it may need several attempts."""
        deadline = time.monotonic() + 180
        while True:
            try:
                address = f"{self.stack.settings.prefect_api}/{path}"
                return call(address, body, method=method, timeout=30)
            except (OSError, HTTPException, Refused) as error:
                refused = isinstance(error, Refused) and error.status not in BUSY
                if refused or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _click(self, element: str) -> None:
        """With the mouse, when the element has come to rest."""
        self.page.wait(element)
        x, y = self.page.run(f"centre({element})")
        while True:
            time.sleep(0.1)
            place = self.page.run(f"centre({element})")
            if place == [x, y]:
                break
            x, y = place
        self.page.mouse(x, y)
