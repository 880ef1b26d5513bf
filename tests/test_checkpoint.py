import json
import pickle
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from inverseq import checkpoint, checkpoint_files
from inverseq.checkpoint import (
    check_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent
PROGRESS = {"epoch": 1, "num_updates": 3, "prompts": {"cursor": [1, 2**70], "order": None}, "fingerprint": "ab"}
FILES = ["model.safetensors", "engine.pt", "rng.pt", "state.json"]


class Net(nn.Module):
    """An embedding, a layer with a buffer, and a head that may be the embedding."""

    def __init__(self, *, seed=0, tied=True, dtype=torch.float32, width=8):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids)))


class Run:
    def __init__(self, **net_options):
        self.model = Net(**net_options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda update: 1 / (1 + update))

    def train(self, updates=3):
        """Updates that draw on every generator."""
        losses = []
        for _ in range(updates):
            ids = torch.randint(0, 11, (16,))
            weight = random.random() + np.random.rand() + np.random.randn()
            loss = weight * nn.functional.dropout(self.model(ids), 0.5).float().square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, run_dir, epoch=1, keep_last=2, progress=PROGRESS):
        return save_checkpoint(
            run_dir,
            epoch,
            model=self.model,
            engine_state={"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            progress=progress,
            keep_last=keep_last,
        )

    def load(self, path):
        engine_state, progress = load_checkpoint(path, model=self.model)
        self.optimizer.load_state_dict(engine_state["optimizer"])
        self.scheduler.load_state_dict(engine_state["scheduler"])
        return progress

    def bits(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def seed_everything(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def assert_equal_bits(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, tied, dtype):
    seed_everything(1)
    run = Run(tied=tied, dtype=dtype)
    run.train()
    np.random.randn()  # leaves the second of a pair in NumPy's generator
    path = run.save(tmp_path)
    assert path == tmp_path / "checkpoints" / "epoch_0001"
    losses = run.train()
    seed_everything(2)
    restored = Run(seed=5, tied=tied, dtype=dtype)
    restored.train(1)
    assert restored.load(path) == PROGRESS
    assert restored.train() == losses
    assert_equal_bits(restored.bits(), run.bits())
    assert restored.scheduler.get_last_lr() == run.scheduler.get_last_lr()
    assert (restored.model.head.weight is restored.model.embedding.weight) == tied


def test_saving_does_not_move_the_random_generators_or_the_weights(tmp_path):
    losses = []
    for saves in (False, True):
        seed_everything(3)
        run = Run()
        run.train()
        if saves:
            run.save(tmp_path)
        losses.append(run.train())
    assert losses[0] == losses[1]


def test_weights_are_safetensors_with_tied_ones_once_and_state_names_every_file(tmp_path):
    from safetensors.torch import load_file

    path = Run().save(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    weights = load_file(path / "model.safetensors")
    assert "embedding.weight" in weights and "head.weight" not in weights and "norm.running_mean" in weights
    state = json.loads((path / "state.json").read_text())
    assert state["epoch"] == 1 and state["progress"] == PROGRESS
    assert set(state["files"]) == set(FILES) - {"state.json"}
    for name, entry in state["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "crc32": zlib.crc32(content)}
    assert {"inverseq", "torch", "transformers", "python", "numpy"} <= set(state["versions"])


def test_the_newest_ones_are_kept_in_order_of_epoch(tmp_path):
    run = Run()
    assert latest_checkpoint(tmp_path) is None and list_checkpoints(tmp_path) == []
    for epoch in (8, 9, 10, 9999, 10000):
        run.save(tmp_path, epoch, keep_last=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch_0010", "epoch_9999", "epoch_10000"]
    assert latest_checkpoint(tmp_path).name == "epoch_10000"
    run.save(tmp_path, 10001, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_10001"]


def test_a_run_taken_back_leaves_no_checkpoint_of_its_undone_future(tmp_path):
    run = Run()
    for epoch in (1, 2, 3):
        run.save(tmp_path, epoch, keep_last=3)
    run.train()
    run.save(tmp_path, 2, keep_last=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch_0001", "epoch_0002"]
    restored = Run(seed=9)
    restored.load(latest_checkpoint(tmp_path))
    assert_equal_bits(restored.bits(), run.bits())


def test_half_written_checkpoints_are_ignored_and_cleaned_by_the_next_one(tmp_path):
    run = Run()
    run.save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for litter in (".epoch_0002.tmp", ".epoch_0001.old", "epoch_0003"):
        (folder / litter).mkdir()
        (folder / litter / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path).name == "epoch_0001"
    run.save(tmp_path, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["epoch_0001", "epoch_0002"]


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize("spoil", [flip_a_bit, cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_spoilt_file_is_named_the_older_checkpoint_offered_and_nothing_changed(tmp_path, name, spoil):
    run = Run()
    for epoch in (1, 2, 3):
        run.train(1)
        path = run.save(tmp_path, epoch, keep_last=3)
    flip_a_bit(tmp_path / "checkpoints" / "epoch_0002" / "engine.pt")  # not to be offered
    spoil(path / name)
    fresh = Run(seed=7)
    before = fresh.bits()
    with pytest.raises(ValueError) as raised:
        fresh.load(path)
    assert str(path / name) in str(raised.value)
    assert f"{tmp_path / 'checkpoints' / 'epoch_0001'} is complete" in str(raised.value)
    assert_equal_bits(fresh.bits(), before)
    assert len(fresh.optimizer.state) == 0


def test_of_several_older_checkpoints_the_newest_complete_one_is_offered(tmp_path):
    for epoch in (1, 2, 3):
        path = Run().save(tmp_path, epoch, keep_last=3)
    flip_a_bit(path / "rng.pt")
    with pytest.raises(ValueError, match=r"older checkpoint \S+epoch_0002 is complete"):
        Run().load(path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = Run().save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"state\.json: format 2; this version reads format 1"):
        Run().load(path)


def test_a_checksum_is_of_the_whole_file_however_it_is_read(tmp_path, monkeypatch):
    content = bytes(range(256)) * 5
    (tmp_path / "file").write_bytes(content)
    for block_bytes in (1, 100, 256, len(content), len(content) + 1):
        monkeypatch.setattr(checkpoint_files, "CHECKSUM_BLOCK_BYTES", block_bytes)
        assert checkpoint_files.file_crc32(tmp_path / "file") == zlib.crc32(content)


def test_numpys_second_normal_number_of_a_pair_is_restored(tmp_path):
    run = Run()
    for draws in (1, 2):
        np.random.seed(draws)
        np.random.randn(draws)
        path = run.save(tmp_path)
        expected = np.random.randn(3).tolist()
        run.load(path)
        assert np.random.randn(3).tolist() == expected


def test_weights_that_lie_transposed_in_memory_are_written_and_restored(tmp_path):
    run, fresh = Run(tied=False), Run(seed=3, tied=False)
    for weight in (run.model.head.weight, fresh.model.embedding.weight):
        weight.data = weight.detach().t().contiguous().t()
        assert not weight.is_contiguous()
    fresh.load(run.save(tmp_path))
    assert_equal_bits(fresh.bits(), run.bits())


def test_without_an_older_complete_checkpoint_the_error_says_so(tmp_path):
    path = Run().save(tmp_path)
    flip_a_bit(path / "rng.pt")
    with pytest.raises(ValueError, match=r"rng\.pt: corrupt.*there is no older complete checkpoint"):
        Run().load(path)


@pytest.mark.parametrize(
    "options, named",
    [({"tied": False}, "head.weight"), ({"width": 4}, "embedding.weight"), ({"dtype": torch.bfloat16}, "bfloat16")],
    ids=["tied", "shape", "dtype"],
)
def test_weights_of_another_model_are_refused_before_anything_changes(tmp_path, options, named):
    path = Run().save(tmp_path)
    other = Run(seed=4, **options)
    before = other.bits()
    with pytest.raises(ValueError, match=r"model\.safetensors.*" + named):
        other.load(path)
    assert_equal_bits(other.bits(), before)


def test_weights_that_the_model_does_not_have_are_refused(tmp_path):
    path = Run(tied=False).save(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: holds other weights than the model.*head\.weight"):
        Run().load(path)


def test_a_pickle_that_runs_code_is_not_loaded_even_with_a_right_checksum(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    model = Net()
    path = save_checkpoint(tmp_path, 1, model=model, engine_state={"state": Evil()}, progress={}, keep_last=1)
    check_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        load_checkpoint(path, model=model)
    assert not (tmp_path / "ran").exists()


def test_progress_that_json_would_change_is_refused(tmp_path):
    run = Run()
    for progress in ({"cursor": (1, 2)}, {1: 2}, {"loss": float("nan")}):
        with pytest.raises(ValueError, match="progress"):
            run.save(tmp_path, progress=progress)


FULL_DISK = """
import resource, signal, sys
from tests.test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run_dir = Path(sys.argv[1])
run = Run(width=512)
run.train(1)
for limit, name in ((10_000, "model.safetensors"), (50_000, "engine.pt"), (100_000, "state.json")):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        run.save(run_dir, 2, progress={"text": "x" * 200_000})
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = run_dir / "checkpoints" / "epoch_0002" / name
    assert "File too large" in message and message.endswith(f"'{file}'"), message
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["epoch_0001"]
    Run(seed=3).load(latest_checkpoint(run_dir))
"""


def test_a_full_disk_is_one_error_naming_the_file_and_the_older_checkpoint_stays(tmp_path):
    Run().save(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


KILL = """
import os, signal, sys, time
from tests.test_checkpoint import *
torch.set_num_threads(1)

def run_of(epoch):  # every number of the checkpoint is its epoch
    run = Run(width=2048)
    run.train(1)
    for tensor in (*run.model.parameters(), *(t for s in run.optimizer.state.values() for t in s.values())):
        tensor.data.fill_(epoch)
    return run

def write_for_ever(run_dir, pipe):
    run = run_of(0)
    for epoch in range(1, 10_000):
        for tensor in (*run.model.parameters(), *(t for s in run.optimizer.state.values() for t in s.values())):
            tensor.data.fill_(epoch % 100)
        run.save(run_dir, 1 + epoch % 100, keep_last=1, progress={"epoch": epoch % 100})
        os.write(pipe, b".")

run_dir, rounds = sys.argv[1], int(sys.argv[2])
delays = random.Random(0)
run_of(0).save(run_dir, 1, keep_last=1, progress={"epoch": 0})
seen, litter = set(), 0
for _ in range(rounds):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write_for_ever(run_dir, writer)
    for _ in range(delays.randint(1, 3)):
        os.read(reader, 1)
    time.sleep(delays.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    restored = Run(width=2048)
    progress = restored.load(latest_checkpoint(run_dir))
    tensors = (*restored.model.parameters(), *(t for s in restored.optimizer.state.values() for t in s.values()))
    assert all((tensor == progress["epoch"]).all() for tensor in tensors), progress
    seen.add(progress["epoch"])
    litter += any(path.name.startswith(".") for path in Path(run_dir, "checkpoints").iterdir())
print(len(seen), litter)
"""


def test_sigkill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILL, tmp_path, "8"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_states, num_interrupted = map(int, done.stdout.split())
    assert num_states > 1 and num_interrupted > 1  # the kills really fell on different moments, and inside writes
