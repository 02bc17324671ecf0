"""The proxy's configuration as our wrapper mends it, read by the real HAProxy."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from pathlib import Path

import pytest

from flows import services
from tasks.runtime.settings import Settings

RAYS = """\
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s

frontend http_frontend
    bind *:{port}
    http-request return status 200 content-type text/plain string answered
"""


def test_a_client_that_drips_its_headers_is_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "HEADER_SECONDS", 1)
    settings = Settings(home=tmp_path)
    (tmp_path / "run").mkdir()
    services._write_haproxy_wrapper(settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(RAYS.format(port=port))
    command = [services._haproxy_wrapper(settings), "-db", "-f", configuration]
    with subprocess.Popen(command) as proxy:
        try:
            drip = connected(port)
            drip.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            with connected(port) as quick:
                quick.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert b"answered" in quick.makefile("rb").read()
            assert drip.makefile("rb").read().startswith(b"HTTP/1.1 408")
            drip.close()
        finally:
            proxy.terminate()
    assert f"bind 127.0.0.1:{port}" in configuration.read_text()
    subprocess.run([*command[:1], "-c", "-f", configuration], check=True)  # as at a reload
    assert configuration.read_text().count("timeout http-request 1s") == 1


def connected(port: int) -> socket.socket:
    for _ in range(100):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), 10)
        time.sleep(0.05)
    raise AssertionError("HAProxy did not start")
