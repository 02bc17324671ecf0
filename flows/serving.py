"""Starts Ray Serve's proxy on its port and deploys the champion again, if there is one."""

from __future__ import annotations

import subprocess
import sys

from tasks.runtime.settings import Settings


def start_proxy(settings: Settings) -> None:
    """Start Serve in the running cluster; harmless when it runs."""
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.serve.scripts", "start", "--address", settings.ray),
            *("--http-host", settings.host, "--http-port", str(settings.ports.serve)),
            *("--proxy-location", "HeadOnly"),
        ],
        check=True,
        timeout=90,
    )


def main() -> int:
    settings = Settings.load()
    settings.apply()
    start_proxy(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
