"""Does the engine answer with the trainer's weights: each way of telling finds other weights, and only those."""

import copy
import functools
import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inverseq.attention import ATTENTION_NAME
from inverseq.config import SamplingConfig
from inverseq.freshness import Freshness, ProbeAnswer, StaleWeightsError, greedy_tokens
from inverseq.sampling import make_sampler, sample_responses
from tests.fault_proxy import FaultProxy
from tests.server_sampler import Trainer, make_prompts
from tests.serving import shared_server
from tests.test_sampling import EOS, NUM_WORDS, OTHER_EOS, make_model, make_prompt, make_tokenizer
from tests.tiny_words import EOS as WORD_EOS
from tests.tiny_words import make_word_tokenizer

PROMPT = make_prompt("probe", [3, 7, 4, 9, 2])


@torch.no_grad()
def exact_greedy(model, num_tokens):
    """Greedy continuation of PROMPT and its log-probs by whole forward passes, with plain attention."""
    model.set_attn_implementation("eager")
    ids, logprobs = PROMPT.policy_ids.tolist(), []
    start = len(ids)
    while len(ids) - start < num_tokens and ids[start:][-1:] not in ([EOS], [OTHER_EOS]):
        row = model(torch.tensor([ids])).logits[0, -1, :NUM_WORDS].double().log_softmax(-1)
        logprobs.append(row.max().item())
        ids.append(row.argmax().item())
    model.set_attn_implementation(ATTENTION_NAME)
    return np.array(ids[start:], np.int32), np.array(logprobs, np.float32)


class Engine:
    """An engine that answers with the weights it was last allowed to take."""

    name, version, weights_step = "engine", "1", 0

    def __init__(self, *, tells_logprobs=True, tells_tokens=True, noise=0.0):
        self.model = None
        self.stuck = False
        self.tells_logprobs, self.tells_tokens, self.noise = tells_logprobs, tells_tokens, noise

    def sync(self, model, weights_step):
        if not self.stuck:
            self.model, self.weights_step = copy.deepcopy(model), weights_step

    def probe(self, prompt, num_tokens):
        ids, logprobs = exact_greedy(self.model, num_tokens)
        noise = np.random.default_rng(int(abs(logprobs.sum()) * 1e6)).normal(0, self.noise, len(ids))
        text = make_tokenizer().decode(ids, skip_special_tokens=True)
        if not self.tells_tokens:
            return ProbeAnswer(None, text)
        return ProbeAnswer(ids, text, (logprobs + noise).astype(np.float32) if self.tells_logprobs else None)


def freshness(max_gap=0.1):
    return Freshness(PROMPT, make_tokenizer(), stop_ids=(EOS, OTHER_EOS), num_valid_vocab=NUM_WORDS, max_gap=max_gap)


@functools.cache
def seed_of_a_longer_answer():
    return next(seed for seed in range(50) if len(exact_greedy(make_model(seed=seed), 16)[0]) == 16)


def longer_model():
    """A model whose greedy continuation of PROMPT runs to the limit."""
    model = make_model(seed=seed_of_a_longer_answer())
    model.set_attn_implementation(ATTENTION_NAME)
    with torch.no_grad():
        model.lm_head.weight[NUM_WORDS:] = 100 * model.lm_head.weight[:4]  # words that do not exist would win
    return model


