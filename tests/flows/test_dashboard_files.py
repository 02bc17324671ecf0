"""The copy of Prefect's dashboard that asks nobody else."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import prefect

from flows import dashboard_files
from tasks.runtime.settings import Settings


def text_of(directory: Path) -> str:
    files = [file for file in directory.rglob("*") if file.suffix in dashboard_files.TEXT]
    return "".join(file.read_text(encoding="utf-8") for file in files)


def test_the_copy_has_every_file_but_not_the_key(tmp_path: Path) -> None:
    dashboard_files.prepare(Settings(home=tmp_path))
    copy = dashboard_files.directory(Settings(home=tmp_path)) / "v2"
    source = Path(prefect.__file__).parent / "server" / "ui-v2"
    names = {file.relative_to(source) for file in source.rglob("*")}
    assert {file.relative_to(copy) for file in copy.rglob("*")} == {*names, Path("UI_SERVE_BASE")}
    assert dashboard_files.KEY in text_of(source)  # else Prefect has changed it: look again
    assert dashboard_files.KEY not in text_of(copy)
    assert dashboard_files.PLACEHOLDER not in text_of(copy)


def test_a_copy_of_another_version_is_made_anew_and_one_of_this_version_is_kept(
    tmp_path: Path,
) -> None:
    settings = Settings(home=tmp_path)
    dashboard_files.prepare(settings)
    page = dashboard_files.directory(settings) / "v2" / "index.html"
    page.write_text("mine")
    dashboard_files.prepare(settings)
    assert page.read_text() == "mine"
    (page.parent / "UI_SERVE_BASE").write_text("v2:1.0.0:/v2")
    dashboard_files.prepare(settings)
    assert page.read_text() != "mine"
    mark = (page.parent / "UI_SERVE_BASE").read_text()
    assert mark == f"v2:{importlib.metadata.version('prefect')}:/v2"
