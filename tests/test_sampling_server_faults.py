"""What goes wrong between trainer and server: nothing is lost, doubled, or trained on by mistake."""

import dataclasses
import logging
import threading
import time
from collections import Counter

import pytest

from inverseq import sampling_server_client
from inverseq.freshness import StaleWeightsError
from inverseq.sampling import sample_responses
from inverseq.sampling_server import ServerError
from tests.fault_proxy import FAULTS, Fault, FaultProxy
from tests.server_sampler import Trainer, make_prompts
from tests.serving import Served, nobodys_root, shared_server
from tests.tiny_words import EOS

REPEATED = [name for name in FAULTS if name != "cut short"]
PASSING = [Fault(status=429, retry_after="0.1"), Fault(status=500), Fault(status=503), Fault(silence_s=60.0)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(sampling_server_client, "FIRST_PAUSE_S", 0.05)


@pytest.fixture
def proxy():
    with FaultProxy(shared_server().root) as running:
        yield running


def answered_once(samples, prompts) -> bool:
    """Each prompt has one whole response, in its place."""
    whole = [s.response.token_ids[-1] == EOS or s.num_actions == 6 for s in samples]
    return [s.rendered for s in samples] == prompts and all(whole)


@pytest.mark.parametrize("fault", [*REPEATED, *PASSING], ids=lambda fault: str(fault))
def test_an_answer_that_fails_is_asked_for_again(tmp_path, proxy, fault):
    is_late = isinstance(fault, Fault) and fault.silence_s > 0
    trainer = Trainer(tmp_path, proxy.root, retries=20 if is_late else 3)
    trainer.sync(1)
    if is_late:  # the first answer would be slower than this
        trainer.sampler.config = dataclasses.replace(trainer.sampler.config, timeout_s=2.0)
    proxy.plan = {2: fault, 4: fault, 5: fault}  # request 0 was the probe
    prompts = make_prompts(7)
    announced = []
    samples = sample_responses(trainer.sampler, prompts, seed=0, advance=announced.append)
    assert answered_once(samples, prompts) and announced == [1] * 7
    drawn = [request for request in proxy.requests if "logprobs" not in request]
    num_probes = len(proxy.requests) - len(drawn)
    # Only what was seen and refused is drawn with another seed: who is late would else be replaced by who is short.
    assert len({request["seed"] for request in drawn}) == (10 if fault in ("garbled", "miscounted") else 7)
    if is_late:  # a busy machine may be late by itself
        assert len(drawn) >= 10 and num_probes >= 2
    else:
        restarted_unseen = isinstance(fault, Fault) and fault.status >= 500
        assert len(drawn) == 10 and num_probes == 1 + restarted_unseen


@pytest.mark.parametrize("fault", [Fault(status=500), "error", "garbled"], ids=str)
def test_spent_retries_stop_the_run_and_name_the_server_and_the_prompts(tmp_path, proxy, fault):
    trainer = Trainer(tmp_path, proxy.root, retries=2, concurrency=1)
    trainer.sync(1)
    proxy.plan = {n: fault for n in range(4, 100)}
    with pytest.raises(ServerError, match=rf"{proxy.root}/v1: prompt 'p\d' is given up, 2 of 5 prompts are unanswered"):
        sample_responses(trainer.sampler, make_prompts(5), seed=0)
    attempts = Counter(request["prompt"] for request in proxy.requests[4:])
    assert max(attempts.values()) == 3 and len(attempts) <= 2  # two were left, and one of them had three attempts


def test_an_answer_that_the_server_cuts_off_ends_the_run(tmp_path, proxy):
    """Drawn again, a prompt that leaves no room for a long answer would be trained on short ones alone."""
    trainer = Trainer(tmp_path, proxy.root, retries=3, concurrency=1)
    trainer.sync(1)
    proxy.plan = {2: "cut short"}
    with pytest.raises(ServerError, match=r"'p\d' is given up, 6 of 7 .* cut off after 1 of 6 tokens"):
        sample_responses(trainer.sampler, make_prompts(7), seed=0)
    assert len(proxy.requests) <= 4


def test_a_busy_server_is_given_the_time_it_asks_for(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root, concurrency=1)
    trainer.sync(1)
    proxy.plan = {1: Fault(status=429, retry_after="0.7")}
    sample_responses(trainer.sampler, make_prompts(1), seed=0)
    assert len(proxy.requests) == 3 and proxy.arrived_s[2] - proxy.arrived_s[1] >= 0.7


def test_a_refused_request_is_not_repeated(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root, concurrency=1)
    trainer.sync(1)
    proxy.plan = {1: Fault(status=400)}
    with pytest.raises(ServerError, match="5 of 5 prompts are unanswered: status 400"):
        sample_responses(trainer.sampler, make_prompts(5), seed=0)
    assert [request["prompt"] for request in proxy.requests].count(proxy.requests[1]["prompt"]) == 1


@pytest.mark.parametrize("fault", [Fault(drop=True), Fault(status=502)], ids=str)
def test_a_dropped_connection_is_followed_by_a_look_at_the_weights(tmp_path, proxy, fault):
    trainer = Trainer(tmp_path, proxy.root, concurrency=2)
    trainer.sync(1)
    proxy.plan = {3: fault}
    prompts = make_prompts(8)
    assert answered_once(sample_responses(trainer.sampler, prompts, seed=0), prompts)
    probes = [index for index, request in enumerate(proxy.requests) if "logprobs" in request]
    assert len(probes) == 2 and 3 < probes[1] <= 5  # at most the other request in flight stands between
    assert proxy.num_refreshes == 1  # the weights were still there


def old_weights_after(proxy, trainer, number):
    """From completion request ``number`` on the server answers with its initial weights, until it is refreshed."""
    old = threading.Event()

    def rewrite(request):
        if len(proxy.requests) > number and not proxy.was_refreshed:
            old.set()
        if old.is_set():
            request["model"] = str(trainer.initial)

    def on_refresh():
        proxy.was_refreshed = True
        old.clear()

    proxy.was_refreshed = False
    proxy.rewrite, proxy.on_refresh = rewrite, on_refresh


def test_a_server_that_comes_back_with_old_weights_gets_the_new_ones_before_it_is_asked_again(tmp_path, proxy, caplog):
    trainer = Trainer(tmp_path, proxy.root, concurrency=2)
    trainer.sync(0)
    trainer.change_weights()
    trainer.sync(4)
    proxy.plan = {5: Fault(drop=True)}
    old_weights_after(proxy, trainer, 5)
    prompts = make_prompts(8)
    models = []
    rewrite = proxy.rewrite
    proxy.rewrite = lambda request: (rewrite(request), models.append((request["model"], "logprobs" in request)))
    with caplog.at_level(logging.WARNING):
        assert answered_once(sample_responses(trainer.sampler, prompts, seed=0), prompts)
    assert proxy.num_refreshes == 3 and "loading step 4 anew" in caplog.text
    initial = str(trainer.initial)
    assert (initial, True) in models  # the probe saw the old weights,
    after = models[models.index((initial, True)) + 1 :]
    assert initial not in [model for model, _ in after]  # and nothing was asked of them


def test_a_server_that_keeps_coming_back_with_old_weights_stops_the_run(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root, concurrency=2)
    trainer.sync(0)
    trainer.change_weights()
    trainer.sync(4)
    proxy.plan = {3: Fault(drop=True)}
    proxy.rewrite = lambda request: request.update(model=str(trainer.initial)) if len(proxy.requests) > 3 else None
    with pytest.raises(StaleWeightsError, match="does not answer with the weights of step 4"):
        sample_responses(trainer.sampler, make_prompts(8), seed=0)


@pytest.mark.parametrize("status", [500, 503])  # 500 may be the last word of an engine that died
def test_a_restart_that_nobody_saw_is_found_out_before_the_samples_are_used(tmp_path, proxy, status):
    trainer = Trainer(tmp_path, proxy.root, concurrency=1)
    trainer.sync(0)
    trainer.change_weights()
    trainer.sync(4)
    proxy.plan = {3: Fault(status=status)}
    proxy.rewrite = lambda request: request.update(model=str(trainer.initial)) if len(proxy.requests) > 3 else None
    with pytest.raises(StaleWeightsError):
        sample_responses(trainer.sampler, make_prompts(4), seed=0)


def test_a_server_that_stays_away_stops_the_run(tmp_path, caplog):
    with FaultProxy(shared_server().root) as proxy:
        trainer = Trainer(tmp_path, proxy.root, concurrency=1)
        trainer.sync(0)
        trainer.sampler.config = dataclasses.replace(trainer.sampler.config, wait_s=1.0)
        proxy.delay_s = 0.3
        finished = trainer.sampler.generate(make_prompts(20), seed=0)
        next(finished)
        proxy.target = nobodys_root()
        proxy.__exit__()  # nobody listens any more
        started = time.monotonic()
        with pytest.raises(
            ServerError, match=r"still away after sampling.server.wait_s=1 seconds, \d+ of 20 prompts are"
        ):
            list(finished)
        assert time.monotonic() - started < 60
        assert "lost the connection" in caplog.text and "nothing is sent after" not in caplog.text


def test_a_real_server_that_is_killed_in_a_batch_and_started_again_loses_nothing(tmp_path):
    served = Served().start()
    try:
        trainer = Trainer(tmp_path, served.root, max_new_tokens=60, concurrency=4)
        trainer.sync(2)
        prompts = make_prompts(30)
        finished = trainer.sampler.generate(prompts, seed=0)
        seen = [next(finished) for _ in range(3)]
        served.kill()
        restart = threading.Timer(0.5, served.start)
        restart.start()
        seen += list(finished)
        restart.join()
        assert sorted(index for index, _ in seen) == list(range(30))
        assert {response.weights_step for _, response in seen} == {2}
    finally:
        served.kill()
