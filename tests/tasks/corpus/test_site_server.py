"""The loopback server of the embedded site, as its own process."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.corpus.site import _identity

ROOT = Path(__file__).parents[3]
PAGE = b"<!DOCTYPE html><title>a</title><p>words"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(root: Path, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.corpus.site_server", "--root", root, "--port", str(port)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A tiny site that passes for rendered, served."""
    root = tmp_path_factory.mktemp("served")
    (root / "pages" / "library").mkdir(parents=True)
    (root / "pages" / "library" / "a.html").write_bytes(PAGE)
    (root / "pages" / "robots.txt").write_text("Sitemap: {base}/sitemap.xml\n")
    (root / "secret.txt").write_text("outside the pages")
    (root / "site.json").write_text(
        json.dumps(_identity() | {"redirects": {"/": "/library/a.html"}})
    )
    port = free_port()
    process = start(root, port)
    base = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{base}/robots.txt", timeout=5)
            break
        except urllib.error.URLError:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    yield base, root
    process.terminate()
    assert process.wait(10) == 0


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: object, **kwargs: object) -> None:
            return None

    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=10) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_pages_are_served_with_validators(server: tuple[str, Path]) -> None:
    status, headers, body = get(f"{server[0]}/library/a.html")
    assert (status, body) == (200, PAGE)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["ETag"].startswith('"')
    assert headers["Last-Modified"].endswith("GMT")
    status, head, body = get(f"{server[0]}/library/a.html", "HEAD")
    assert (status, body, head["Content-Length"]) == (200, b"", str(len(PAGE)))


def test_conditional_requests(server: tuple[str, Path]) -> None:
    url = f"{server[0]}/library/a.html"
    headers = get(url)[1]
    etag, modified = headers["ETag"], headers["Last-Modified"]
    assert get(url, **{"If-None-Match": etag})[0] == 304
    assert get(url, **{"If-None-Match": f'"x", W/{etag}'})[0] == 304
    assert get(url, **{"If-Modified-Since": modified})[0] == 304
    # If-None-Match decides where both are given (RFC 9110, section 13.1.3).
    assert get(url, **{"If-None-Match": '"x"', "If-Modified-Since": modified})[0] == 200
    assert get(url, **{"If-Modified-Since": "nonsense"})[0] == 200
    page = server[1] / "pages" / "library" / "a.html"
    stat = page.stat()
    try:
        page.write_bytes(b"another")
        status, changed, body = get(url, **{"If-None-Match": etag})
        assert (status, body) == (200, b"another")
        assert changed["ETag"] != etag
    finally:
        page.write_bytes(PAGE)
        os.utime(page, (stat.st_atime, stat.st_mtime))


def test_redirects_templates_and_missing_pages(server: tuple[str, Path]) -> None:
    status, headers, _ = get(f"{server[0]}/")
    assert (status, headers["Location"]) == (301, "/library/a.html")
    assert get(f"{server[0]}/robots.txt")[2].decode() == f"Sitemap: {server[0]}/sitemap.xml\n"
    assert get(f"{server[0]}/nothing.html")[0] == 404
    assert get(f"{server[0]}/..%2fsecret.txt")[0] == 404
    assert get(f"{server[0]}/library")[0] == 404
    assert get(f"{server[0]}/library/a.html", "POST")[0] == 405


def test_the_calendar_has_no_end(server: tuple[str, Path]) -> None:
    _, _, body = get(f"{server[0]}/private/calendar/2024-02-29")
    assert b"/private/calendar/2024-03-01" in body
    assert get(f"{server[0]}/private/calendar/9999-12-31")[0] == 404


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    process = start(tmp_path, free_port())
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "holds other files" in errors
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_taken_port_is_one_clear_sentence(server: tuple[str, Path]) -> None:
    port = int(server[0].rpartition(":")[2])
    process = start(server[1], port)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in errors
    assert "Traceback" not in errors
