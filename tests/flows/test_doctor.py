"""What `gristmill doctor` finds on this machine and on worse ones."""

from __future__ import annotations

import collections
import os
import shutil
import socket
from pathlib import Path

import psutil
import pytest
from killable_stack import settings_with_free_ports

from flows import doctor
from flows.doctor import Finding, examine, report


def found(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def test_this_machine_is_fit(tmp_path: Path) -> None:
    findings = examine(settings_with_free_ports(tmp_path))
    assert [f for f in findings if not f.fine and f.fatal and f.what != "memory"] == []
    assert found(findings, "python").fine
    assert found(findings, "packages").fine


def test_a_taken_port_is_found_with_its_holder(tmp_path: Path, listener: socket.socket) -> None:
    settings = settings_with_free_ports(tmp_path)
    port = listener.getsockname()[1]
    ports = settings.ports.model_copy(update={"serve": port})
    finding = found(examine(settings.model_copy(update={"ports": ports})), f"port {port}")
    assert not finding.fine
    assert f"process {os.getpid()} (" in finding.found
    assert finding.remedy == "choose another: --ports serve=PORT"


def test_a_small_machine_is_told_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**8))
    memory = psutil.virtual_memory()._replace(available=2 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    findings = examine(settings_with_free_ports(tmp_path), ports=False)
    assert "5.9 GB" in found(findings, "disk").remedy
    assert found(findings, "memory").found.startswith("2.0 GB available")
    assert not found(findings, "memory").fine
    assert not found(findings, "shared memory").fatal  # Ray then uses files, slowly


def test_missing_and_wrong_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = ['pytest>=999', 'no-such-package-here', 'psutil']\n"
    )
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    finding = found(examine(settings_with_free_ports(tmp_path), ports=False), "packages")
    assert "no-such-package-here is missing" in finding.found
    assert "not >=999" in finding.found
    assert "requirements.lock" in finding.remedy


def test_the_report_puts_remedies_below_what_they_mend() -> None:
    text = report([Finding("disk", "1 GB", "free some"), Finding("clock", "right")], colour=False)
    assert text.splitlines()[0].split() == ["missing", "disk", "1", "GB"]
    assert text.splitlines()[1].strip() == "→ free some"
    assert text.splitlines()[2].split() == ["ok", "clock", "right"]
