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

from inverseq.sampling_lmdeploy_server import held_port

__all__ = ["Served", "nobodys_root", "shared_server"]

START_S = 600.0


class Served:
    """One server process, which may be killed and started again on its port."""

    def __init__(self):
        self.holder = held_port()  # also between a kill and the next start
        self.process: subprocess.Popen | None = None

    @property
    def root(self) -> str:
        return root_at(self.holder)

    def start(self) -> Served:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", str(self.holder.getsockname()[1]), "--log-level", "error"]
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


def root_at(holder: socket.socket) -> str:
    return f"http://127.0.0.1:{holder.getsockname()[1]}"


@functools.cache
def nobodys_port() -> socket.socket:
    return held_port()


def nobodys_root() -> str:
    """An address on loopback where nobody listens, as long as this process lives."""
    return root_at(nobodys_port())


@functools.cache
def shared_server() -> Served:
    """One server for all tests of the session; it ends with the process."""
    served = Served()
    atexit.register(served.kill)
    return served.start()
