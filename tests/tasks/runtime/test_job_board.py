"""What is known of a job, asked of a server that answers as Ray does, or not."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tasks.runtime.job_board import job_status
from tasks.runtime.rest import Refused
from tasks.runtime.settings import Ports, Settings


@contextmanager
def answering(home: Path, status: int, body: str) -> Iterator[Settings]:
    """Settings whose Ray dashboard gives every question the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield Settings(home=home, ray_dashboard_url=url)
        server.shutdown()


@pytest.mark.parametrize("told", ["PENDING", "SUCCEEDED", "FAILED"])
def test_a_jobs_status(tmp_path: Path, told: str) -> None:
    with answering(tmp_path, 200, json.dumps({"status": told})) as settings:
        assert job_status(settings, "pretrain-1") == told


def test_a_job_of_an_earlier_cluster_is_unknown(tmp_path: Path) -> None:
    with answering(tmp_path, 404, "Job pretrain-1 does not exist") as settings:
        assert job_status(settings, "pretrain-1") is None


@pytest.mark.parametrize(
    ("status", "body", "raised"),
    [
        (404, "not found", Refused),
        (500, "", Refused),
        (200, "<html>", OSError),
        (200, "1", OSError),
    ],
)
def test_another_answer_says_nothing_of_the_job(
    tmp_path: Path, status: int, body: str, raised: type[Exception]
) -> None:
    with answering(tmp_path, status, body) as settings, pytest.raises(raised):
        job_status(settings, "pretrain-1")


def test_no_answer_is_an_os_error(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, ports=Ports(ray_dashboard=9))
    with pytest.raises(OSError):
        job_status(settings, "pretrain-1")
