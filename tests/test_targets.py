"""Targets of packed views equal the formula computed one sequence at a time from full float64 logits."""

import copy

import numpy as np
import pytest
import torch

from inverseq.attention import ATTENTION_NAME
from inverseq.config import Config, ContrastConfig, EngineConfig, ModelConfig, PackingConfig
from inverseq.distributed import Ranks
from inverseq.model import FrozenPair, load_model
from inverseq.packing import pack_views, view_lengths
from inverseq.policy import Policy
from inverseq.targets import score_targets
from tests.tiny import make_tiny_model
from tests.tiny_samples import full_logprobs, make_samples, superior_logprobs

MODEL = ModelConfig(path="tiny", device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        load_model(make_tiny_model(folder / str(seed), tied=bool(seed), seed=seed, scale=0.3), MODEL) for seed in (0, 1)
    ]


def score(better, plain, samples, *, alpha=1.4, kind="principle", budget=64, share_prefix=False, initial=False, **more):
    for model in (better, plain):
        model.set_attn_implementation(ATTENTION_NAME)
    other = "other" if kind == "model" else ""
    contrast = ContrastConfig(kind=kind, alpha=alpha, plain_model=other, kl_to_initial=initial)
    packing = PackingConfig(score_tokens=budget, share_prefix=share_prefix)
    config = Config(model=MODEL, contrast=contrast, packing=packing, run_dir="unused")
    return score_targets(FrozenPair(better, plain), samples, config, **{"num_valid_vocab": 512, **more})


@pytest.mark.parametrize("alpha", [1.4, 1.0, 0.0, -0.5])
@pytest.mark.parametrize("budget", [96, 4096])
def test_principle_contrast_equals_the_formula(models, alpha, budget):
    samples, done = make_samples(7), []
    scored = score(models[0], models[0], samples, alpha=alpha, budget=budget, advance=done.append)
    assert sum(done) == 7 and (len(done) > 1) == (budget < sum(view_lengths(samples, (0, 1))))
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


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("num_views", [1, 2])
def test_the_initial_model_is_scored_on_the_policys_view(models, num_views, share_prefix):
    samples = make_samples(6, num_views=num_views, seed=3)
    for sample in samples:
        object.__setattr__(sample.rendered, "prefix_ids", samples[0].rendered.prefix_ids)
    forwards = []
    handle = models[0].get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    shared = {"budget": 4096, "share_prefix": share_prefix, "kind": "model"}
    scored = score(models[0], models[1], samples, **shared, initial=True)
    handle.remove()
    assert len(forwards) == 1, "the hidden states of both its views come from one forward"
    without = score(models[0], models[1], samples, **shared)
    assert without.initial_logprobs is None and list(without.values) == ["targets", "plain_logprobs"]
    torch.testing.assert_close(scored.targets, without.targets, rtol=0, atol=1e-5)
    initial = []
    for sample in samples:
        token_ids = torch.from_numpy(sample.response.token_ids.astype(np.int64))[:, None]
        initial.append(full_logprobs(models[0], sample, -1).gather(1, token_ids)[:, 0])
    torch.testing.assert_close(scored.initial_logprobs.double(), torch.cat(initial), rtol=0, atol=2e-5)
    assert (scored.initial_logprobs - scored.plain_logprobs).abs().max() > 0.1


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
    other.config.logits_scaling, other.config.final_logit_softcapping = 1.0, 30.0
    with pytest.raises(ValueError, match="contrast.plain_model"):
        score(models[0], other, samples, kind="model")


def with_a_full_head(model, seed):
    """A copy whose head has all that one may have: a bias, a softcap, a temperature, and words that are padding."""
    copied = copy.deepcopy(model)
    copied.lm_head.bias = torch.nn.Parameter(torch.randn(512, generator=torch.Generator().manual_seed(seed)))
    copied.config.final_logit_softcapping, copied.config.logits_scaling = 2.0, 0.5

    def shape(_head, _inputs, logits):  # of the model's own logits: scoring reads the head's weight and bias
        shaped = 2.0 * torch.tanh(logits / 2.0) / 0.5
        shaped[..., 480:] = -1e9
        return shaped

    copied.lm_head.register_forward_hook(shape)
    return copied


