"""Measured peaks: a phase's own memory, not an earlier phase's, beside its estimate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inverseq import memory_peaks
from inverseq.memory_peaks import PeakMemory

MIB = 2**20
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of a CPU process are measured on Linux")

# A process of its own: in a long one, memory that is freed meanwhile would be counted against the peak.
PROGRAM = """
import json, logging, sys
import numpy as np, torch
from inverseq.memory_peaks import PeakMemory

MIB = 2**20
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("inverseq").addHandler(handler)
logging.getLogger("inverseq").setLevel(logging.INFO)

def hold(mib):
    return np.ones(mib * MIB, np.uint8)

memory = PeakMemory(torch.device("cpu"), {"sample": 300 * MIB, "score": 7 * MIB})
kept = hold(64)
with memory.phase("sample"):
    hold(256)
with memory.phase("score"):
    hold(16)
first, second = memory.row(), memory.row()
for size in (200, 10):
    with memory.phase("sample"):
        hold(size)
print(json.dumps({"first": first, "second": second, "twice": memory.row(), "messages": messages, "kept": int(kept[0])}))
"""


@pytest.fixture(scope="module")
def measured():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def test_each_phase_reports_its_own_peak_beside_the_estimate(measured):
    row = measured["first"]
    assert row["peak_memory_sample_bytes"] == pytest.approx(320 * MIB, abs=24 * MIB)
    assert row["peak_memory_score_bytes"] == pytest.approx(80 * MIB, abs=24 * MIB)
    assert "(estimated 0.29), score 0.0" in measured["messages"][0]
    assert measured["second"] == {} and len(measured["messages"]) == 2


def test_a_phase_met_twice_keeps_its_largest_peak(measured):
    assert measured["twice"]["peak_memory_sample_bytes"] == pytest.approx(264 * MIB, abs=24 * MIB)


def test_nothing_is_reported_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_peaks, "PROCESS", tmp_path / "none")
    memory = PeakMemory(torch.device("cpu"), {"sample": 1})
    with memory.phase("sample"):
        pass
    assert memory.row() == {}
