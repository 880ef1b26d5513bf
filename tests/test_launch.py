"""How processes are started, and how the command ends when it is one of several: statuses, lines, refusals."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from inverseq import cli, distributed, launch
from inverseq.config_loading import load_config

ROOT = Path(__file__).resolve().parent.parent
CPU = ["model.path=./nowhere", "run_dir=run", "model.device=cpu"]


def configure(*overrides):
    return load_config("demo", ["run_dir=run", "model.path=somewhere", *overrides])


def environment(**more) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "RANK", "WORLD"))}
    return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}


def command_line(*words: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "inverseq.cli", *words]
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=1200)


def own_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if not line.startswith("INFO ")]


# How many processes


def give_gpus(monkeypatch, number: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: number > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: number)


@pytest.mark.parametrize(
    ("gpus", "nproc", "overrides", "processes"),
    [(8, "auto", [], 8), (8, "3", [], 3), (0, "auto", [], 1), (0, "5", [], 5), (2, "auto", ["model.device=cpu"], 1)],
)
def test_a_process_for_each_gpu_or_as_many_as_asked_for(monkeypatch, gpus, nproc, overrides, processes):
    give_gpus(monkeypatch, gpus)
    assert launch.count_processes(nproc, configure(*overrides)) == processes


@pytest.mark.parametrize("nproc", ["0", "-1", "two", "1.5", "³"])
def test_a_number_of_processes_that_is_none_is_refused(nproc):
    with pytest.raises(ValueError, match=f"--nproc={nproc}: expected a positive number or auto"):
        launch.count_processes(nproc, configure())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    give_gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match="--nproc=3: this machine has 2 GPUs"):
        launch.count_processes("3", configure())


@pytest.mark.parametrize(("gpus", "mentioned"), [(0, False), (1, False), (4, True)])
def test_one_process_on_a_machine_with_several_gpus_says_that_others_are_idle(monkeypatch, caplog, gpus, mentioned):
    give_gpus(monkeypatch, gpus)
    with caplog.at_level("INFO", logger="inverseq"):
        launch.mention_idle_gpus(configure())
    assert ("one of this machine's 4 GPUs is used; --nproc auto" in caplog.text) == mentioned


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nproc", "2", "--hostfile", "hosts"], "expected one of them"),
        (["--dry-run", "--nproc", "2", "--hardware", "8xA800"], "expected one of them"),
        (["--dry-run", "--hostfile", "hosts"], "name the hosts' GPUs instead, for example --hardware 16x80GB"),
        (["--max-restarts", "1"], "--max-restarts=1: goes with --nproc"),
        (["--nproc", "2", "--max-restarts", "x"], "expected 0 or a positive number"),
        (["--nproc", "many"], "--nproc=many: expected a positive number or auto"),
        (["--hostfile", "nowhere"], "--hostfile=nowhere: no such file"),
    ],
)
def test_options_that_contradict_each_other_are_refused(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["--config", "demo", *CPU, *words])
    except SystemExit as exit:
        status = exit.code
    [line] = capsys.readouterr().err.splitlines()
    assert status == 2 and expected in line


# What the ends of the processes say together


@pytest.mark.parametrize(
    ("codes", "status", "said"),
    [
        ({0: -15, 1: 2}, 2, []),
        ({0: 1, 1: 2}, 2, []),
        ({0: -15, 3: 1}, 1, []),
        ({0: -15, 1: -9, 2: -15}, 1, ["[rank 1] error: ended by SIGKILL (is the machine's memory full?)"]),
        ({0: -11, 1: -15}, 1, ["[rank 0] error: ended by SIGSEGV"]),
        ({0: -15}, 1, ["[rank 0] error: ended by SIGTERM"]),
    ],
)
def test_the_status_is_the_failing_ranks_and_a_killed_rank_is_named(codes, status, said):
    lines = []
    assert launch._describe_failures(codes, lines.append) == status
    assert lines == said


@pytest.fixture
def processes(monkeypatch):
    """Run attempts of tests/launched_process.py; (status, whether each attempt was a restart, what was said)."""
    handlers = {number: signal.getsignal(number) for number in launch.SIGNALS}
    monkeypatch.setattr(launch, "MODULE", "tests.launched_process")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(launch.SUPERVISED, "")

    def run(*attempts: list[str]):
        left, restarted, said = [*attempts], [], []

        def words(is_restart: bool) -> list[str]:
            restarted.append(is_restart)
            return left.pop(0)

        status = launch.run_processes(words, num_processes=2, max_restarts=2, say=said.append)
        return status, restarted, said

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_processes_are_started_again_after_a_failure_as_often_as_allowed(processes):
    killed = "[rank 1] error: ended by SIGKILL (is the machine's memory full?)"
    assert processes(["0:status1"], ["1:SIGKILL"], []) == (
        0, [False, True, True], ["restart 1 of 2", killed, "restart 2 of 2"]
    )  # fmt: skip
    assert processes(["0:status3"], ["1:status1"], ["1:status4"]) == (
        4, [False, True, True], ["restart 1 of 2", "restart 2 of 2"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "status", "waited"),
    [(0, 2, []), (0, 1, [launch.FIRST_WAIT_S]), (1, 2, [launch.OTHERS_WAIT_S]), (1, 1, [launch.OTHERS_WAIT_S])],
)
def test_rank_0_speaks_first_and_of_bad_input_at_once(monkeypatch, rank, status, waited):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    launch.wait_for_the_launcher(rank, status)
    assert slept == waited and 0 < launch.FIRST_WAIT_S < launch.OTHERS_WAIT_S


def test_neither_bad_input_nor_an_interrupt_is_tried_again(processes):
    assert processes(["1:status2"]) == (2, [False], [])
    assert processes(["0:interrupt"]) == (130, [False], [])
    assert processes(["0:terminate"]) == (143, [False], [])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # one more would replace the exit status


@pytest.mark.parametrize(("num_processes", "asked", "threads"), [(5, None, "2"), (16, None, "1"), (5, "7", "7")])
def test_the_cores_are_divided_among_the_processes_unless_threads_are_set(monkeypatch, num_processes, asked, threads):
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda config, program: lambda *words: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(12))
    monkeypatch.setenv(launch.SUPERVISED, "")
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    launch.run_processes(lambda restarted: [], num_processes=num_processes, max_restarts=0, say=print)
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_what_every_process_finds_is_said_by_rank_0_alone(processes, monkeypatch, capfd):
    monkeypatch.setattr(launch, "MODULE", "inverseq.cli")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    assert processes(["--config", "demo", "--fast"]) == (2, [False], [])
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("inverseq-train: [rank 0] error: unrecognized arguments: --fast")


def test_bad_input_is_said_once_by_processes_that_end_with_its_status_and_are_not_restarted(tmp_path):
    done = command_line("--config", "demo", *CPU, "--nproc", "2", "--max-restarts", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    [line] = own_lines(done.stderr)
    assert line.startswith("inverseq-train: [rank ") and "error: model.path='./nowhere': no such folder" in line
    assert list(tmp_path.iterdir()) == []


ONE_OF_TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def test_a_port_in_use_is_one_clear_error(tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = command_line("--config", "demo", *CPU, cwd=tmp_path, **ONE_OF_TWO, MASTER_PORT=port)
    assert done.returncode == 2
    [line] = [line for line in own_lines(done.stderr) if not line.startswith("[W")]
    assert f"[rank 0] error: MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}: " in line and "in use" in line


def test_a_launched_process_refuses_to_launch_others(tmp_path):
    done = command_line("--config", "demo", *CPU, "--nproc", "2", cwd=tmp_path, **ONE_OF_TWO, MASTER_PORT="29500")
    assert done.returncode == 2
    [line] = own_lines(done.stderr)
    assert "start a launcher; leave them out, this process has one already" in line


def test_the_ranks_of_each_attempt_meet_under_a_name_of_their_own_in_a_store_that_outlives_attempts(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def meet(attempt: int, rank: int) -> dist.Store:
        time.sleep(0.1 * ((attempt + rank) % 3))  # in another order each time
        return distributed._store_of_attempt(rank, 3, timedelta(seconds=60))

    with ThreadPoolExecutor(3) as pool:
        for attempt in range(3):
            stores = list(pool.map(meet, [attempt] * 3, range(3)))
            assert not any(store.check(["address"]) for store in stores)  # nothing of an earlier attempt
            stores[attempt].set("address", str(attempt))
            assert [store.get("address") for store in stores] == [str(attempt).encode()] * 3


# Hosts


def put_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder in front of PATH with an ssh that reaches every host but those named bad…."""
    folder = tmp_path / "programs"
    script = 'for word; do case $word in bad*) echo "ssh: connect to host $word port 22: no route" >&2; exit 255;; '
    put_program(folder, "ssh", script + "silent*) sleep 100;; esac; done; exit 0")
    put_program(folder, "pdsh", "exit 0")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_an_unreachable_host_is_named_before_anything_starts(tmp_path, programs, monkeypatch, capsys):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("good-1 slots=8\nbad-2 slots=8\ngood-3 slots=8\n")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("a launcher was started"))
    assert cli.main(["--config", "demo", *CPU, "--hostfile", str(hostfile)]) == 2
    captured = capsys.readouterr()
    expected = "not reachable by ssh without a password: bad-2 (ssh: connect to host bad-2 port 22: no route)"
    assert captured.err == f"inverseq-train: error: --hostfile={hostfile}: {expected}\n" and captured.out == ""


