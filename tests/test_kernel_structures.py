"""The offline comparison of structures compiles what it lists and counts it, Triton's and the candidates in Gluon."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]

CODE = """
import json
import kernel_structures as benchmark

first, *_ = benchmark.structures(80)
rows = [benchmark.row_of(benchmark.case_of(first, 80), 80)]
benchmark.KERNELS = [name for name in benchmark.KERNELS if "statistics" in name]
benchmark.RINGS = benchmark.RINGS[:1]
print(json.dumps(rows + benchmark.hopper_rows()))
"""


def test_a_structure_of_each_kind_compiles_and_is_counted():
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'benchmarks'}")
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    tile, candidate = json.loads(result.stdout.splitlines()[-1])
    for row in (tile, candidate):
        assert row["spills"] == 0 and row["tensor"] > 0 and 0 < row["loop"] < row["instructions"]
    assert tile["sm"] == 80 and tile["programs/SM"] == 2 and not tile["setmaxnreg"]
    assert candidate["sm"] == 90 and candidate["shared"] <= 227 * 1024
    assert {"24", "240"} <= set(candidate["setmaxnreg"].split("/"))  # of the warps that load, and that multiply