WAYS = [{}, {"tells_logprobs": False}, {"tells_tokens": False}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_trainers_own_weights_pass(way):
    model, check, engine = longer_model(), freshness(), Engine(**way)
    for step in range(3):
        check.sync(engine, model, step)
        gaps = {key: value for key, value in check.row.items() if key.startswith("probe_")}
        assert gaps and max(gaps.values()) < 1e-5 and check.row["weights_lag_steps"] == 0
        with torch.no_grad():
            model.lm_head.weight[:NUM_WORDS] += 0.1 * torch.randn(NUM_WORDS, 32, generator=torch.Generator())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_other_weights_are_found(way):
    model, check, engine = longer_model(), freshness(), Engine(**way)
    check.sync(engine, model, 0)
    engine.stuck = True
    with torch.no_grad():
        model.lm_head.weight.neg_()
    with pytest.raises(StaleWeightsError, match="engine does not answer with the weights of step 5"):
        check.sync(engine, model, 5)
    lenient = freshness(max_gap=0.0)  # 0 never stops
    lenient.sync(engine, model, 5)
    assert lenient.row["weights_lag_steps"] == 5


def test_the_gap_is_the_mean_difference_of_log_probs():
    model, check = longer_model(), freshness()
    ids, logprobs = exact_greedy(model, 16)
    shifted = logprobs + np.linspace(-0.08, 0.08, 16, dtype=np.float32)
    answer = ProbeAnswer(ids, "", shifted)
    metrics, doubt = check.compare(model, answer, 0)
    assert doubt is None
    assert metrics["probe_logprob_gap"] == pytest.approx(np.abs(shifted - logprobs).mean(), abs=1e-5)
    other = ids.copy()
    other[0] = (ids[0] + 1) % NUM_WORDS if (ids[0] + 1) % NUM_WORDS not in (EOS, OTHER_EOS) else 2
    assert check.compare(model, ProbeAnswer(other, ""), 0)[0]["probe_greedy_gap"] > 1e-3


@pytest.mark.parametrize(("move", "is_suspected"), [(2e-5, False), (1e-3, True)])
def test_weights_that_hardly_moved_since_the_sync_before_are_not_told_apart(move, is_suspected):
    model, check = longer_model(), freshness()
    ids, logprobs = exact_greedy(model, 16)
    check.previous = (0, ids.tobytes(), torch.from_numpy(logprobs - np.float32(move)))
    _, doubt = check.compare(model, ProbeAnswer(ids, "", logprobs - np.float32(move)), 1)
    assert (doubt is not None) == is_suspected


def test_the_probe_waits_for_all_ranks_and_log_probs_that_are_no_numbers_are_stale():
    model, events = longer_model(), []

    class Broken(Engine):
        def sync(self, model, weights_step):
            events.append("sync")
            super().sync(model, weights_step)

        def probe(self, prompt, num_tokens):
            events.append("probe")
            answer = super().probe(prompt, num_tokens)
            return ProbeAnswer(answer.token_ids, answer.text, np.full_like(answer.logprobs, np.nan))

    ranks = SimpleNamespace(barrier=lambda: events.append("barrier"))
    with pytest.raises(StaleWeightsError, match="they differ by nan nats"):
        freshness().sync(Broken(), model, 0, ranks)
    assert events == ["sync", "barrier", "probe"]


def test_small_steps_are_told_apart_by_the_weights_before():
    """The gap is far below the limit, but the engine agrees much better with the weights of the sync before."""
    model, check, engine = longer_model(), freshness(), Engine(noise=1e-3)
    check.sync(engine, model, 0)
    engine.stuck = True
    with torch.no_grad():
        model.lm_head.weight[:NUM_WORDS] *= 1.02
    with pytest.raises(StaleWeightsError, match="step 1: .*it agrees to .* with step 0, to .* with this"):
        check.sync(engine, model, 1)


def test_an_engine_that_only_rounds_differently_is_not_suspected():
    model, check, engine = longer_model(), freshness(), Engine(noise=1e-2)
    for step in range(8):
        check.sync(engine, model, step)
        with torch.no_grad():
            model.lm_head.weight[:NUM_WORDS] *= 1.002
    assert 1e-3 < check.row["probe_logprob_gap"] < 2e-2


def test_greedy_tokens_are_those_of_a_head_with_a_bias():
    model = make_model(seed=0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
    with torch.no_grad():
        model.lm_head.bias[NUM_WORDS - 1] = 100.0
    ids = greedy_tokens(model, PROMPT, 3, stop_ids=(EOS, OTHER_EOS), num_valid_vocab=NUM_WORDS)
    assert ids.tolist() == [NUM_WORDS - 1] * 3


def test_greedy_tokens_are_the_trainers_own():
    model = longer_model()
    prompt = {"stop_ids": (EOS, OTHER_EOS), "num_valid_vocab": NUM_WORDS}
    assert greedy_tokens(model, PROMPT, 16, **prompt).tolist() == exact_greedy(model, 16)[0].tolist()
    stop = int(exact_greedy(model, 16)[0][4])
    first = exact_greedy(model, 16)[0].tolist().index(stop)
    assert greedy_tokens(model, PROMPT, 16, stop_ids=(stop,), num_valid_vocab=NUM_WORDS).tolist()[-1] == stop
    assert len(greedy_tokens(model, PROMPT, 16, stop_ids=(stop,), num_valid_vocab=NUM_WORDS)) == first + 1


def test_the_probe_of_the_embedded_engine_is_its_greedy_continuation(caplog):
    model = longer_model()
    sampler = make_sampler(SamplingConfig(), model, make_tokenizer(), num_valid_vocab=NUM_WORDS)
    check = freshness()
    with caplog.at_level("INFO", logger="inverseq"):
        check.sync(sampler, model, 3)
    assert re.search(r"transformers probed at step 3: probe_greedy_gap=\S+, probe_logprob_gap=\S+$", caplog.text, re.M)
    assert check.row["probe_logprob_gap"] < 1e-5 and check.row["probe_greedy_gap"] < 1e-5
    answer, (ids, logprobs) = sampler.probe(PROMPT, 16), exact_greedy(model, 16)
    assert answer.token_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-5)
    assert model.config._attn_implementation == ATTENTION_NAME


def test_static_weights_are_not_held_to_the_limit(caplog):
    model, check, engine = longer_model(), freshness(), Engine()
    engine.is_static = True
    check.sync(engine, model, 0)
    engine.stuck = True
    with torch.no_grad():
        model.lm_head.weight.neg_()
    with caplog.at_level(logging.WARNING):
        check.sync(engine, model, 5)
    assert check.row["weights_lag_steps"] == 5 and check.row["probe_logprob_gap"] > 0.1
    assert "static weights, off-policy samples" in caplog.text


def speaks_vllm(proxy, logits_of):
    """Let the proxy take token ids and give them back with log-probs, as vLLM does, before a server of texts."""
    tokenizer = make_word_tokenizer()
    seen = {}

    def rewrite(request):
        assert set(request) >= {"top_k", "min_p", "repetition_penalty", "stop_token_ids", "return_token_ids"}
        seen["prompt"], seen["wants_logprobs"] = request["prompt"], "logprobs" in request
        seen["limit"] = request["max_tokens"]
        for name in ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "return_token_ids"):
            request.pop(name)
        request["prompt"] = tokenizer.decode(request["prompt"])
        settings = {"do_sample": request["temperature"] > 0, "top_k": 0, "eos_token_id": [WORD_EOS]}
        request["generation_config"] = json.dumps(settings)

    @torch.no_grad()
    def adapt(answer):
        choice = answer["choices"][0]
        ids = tokenizer(choice["text"])["input_ids"]
        if choice["finish_reason"] == "stop" or len(ids) < seen["limit"]:
            ids, choice["finish_reason"] = [*ids, WORD_EOS], "stop"
        choice["token_ids"] = ids
        if seen["wants_logprobs"]:
            rows = logits_of([*seen["prompt"], *ids])[len(seen["prompt"]) - 1 : -1].log_softmax(-1)
            values = [row[i].item() for row, i in zip(rows, ids, strict=True)]
            choice["logprobs"] = {"token_logprobs": values, "tokens": [], "text_offset": [], "top_logprobs": None}

    proxy.rewrite, proxy.adapt = rewrite, adapt


def test_a_server_that_speaks_token_ids_and_log_probs(tmp_path):
    with FaultProxy(shared_server().root) as proxy:
        options = {"dialect": "vllm", "prompts": "ids", "concurrency": 1}
        trainer = Trainer(tmp_path, proxy.root, **options)
        own = copy.deepcopy(trainer.model)
        own.set_attn_implementation("eager")
        speaks_vllm(proxy, lambda ids: own(torch.tensor([ids])).logits[0])
        assert trainer.sync(0)["probe_logprob_gap"] < 1e-5
        prompts = make_prompts(12)
        samples = sample_responses(trainer.sampler, prompts, seed=0)
        assert [sample.rendered for sample in samples] == prompts
        assert {sample.response.finish_reason for sample in samples} == {"stop", "length"}
        trainer.model.get_output_embeddings().weight.data.mul_(1.02)  # the server loads these, but says old log-probs
        with pytest.raises(StaleWeightsError, match="step 1: .* it agrees to .* with step 0"):
            trainer.sync(1)
