"""What ranks tell each other, and that all stop when one fails, without a launcher that would end them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from inverseq import distributed
from inverseq.config import Config, ModelConfig
from inverseq.distributed import LAUNCHER_VARIABLES, FailureWatch, RankFailed, Ranks, init_ranks
from inverseq.sampling_lmdeploy_server import held_port

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Config(model=ModelConfig(path="unused", device="cpu"), run_dir="unused")

# Two processes meet anew for every scenario; each tells what it raised and how many seconds that took.
SCRIPT = """
import json, os, sys, time
from inverseq import distributed
from tests.test_distributed import CONFIG

def exchange(ranks):
    assert ranks.gather(ranks.rank + 1) == [1, 2] and ranks.broadcast(ranks.rank) == 0
    for items in ([], ["a"], list(range(5))):
        assert ranks.unshare(ranks.share(items)) == items
    if ranks.is_main:
        time.sleep(0.5)  # the other rank reaches the end first and must not miss the store

def one_ends_late(ranks):
    assert ranks.num_restarts == 3  # of both machines
    if not ranks.is_main:
        time.sleep(1.5)  # its watch reads the store of rank 0, which must still be there

def one_fails_before_a_collective(ranks):
    if ranks.rank == 1:
        raise ValueError("boom")
    ranks.barrier()

def one_fails_while_the_other_computes(ranks):
    if ranks.rank == 1:
        raise ValueError("boom")
    time.sleep(300)

def both_find_the_same(ranks):
    while ranks.rank == 1 and not ranks.watch.store.check([distributed.FAILURE_KEY]):
        time.sleep(0.01)  # as long as the other rank has not said so
    raise ValueError("bad input")

def one_hangs_in_a_collective(ranks):  # the rank that failed does not end, so the connection stays
    distributed.GRACE_S = 1.0
    if ranks.rank == 1:
        ranks.watch.report(ValueError("boom"))
        time.sleep(300)
    ranks.barrier()

def run(scenario, port):
    os.environ["MASTER_PORT"] = port
    ranks = distributed.init_ranks(CONFIG)
    started = time.monotonic()
    try:
        with ranks.failing_together():
            globals()[scenario](ranks)
        said = None
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([scenario, said, time.monotonic() - started]), flush=True)
    if said is not None and ranks.is_main:
        time.sleep(1)  # rank 0 holds the store

for scenario, port in zip(sys.argv[1::2], sys.argv[2::2]):
    run(scenario, port)
"""
SCENARIOS = (
    "exchange",
    "one_ends_late",
    "one_fails_before_a_collective",
    "one_fails_while_the_other_computes",
    "both_find_the_same",
    "one_hangs_in_a_collective",
)


@pytest.fixture(scope="module")
def told() -> list[dict]:
    """What each rank told, by scenario; rank 0 also how it ended and what it logged."""
    holders = {scenario: held_port() for scenario in SCENARIOS}
    words = [word for scenario, at in holders.items() for word in (scenario, str(at.getsockname()[1]))]
    processes = []
    for rank in (0, 1):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"TORCHELASTIC_RESTART_COUNT": str(1 + rank)}
        command = [sys.executable, "-c", SCRIPT, *words]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        out, err = processes[0].communicate(timeout=600)
    finally:
        processes[1].kill()
        for holder in holders.values():
            holder.close()
    outputs = [out, processes[1].communicate()[0]]
    told = [{row[0]: row[1:] for row in map(json.loads, output.splitlines())} for output in outputs]
    told[0]["end"] = [processes[0].returncode, err]
    return told


def test_values_reach_all_ranks_in_order(told):
    assert told[0]["exchange"][0] is told[1]["exchange"][0] is None


def test_restarts_of_all_machines_are_counted_and_a_rank_that_ends_late_misses_nobody(told):
    assert told[0]["one_ends_late"][0] is told[1]["one_ends_late"][0] is None


@pytest.mark.parametrize("scenario", ["one_fails_before_a_collective", "one_fails_while_the_other_computes"])
def test_a_rank_that_fails_stops_the_others_with_its_number_and_error(told, scenario):
    assert told[1][scenario][0] == "ValueError: boom"
    said, duration_s = told[0][scenario]
    assert said == "RankFailed: stopped because rank 1 failed: ValueError: boom"
    assert duration_s < 200


def test_what_all_ranks_find_is_raised_as_itself_by_one_of_them(told):
    assert told[0]["both_find_the_same"][0] == "ValueError: bad input"
    assert told[1]["both_find_the_same"][0].startswith("RankFailed: stopped because rank 0 failed: ")


def test_a_rank_that_hangs_in_a_collective_ends_itself_and_says_why(told):
    assert "one_hangs_in_a_collective" not in told[0]
    status, err = told[0]["end"]
    assert status == 1 and "stopped because rank 1 failed: ValueError: boom" in err


def test_an_interrupt_of_the_watch_that_comes_late_does_not_replace_the_error(monkeypatch):
    """This rank fails by itself just as its watch, which has heard of the other rank's failure, interrupts it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(distributed, "POLL_S", 0.01)
    interrupting, interrupt = threading.Event(), signal.pthread_kill

    def interrupt_late(*arguments):
        interrupting.set()
        time.sleep(0.2)
        interrupt(*arguments)

    monkeypatch.setattr(signal, "pthread_kill", interrupt_late)
    watch = distributed.FailureWatch(0, 0)
    watch.store.set(distributed.FAILURE_KEY, "1 ValueError: boom")
    with pytest.raises(RankFailed, match="rank 1 failed: ValueError: boom"):
        with Ranks(world_size=2, watch=watch).failing_together():
            interrupting.wait()
            raise ConnectionError("the other rank has gone")
    watch.thread.join()


