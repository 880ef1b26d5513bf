"""contrast.refresh_every: the policy takes the place of μ, targets follow, and a stopped run goes on alike."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from inverseq import trainer
from inverseq.config_loading import load_config
from inverseq.engine import TorchEngine
from inverseq.model import load_model
from inverseq.run_state import remove_refreshed
from inverseq.sample_files import eval_path, held_out_path, read_samples, samples_path
from inverseq.trainer import train
from tests.tiny import make_tiny_model
from tests.tiny_run import tiny_run_options
from tests.tiny_samples import superior_logprobs


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refresh")
    return make_tiny_model(folder / "model", scale=0.2), make_tiny_model(folder / "plain", seed=4, scale=0.2), folder


def options(paths, name, *more):
    words = (f"model.path={paths[0]}", f"run_dir={paths[2] / name}", "contrast.refresh_every=2", "epochs=3")
    return load_config("demo", tiny_run_options(*words, "evaluation.every=0", "checkpoint.keep_last=3", *more))


@pytest.fixture(scope="module")
def run_dir(paths):
    return train(options(paths, "run"))


def model_of_checkpoint(run_dir, epoch):
    config = load_config(run_dir / "config.yaml")
    model = load_model(config.model.path, config.model)
    model.load_state_dict(load_file(run_dir / "checkpoints" / f"epoch_{epoch:04d}" / "model.safetensors"), strict=False)
    return model


def held_out_metric(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out/mean_squared_log_ratio"] for row in rows if row["kind"] == "epoch"]


def check_targets(run_dir, epoch, better, plain):
    scored = read_samples(samples_path(run_dir, epoch))
    targets, plains = superior_logprobs(better, plain, scored.samples, 1.4)
    torch.testing.assert_close(scored.targets.double(), targets, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scored.plain_logprobs.double(), plains, atol=2e-4, rtol=1e-5)


def test_targets_are_of_the_initial_model_before_and_of_the_refreshed_policy_after(paths, run_dir):
    config = load_config(run_dir / "config.yaml")
    initial, second = load_model(str(paths[0]), config.model), model_of_checkpoint(run_dir, 2)
    for epoch in (1, 2):
        check_targets(run_dir, epoch, initial, initial)
    check_targets(run_dir, 3, second, second)
    with pytest.raises(AssertionError):
        check_targets(run_dir, 3, initial, initial)


def test_the_held_out_metric_is_against_what_stands_for_the_frozen_model(run_dir):
    second, third = model_of_checkpoint(run_dir, 2), model_of_checkpoint(run_dir, 3)
    samples = read_samples(held_out_path(run_dir)).samples
    targets, _ = superior_logprobs(second, second, samples, 1.4)
    _, policy = superior_logprobs(third, third, samples, 1.4)
    assert held_out_metric(run_dir)[3] == pytest.approx((targets - policy).square().mean().item(), rel=1e-4)


def test_the_model_contrast_refreshes_the_better_model_only(paths):
    words = ("contrast.kind=model", f"contrast.plain_model={paths[1]}", "contrast.principle=")
    run = train(options(paths, "pair", *words))
    config = load_config(run / "config.yaml")
    check_targets(run, 3, model_of_checkpoint(run, 2), load_model(str(paths[1]), config.model))


def test_a_stopped_run_goes_on_with_the_refreshed_model(paths, run_dir, monkeypatch):
    original = trainer.run_epoch

    def stop_in_the_third(state, config):
        if state.epoch == 2:
            raise KeyboardInterrupt
        original(state, config)

    monkeypatch.setattr(trainer, "run_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(options(paths, "stopped"))
    monkeypatch.setattr(trainer, "run_epoch", original)
    answers = [eval_path(paths[2] / "stopped", epoch) for epoch in (1, 2, 3, 10)]
    answers[0].parent.mkdir(exist_ok=True)
    for path in answers:
        path.touch()
    stopped = train(options(paths, "stopped"), resume=True)
    for name in ("export/model.safetensors", "samples/epoch_0003.jsonl"):
        assert (stopped / name).read_bytes() == (run_dir / name).read_bytes(), name
    assert held_out_metric(stopped) == held_out_metric(run_dir)
    assert [path.exists() for path in answers] == [True, True, False, False], "answers of epochs that were undone"


def test_weights_that_no_checkpoint_needs_are_removed_and_missing_ones_are_named(paths):
    run = train(options(paths, "pruned", "contrast.refresh_every=1", "checkpoint.keep_last=1"))
    assert [path.name for path in (run / "frozen").iterdir()] == ["epoch_0003.safetensors"]
    (run / "frozen" / "epoch_0003.safetensors").unlink()
    with pytest.raises(ValueError, match="epoch_0003.safetensors: missing; without it the run cannot go on"):
        train(options(paths, "pruned", "contrast.refresh_every=1", "checkpoint.keep_last=1"), resume=True)


def test_what_a_kept_checkpoint_would_be_resumed_with_stays(tmp_path):
    config = load_config("demo", [f"run_dir={tmp_path}", "contrast.refresh_every=2"])
    for epoch in (4, 5, 6):
        (tmp_path / "checkpoints" / f"epoch_{epoch:04d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"epoch_{epoch:04d}" / "state.json").touch()
    (tmp_path / "frozen").mkdir()
    for epoch in (2, 4, 6):
        (tmp_path / "frozen" / f"epoch_{epoch:04d}.safetensors").touch()
    remove_refreshed(SimpleNamespace(config=config, run_dir=tmp_path, epoch=6))
    assert sorted(path.stem for path in (tmp_path / "frozen").iterdir()) == ["epoch_0004", "epoch_0006"]


def test_every_whole_copy_of_the_policy_is_freed_before_the_next_one_is_made(paths, monkeypatch):
    """A plain engine makes none; under ZeRO-3 it is as large as the model."""
    events = []
    monkeypatch.setattr(TorchEngine, "full_model", lambda self: events.append("made") or self.policy.model)
    monkeypatch.setattr(TorchEngine, "release_full_model", lambda self: events.append("freed"))
    short = ("prompts.held_out=1", "sampling.samples_per_epoch=2", "sampling.max_new_tokens=3", "epochs=1")
    train(options(paths, "copies", "contrast.refresh_every=1", *short))
    assert len(events) >= 6 and events == ["made", "freed"] * (len(events) // 2)
