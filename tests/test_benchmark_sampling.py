"""benchmarks/sampling.py: contenders decode the same tokens, and every row says what it was measured with."""

import json
import sys
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def sampling():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import importlib

        yield importlib.import_module("sampling")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def rows(sampling, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    model = make_tiny_model(folder / "model")
    out = folder / "rows.jsonl"
    arguments = [
        "--model", str(model), "--prompts", "4", "--batch-size", "2", "--max-new-tokens", "4",
        "--response-scale", "0.1", "--out", str(out), "--only", *FORCED, *OWN,
        "backend transformers", "backend lmdeploy server",
    ]  # fmt: skip
    assert sampling.main(arguments) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


FORCED = ["generate", "generate, sorted by prompt", "transformers", "transformers, its own attention"]
FORCED += ["transformers, per_prompt_seeds"]
OWN = ["transformers, 4 per prompt, read once", "transformers, 4 per prompt, read each"]


def test_contenders_with_forced_lengths_decode_the_same_number_of_tokens(rows, sampling):
    forced = {row["backend"]: row for row in rows if row["workload"] == "hh_lengths"}
    assert list(forced) == FORCED
    lengths = sampling.hh_lengths(4, seed=0, response_scale=0.1)[1]
    for row in forced.values():
        assert (row["num_tokens"], row["longest_tokens"]) == (lengths.sum(), lengths.max())
        assert row["tokens_per_cpu_second"] > 0 and row["bound"] == "generate"
        assert row["speedup"] == row["tokens_per_cpu_second"] / forced["generate"]["tokens_per_cpu_second"]


def test_backends_are_measured_or_say_why_not(rows):
    own = {row["backend"]: row for row in rows if row["workload"] == "own_lengths"}
    assert set(own) == {"generate", "transformers", *OWN, "backend transformers", "backend lmdeploy server"}
    assert own["backend transformers"]["probe_logprob_gap"] < 1e-4
    assert own["backend transformers"]["sync_duration_s"] >= 0
    assert "needs a CUDA device" in own["backend lmdeploy server"]["error"]
    for row in rows:
        assert {"device", "command", "commit", "versions", "date", "threads", "model", "dtype"} <= set(row)


def test_a_failure_is_a_row(sampling):
    def leave():
        raise SystemExit(3)

    assert sampling.attempted(leave) == {"error": "SystemExit: 3"}
