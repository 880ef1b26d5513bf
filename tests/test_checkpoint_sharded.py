"""Checkpoints of many ranks: several parts of one rank, generators of each rank, and what one process has saved."""

import json
import random

import numpy as np
import pytest
import torch

from inverseq import checkpoint_sharded
from inverseq.checkpoint import STATE_FILE, save_checkpoint, write_content
from inverseq.checkpoint_files import describe_file, rng_state, write_state
from inverseq.checkpoint_sharded import KINDS, load_named_checkpoint, save_sharded_checkpoint
from inverseq.config import EngineConfig, OptimConfig
from inverseq.distributed import Ranks
from inverseq.engine import TorchEngine
from inverseq.policy import Policy
from tests.attention_oracle import tiny

NAMES = [f"layer.{index}.weight" for index in range(7)]


class Second(Ranks):
    """Rank 1 of 2, where rank 0 says the same."""

    def gather(self, value):
        return [value, value]


def states(names=NAMES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(name, {kind: torch.randn(3, 5, generator=generator) for kind in KINDS}) for name in names]


def save(run_dir):
    keywords = {"named_state": states(), "num_updates": 4, "progress": {"epoch": 1}, "keep_last": 2}
    return save_sharded_checkpoint(run_dir, 1, ranks=Ranks(), **keywords)


def assert_state(saved, expected):
    for name, state in expected:
        found = saved.read(name)
        assert found.keys() == state.keys() and all(torch.equal(found[kind], state[kind]) for kind in KINDS), name


@pytest.mark.parametrize(("limit", "num_parts"), [(1, 7), (3 * 3 * 5 * 4 + 1, 4), (2**31, 1)])
def test_a_rank_writes_its_weights_in_parts_and_all_are_read(tmp_path, monkeypatch, limit, num_parts):
    monkeypatch.setattr(checkpoint_sharded, "PART_BYTES", limit)
    path = save(tmp_path)
    parts = sorted(file.name for file in path.glob("*.safetensors"))
    assert parts == [f"state_0000_{number:03d}.safetensors" for number in range(num_parts)]
    saved = load_named_checkpoint(path, names=NAMES, ranks=Ranks())
    assert_state(saved, states())
    assert saved.num_updates == 4 and saved.progress == {"epoch": 1}


def test_each_rank_goes_on_with_its_own_generators_and_other_numbers_of_ranks_with_the_first(tmp_path):
    path = save(tmp_path)
    drawn = []
    for seed, rank in ((1, 0), (2, 1)):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        write_state(path, path, f"rng_{rank:04d}.pt", rng_state())
        drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
    content = json.loads((path / STATE_FILE).read_text())
    files = {file.name: describe_file(file) for file in path.iterdir() if file.name != STATE_FILE}
    del content["crc32"]
    write_content(path, path, content | {"world_size": 2, "files": files})
    for ranks, expected in ((Second(rank=1, world_size=2), drawn[1]), (Second(world_size=2), drawn[0])):
        load_named_checkpoint(path, names=NAMES, ranks=ranks)
        assert (torch.rand(()).item(), random.random(), np.random.rand()) == expected
    load_named_checkpoint(path, names=NAMES, ranks=Ranks())
    assert (torch.rand(()).item(), random.random(), np.random.rand()) == drawn[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_what_one_process_has_saved_is_read_by_name_with_its_fp32_masters(tmp_path, frozen):
    model = tiny("llama", torch.bfloat16)
    model.get_decoder().norm.float()  # weights of two dtypes: the first has a master, the second is its own
    if frozen:
        model.get_decoder().embed_tokens.weight.requires_grad_(False)
    engine = TorchEngine(Policy(model, 97, EngineConfig()), OptimConfig(), 10)
    generator = torch.Generator().manual_seed(0)
    for master in engine.masters:
        master.grad = torch.randn(master.shape, generator=generator)
    engine._update()
    path = save_checkpoint(
        tmp_path, 1, model=model, engine_state=engine.state_dict(), progress={"epoch": 1}, keep_last=1
    )
    saved = load_named_checkpoint(path, names=engine.names, ranks=Ranks())
    assert saved.num_updates == 1
    rounded = 0
    for name, master in zip(engine.names, engine.masters, strict=True):
        state, found = engine.optimizer.state[master], saved.read(name)
        assert all(torch.equal(found[kind], state[kind]) for kind in ("exp_avg", "exp_avg_sq")), name
        assert found["master"].dtype == torch.float32 and torch.equal(found["master"], master), name
        rounded += not torch.equal(master, master.bfloat16().float())
    assert rounded > 10
    for names in (engine.names[:-1], [*engine.names[:-1], "another.weight"]):
        with pytest.raises(ValueError, match="the model trains|other weights than the model"):
            load_named_checkpoint(path, names=names, ranks=Ranks())
