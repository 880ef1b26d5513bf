"""The command ``inverseq-train``: read the configuration, then train, start processes that do, or only plan.

Bad input ends with one line on stderr and exit status 2, a run that stopped with 1 and its last checkpoint intact, an
interrupt with 130 and SIGTERM with 143, both with the command that continues the run. ``INVERSEQ_DEBUG=1`` shows the
traceback too. As one of several processes the program logs on rank 0 only, and its error line begins with the rank.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import __version__
from .config import Config, iter_options
from .config_loading import load_config, recipe_names
from .launch import (
    ECHO_WAIT_S,
    SUPERVISED,
    count_processes,
    end_process,
    exec_on_hosts,
    launched_rank,
    mention_idle_gpus,
    run_processes,
    wait_for_the_launcher,
)
from .run_directory import has_begun

__all__ = ["main"]

PROGRAM = "inverseq-train"
HELP_WIDTH = 100
AGAIN_S = 0.05


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments"):
            message += "; options of the configuration are words without dashes, section.key=value"
        sys.exit(fail(2, f"error: {message} (see {PROGRAM} --help)"))


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, as schedulers send it before they kill; ends a run as an interrupt does."""


class StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is now, so that log lines go above a progress bar instead of through it.

    A line is one write: under launchers (``python -u``) ``print`` makes two, and another process writes between them.
    """

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; a failing process among several ends here."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_intermixed_args(words)
    show_log_lines()
    config = None
    try:
        with stopping_cleanly():
            config = load_config(arguments.config, arguments.overrides)
            check_launch_options(arguments)
            if (arguments.nproc or arguments.hostfile) and not arguments.dry_run:
                return launch(config, arguments, words)
            work(config, arguments)
            return 0
    except KeyboardInterrupt as error:
        return fail(status_of(error), describe_interrupt(config, words))
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("INVERSEQ_DEBUG") == "1" and launched_rank() is None:
            raise
        return fail(2 if isinstance(error, ValueError) else 1, f"error: {error}")
    except Exception as error:
        if launched_rank() is None:
            raise
        return fail(1, f"error: {type(error).__name__}: {error}", show_traceback=True)


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of a program that a signal ended."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` in the block, once, and an interrupt or SIGTERM always reach its code.

    Python drops what a signal raises while a destructor runs, and transformers' engine collects garbage in one after
    each sampling phase (symptom: the run goes on); such a signal is sent again. One of several processes keeps the
    default of SIGTERM, which ends it at once: its launcher sends it when another rank has failed, and in a collective
    operation that waits for that rank nothing would ever be raised.

    Further SIGTERMs are ignored, after the block too: the program is at its end, and one that comes while it leaves
    would replace the exit status (timeout(1) sends two, one to the process and one to its group).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    def send_again(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook_before(dropped)
            return
        number = signal.SIGINT
        if isinstance(dropped.exc_value, Terminated):
            number = signal.SIGTERM
            signal.signal(number, terminate)
        threading.Timer(AGAIN_S, signal.pthread_kill, (threading.main_thread().ident, number)).start()

    hook_before, sys.unraisablehook = sys.unraisablehook, send_again
    handler_before = None if launched_rank() is not None else signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        if handler_before is not None and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, handler_before)


def check_launch_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options of the launch that contradict each other or the launcher that is there."""
    if arguments.nproc and arguments.hostfile:
        raise ValueError("--nproc and --hostfile: expected one of them; the hostfile says how many processes run")
    if arguments.hardware and arguments.nproc:
        raise ValueError("--hardware and --nproc: expected one of them; the hardware says how many processes run")
    if arguments.hostfile and arguments.dry_run:
        raise ValueError("--hostfile and --dry-run: name the hosts' GPUs instead, for example --hardware 16x80GB")
    if arguments.max_restarts and not arguments.nproc:
        raise ValueError(f"--max-restarts={arguments.max_restarts}: goes with --nproc; torchrun has an option like it")
    if arguments.hardware and not arguments.dry_run:
        raise ValueError(f"--hardware={arguments.hardware}: goes with --dry-run; a run takes the hardware it finds")
    if (arguments.nproc or arguments.hostfile) and launched_rank() is not None:
        raise ValueError("--nproc and --hostfile start a launcher; leave them out, this process has one already")


def work(config: Config, arguments: argparse.Namespace) -> None:
    """Train or plan in this process."""
    if arguments.dry_run:
        from .dry_run import dry_run

        world_size = count_processes(arguments.nproc, config) if arguments.nproc and not arguments.hardware else 1
        found = dry_run(config, resume=arguments.resume, hardware=arguments.hardware, world_size=world_size)
        print(found.text)
        if found.problem is not None:
            raise ValueError(found.problem)
        return
    if launched_rank() is None:
        mention_idle_gpus(config)
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from .distributed import RankFailed
    from .trainer import train

    disable_progress_bar()  # a bar for the shards of a model file; the trainer has bars of its own
    # DeepSpeed's calls of torch, which are not the user's business
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if launched_rank():  # what libraries warn of, rank 0 says for all
        warnings.simplefilter("ignore")
        set_verbosity_error()
    try:
        train(config, resume=arguments.resume)
    except RankFailed:
        time.sleep(ECHO_WAIT_S)  # the rank that failed says why, and the launcher ends this one
        raise


