"""Several processes of which one fails: all stop, torchrun starts them again, and the run is the uninterrupted one."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from inverseq.metrics import read_metrics
from inverseq.sampling_lmdeploy_server import held_port
from tests.tiny import make_tiny_model
from tests.tiny_run import tiny_run_options

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MACHINE_KEYS = ("duration_s", "tokens_per_second", "_bytes")
STEPS_PER_EPOCH = 2  # 6 samples in steps of 4


@dataclass(frozen=True)
class Launched:
    """What a launched command left."""

    status: int
    out: str
    errors: str
    run_dir: Path
    ended: float = 0.0  # on the clock of time.time

    @property
    def own_lines(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("inverseq-train: ")]


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "RANK", "WORLD"))}
    return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def tiny_options(root: Path, name: str) -> list[str]:
    own = "evaluation.every=0", "prompts.held_out=2", f"model.path={root / 'model'}", f"run_dir={root / name / 'run'}"
    return tiny_run_options(*own)


def launch(root: Path, name: str, launcher: list[str], *, faults) -> Launched:
    """Run the command line in processes of a launcher, with faults, in a run directory of its own."""
    folder = root / name
    (folder / "faults").mkdir(parents=True)
    accidents = environment(FAULTS=json.dumps(faults), FAULTS_DONE=str(folder / "faults"))
    command = [*launcher, "--config", "demo", *tiny_options(root, name)]
    done = subprocess.run(command, cwd=ROOT, env=accidents, capture_output=True, text=True, timeout=1200)
    missing = [row for number, row in enumerate(faults) if not (folder / "faults" / str(number)).exists()]
    assert not missing, f"never happened: {missing}\n{done.stderr}"
    return Launched(done.returncode, done.stdout, done.stderr, folder / "run", time.time())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    make_tiny_model(root / "model", scale=0.2)
    return root


# Runs $A on a host of address 10.0.0.1 and $B on one of 10.0.0.2: two network namespaces joined by a cable.
TWO_HOSTS = """
set -e
ip link set lo up
unshare -n sleep 600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
ip link add cable-a type veth peer name cable-b netns $other
ip address add 10.0.0.1/24 dev cable-a
ip link set cable-a up
nsenter -t $other -n ip link set lo up
nsenter -t $other -n ip address add 10.0.0.2/24 dev cable-b
nsenter -t $other -n ip link set cable-b up
GLOO_SOCKET_IFNAME=cable-a sh -c "$A" & first=$!
GLOO_SOCKET_IFNAME=cable-b nsenter -t $other -n sh -c "$B"
wait $first
"""
LOOPBACK = """
set -e
sh -c "$A" & first=$!
sh -c "$B"
wait $first
"""


def two_hosts_script() -> tuple[str, tuple[str, str]]:
    """The script that runs $A and $B, and their addresses; both are this machine's where namespaces are not allowed."""
    allowed = subprocess.run(["unshare", "-rn", "sh", "-c", "ip link add a type veth peer name b"], capture_output=True)
    return (LOOPBACK, ("127.0.0.1", "127.0.0.1")) if allowed.returncode else (TWO_HOSTS, ("10.0.0.1", "10.0.0.2"))


def torchrun_on(address: str, *, meeting: str, hosts_it: bool) -> list[str]:
    """The command for one of two machines; ``meeting`` is the address and port where their agents meet."""
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting]
    words += ["--rdzv-id", "two-hosts", "--rdzv-conf", f"is_host={int(hosts_it)}", "--local-addr", address]
    return [*TORCHRUN, *words, "-m", "inverseq.cli"]


@pytest.fixture(scope="module")
def whole(root) -> Launched:
    """The uninterrupted run, of two machines with a process each."""
    script, addresses = two_hosts_script()
    holder = held_port()
    meeting = f"{addresses[0]}:{holder.getsockname()[1]}"
    options = ["--config", "demo", *tiny_options(root, "whole")]
    commands = [
        shlex.join([*torchrun_on(address, meeting=meeting, hosts_it=index == 0), *options])
        for index, address in enumerate(addresses)
    ]
    program = ["unshare", "-rn", "sh", "-c", script] if script is TWO_HOSTS else ["sh", "-c", script]
    no_compiler = {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(root / "compiled")}
    variables = environment(A=commands[0], B=commands[1], **no_compiler)
    done = subprocess.run(program, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1200)
    holder.close()
    return Launched(done.returncode, done.stdout, done.stderr, root / "whole" / "run")


