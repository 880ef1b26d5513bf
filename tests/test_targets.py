"""Targets of packed views equal the formula computed one sequence at a time from full float64 logits."""

import copy

import pytest
import torch

from inverseq.attention import ATTENTION_NAME
from inverseq.config import Config, ContrastConfig, ModelConfig, PackingConfig
from inverseq.model import FrozenPair, load_model
from inverseq.targets import score_targets
from tests.tiny import make_tiny_model
from tests.tiny_samples import make_samples, superior_logprobs

MODEL = ModelConfig(path="tiny", device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        load_model(make_tiny_model(folder / str(seed), tied=bool(seed), seed=seed, scale=0.3), MODEL)
        for seed in (0, 1)
    ]


def score(better, plain, samples, *, alpha=1.4, kind="principle", budget=64, share_prefix=False):
    for model in (better, plain):
        model.set_attn_implementation(ATTENTION_NAME)
    contrast = ContrastConfig(kind=kind, alpha=alpha, plain_model="other" if kind == "model" else "")
    packing = PackingConfig(score_tokens=budget, share_prefix=share_prefix)
    config = Config(model=MODEL, contrast=contrast, packing=packing, run_dir="unused")
    return score_targets(FrozenPair(better, plain), samples, config, num_valid_vocab=512)


@pytest.mark.parametrize("alpha", [1.4, 1.0, 0.0, -0.5])
@pytest.mark.parametrize("budget", [96, 4096])
def test_principle_contrast_equals_the_formula(models, alpha, budget):
    samples = make_samples(7)
    scored = score(models[0], models[0], samples, alpha=alpha, budget=budget)
    targets, plain = superior_logprobs(models[0], models[0], samples, alpha)
    assert (targets - plain).abs().max() > 0.1 or alpha == 0.0
    torch.testing.assert_close(scored.targets.double(), targets, rtol=0, atol=2e-5)
    torch.testing.assert_close(scored.plain_logprobs.double(), plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_views", [1, 2])
def test_model_contrast_equals_the_formula_with_and_without_a_principle(models, num_views):
    samples = make_samples(6, num_views=num_views, seed=3)
    scored = score(models[0], models[1], samples, kind="model")
    targets, plain = superior_logprobs(models[0], models[1], samples, 1.4)
    torch.testing.assert_close(scored.targets.double(), targets, rtol=0, atol=2e-5)
    torch.testing.assert_close(scored.plain_logprobs.double(), plain, rtol=0, atol=2e-5)


def test_identical_models_and_views_give_the_plain_logprob_exactly(models):
    samples = make_samples(5, num_views=1, seed=4)
    twin = copy.deepcopy(models[0])
    scored = score(models[0], twin, samples, kind="model")
    assert (scored.targets - scored.plain_logprobs).abs().max() < 1e-5


def test_a_shared_prefix_gives_the_same_targets(models):
    samples = make_samples(6, seed=5)
    prefixes = samples[0].rendered.prefix_ids
    for sample in samples:
        object.__setattr__(sample.rendered, "prefix_ids", prefixes)
    plain = score(models[0], models[0], samples, budget=400)
    shared = score(models[0], models[0], samples, budget=400, share_prefix=True)
    torch.testing.assert_close(shared.targets, plain.targets, rtol=0, atol=1e-5)


def test_models_that_shape_their_logits_differently_are_refused(models):
    samples = make_samples(2, num_views=1)
    other = copy.deepcopy(models[1])
    other.config.logits_scaling = 2.0
    with pytest.raises(ValueError, match="contrast.plain_model"):
        score(models[0], other, samples, kind="model")
