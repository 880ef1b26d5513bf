"""The numbers of the epoch benchmark by hand: medians, quantiles, rates, MFU, speed-ups, padding, memory, the table."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import epoch_time_phases as phases  # noqa: E402
import epoch_time_report as report  # noqa: E402
from epoch_time_phases import Measured, Measurements  # noqa: E402

CPU = torch.device("cpu")
LADDER = [("first", "baseline", "baseline"), ("second", "between", "between"), ("third", "ours", "ours")]
SECONDS = {  # of three repetitions: wall, CPU
    ("score", "baseline"): ([6.0, 5.0, 10.0], [20.0, 21.0, 22.0]),
    ("pack", "baseline"): ([1.0] * 3, [1.0] * 3),
    ("train", "baseline"): ([8.0] * 3, [14.0] * 3),
    ("score", "between"): ([4.0] * 3, [10.0] * 3),
    ("pack", "between"): ([1.0] * 3, [0.5] * 3),
    ("train", "between"): ([5.0] * 3, [7.5] * 3),
    ("score", "ours"): ([2.0] * 3, [3.0] * 3),
    ("pack", "ours"): ([0.5] * 3, [0.5] * 3),
    ("train", "ours"): ([2.5] * 3, [2.5] * 3),
}


@pytest.fixture
def rows():
    found = Measurements({key: Measured(*times, peak_bytes=3 * 2**30) for key, times in SECONDS.items()})
    found.losses = {"baseline": 2.5, "ours": 2.0}
    work = report.Work(1000, 3000, 100, train_flops=989.4e12, score_flops=2 * 989.4e12)
    return report.make_rows(found, work, chip=report.CHIPS["H100"], facts={"measured": True}, ladder=LADDER)


def test_a_phases_row(rows):
    by_key = {(row["phase"], row["variant"]): row for row in rows if row["op"] == "epoch_time"}
    score, train = by_key["score", "baseline"], by_key["train", "ours"]
    assert [score[key] for key in ("ms", "ms_p20", "ms_p80", "cpu_ms")] == pytest.approx([6000, 5400, 8400, 21_000])
    assert (score["tokens_per_second"], score["mfu"], score["reps"]) == (500, pytest.approx(1 / 3), 3)
    assert (train["tokens_per_second"], train["mfu"], train["peak_bytes"]) == (400, pytest.approx(0.4), 3 * 2**30)
    assert by_key["train", "baseline"]["error"] == 0.25 and train["error"] == 0 and score["error"] is None


def test_speed_ups_are_the_baselines_time_over_ours(rows):
    assert report.summary(rows) == {"baseline_ms": 15_000, "ours_ms": 5000, "speed_up": 3, "cpu_speed_up": 6}
    rungs = [row for row in rows if row["op"] == "epoch_time split"]
    assert [row["total_s"] for row in rungs] == [15, 10, 5] and [row["total_cpu_s"] for row in rungs] == [36, 18, 6]
    assert [row["factor"] for row in rungs] == [None, 1.5, 2]
    assert [row["cpu_factor"] for row in rungs] == [None, 2, 3]


def test_the_table_by_either_clock(rows):
    for clock, score, whole in (
        ("ms", "6.000 2.000 3.00 1,500 33.3% 100.0% 3.00 3.00 – –", "first 6.000 8.000 15.000 – 2e-01"),
        ("cpu_ms", "21.000 3.000 7.00 1,000 33.3% 100.0% 3.00 3.00 – –", "first 21.000 14.000 36.000 – 2e-01"),
    ):
        lines = [" ".join(line.split()) for line in report.table(rows, "title", clock).splitlines()]
        assert f"score {score}" in lines and whole in lines
        text = "3.00x by wall clock (baseline 15.00 s, ours 5.00 s), 6.00x by the process's CPU time"
        assert f"score, pack, train: {text}" in lines


def test_padding_and_dummies_are_waste():
    def pack(computed, **facts):
        return SimpleNamespace(pack=SimpleNamespace(input_ids=torch.zeros(computed), **facts))

    padded = [pack(60, num_real_tokens=45), pack(40, num_real_tokens=30)]
    packed = [pack(75, is_dummy=False, num_tokens=75), pack(25, is_dummy=True, num_tokens=25)]
    steps = {name: [SimpleNamespace(micro_batches=batches)] for name, batches in (("a", padded), ("b", packed))}
    found = Measurements(steps=steps)
    assert [report.pad_waste(found, name) for name in "abc"] == [0.25, 0.25, None]


def test_a_phase_lasts_until_the_device_is_done_and_remembers_its_highest_peak(monkeypatch):
    events, peaks = [], [5, 9, 7]
    monkeypatch.setattr(phases, "synchronize", lambda device: events.append("synchronised"))
    monkeypatch.setattr(phases, "reset_peak", lambda device: events.append("forgotten"))
    monkeypatch.setattr(phases, "peak_bytes", lambda device: peaks.pop(0))
    found = Measurements()

    def work():
        events.append("worked")
        time.sleep(0.2)

    for _ in range(3):
        found.measure("score", "ours", work, CPU)
    assert events == ["forgotten", "synchronised", "worked", "synchronised"] * 3
    [entry] = found.phases.values()
    assert entry.peak_bytes == 9
    assert min(entry.wall_s) >= 0.2 and sum(entry.cpu_s) < sum(entry.wall_s) / 2
