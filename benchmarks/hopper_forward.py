"""What a GPU has to say about hopper_kernels.py: right or wrong, and how fast beside today's kernels and bare cuBLAS.

    PYTHONPATH=.:kernels python benchmarks/hopper_forward.py --out DIR [--smoke]

Needs an H100 or H200 and under two minutes. hopper_measure.py does the work in a process that is killed when it says
nothing for a while: a candidate that hangs costs its own rows and no more, the next one starts in a new process. The
smallest shape comes first, then ragged ones, then the goals; a wrong result ends its candidate before anything is
timed. Rows are in DIR/hopper_forward.jsonl as they come. Exit status 1 where something hung, failed or was wrong.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import torch

# Operation and width of the ring's stages, the goal's first.
CANDIDATES = ("contrast-64", "contrast-32", "statistics-64", "exponentials-64", "statistics-32", "exponentials-32")
SCRIPT = pathlib.Path(__file__).with_name("hopper_measure.py")


class Silence(Exception):
    """The process said nothing for too long and was killed."""


def lines_of(command: list[str], silence_s: float, deadline: float) -> Iterator[str]:
    """Lines of a command's output; kills it and raises ``Silence`` when none comes, or at the deadline."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        wait_s = min(silence_s, deadline - time.monotonic())
        try:
            line = lines.get(timeout=max(wait_s, 0.0))
        except queue.Empty:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)  # so that its GPU is free again, where that can be had
            raise Silence(f"killed after {wait_s:.0f} s without a word") from None
        if line is None:
            break
        yield line
    if process.wait() != 0:
        raise ChildProcessError(f"exit status {process.returncode}")


def run_all(command: list[str], candidates: list[str], silence_s: float, limit_s: float) -> Iterator[dict]:
    """Rows of all candidates, one of kind "failure" for each that hung or broke its process."""
    deadline, left = time.monotonic() + limit_s, list(candidates)
    while left:
        current, at, last = left[0], "start", ""
        try:
            for line in lines_of([*command, *left], silence_s, deadline):
                word, _, rest = line.partition(" ")
                if word == "TRY":
                    current = rest
                elif word == "AT":
                    at = rest
                elif word == "ROW":
                    yield json.loads(rest)
                last = line
                print(line, flush=True)
            return
        except (Silence, ChildProcessError) as error:
            failure = f"{error}; last: {last}"[:300]
            op = current.split("-")[0]
            yield {"kind": "failure", "op": op, "contender": current, "passed": False, "at": at, "failure": failure}
        left = left[left.index(current) + 1 :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for hopper_forward.jsonl")
    parser.add_argument("--smoke", action="store_true", help="small shapes only, nothing timed")
    parser.add_argument("--only", default=",".join(CANDIDATES), help="some of the candidates (default: %(default)s)")
    parser.add_argument("--silence-s", type=float, default=45.0, help="longest without a word (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=300.0, help="longest time in all (default: %(default)s)")
    arguments = parser.parse_args()
    candidates = arguments.only.split(",")
    if not set(candidates) <= set(CANDIDATES):
        parser.error(f"--only is {arguments.only}, expected some of {', '.join(CANDIDATES)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("the kernels are for GPUs of capability 9.0 (H100, H200) and there is none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": " ".join(["python", "benchmarks/hopper_forward.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    command = [sys.executable, str(SCRIPT), "smoke" if arguments.smoke else "all"]
    rows = []
    with open(arguments.out / "hopper_forward.jsonl", "w") as file:
        for row in run_all(command, candidates, arguments.silence_s, arguments.limit_s):
            rows.append(facts | row)
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())
    failed = [row for row in rows if row.get("passed") is False]
    for row in failed:
        print("FAILED", row["op"], row.get("contender", ""), row.get("at", ""), row.get("failure", row.get("error")))
    for row in rows:
        if row["kind"] == "timing":
            where = f"{row['num_rows']} x {row['num_words']} x {row['dim']}"
            print(f"{row['op']:13} {row['contender']:22} {where:22} {row['ms']:8.3f} ms {row['tflops']:6.0f} TFLOP/s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
