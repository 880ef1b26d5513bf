"""Whole runs that are sampled by a server: what they record, and how they stop and go on when it fails."""

import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from inverseq import sampling_server_client, trainer
from inverseq.config_loading import load_config
from inverseq.engine import TorchEngine
from inverseq.freshness import StaleWeightsError
from inverseq.sample_files import read_samples
from inverseq.sampling_ahead import SamplesAhead
from inverseq.sampling_server import ServerError
from inverseq.trainer import train
from tests.fault_proxy import Fault, FaultProxy
from tests.serving import nobodys_root, shared_server
from tests.tiny_words import EOS, make_word_model, write_word_prompts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_word_model(folder / "model", scale=0.3)
    write_word_prompts(folder / "prompts.jsonl", 30)
    (folder / "principle.txt").write_text("w1 w2 w3")
    return folder


@pytest.fixture
def proxy(monkeypatch):
    monkeypatch.setattr(sampling_server_client, "FIRST_PAUSE_S", 0.05)
    with FaultProxy(shared_server().root) as running:
        yield running


def overrides(inputs, run_dir, proxy, *more):
    server = {
        "url": f"{proxy.root}/v1",
        "model": "{model_dir}",
        "dialect": "transformers",
        "prompts": "text",
        "refresh_url": f"{proxy.root}/reset",
        "retries": 1,
        "concurrency": 4,
    }
    options = [
        f"model.path={inputs / 'model'}",
        "model.device=cpu",
        f"prompts.path={inputs / 'prompts.jsonl'}",
        "prompts.held_out=4",
        f"contrast.principle={inputs / 'principle.txt'}",
        "sampling.backend=server",
        "sampling.samples_per_epoch=8",
        "sampling.max_new_tokens=6",
        "packing.train_tokens=512",
        "packing.score_tokens=1024",
        "optim.lr=3e-2",
        "optim.samples_per_step=4",
        "logging.tensorboard=false",
        "epochs=2",
        f"run_dir={run_dir}",
        *(f"sampling.server.{key}={value}" for key, value in server.items()),
    ]
    replaced = {item.partition("=")[0] for item in more}
    return [*(item for item in options if item.partition("=")[0] not in replaced), *more]


def rows(run_dir, kind):
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in parsed if row["kind"] == kind]


def test_a_run_trains_on_what_the_server_sampled_with_the_weights_of_the_moment(inputs, tmp_path, proxy):
    run_dir = train(load_config("demo", overrides(inputs, tmp_path / "run", proxy, "evaluation.every=2")))
    epochs = rows(run_dir, "epoch")
    assert [row["probe_greedy_gap"] < 1e-5 for row in epochs] == [True] * 3
    assert [row["weights_lag_steps"] for row in epochs] == [0, 0, 0]
    assert proxy.num_refreshes == 3  # steps 0, 2 and 4; the held-out prompts and the first epoch share step 0
    for epoch, step in ((1, 0), (2, 2)):
        for sample in read_samples(run_dir / "samples" / f"epoch_{epoch:04d}.jsonl").samples:
            response = sample.response
            assert (response.engine, response.weights_step) == ("server", step)
            assert (response.token_ids[-1] == EOS) == (response.finish_reason == "stop")
    assert (run_dir / "eval" / "epoch_0002.jsonl").exists()


def test_a_server_is_given_the_adapters_merged_into_the_weights(inputs, tmp_path, proxy):
    more = ("policy.lora.rank=4", "evaluation.every=2", "sampling.ahead=true")
    run_dir = train(load_config("demo", overrides(inputs, tmp_path / "run", proxy, *more)))
    assert [row["probe_greedy_gap"] < 1e-5 for row in rows(run_dir, "epoch")] == [True] * 3
    assert proxy.num_refreshes == 2  # steps 0 and 4: epoch 2 is drawn with the weights of epoch 1
    served, exported = (load_file(run_dir / name / "model.safetensors") for name in ("weights", "export"))
    initial = load_file(inputs / "model" / "model.safetensors")
    assert served.keys() == exported.keys() == initial.keys()
    assert all(torch.equal(served[name], weight) for name, weight in exported.items())
    assert any((weight - initial[name]).abs().max() > 1e-3 for name, weight in served.items())


def test_a_server_that_fails_stops_the_run_at_its_checkpoint_and_resume_loses_and_doubles_nothing(
    inputs, tmp_path, proxy
):
    options = overrides(inputs, tmp_path / "run", proxy)
    refused = 2 + 4 + 8 + 2 + 3  # probes, held-out prompts, the first epoch, its probe, and a part of the second
    proxy.plan = {number: Fault(status=500) for number in range(refused, 500)}
    with pytest.raises(ServerError, match=rf"{proxy.root}/v1: prompt .* is given up, \d of 8 prompts are unanswered"):
        train(load_config("demo", options))
    run_dir = tmp_path / "run"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["epoch_0001"]
    assert not (run_dir / "samples" / "epoch_0002.jsonl").exists() and len(rows(run_dir, "step")) == 2

    proxy.plan = {}
    train(load_config("demo", overrides(inputs, run_dir, proxy, "sampling.server.retries=3")), resume=True)
    assert [row["num_samples"] for row in rows(run_dir, "step")] == [4, 4, 4, 4]
    assert [row["epoch"] for row in rows(run_dir, "epoch")] == [0, 1, 2]
    whole = [item for item in options if not item.startswith(("sampling.server", "sampling.backend", "run_dir"))]
    other = train(load_config("demo", [*whole, f"run_dir={tmp_path / 'other'}"]))
    for epoch in (1, 2):
        ours, theirs = (
            [s.rendered.prompt.id for s in read_samples(path / "samples" / f"epoch_{epoch:04d}.jsonl").samples]
            for path in (run_dir, other)
        )
        assert ours == theirs and len(set(ours)) == 8