KILLS = [
    (0, "torch.optim:AdamW.step", STEPS_PER_EPOCH, "SIGKILL"),
    (1, "inverseq.checkpoint_sharded:write_state", 2, "SIGKILL"),
]


@pytest.fixture(scope="module")
def killed(root) -> Launched:
    """Its twin on one machine: a rank is killed within a step of epoch 1, then one within the checkpoint of epoch 2."""
    words = ["--nproc-per-node", "2", "--max-restarts", "2", "-m", "tests.faulty_cli"]
    return launch(root, "killed", [*TORCHRUN, *words], faults=KILLS)


def rows_without_clocks(run_dir: Path) -> list[dict]:
    """The metric rows without what was measured of the machine."""
    return [{k: v for k, v in row.items() if not k.endswith(MACHINE_KEYS)} for row in read_metrics(run_dir)]


def result_files(run_dir: Path) -> dict[str, bytes]:
    """What a run leaves, but for clocks and paths, and the generators that no run seeds (Python's and NumPy's)."""
    left_out = ("config.yaml", "metrics.jsonl", "state.json")
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name not in left_out]
    contents = {str(path.relative_to(run_dir)): path.read_bytes() for path in files if path.suffix != ".pt"}
    for path in files:
        if path.name.startswith("rng_"):
            generator = torch.load(path, weights_only=True)["torch"]
            contents[str(path.relative_to(run_dir))] = generator.numpy().tobytes()
    return contents


def test_processes_killed_within_a_step_and_within_a_checkpoint_end_as_the_uninterrupted_run(killed, whole):
    assert killed.status == 0, killed.errors
    assert rows_without_clocks(killed.run_dir) == rows_without_clocks(whole.run_dir)
    ours, theirs = result_files(killed.run_dir), result_files(whole.run_dir)
    assert ours.keys() == theirs.keys() and len(theirs) >= 2 * 4 + 4
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert killed.errors.count("INFO resumed ") == 1 and "behind epoch 1" in killed.errors
    assert list(killed.run_dir.rglob(".*")) == []  # no temporary file is left


def test_two_machines_train_and_say_everything_once(whole):
    assert whole.status == 0, whole.errors
    assert len(read_metrics(whole.run_dir, "step")) == 2 * STEPS_PER_EPOCH
    assert whole.out.count("run directory: ") == 1
    lines = whole.errors.splitlines()
    for once in ("INFO rendering", "INFO placement: engine.zero_stage", "epoch 2/2 train: ", "Warning: "):
        assert sum(once in line for line in lines) <= 1, whole.errors
    assert "epoch 2/2 train: 6 samples" in whole.errors and whole.own_lines == []


def test_training_on_a_cpu_compiles_nothing(root, whole):
    assert whole.status == 0 and not (root / "compiled").exists()


def test_a_rank_that_fails_in_sampling_stops_all_and_names_itself(root):
    """Started by ``--nproc``, whose processes are told to have the accident."""
    faults = [(1, "inverseq.trainer:sample_responses", 1, "no more\npaper")]
    program = "from inverseq import cli, launch; launch.MODULE = 'tests.faulty_cli'; raise SystemExit(cli.main())"
    run = launch(root, "sampling", [sys.executable, "-c", program, "--nproc", "2"], faults=faults)
    assert run.status == 1, run.errors
    assert run.own_lines == ["inverseq-train: [rank 1] error: no more paper"], run.errors
    assert "Traceback" not in run.errors and "torch.distributed" not in run.errors
    raised = (root / "sampling" / "faults" / "0").stat().st_mtime
    assert run.ended - raised < 600  # ranks that wait for each other do so for an hour