def test_an_interrupt_is_nobodys_failure_and_a_known_failure_is_its_reason():
    watch = object.__new__(FailureWatch)
    watch.over, watch.lock, watch.failure, watch.rank = threading.Event(), threading.Lock(), None, 1
    assert FailureWatch.report(watch, KeyboardInterrupt()) is None and watch.over.is_set()
    watch.failure = RankFailed(0, "boom")
    assert FailureWatch.report(watch, KeyboardInterrupt()) is watch.failure


def test_one_process_needs_no_launcher_and_no_group(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    ranks = init_ranks(CONFIG)
    assert ranks == Ranks() and ranks.is_main
    assert ranks.gather("x") == ["x"] and ranks.share([1, 2]) == [1, 2] == ranks.unshare([1, 2])
    with pytest.raises(ValueError, match="boom"), ranks.failing_together():
        raise ValueError("boom")


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_in_one_process_ends_the_group_that_its_engine_made_and_no_other(fails):
    def run(*, already_there: bool) -> bool:
        """Whether there is a group behind the run."""
        begin = partial(dist.init_process_group, "gloo", store=dist.HashStore(), rank=0, world_size=1)
        if already_there:
            begin()
        try:
            with suppress(ValueError), Ranks().failing_together():
                if not already_there:
                    begin()
                if fails:
                    raise ValueError("boom")
            return dist.is_initialized()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    assert run(already_there=True) and not run(already_there=False)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=2: expected MASTER_ADDR beside it"),
        ({name: "2" for name in LAUNCHER_VARIABLES}, "RANK=2: expected 0 … 1, for WORLD_SIZE=2"),
    ],
)
def test_variables_of_a_launcher_that_do_not_belong_together_are_refused(monkeypatch, variables, message):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        init_ranks(CONFIG)


@pytest.mark.parametrize("variable, minutes", [("", 60), ("7", 7)])
def test_a_rank_waits_longer_than_by_default_and_as_long_as_deepspeeds_variable_says(monkeypatch, variable, minutes):
    def refuse(backend, *, timeout, **_):
        raise dist.DistError(f"waits {timeout.total_seconds() / 60:.0f} minutes")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    for name, value in zip(LAUNCHER_VARIABLES, ("0", "2", "0", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", variable)
    with pytest.raises(ValueError, match=f"waits {minutes} minutes"):
        init_ranks(CONFIG)


def test_an_address_in_use_is_one_error(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in zip(LAUNCHER_VARIABLES, ("0", "2", "0", "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}: the ranks could not meet"):
            init_ranks(CONFIG)
