"""Scoring while sampling: the same samples and targets, and the engine does not wait for the scorer."""

import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inverseq import overlap
from inverseq.config_loading import load_config
from inverseq.distributed import Ranks
from inverseq.model import FrozenPair, frozen_copy, load_model
from inverseq.sample_files import read_samples
from inverseq.sampling import finished_samples, make_sampler, sample_responses
from inverseq.targets import score_targets
from inverseq.trainer import train
from tests.fault_proxy import FaultProxy
from tests.server_sampler import Trainer, make_prompts
from tests.serving import shared_server
from tests.tiny_run import TINY_RUN
from tests.tiny_samples import make_samples
from tests.tiny_words import NUM_WORDS, make_word_model, make_word_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Configuration, sampler and frozen pair of a tiny model on this process's CPU."""
    path = make_word_model(tmp_path_factory.mktemp("model") / "words")
    settings = ["model.device=cpu", "sampling.max_new_tokens=8", "sampling.batch_size=4", "packing.score_tokens=160"]
    config = load_config("demo", [f"model.path={path}", "run_dir=unused", *settings])
    model = load_model(path, config.model)
    frozen = frozen_copy(model)
    sampler = make_sampler(config.sampling, model, make_word_tokenizer(), num_valid_vocab=NUM_WORDS)
    return config, sampler, FrozenPair(frozen, frozen)


def together(parts, prompts, **changes):
    config, sampler, frozen = parts
    keywords = {"seed": 3, "ranks": Ranks(), "num_valid_vocab": NUM_WORDS, "advance": lambda count: None} | changes
    return overlap.sample_and_score(sampler, frozen, prompts, config, **keywords)


def test_samples_and_targets_are_those_of_two_phases(parts):
    config, sampler, frozen = parts
    prompts, announced = make_prompts(30), []
    scored, score_s = together(parts, prompts, advance=announced.append)
    samples = sample_responses(sampler, prompts, seed=3)
    expected = score_targets(frozen, samples, config, num_valid_vocab=NUM_WORDS)
    assert [s.rendered for s in scored.samples] == prompts and announced == [1] * 30 and score_s > 0
    for ours, theirs in zip(scored.samples, samples, strict=True):
        assert ours.response.token_ids.tolist() == theirs.response.token_ids.tolist()
    assert np.array_equal(scored.offsets, expected.offsets)
    torch.testing.assert_close(scored.targets, expected.targets, rtol=0, atol=2e-5)
    torch.testing.assert_close(scored.plain_logprobs, expected.plain_logprobs, rtol=0, atol=2e-5)


def test_packs_are_filled_before_they_are_scored(parts, monkeypatch):
    config, sampler, frozen = parts
    scored_at_once = []
    monkeypatch.setattr(
        overlap, "score_targets", lambda *a, **k: (scored_at_once.append(a[1][:]), score_targets(*a, **k))[1]
    )
    together(parts, make_prompts(30))
    sizes = [sum(overlap.scored_tokens(s, together=True) for s in samples) for samples in scored_at_once]
    assert len(sizes) > 3 and max(sizes) <= 160
    assert all(a + b > 160 for a, b in zip(sizes, sizes[1:], strict=False))


def test_a_sample_takes_the_tokens_of_all_its_views_or_of_its_longest():
    sample = make_samples(1)[0]
    lengths = [count + len(sample.rendered.prompt_ids) + sample.num_actions for count in (5, 0, 2)]
    rendered = replace(sample.rendered, prefix_ids=tuple(np.zeros(n, dtype=np.int32) for n in (5, 0, 2)))
    sample = replace(sample, rendered=rendered)
    assert overlap.scored_tokens(sample, together=True) == sum(lengths)
    assert overlap.scored_tokens(sample, together=False) == lengths[0]


def test_samples_that_fill_a_pack_exactly_are_scored_together_and_all_scoring_is_timed(parts, monkeypatch):
    config, sampler, frozen = parts
    prompts = make_prompts(3)
    lengths = [overlap.scored_tokens(s, together=True) for s in sample_responses(sampler, prompts, seed=3)]
    clock = itertools.count()  # so that each scoring takes one second
    monkeypatch.setattr(overlap, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for score_tokens, num_packs in ((sum(lengths), 1), (sum(lengths) - 1, 2), (max(lengths), 3)):
        smaller = replace(config, packing=replace(config.packing, score_tokens=score_tokens))
        _, score_s = together((smaller, sampler, frozen), prompts)
        assert score_s == num_packs


def test_each_rank_answers_and_scores_its_share(parts):
    class Second(Ranks):
        def gather(self, value):
            return [[("other", torch.zeros(1), torch.zeros(1))] * 4, value]

    pieces = []
    original = overlap.joined
    try:
        overlap.joined = lambda whole: pieces.extend(whole)
        together(parts, make_prompts(8), ranks=Second(rank=1, world_size=2))
    finally:
        overlap.joined = original
    assert [piece[0] if piece[0] == "other" else piece[0].rendered.prompt.id for piece in pieces] == [
        *["other", "p1", "other", "p3", "other", "p5", "other", "p7"]
    ]


def test_no_prompts_give_no_samples(parts):
    scored, _ = together(parts, [])
    assert scored.samples == [] and scored.offsets.tolist() == [0] and len(scored.targets) == 0


def test_the_server_goes_on_while_samples_are_scored(tmp_path, parts, monkeypatch):
    config, _, frozen = parts
    with FaultProxy(shared_server().root) as proxy:
        trainer = Trainer(tmp_path, proxy.root, concurrency=1)
        trainer.sync(0)
        sent_by_then = []

        def score_when_all_is_sent(*arguments, **keywords):
            deadline = time.monotonic() + 120
            while len(proxy.requests) < 1 + 24 and time.monotonic() < deadline:  # the first is the probe
                time.sleep(0.01)
            sent_by_then.append(len(proxy.requests) - 1)
            return score_targets(*arguments, **keywords)

        monkeypatch.setattr(overlap, "score_targets", score_when_all_is_sent)
        scored, _ = together((config, trainer.sampler, frozen), make_prompts(24))
        assert len(scored.samples) == 24
        assert sent_by_then[0] == 24  # all others were sent while the first pack was scored


def test_an_error_while_scoring_stops_the_engine(parts, monkeypatch):
    def fail(*arguments, **keywords):
        raise ArithmeticError("the planted failure")

    monkeypatch.setattr(overlap, "score_targets", fail)
    with pytest.raises(ArithmeticError, match="planted"):
        together(parts, make_prompts(30))
    assert len([*finished_samples(parts[1], make_prompts(2), seed=0)]) == 2  # and it can be used again


def test_a_run_with_overlap_trains_on_every_sample_once(tmp_path):
    model = make_word_model(tmp_path / "model")
    settings = [item for item in TINY_RUN if not item.startswith(("evaluation", "epochs"))]
    options = [f"model.path={model}", f"run_dir={tmp_path / 'run'}", *settings, "epochs=1", "sampling.overlap=true"]
    run_dir = train(load_config("demo", options))
    scored = read_samples(run_dir / "samples" / "epoch_0001.jsonl")
    assert len({sample.rendered.prompt.id for sample in scored.samples}) == 6
    with pytest.raises(ValueError, match="sampling.overlap=True: expected false with a replayed run"):
        load_config("demo", [*options, "sampling.backend=replay", f"sampling.replay_path={run_dir}"])
