"""Projections: arithmetic by hand, every assumption stated, and never taken for a measurement."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import epoch_time  # noqa: E402
import epoch_time_inputs as inputs  # noqa: E402
import epoch_time_projection as projection  # noqa: E402
from epoch_time_report import CHIPS, Chip, epoch_work  # noqa: E402

from inverseq.memory import model_size  # noqa: E402
from inverseq.packing import plan_packs  # noqa: E402

H100 = "NVIDIA H100 80GB HBM3"


def measured_rows(**changes):
    common = {
        "op": "epoch_time", "variant": "ours", "measured": True, "model": "llama-3b", "device": H100, "commit": "abc",
        "date": "2026-01-01", "response_scale": 1.0, "num_samples": 500,
    }  # fmt: skip
    common |= changes
    return [
        common | {"phase": "train", "mfu": 0.5, "ms": 1000.0},
        common | {"phase": "score", "mfu": 0.6, "ms": 500.0},
        common | {"phase": "sample", "mfu": None, "ms": 20_000.0},
        common | {"phase": "train", "mfu": 0.1, "ms": 9000.0, "variant": "baseline"},
    ]


def write_rows(tmp_path, rows):
    path = tmp_path / "epoch_time.json"
    path.write_text(json.dumps(rows))
    return path


def run(tmp_path, rows, *arguments):
    return epoch_time.main([*arguments, "--rows", str(write_rows(tmp_path, rows)), "--out", str(tmp_path / "out")])


def test_a_projection_says_so_everywhere_and_states_its_assumptions(tmp_path, capsys):
    assert run(tmp_path, measured_rows(), "--project", "8xA800") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "out" / "projected"
    [row] = json.loads((folder / "epoch_time_8xA800_vicuna-7b.json").read_text())
    text = (folder / "epoch_time_8xA800_vicuna-7b.txt").read_text()
    assert row["measured"] is False and "projection" in row["op"] and row["device"] == "8xA800"
    assert text.startswith("PROJECTION, not a measurement") and text in printed
    longest = inputs.hh_lengths(500, seed=0)[1].max()
    for said in (
        "epoch_time.json, llama-3b on one NVIDIA H100",
        "peak rate 312 TFLOP/s in bf16, 0.32 of the measured",
        "training 50.0%, scoring 60.0%",
        "400 GB/s both ways",
        "16 samples a step, 32 steps",
        f"longest {longest} tokens",
        "of the bandwidth bound",
        "measured phase train, a one-GPU optimizer included",
        "three readings of the weights",
        "not counted: checkpoints",
    ):
        assert said in text and said in row["assumptions"], said
    parts = [row[key] for key in ("sample_s", "score_s", "train_overlapped_s", "gather_s")]
    assert row["epoch_best_s"] == pytest.approx(sum(parts)) and row["epoch_worst_s"] > row["epoch_best_s"]
    parts[2] = row["train_exposed_s"]
    assert row["epoch_worst_s"] == pytest.approx(sum(parts))
    assert not list((tmp_path / "out").glob("*.png"))  # nothing projected is drawn beside what was measured


def test_it_rests_on_measured_rows_of_a_gpu_only(tmp_path, capsys):
    for rows in (
        measured_rows(measured=False),
        [row | {"mfu": None} for row in measured_rows(device="AMD EPYC")],
        measured_rows()[:1],
        [],
    ):
        assert run(tmp_path, rows, "--project", "8xA800") == 2
        assert "expected measured rows with an MFU for score and train" in capsys.readouterr().out
    assert run(tmp_path, measured_rows(), "--project", "8xA801") == 2
    assert "expected a number of GPUs and one of A100, A800" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_training_takes_the_mfu_of_a_phase_without_an_optimizer_where_there_is_one(tmp_path):
    path, rows = tmp_path / "rows.json", measured_rows()
    train = rows[0]
    path.write_text(json.dumps([*rows, train | {"phase": "forward_backward", "mfu": 0.6}]))
    found = projection.read_source(path)
    assert (found.train_phase, found.train_mfu) == ("forward_backward", 0.6)


def test_its_own_output_is_no_input(tmp_path):
    assert run(tmp_path, measured_rows(), "--project", "8xH100") == 0
    written = tmp_path / "out" / "projected" / "epoch_time_8xH100_vicuna-7b.json"
    with pytest.raises(ValueError, match="a projection is not measured"):
        projection.read_source(written)


def test_flops_are_those_of_the_report():
    model = inputs.build_random_model(inputs.PRESETS["tiny"].config(), torch.device("cpu"), torch.float32)
    samples = inputs.make_samples(7, vocab=512)
    work = epoch_work(model, samples)
    prompts, responses = inputs.hh_lengths(7, seed=0)
    policy = inputs.PLAIN_TOKENS + prompts + responses - 1
    shape = inputs.PRESETS["tiny"]
    train = projection.flops_of(shape, policy, responses, factor=6, dots=1)
    assert train.sum() == pytest.approx(work.train_flops, rel=1e-12)
    work = epoch_work(model, inputs.make_samples(500, vocab=512))
    alone = projection.project(source(), model="tiny", num_gpus=1, chip=Chip(1e14, 1e30, 1e30))
    assert alone.score_s == pytest.approx(work.score_flops / 1e14 / 0.5, rel=1e-12)
    assert alone.train_exposed_s == pytest.approx(work.train_flops / 1e14 / 0.5, rel=1e-12)
    shared = projection.project(source(), model="tiny", num_gpus=8, chip=Chip(1e14, 1e30, 1e30))
    # As long as the rank with most to do, which is not far from the mean.
    assert alone.score_s / 8 < shared.score_s < alone.score_s / 6
    assert alone.train_exposed_s / 8 < shared.train_exposed_s < alone.train_exposed_s / 4


def source(**changes):
    values = {
        "file": "f", "model": "llama-3b", "device": H100, "commit": "c", "date": "d", "train_mfu": 0.5,
        "train_phase": "train", "score_mfu": 0.5, "response_scale": 1.0, "decode_efficiency": None,
    }  # fmt: skip
    return projection.Source(**(values | changes))


def test_one_gpu_is_flops_over_rate_and_weights_over_bandwidth():
    """A chip with endless bandwidth is bound by FLOPs; with an endless rate, by what is read."""
    shape = inputs.PRESETS["vicuna-7b"]
    prompts, responses = inputs.hh_lengths(500, seed=0)
    policy = inputs.PLAIN_TOKENS + prompts + responses - 1
    flops = projection.flops_of(shape, policy, responses, factor=6, dots=1).sum()
    fast_memory = projection.project(source(), model="vicuna-7b", num_gpus=1, chip=Chip(1e14, 1e30, 1e30))
    assert fast_memory.train_exposed_s == pytest.approx(flops / 1e14 / 0.5)
    assert fast_memory.sample_s == pytest.approx(0, abs=1e-9) and fast_memory.gather_s == 0
    slow_memory = projection.project(source(), model="vicuna-7b", num_gpus=1, chip=Chip(1e30, 1e12, 1e30))
    parameters = model_size(shape.config()).num_parameters
    tokens = sum(
        int(r) * int(p + inputs.PLAIN_TOKENS) + int(r) * (int(r) - 1) // 2
        for p, r in zip(prompts, responses, strict=True)
    )
    cache = 2 * 32 * 4096 * 2
    assert responses.max() > responses.sum() / 64  # else the batch size would set the number of steps
    expected = (int(responses.max()) * 2 * parameters + tokens * cache) / 1e12
    assert slow_memory.sample_s == pytest.approx(expected)
    sizes = [16] * 31 + [4]
    plan = plan_packs(policy, token_budget=projection.TRAIN_TOKENS, step_sizes=sizes)
    num_packs = sum(len(plan.packs(step, 0)) for step in range(32))
    weights = 2 * parameters  # read three times a pack; an update moves 16 + 14 bytes a parameter
    assert slow_memory.train_exposed_s == pytest.approx((num_packs * 3 * weights + 32 * 30 * parameters) / 1e12)


def test_communication_and_uneven_ranks_cost_time():
    one, eight = (projection.project(source(), model="vicuna-7b", num_gpus=n, chip=CHIPS["A800"]) for n in (1, 8))
    parameters = model_size(inputs.PRESETS["vicuna-7b"].config()).num_parameters
    assert eight.gather_s == pytest.approx(2 * parameters * 7 / 8 / 200e9)  # 400 GB/s are 200 each way
    assert one.train_exposed_s / 8 < eight.train_overlapped_s < one.train_exposed_s
    assert eight.num_steps == 32
    hidden = eight.train_exposed_s - eight.train_overlapped_s
    assert 0 < hidden <= 32 * 3 * eight.gather_s * 1.001
    slow_link = projection.project(source(), model="vicuna-7b", num_gpus=8, chip=Chip(1e30, 1e30, 4e11))
    assert slow_link.train_exposed_s == pytest.approx(slow_link.train_overlapped_s)
    assert slow_link.train_exposed_s >= 32 * 3 * eight.gather_s * 0.999  # three moves a micro-step
    slower = projection.project(source(train_mfu=0.25), model="vicuna-7b", num_gpus=8, chip=CHIPS["A800"])
    assert slower.train_exposed_s > eight.train_exposed_s and slower.score_s == eight.score_s


def test_a_measured_sampler_scales_the_bandwidth_bound():
    row = measured_rows()[2]
    efficiency = projection.decode_efficiency(row)
    shape = inputs.PRESETS["llama-3b"]
    prompts, responses = inputs.hh_lengths(500, seed=0)
    bound = projection.sampling_bound(shape, prompts + inputs.PLAIN_TOKENS, responses, CHIPS["H100"])
    assert efficiency == pytest.approx(bound / 20)
    free, scaled = (
        projection.project(source(decode_efficiency=e), model="vicuna-7b", num_gpus=8, chip=CHIPS["A800"]).sample_s
        for e in (None, efficiency)
    )
    assert scaled == pytest.approx(free / efficiency)
    many = projection.sampling_bound(shape, np.full(640, 10), np.full(640, 100), Chip(1.0, 1e12, 1.0))
    few = projection.sampling_bound(shape, np.full(64, 10), np.full(64, 100), Chip(1.0, 1e12, 1.0))
    assert many == pytest.approx(10 * few)  # ten batches of 64
    assert projection.decode_efficiency(None) is None and np.isfinite(efficiency)
