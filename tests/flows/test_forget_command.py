"""`gristmill forget` as a person types it, without a stack."""

from pathlib import Path

import pytest

from flows.cli import parser
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings
from tasks.state.tombstones import Tombstones


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    return Settings.load()


def forget(settings: Settings, *arguments: str) -> int:
    parsed = parser().parse_args(["forget", *arguments])
    return int(parsed.command(settings, parsed))


def test_tombstones_are_set_listed_and_withdrawn(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert forget(settings, "example.org", "https://e.net/p#x", "--reason", "letter of May 3") == 0
    assert forget(settings, "Example.org", "--purge") == 0
    said = capsys.readouterr().out
    assert said.count("tombstone 1: domain example.org") == 2
    assert "no earlier artifact holds any of it" in said
    assert "what will run again: gristmill plan corpus" in said
    assert forget(settings, "--withdraw", "1") == 0
    assert forget(settings, "--list") == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "withdrawn" in first and "letter of May 3" in first
    assert "stands" in second and "//e.net/p" in second


def test_mistakes_are_told_in_a_sentence_and_bury_nothing(settings: Settings) -> None:
    with pytest.raises(UserError, match="say what to forget"):
        forget(settings)
    with pytest.raises(UserError, match="'nonsense' is no address"):
        forget(settings, "example.org", "nonsense")
    with pytest.raises(UserError, match="for that one address, or example"):
        forget(settings, "example.org/page", "--purge")
    with pytest.raises(UserError, match="no tombstone 7 stands"):
        forget(settings, "--withdraw", "7")
    assert Tombstones(settings.database_url).all() == []
