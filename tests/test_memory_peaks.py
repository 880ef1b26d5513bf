"""Measured peaks: a phase's own memory, not an earlier phase's, beside its estimate."""

import logging
import sys

import numpy as np
import pytest
import torch

from inverseq import memory_peaks
from inverseq.memory_peaks import PeakMemory

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of a CPU process are measured on Linux")


def hold(num_bytes):
    return np.ones(num_bytes, np.uint8)


def test_each_phase_reports_its_own_peak_beside_the_estimate(caplog):
    caplog.set_level(logging.INFO, logger="inverseq")
    memory = PeakMemory(torch.device("cpu"), {"sample": 300 * MIB, "score": 7 * MIB})
    kept = hold(64 * MIB)
    with memory.phase("sample"):
        hold(256 * MIB)
    with memory.phase("score"):
        hold(16 * MIB)
    row = memory.row()
    assert row["peak_memory_sample_bytes"] == pytest.approx(320 * MIB, abs=24 * MIB)
    assert row["peak_memory_score_bytes"] == pytest.approx(80 * MIB, abs=24 * MIB)
    assert kept.all() and "(estimated 0.29), score 0.0" in caplog.messages[-1]
    assert memory.row() == {} and len(caplog.messages) == 1


def test_a_phase_met_twice_keeps_its_largest_peak():
    memory = PeakMemory(torch.device("cpu"), {})
    for size in (200, 10):
        with memory.phase("sample"):
            hold(size * MIB)
    assert memory.row()["peak_memory_sample_bytes"] == pytest.approx(200 * MIB, abs=24 * MIB)


def test_nothing_is_reported_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_peaks, "PROCESS", tmp_path / "none")
    memory = PeakMemory(torch.device("cpu"), {"sample": 1})
    with memory.phase("sample"):
        pass
    assert memory.row() == {}
