"""A real OpenAI-compatible server on loopback: ``transformers serve`` on the CPU, which loads a folder by its name."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

__all__ = ["Served", "free_port", "shared_server"]

START_S = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Served:
    """One server process, which may be killed and started again on its port."""

    def __init__(self):
        self.port = free_port()
        self.process: subprocess.Popen | None = None

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Served:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_S
        while not self.is_healthy():
            assert self.process.poll() is None, f"transformers serve ended with status {self.process.returncode}"
            assert time.monotonic() < deadline, "transformers serve did not start"
            time.sleep(0.1)
        return self

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.root}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@functools.cache
def shared_server() -> Served:
    """One server for all tests of the session; it ends with the process."""
    served = Served()
    atexit.register(served.kill)
    return served.start()
