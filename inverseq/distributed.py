"""The processes of a run: which one this is, what they tell each other, and how all stop when one fails.

A launcher (torchrun, DeepSpeed's) has set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them the
run is one process and every function here is free. Python objects travel through a gloo group of their own, tensors
through the default group, which is the engine's. Left out: starting processes, and anything that knows the training.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .config import Config
from .model import resolve_device

__all__ = ["RankFailed", "Ranks", "init_ranks"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_VARIABLE, TIMEOUT_MINUTES = "DEEPSPEED_TIMEOUT", 60  # how long a rank waits for the others
FAILURE_KEY = "failure"
POLL_S, GRACE_S, MEETING_POLL_S = 1.0, 15.0, 0.02


class RankFailed(RuntimeError):
    """Another rank has failed and says why itself; this one only stops. ``rank`` is that rank."""

    def __init__(self, rank: int, reason: str):
        super().__init__(f"stopped because rank {rank} failed: {reason}")
        self.rank = rank


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. The default is a run of one process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine
    group: Any = None  # gloo, for Python objects
    watch: FailureWatch | None = None
    num_restarts: int = 0  # 0 in a launcher's first attempt, more in each later one; the same on every rank

    @property
    def is_main(self) -> bool:
        """True for the rank that writes the run's files and log lines."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of items that all ranks hold; ranks may get none."""
        return list(items[self.rank :: self.world_size])

    def unshare(self, items: Sequence[T]) -> list[T]:
        """All items in their order before ``share``, on every rank, from the part of each."""
        parts = self.gather(list(items))
        whole: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.world_size] = part
        return whole

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let a rank that raises in the block stop all ranks, wherever they are.

        The first rank that fails raises its own error; every other rank, also one that fails in the wake of the first,
        raises ``RankFailed``, which names it. A rank that sits in a collective operation and cannot be reached ends
        itself. Ends the process group.
        """
        is_ours = self.world_size > 1 or not dist.is_initialized()  # an engine may make a group of one process
        try:
            try:
                yield
            finally:
                if self.watch is not None:
                    self.watch.stop()  # an interrupt of its comes up to here: one behind it would be taken for Ctrl-C
        except BaseException as error:
            failure = self.watch.report(error) if self.watch is not None else None
            if is_ours and self.group is None:  # an NCCL group may wait here for operations that will never end
                leave_group()
            if failure is not None:
                raise failure from None
            raise
        if self.watch is not None:
            self.watch.thread.join()
            self.barrier()  # rank 0 may hold the store that the watches of the others read
        if is_ours:
            leave_group()


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def init_ranks(config: Config) -> Ranks:
    """Join the processes that a launcher started; without a launcher, or for one process, the run is this process.

    Raises ValueError for variables of a launcher that do not belong together, a LOCAL_RANK without a GPU, a package
    that is missing for several processes, and an address where the ranks cannot meet.
    """
    on_cuda = resolve_device(config.model).type == "cuda"
    if not on_cuda:  # read when DeepSpeed is first imported, which transformers does as well
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    found = [name for name in LAUNCHER_VARIABLES if os.environ.get(name)]
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if "WORLD_SIZE" not in found or os.environ["WORLD_SIZE"] == "1":
        return Ranks(num_restarts=num_restarts)
    missing = [name for name in LAUNCHER_VARIABLES if name not in found]
    if missing:
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected {missing[0]} beside it, as launchers set it")
    rank, world_size, local_rank = (int(os.environ[name]) for name in LAUNCHER_VARIABLES[:3])
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank}: expected 0 … {world_size - 1}, for WORLD_SIZE={world_size}")
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK={local_rank}: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank)
        if rank == 0:
            logger.warning("several processes on GPUs: never verified (see README, Verified on)")
    timeout = timedelta(minutes=int(os.environ.get(TIMEOUT_VARIABLE) or TIMEOUT_MINUTES))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _store_of_attempt(rank, world_size, timeout)
        meeting = {} if store is None else {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout, **meeting)
    except dist.DistError as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"MASTER_ADDR:MASTER_PORT={address}: the ranks could not meet there: {said}") from error
    group = dist.new_group(backend="gloo", timeout=timeout) if on_cuda else None
    counts = [0] * world_size  # torchrun counts a restart on the machine alone where a process failed
    dist.all_gather_object(counts, num_restarts, group=group)
    return Ranks(rank, world_size, local_rank, group, FailureWatch(rank, sum(counts)), sum(counts))


def _store_of_attempt(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The launcher's store under a name of this attempt, or None for a launcher that has none or a new one.

    torchrun's agents keep one store over restarts. There gloo and NCCL would find the addresses of processes that have
    died (symptom: "Connection refused" or no end of init_process_group), and the agents of several machines count
    restarts differently. So rank 0 invents a name, and repeats beside it what the others said last, until each of
    them has found there what it said itself; what earlier attempts left is never taken for an answer.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=timeout)
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    hello, welcome, others = "inverseq/hello/", "inverseq/welcome", [str(other) for other in range(1, world_size)]
    if rank > 0:
        store.set(f"{hello}{rank}", word)
    while True:
        if rank == 0:
            store.set(welcome, json.dumps([word, {other: store.get(hello + other).decode() for other in others}]))
            name, met = word, store.check([f"{word}/{other}" for other in others])
        else:
            name, words = json.loads(store.get(welcome))
            met = words.get(str(rank)) == word
        if met:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} of {world_size} waited {timeout} for the others")
        time.sleep(MEETING_POLL_S)
    store.set(f"{name}/{rank}", "")
    return dist.PrefixStore(name, store)


class FailureWatch:
    """A word of failure in the launcher's store, written by the first rank that fails and watched for by all.

    Collective operations cannot carry it: the other ranks may wait in one that will never end.
    """

    def __init__(self, rank: int, num_restarts: int):
        self.rank = rank
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        prefix = f"inverseq/{num_restarts}"  # torchrun's store outlives an attempt
        self.store = dist.PrefixStore(prefix, dist.TCPStore(*address, is_master=False))
        self.over = threading.Event()
        self.lock = threading.Lock()  # of the step from watching to over, or to an interrupt
        self.failure: RankFailed | None = None
        self.thread = threading.Thread(target=self._run, name="failure watch", daemon=True)
        self.thread.start()

    def report(self, error: BaseException) -> RankFailed | None:
        """Say that this rank fails, and return the failure of the rank that said so first, unless it is this one."""
        self.stop()
        if self.failure is not None:
            return self.failure
        if isinstance(error, KeyboardInterrupt):
            return None  # the launcher interrupts every rank
        reason = f"{self.rank} {type(error).__name__}: {error}"
        try:
            return self._understood(self.store.compare_set(FAILURE_KEY, "", reason).decode())
        except dist.DistError:  # the store's process ends only by failing while others still run
            return RankFailed(0, "its process has gone") if self.rank != 0 else None

    def stop(self) -> None:
        """Watch no more, and interrupt nothing once this has returned."""
        with self.lock:
            self.over.set()

    def _understood(self, reason: str) -> RankFailed | None:
        rank, _, words = reason.partition(" ")
        return None if int(rank) == self.rank else RankFailed(int(rank), words)

    def _run(self) -> None:
        failure = None
        while not self.over.wait(POLL_S):
            try:
                if not self.store.check([FAILURE_KEY]):
                    continue
                failure = self._understood(self.store.get(FAILURE_KEY).decode())
            except dist.DistError:
                failure = RankFailed(0, "its process or its launcher's has gone")
            break
        with self.lock:
            if failure is None or self.over.is_set():
                return
            self.failure = failure
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it from Python code only
        if not self.over.wait(GRACE_S):
            logger.error("%s", self.failure)
            os._exit(1)