def test_a_server_with_old_weights_stops_the_run(inputs, tmp_path, proxy):
    initial = inputs / "model"
    options = overrides(inputs, tmp_path / "run", proxy, f"sampling.server.model={initial}")
    with pytest.raises(StaleWeightsError, match="does not answer with the weights of step 2"):
        train(load_config("demo", options))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch_0001"]


def test_the_next_epoch_may_be_sampled_while_this_one_trains(inputs, tmp_path, proxy, monkeypatch):
    """Epoch 2 is drawn from the weights that epoch 1 was drawn from, and its requests arrive while epoch 1 trains."""
    arrived, training = [], threading.Event()
    train_step = TorchEngine.train_step

    class Held(SamplesAhead):
        """Gets its first answer when the first step begins: no machine is so slow that all of them come before."""

        def __init__(self, *arguments, **keywords):
            training.clear()
            super().__init__(*arguments, **keywords)

    def watched_step(self, step):
        training.set()
        before = len(proxy.requests)
        deadline = time.monotonic() + (60.0 if len(arrived) in (0, 2) else 0.2)
        while len(proxy.requests) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        arrived.append(len(proxy.requests) - before)
        return train_step(self, step)

    training.set()
    proxy.rewrite = lambda request: training.wait(60)
    monkeypatch.setattr(trainer, "SamplesAhead", Held)
    monkeypatch.setattr(TorchEngine, "train_step", watched_step)
    proxy.delay_s = 0.1
    more = ("sampling.ahead=true", "epochs=3", "sampling.server.concurrency=1")
    more += ("evaluation.every=1", "evaluation.num_prompts=1")
    run_dir = train(load_config("demo", overrides(inputs, tmp_path / "run", proxy, *more)))
    steps = []
    for epoch in (1, 2, 3):
        samples = read_samples(run_dir / "samples" / f"epoch_{epoch:04d}.jsonl").samples
        assert len({sample.rendered.prompt.id for sample in samples}) == 8
        steps += {sample.response.weights_step for sample in samples}
    assert steps == [0, 0, 2]
    assert [row["weights_lag_steps"] for row in rows(run_dir, "epoch")] == [0, 0, 2, 2]
    assert arrived[0] > 0 and arrived[2] > 0 and arrived[4] == 0  # nothing is drawn behind the last epoch
    for row in rows(run_dir, "epoch")[2:]:  # by one request after the other, each delayed
        assert row["sample_tokens_per_second"] == row["num_actions"] / row["sample_ahead_duration_s"]
        assert row["sample_ahead_duration_s"] > 8 * proxy.delay_s
    proxy.delay_s = 0.0
    other = train(load_config("demo", overrides(inputs, tmp_path / "other", proxy, "epochs=3")))
    for epoch in (1, 2, 3):
        ours, theirs = (
            [s.rendered.prompt.id for s in read_samples(path / "samples" / f"epoch_{epoch:04d}.jsonl").samples]
            for path in (run_dir, other)
        )
        assert ours == theirs


def test_an_error_in_training_ends_the_sampling_of_the_next_epoch(inputs, tmp_path, proxy, monkeypatch):
    def fail(self, step):
        raise ArithmeticError("the planted failure")

    monkeypatch.setattr(TorchEngine, "train_step", fail)
    proxy.rewrite = lambda request: time.sleep(4.0 if len(proxy.requests) > 2 + 4 + 8 + 1 else 0.0)
    more = ("sampling.ahead=true", "sampling.server.concurrency=1")
    with pytest.raises(ArithmeticError, match="planted"):
        train(load_config("demo", overrides(inputs, tmp_path / "run", proxy, *more)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inverseq")]


def test_a_server_that_fails_ahead_stops_the_run_behind_the_checkpoint(inputs, tmp_path, proxy):
    proxy.plan = {number: Fault(status=500) for number in range(2 + 4 + 8 + 1 + 3, 500)}
    with pytest.raises(ServerError, match=r"\d of 8 prompts are unanswered"):
        train(load_config("demo", overrides(inputs, tmp_path / "run", proxy, "sampling.ahead=true")))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch_0001"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inverseq")]
    with pytest.raises(ValueError, match="sampling.ahead=True: expected false unless sampling.backend=server"):
        load_config("demo", [f"model.path={inputs}", "run_dir=x", "sampling.ahead=true"])


def test_weights_that_change_while_the_trainer_moves_on_are_found(inputs, tmp_path, proxy):
    """Ahead of the trainer the server is compared with its own answer: a restart with other weights is not passed."""
    proxy.plan = {2 + 4 + 8 + 1 + 2: Fault(drop=True)}
    other = str(make_word_model(tmp_path / "other", seed=7))
    proxy.rewrite = lambda request: request.update(model=other) if len(proxy.requests) > 2 + 4 + 8 + 1 + 2 else None
    with pytest.raises(StaleWeightsError, match="no longer answers the probe prompt"):
        train(load_config("demo", overrides(inputs, tmp_path / "run", proxy, "sampling.ahead=true")))


def test_a_server_that_is_not_there_is_named_before_anything_is_written(inputs, tmp_path, proxy):
    more = (f"sampling.server.url={nobodys_root()}/v1",)
    with pytest.raises(ValueError, match="sampling.server.url=.*cannot be reached"):
        train(load_config("demo", overrides(inputs, tmp_path / "run", proxy, *more)))
    assert not (tmp_path / "run").exists()