def launch(config: Config, arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Start the processes that ``--nproc`` or ``--hostfile`` asks for and return their exit status."""
    given = ["--config", arguments.config, *arguments.overrides]
    resumed = ["--resume", *given]
    if arguments.hostfile:
        exec_on_hosts(resumed if arguments.resume else given, arguments.hostfile)

    def words_of_attempt(restarted: bool) -> list[str]:
        return resumed if arguments.resume or (restarted and has_begun(config)) else given

    status = run_processes(
        words_of_attempt,
        num_processes=count_processes(arguments.nproc, config),
        max_restarts=arguments.max_restarts,
        say=lambda message: fail(1, message),
    )
    return fail(status, describe_interrupt(config, words)) if status >= 128 else status


def fail(status: int, message: str, *, show_traceback: bool = False) -> int:
    """Print one line to stderr and return the status; as one of several processes, end with it.

    Such a process names its rank and gives way to the rank that has more to say.
    """
    rank = launched_rank()
    message = " ".join(message.split())
    if rank is None:
        sys.stderr.write(f"{PROGRAM}: {message}\n")
        return status
    if status == 130:
        end_process(status, f"{PROGRAM}: {message}" if rank == 0 and not os.environ.get(SUPERVISED) else "")
    wait_for_the_launcher(rank, status)
    if show_traceback or os.environ.get("INVERSEQ_DEBUG") == "1":
        traceback.print_exc()
    end_process(status, f"{PROGRAM}: {message if message.startswith('[rank ') else f'[rank {rank}] {message}'}")


def describe_interrupt(config: Config | None, words: Sequence[str]) -> str:
    if config is None or "--dry-run" in words or not has_begun(config):
        return "interrupted before the run began"
    words = [*words] if "--resume" in words else [*words, "--resume"]
    command = PROGRAM if launched_rank() is None else "the same launcher and -m inverseq.cli"
    return f"interrupted; continue with: {command} {shlex.join(words)}"


def show_log_lines() -> None:
    """Send this package's log lines to stderr, once however often ``main`` is called; of several processes rank 0's."""
    logger = logging.getLogger("inverseq")
    logger.setLevel(logging.ERROR if launched_rank() else logging.INFO)
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --config RECIPE_OR_FILE [--resume] [--dry-run [--hardware 8xA800]]\n"
        f"{'':{len(f'usage: {PROGRAM} ')}}[--nproc N | --hostfile FILE] [section.key=value ...]",
        description="Train a chat model with Inverse-Q*: no preference pairs, no reward model, no value model.",
        epilog=describe_options(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=HELP_WIDTH),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="RECIPE_OR_FILE",
        help=f"a YAML file, or a recipe: {', '.join(recipe_names())}",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in run_dir behind its newest complete checkpoint"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve and check everything, print prompts, memory and the packs of an epoch, and start nothing",
    )
    parser.add_argument(
        "--hardware",
        default="",
        metavar="8xA800",
        help="with --dry-run: place the run on GPUs that need not be here, for example 1x80GB+256GB with host memory",
    )
    parser.add_argument(
        "--nproc", metavar="N", help="run in N processes of this machine, started by torchrun; auto is one per GPU"
    )
    parser.add_argument(
        "--max-restarts",
        type=count,
        default=0,
        metavar="N",
        help="with --nproc: after a failure start all processes again, at most N times; the run continues by itself",
    )
    parser.add_argument(
        "--hostfile",
        metavar="FILE",
        help="run on the hosts of FILE, lines 'HOST slots=N', started by DeepSpeed's launcher over ssh",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options on top of the file, for example optim.lr=1e-6",
    )
    return parser


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or a positive number")
    return int(text)


def describe_options() -> str:
    """Every option of the configuration with its default and help text, section by section."""
    lines = ["options of the configuration, with their defaults (recipes set values of their own):"]
    section = None
    for key, _, default, help_text in iter_options():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        left = f"  {key}={format_default(default)}"
        wrapped = textwrap.wrap(help_text, HELP_WIDTH - 42)
        lines.append(f"{left:<41} {wrapped[0]}" if len(left) < 41 else f"{left}\n{'':41} {wrapped[0]}")
        lines += [f"{'':41} {line}" for line in wrapped[1:]]
    lines += ["", "A value may refer to others: run_dir='runs/alpha-${contrast.alpha}'."]
    lines += ["With INVERSEQ_DEBUG=1 in the environment an error shows its traceback."]
    return "\n".join(lines)


def format_default(value) -> str:
    """A default as one would write it on the command line."""
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
