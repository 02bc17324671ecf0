"""The files of Prefect's dashboard, without its one line to a company that counts visitors.

Prefect's own switch (`PREFECT_SERVER_ANALYTICS_ENABLED`) stops the events, but each page still
loads a configuration from Amplitude. So the server gets a copy of the files in which the key of
that account is empty, upon which the page leaves Amplitude alone. A copy that Prefect does not
recognise, as of another version, it replaces by its own files: then the dashboard works as ever.
"""

from __future__ import annotations

import importlib.util
import shutil
from importlib.metadata import version
from pathlib import Path

from tasks.runtime.settings import Settings

KEY = "c97dd2acbf306ab7bf54aca0aeb7ffa1"
BASE = "/v2"
PLACEHOLDER = "/PREFECT_UI_SERVE_BASE_REPLACE_PLACEHOLDER"
MARK = "UI_SERVE_BASE"
TEXT = (".txt", ".html", ".css", ".js", ".json")


def directory(settings: Settings) -> Path:
    """Where Prefect looks for the files it serves (`PREFECT_UI_STATIC_DIRECTORY`)."""
    return settings.home / "prefect" / "dashboard"


def prepare(settings: Settings) -> None:
    """Make the copy, unless it is there already."""
    wanted = f"v2:{version('prefect')}:{BASE}"
    target = directory(settings) / "v2"
    mark = target / MARK
    package = importlib.util.find_spec("prefect")
    if package is None or package.origin is None or _text(mark) == wanted:
        return
    source = Path(package.origin).parent / "server" / "ui-v2"
    if not source.is_dir():
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for file in target.rglob("*"):
        if file.suffix in TEXT:
            text = file.read_text(encoding="utf-8")
            mended = text.replace(PLACEHOLDER, BASE).replace(KEY, "")
            if mended != text:
                file.write_text(mended, encoding="utf-8")
    mark.write_text(wanted)


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""
