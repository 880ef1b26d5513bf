"""Starting one process per GPU, and how the command ends when it is one of several processes.

On one machine the processes are torchrun's, whose agent runs in the process that was called; on several they are those
of DeepSpeed's launcher. Neither rendezvous nor restart nor remote shell is made here. A process that a launcher
started knows it by RANK and WORLD_SIZE, whichever launcher it was.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from .config import Config

__all__ = [
    "ECHO_WAIT_S",
    "SUPERVISED",
    "check_hosts",
    "count_processes",
    "end_process",
    "exec_on_hosts",
    "launched_rank",
    "mention_idle_gpus",
    "read_hosts",
    "run_processes",
    "wait_for_the_launcher",
]

logger = logging.getLogger(__name__)

MODULE = "inverseq.cli"
BAD_INPUT = 2  # the exit status that no restart can help
SUPERVISED = "INVERSEQ_SUPERVISED"  # set for the processes of run_processes, which speaks for them
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT  # that torchrun's agent passes on
SSH_TIMEOUT_S = 5
FIRST_WAIT_S, OTHERS_WAIT_S = 2.0, 5.0
ECHO_WAIT_S = 10.0  # of a rank that stops because another one failed


def launched_rank() -> int | None:
    """The rank that a launcher gave this process, or None when nobody launched it as one of several."""
    return int(os.environ["RANK"]) if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") else None


def wait_for_the_launcher(rank: int, status: int) -> None:
    """Sleep before a failing rank speaks, so that one rank alone speaks where the launcher ends the others.

    Bad input is found by every rank, and rank 0 says so at once. Any other failure may be the echo of a rank that
    died, which the launcher answers by ending this one; what is said after the wait is nobody else's error.
    """
    if rank != 0:
        time.sleep(OTHERS_WAIT_S)
    elif status != BAD_INPUT:
        time.sleep(FIRST_WAIT_S)


def end_process(status: int, message: str) -> NoReturn:
    """End one of several processes, its message on stderr and in the table that torchrun prints of failed ranks.

    Without the interpreter's farewell, which could wait for the other ranks for ever.
    """
    if message:
        sys.stderr.write(f"{message}\n")
    if message and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            content = json.dumps({"message": message, "timestamp": int(time.time())})
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(content)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _num_gpus(config: Config) -> int:
    """The GPUs a run may use: none with ``model.device=cpu``."""
    if config.model.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def count_processes(nproc: str, config: Config) -> int:
    """The number that ``--nproc`` stands for: as given, or for ``auto`` one for each GPU and one without any.

    Raises ValueError for anything but a positive number or ``auto`` and for more processes than GPUs.
    """
    if nproc != "auto" and not (nproc.isascii() and nproc.isdigit() and int(nproc) > 0):
        raise ValueError(f"--nproc={nproc}: expected a positive number or auto")
    num_gpus = _num_gpus(config)
    if nproc == "auto":
        return max(1, num_gpus)
    if 0 < num_gpus < int(nproc):
        raise ValueError(f"--nproc={nproc}: this machine has {num_gpus} GPUs; expected at most one process for each")
    return int(nproc)


def mention_idle_gpus(config: Config) -> None:
    """Log that a run in one process leaves GPUs idle."""
    num_gpus = _num_gpus(config)
    if num_gpus > 1:
        logger.info("one of this machine's %d GPUs is used; --nproc auto starts a process for each", num_gpus)


def run_processes(
    words: Callable[[bool], Sequence[str]], *, num_processes: int, max_restarts: int, say: Callable[[str], None]
) -> int:
    """Run the command line in ``num_processes`` processes on this machine; the exit status of the whole.

    ``words(restarted)`` gives the command line of an attempt. After a failure other than bad input all processes are
    started again, ``max_restarts`` times. The status is that of the rank that failed, 1 when a signal ended it, 130
    after an interrupt and 128 + n after another signal n to this process; ``say`` prints what no rank can say itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the agent's words about what the ranks say already
    os.environ[SUPERVISED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    try:
        for attempt in range(max_restarts + 1):
            options = [f"--nproc-per-node={num_processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
            options += [f"--rdzv-id={uuid.uuid4().hex}", "--local-addr=127.0.0.1", "-m", MODULE]
            config, program, arguments = config_from_args(parse_args([*options, *words(attempt > 0)]))
            try:
                elastic_launch(config, program)(*arguments)
                return 0
            except ChildFailedError as error:
                status = _describe_failures({rank: f.exitcode for rank, f in error.failures.items()}, say)
            if status == BAD_INPUT:
                break
            if attempt < max_restarts:
                say(f"restart {attempt + 1} of {max_restarts}")
    except SignalException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent's handler stays, and timeout(1) sends two
        status = 128 + error.sigval
    return status


def _describe_failures(exit_codes: dict[int, int], say: Callable[[str], None]) -> int:
    """The exit status of processes that ended with these codes; a rank that a signal ended is named through ``say``.

    The launcher ended the others by SIGTERM, which says nothing about them.
    """
    statuses = [code for code in exit_codes.values() if code > 0]
    if statuses:
        return BAD_INPUT if BAD_INPUT in statuses else statuses[0]
    for rank, code in exit_codes.items():
        if code != -signal.SIGTERM or set(exit_codes.values()) == {code}:
            hint = " (is the machine's memory full?)" if code == -signal.SIGKILL else ""
            say(f"[rank {rank}] error: ended by {signal.Signals(-code).name}{hint}")
    return 1


def exec_on_hosts(words: Sequence[str], hostfile: str) -> NoReturn:
    """Become DeepSpeed's launcher, which runs the command line on every host of the file over ssh.

    Raises ValueError, before anything starts, for what ``read_hosts`` and ``check_hosts`` find.
    """
    hosts = read_hosts(hostfile)
    check_hosts(hosts, hostfile)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=warning", f"--hostfile={hostfile}"]
    sys.stderr.flush()
    os.execv(sys.executable, [*launcher, "--module", MODULE, *words])


def read_hosts(hostfile: str) -> list[str]:
    """The hosts of a file with lines ``HOST slots=N``; ValueError for a missing file and for what is no such line."""
    if find_spec("deepspeed") is None:
        raise ValueError(f"--hostfile={hostfile}: needs deepspeed (pip install 'inverseq[deepspeed]')")
    if not Path(hostfile).is_file():
        raise ValueError(f"--hostfile={hostfile}: no such file")
    try:
        with redirect_stdout(io.StringIO()):  # prints the whole file beside its error
            from deepspeed.launcher.runner import fetch_hostfile

            return list(fetch_hostfile(hostfile))
    except ValueError as error:
        raise ValueError(f"--hostfile={hostfile}: {error}; expected lines like: worker-1 slots=8") from None


def check_hosts(hosts: Sequence[str], hostfile: str) -> None:
    """Raise ValueError naming the hosts that ssh does not reach without a password, within seconds."""
    for program in ("ssh", "pdsh") if len(hosts) > 1 else ("ssh",):
        if shutil.which(program) is None:
            raise ValueError(f"--hostfile={hostfile}: DeepSpeed's launcher needs {program}, which is not installed")
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    asked = {host: subprocess.Popen(["ssh", *options, host, "true"], **quiet) for host in hosts}
    deadline = time.monotonic() + 3 * SSH_TIMEOUT_S
    failures = []
    for host, process in asked.items():
        try:
            said = process.communicate(timeout=max(0.0, deadline - time.monotonic()))[1].strip()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            process.stderr.close()  # unread: a proxy that ssh started may still hold the other end
            said = "no answer"
        if process.returncode:
            failures.append(f"{host} ({said.splitlines()[-1] if said else f'ssh ended with {process.returncode}'})")
    if failures:
        raise ValueError(f"--hostfile={hostfile}: not reachable by ssh without a password: {', '.join(failures)}")
