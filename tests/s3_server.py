"""A server that speaks S3's protocol on loopback, and the environment that leads to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from pyarrow import fs

from tests.conftest import free_ports


class S3Server:
    """moto's server, in a process of its own."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {"AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true"}
        self.environment |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")

    def bucket(self, name: str) -> None:
        """Make an empty bucket."""
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def put(self, place: str, data: bytes) -> None:
        """Write the object `bucket/key`."""
        filesystem = fs.S3FileSystem(
            access_key="test", secret_key="test", endpoint_override=self.url, region="us-east-1"
        )
        with filesystem.open_output_stream(place, compression=None) as stream:
            stream.write(data)

    def is_up(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=10).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


@contextmanager
def s3_server(**environment: str) -> Iterator[S3Server]:
    """Ended with the block."""
    (port,) = free_ports(1)
    server = S3Server(port)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )
    try:
        deadline = time.monotonic() + 60
        while not server.is_up():
            assert process.poll() is None and time.monotonic() < deadline, "moto does not start"
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()