def test_a_host_that_does_not_answer_is_given_up_within_seconds(programs, monkeypatch):
    monkeypatch.setattr(launch, "SSH_TIMEOUT_S", 0.1)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"silent-1 \(no answer\)$"):
        launch.check_hosts(["good-1", "silent-1"], "hosts")
    assert time.monotonic() - started < 90


def test_reachable_hosts_are_handed_to_deepspeeds_launcher(tmp_path, programs, monkeypatch):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two machines\ngood-1 slots=8\ngood-2 slots=8\n")
    executed = []
    monkeypatch.setattr(os, "execv", lambda program, command: executed.append(command))
    launch.exec_on_hosts(["--config", "demo", "run_dir=a run"], str(hostfile))
    [command] = executed
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"] and f"--hostfile={hostfile}" in command
    assert command[command.index("--module") + 1 :] == ["inverseq.cli", "--config", "demo", "run_dir=a run"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("good-1 slot=8\n", "bad entry: good-1 slot=8"), ("", "empty"), ("a slots=1\na slots=2\n", "multiple entries")],
)
def test_a_malformed_hostfile_is_one_clear_error(tmp_path, capsys, content, expected):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(content)
    with pytest.raises(ValueError, match=expected) as raised:
        launch.read_hosts(str(hostfile))
    assert str(raised.value).startswith(f"--hostfile={hostfile}: ")
    assert capsys.readouterr().out == ""


def test_several_hosts_need_pdsh(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda program: None if program == "pdsh" else program)
    with pytest.raises(ValueError, match="DeepSpeed's launcher needs pdsh, which is not installed"):
        launch.check_hosts(["good-1", "good-2"], "hosts")
