"""The estimate of what training holds is compared with what the engines really hold, by counting storages."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from inverseq.config_loading import load_config
from inverseq.memory import PHASES, Hardware, Job, Placement, estimate_memory, model_size, peak_of_phases
from inverseq.memory_zero import pinned_bytes
from inverseq.zero_options import reduce_bucket_numel
from tests.zero_memory_job import SHAPE, VOCAB

ROOT = Path(__file__).resolve().parent.parent
SIZE = model_size(LlamaConfig(**SHAPE, vocab_size=VOCAB))
CASES = [(0, "bfloat16", False), (1, "bfloat16", False), (2, "bfloat16", False), (3, "bfloat16", False)]
CASES += [(1, "float32", False), (2, "float32", False), (2, "bfloat16", True)]
ENGINE_PARTS = ("weights", "adapters", "moments", "gradient", "bucket", "temporaries", "copies", "staging")


@pytest.fixture(scope="module")
def measured():
    environment = dict(os.environ, DS_ACCELERATOR="cpu", PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "tests.zero_memory_job", json.dumps(CASES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")] or [done.stderr]
    return dict(zip(CASES, json.loads(line.removeprefix("MEASURED")), strict=True))


def parts_of(stage, dtype, offload, device_type="cpu", world_size=1):
    hardware = Hardware("test", device_type, 2**40, None)
    weight_bytes = 2 if dtype == "bfloat16" else 4
    job = Job(load_config("vicuna-7b"), SIZE, None, weight_bytes, 100, hardware, world_size)
    parts = estimate_memory(job, Placement(stage, offload, False, "replicated", False))
    return [part for part in parts if any(word in part.name for word in ENGINE_PARTS)]


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=str)
def test_the_estimate_of_an_engine_is_what_it_holds(measured, case):
    found, parts = measured[case], parts_of(*case)
    assert found["num_parameters"] == SIZE.num_parameters
    held = sum(part.num_bytes for part in parts if len(part.phases) == len(PHASES))
    estimated = peak_of_phases(parts)
    # ZeRO-1's reduction stands behind the last backward, but before the call that updates.
    reduced = [part.num_bytes for part in parts if part.phases == ("update",) and "reduced" in part.name]
    estimated["train"] = max(estimated["train"], held + sum(reduced))
    assert held == pytest.approx(found["held"], rel=0.04)  # a few buffers of one weight
    for phase in ("train", "update"):
        # Activations and logits of a few tokens are in what was measured, and not every part stands at one moment.
        assert 0.92 * found[phase] < estimated[phase] < 1.2 * found[phase], (phase, estimated[phase])


def test_an_offloaded_optimizer_leaves_the_fp32_sums_on_the_gpu_until_the_last_micro_batch(measured):
    found, parts = measured[2, "bfloat16", True], parts_of(2, "bfloat16", True, "cuda")
    on_gpu = {part.name: part.num_bytes for part in parts if not part.on_host}
    count = SIZE.num_parameters
    assert on_gpu["gradients"] == 4 * count and found["train"] - found["held"] > 4 * count + 2 * 2 * count
    # On the GPU of one rank there is a second bucket; on the host pinned memory is rounded up.
    host = sum(4 * count if part.name == "fp32 master weights" else part.num_bytes for part in parts if part.on_host)
    assert host > 4 * count + 8 * count + 4 * count + 2 * count
    assert found["held"] == pytest.approx((2 + 4 + 8 + 4 + 2) * count, rel=0.1)  # and buffers of one weight


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_rank_holds_its_share(stage):
    one, eight = (
        {part.name: part.num_bytes for part in parts_of(stage, "bfloat16", False, "cuda", ranks)} for ranks in (1, 8)
    )
    for name in ("fp32 master weights", "AdamW moments", *(["gradients"] * (stage > 1))):
        assert eight[name] == pytest.approx(one[name] / 8, rel=1e-4)
    assert stage > 1 or eight["gradients"] == one["gradients"] == 4 * SIZE.num_parameters
    assert stage != 1 or (eight["gradients as they are reduced"] == 2 * SIZE.num_parameters and "bucket" not in eight)


def test_reductions_that_overlap_have_two_buckets_of_at_most_what_the_engine_asks_for():
    config, huge = load_config("vicuna-7b"), replace(SIZE, num_parameters=7 * 10**9)
    job = Job(config, huge, None, 2, 100, Hardware("test", "cuda", 2**40, None), 8)
    found = {part.name: part.num_bytes for part in estimate_memory(job, Placement(2, False, False, "replicated", True))}
    assert reduce_bucket_numel(7 * 10**9) == 2**28
    assert found["reduction buckets"] == 2 * (2 + 1) * 2**28
    on_cpu = replace(job, hardware=Hardware("test", "cpu", 2**40, None))
    found = {p.name: p.num_bytes for p in estimate_memory(on_cpu, Placement(2, False, False, "replicated", True))}
    assert found["reduction buckets"] == 2 * (1 + 1) * 2**28


def test_of_a_share_beyond_buckets_and_sub_groups_the_engines_copy_what_they_work_on_at_a_time():
    count, share, largest = 7 * 10**9, 35 * 10**8, SHAPE["hidden_size"] * VOCAB

    def parts(stage, weight_bytes, device_type, offload=False):
        hardware, size = Hardware("test", device_type, 2**40, None), replace(SIZE, num_parameters=count)
        job = Job(load_config("vicuna-7b"), size, None, weight_bytes, 100, hardware, world_size=2)
        placement = Placement(stage, offload, False, "replicated", False)
        return {part.name: part.num_bytes for part in estimate_memory(job, placement)}

    assert parts(2, 4, "cuda")["reduction buckets"] == 4 * (2 * 2**28 + share)  # the flat copy for the update
    assert parts(1, 2, "cuda", offload=True)["gradients"] == 4 * (count + share)
    assert parts(2, 2, "cpu")["temporaries of AdamW"] == 2 * 4 * share
    assert parts(3, 2, "cpu")["temporaries of AdamW"] == 2 * 4 * 10**9  # one sub-group after the other
    assert parts(3, 2, "cuda")["gradients of the update"] == 4 * (10**9 + largest)


@pytest.mark.parametrize(("asked", "taken"), [(0, 0), (1, 1), (2**20, 2**20), (2**20 + 1, 2**21), (3 * 2**30, 2**32)])
def test_pinned_memory_is_taken_in_powers_of_two(asked, taken):
    assert pinned_bytes(asked) == taken