@pytest.mark.parametrize("kind", ["principle", "model"])
def test_every_part_of_a_head_reaches_targets_and_policy(models, kind):
    better = with_a_full_head(models[0], 1)
    plain = with_a_full_head(models[1], 2) if kind == "model" else better
    samples = make_samples(5, seed=6, vocab=480)
    scored = score(better, plain, samples, kind=kind, initial=kind == "model", num_valid_vocab=480)
    targets, expected = superior_logprobs(better, plain, samples, 1.4)
    torch.testing.assert_close(scored.targets.double(), targets, rtol=0, atol=2e-5)
    torch.testing.assert_close(scored.plain_logprobs.double(), expected, rtol=0, atol=2e-5)
    own = superior_logprobs(better, better, samples, 0.0)[1]
    if kind == "model":
        torch.testing.assert_close(scored.initial_logprobs.double(), own, rtol=0, atol=2e-5)
    better.set_attn_implementation(ATTENTION_NAME)
    loss, logprobs = policy_pass(better, samples, scored.targets, 4096, valid=480)
    torch.testing.assert_close(logprobs.double(), own, rtol=0, atol=2e-5)
    assert loss == pytest.approx((targets - own).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("longer", [0, 1])
def test_each_model_reads_its_own_view_in_packs_of_the_scoring_budget(models, longer):
    samples = make_samples(6, seed=7)
    prefixes = [np.arange(3, 6, dtype=np.int32)] * 2
    prefixes[longer] = np.arange(3, 33, dtype=np.int32)
    for sample in samples:
        object.__setattr__(sample.rendered, "prefix_ids", tuple(prefixes))
    seen, done = [[], []], []
    handles = [
        model.get_decoder().register_forward_pre_hook(
            lambda _module, _args, inputs, tokens=tokens: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        for model, tokens in zip(models, seen, strict=True)
    ]
    score(models[0], models[1], samples, kind="model", budget=110, advance=done.append)
    for handle in handles:
        handle.remove()
    assert sum(done) == 6 and len(done) == len(seen[0]) == len(seen[1]) > 1
    assert all(max(tokens) <= 110 for tokens in seen)
    assert [sum(tokens) for tokens in seen] == [view_lengths(samples, (view,)).sum() for view in (0, 1)]


def test_a_rank_without_samples_adds_nothing(models):
    told, done, samples = {}, [], make_samples(1, seed=2)

    class Told(Ranks):
        def gather(self, value):
            told[self.rank] = value
            return [told[rank] for rank in sorted(told)]

    with pytest.raises(ArithmeticError):  # nothing has been said of the sample yet
        score(models[0], models[0], samples, ranks=Told(1, 2), advance=done.append)
    scored = score(models[0], models[0], samples, ranks=Told(0, 2), advance=done.append)
    assert done == [1] and torch.equal(scored.targets, score(models[0], models[0], samples).targets)


def test_one_model_that_gives_no_numbers_is_an_error(models):
    broken = copy.deepcopy(models[0])
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(ArithmeticError, match="not numbers"):
        score(broken, models[1], make_samples(2), kind="model")


@pytest.fixture(scope="module")
def half_model(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "half", seed=7, scale=0.3)
    return load_model(path, ModelConfig(path="tiny", device="cpu", dtype="bfloat16"))


def policy_pass(model, samples, targets, budget, valid=512):
    """Mean squared log-ratio and log π_θ of all actions, from packs of at most ``budget`` tokens."""
    policy, offsets = Policy(model, valid, EngineConfig()), np.cumsum([0, *(s.num_actions for s in samples)])
    logprobs, loss = torch.empty(len(targets)), 0.0
    for pack in pack_views(samples, (-1,), token_budget=budget):
        rows = pack.action_rows(offsets)
        part, logprobs[rows] = policy(pack, targets[rows], torch.ones(len(rows)), float(len(targets)))
        loss += part.item()
    return loss, logprobs


@pytest.mark.parametrize("policy_budget", [4096, 48])
def test_with_the_same_weights_and_text_the_bf16_loss_is_nothing(half_model, policy_budget):
    samples = make_samples(9, num_views=1, seed=8)
    scored = score(half_model, half_model, samples, budget=4096)
    loss, logprobs = policy_pass(half_model, samples, scored.targets, policy_budget)
    assert loss < 1e-9
    assert (scored.targets - logprobs).square().mean().sqrt() < 1e-5  # far below the goal of 0.02 nats


@pytest.mark.parametrize("kind", ["principle", "model"])
def test_the_plain_view_rounds_as_the_policy_does_beside_a_shared_principle(half_model, kind):
    samples = make_samples(5, seed=9, longest=250)
    prefixes = (np.arange(3, 60, dtype=np.int32), np.arange(3, 9, dtype=np.int32))
    for sample in samples:
        object.__setattr__(sample.rendered, "prefix_ids", prefixes)
    (pack,) = pack_views(samples, (0, 1), token_budget=4096, share_prefix=True)
    assert pack.parent_seq.tolist() == [-1, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1]
    plain = half_model if kind == "principle" else copy.deepcopy(half_model)
    scored = score(half_model, plain, samples, kind=kind, budget=4096, share_prefix=True)
    _, logprobs = policy_pass(half_model, samples, scored.targets, 512)
    torch.testing.assert_close(scored.plain_logprobs, logprobs, rtol=0, atol=1e-5)


def test_a_principle_is_shared_on_a_cpu_and_elsewhere_when_asked_for():
    def shares(value, device_type="cpu", num_views=2):
        return PackingConfig(share_prefix=value).shares_prefix(device_type, num_views)

    assert shares("auto") and not shares("auto", "cuda") and not shares("auto", num_views=1)
    assert shares("true", "cuda") and shares(True, "cuda") and not shares("false") and not shares(False)
    with pytest.raises(ValueError, match=r"packing\.share_prefix='yes': expected one of auto, true, false"):
        PackingConfig(share_prefix="yes")


@pytest.mark.gpu
@pytest.mark.parametrize("share_prefix", [False, True])
def test_scoring_on_cuda_gives_what_it_gives_on_a_cpu(models, share_prefix):
    samples = make_samples(12, seed=10)
    expected = score(models[0], models[0], samples, budget=96)
    device = copy.deepcopy(models[0]).cuda()
    actual = score(device, device, samples, budget=96, share_prefix=share_prefix)
    torch.testing.assert_close(actual.targets, expected.targets, rtol=0, atol=1e-3)
    torch.testing.assert_close(actual.plain_logprobs, expected.plain_logprobs, rtol=0, atol=1e-3)
