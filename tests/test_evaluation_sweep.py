"""The α sweep: one pass gives each α's targets, and whole runs are compared by what α does not move."""

import json

import numpy as np
import pytest

from inverseq.config_loading import load_config
from inverseq.evaluation.cli import main
from inverseq.model import load_model
from inverseq.sample_files import held_out_path, read_samples, samples_path
from tests.tiny import make_tiny_model
from tests.tiny_run import make_tiny_run, tiny_run_options
from tests.tiny_samples import superior_logprobs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("sweep"), "epochs=1")


def run_main(capsys, *words):
    status = main(["sweep", *map(str, words), "--json"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_targets_of_every_alpha_are_those_of_full_logits(run_dir, capsys):
    status, out, _ = run_main(capsys, run_dir, "--alphas", "0,1,1.4")
    assert status == 0
    rows = json.loads(out)["rows"]
    config = load_config(run_dir / "config.yaml")
    model = load_model(config.model.path, config.model)
    samples = read_samples(held_out_path(run_dir)).samples
    better, plain = superior_logprobs(model, model, samples, 1.0)
    for row in rows:
        target, _ = superior_logprobs(model, model, samples, row["alpha"])
        assert row["mean_target_gain"] == pytest.approx((target - plain).mean().item(), abs=1e-4)
        assert row["rms_target_gain"] == pytest.approx((target - plain).square().mean().sqrt().item(), abs=1e-4)
        assert row["mean_w_minus_l"] == pytest.approx((better - plain).mean().item(), abs=1e-4)
        assert row["num_tokens"] == len(plain)
    assert rows[0]["mean_target_gain"] == 0.0 and rows[1]["mean_target_gain"] == rows[1]["mean_w_minus_l"]
    assert (run_dir / "evaluation" / "sweep.csv").read_text().count("\n") == 4


def test_a_sweep_trains_a_run_per_alpha_once_and_compares_them(tmp_path, capfd):
    model = make_tiny_model(tmp_path / "model", scale=0.2)
    words = ["--runs", tmp_path / "runs", "--config", "demo", "--alphas", "1,1.4"]
    words += ["--set", *tiny_run_options(f"model.path={model}", "epochs=1", "evaluation.every=0")]
    status, out, _ = run_main(capfd, *words)
    assert status == 0
    rows = json.loads(out)["rows"]  # nothing else stands there, not even what training prints
    frozen = load_model(str(model), load_config(tmp_path / "runs" / "alpha-1" / "config.yaml").model)
    for row in rows:
        folder = tmp_path / "runs" / f"alpha-{row['alpha']:g}"
        assert load_config(folder / "config.yaml").contrast.alpha == row["alpha"]
        scored = read_samples(samples_path(folder, 1))
        better, plain = superior_logprobs(frozen, frozen, scored.samples, 1.0)
        assert row["mean_w_minus_l"] == pytest.approx((better - plain).mean().item(), abs=1e-4)
        assert row["response_length"] == pytest.approx(np.mean([len(s.response.token_ids) for s in scored.samples]))
        assert row["reward"] is None and row["win_minus_lose"] is None
    stamp = (tmp_path / "runs" / "alpha-1" / "export" / "config.json").stat().st_mtime_ns
    status, again, _ = run_main(capfd, *words)
    assert json.loads(again)["rows"] == rows
    assert (tmp_path / "runs" / "alpha-1" / "export" / "config.json").stat().st_mtime_ns == stamp
    status, _, error = run_main(capfd, *words, "seed=7")
    assert status == 2 and "holds a finished run of another configuration" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a RUN"),
        (["--runs", "x"], "expected --config with it"),
        (["/nowhere", "--alphas", "1,two"], "--alphas 1,two: expected numbers"),
        (["/nowhere", "--alphas", "1,1"], "each once"),
        (["/nowhere"], "no such samples"),
        (["--runs", "x", "--config", "demo", "--verdicts", "9=f"], "--verdicts 9=f"),
        (
            ["--runs", "x", "--config", "demo", "--reward-model", "m", "--set", "evaluation.every=3", "epochs=4"],
            "evaluation.every=3 with epochs=4 draws none there",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    status, out, error = run_main(capsys, *words)
    assert status == 2 and out == ""
    assert message in error and error.count("\n") == 1
