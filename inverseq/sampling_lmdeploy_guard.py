"""Runs a command and ends it, with all that it started, when standard input closes: ``python THIS_FILE LOG COMMAND …``.

Standard input is a pipe from the process that started this one, so the command also ends when that process is killed.
Run by its path, on the standard library alone: it must start in an instant.
"""

import os
import select
import signal
import subprocess
import sys
import time

__all__ = ["main"]

GRACE_S, POLL_S = 10.0, 0.2


def main(log_path: str, command: list[str]) -> int:
    """Run ``command`` with its output in the file ``log_path``; return its status, negative when it was ended."""
    asked_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked_to_end.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the run comes as the end of standard input
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    while process.poll() is None and not asked_to_end:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 1024):
            break
    end_group(process)
    return process.wait()


def end_group(process: subprocess.Popen) -> None:
    """Ask the command's processes to end, and kill those that are left after a while."""
    started = time.monotonic()
    number = signal.SIGTERM
    while signal_group(process.pid, number):
        number = signal.SIGKILL if time.monotonic() > started + GRACE_S else 0
        process.poll()  # reaps it: a dead leader would keep its group
        time.sleep(POLL_S / 4)


def signal_group(leader: int, number: int) -> bool:
    """Signal a group of processes (0 only looks); False when there is none any more."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
