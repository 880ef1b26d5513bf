"""The operations give their formulas' values and gradients: by hand, by enumeration, against float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inverseq_kernels import (
    contrastive_logprob,
    contrastive_logprob_sweep,
    linear_logprob,
    squared_log_ratio_loss,
)
from inverseq_kernels.contrastive import contrastive_reference

from tests import kernels_oracle as oracle

SETTINGS = [
    {},
    {"softcap": 3.0},
    {"temperature": 0.7},
    {"num_valid_vocab": 29},
    {"softcap": 2.0, "temperature": 1.6, "num_valid_vocab": 30},
]
# Same-dtype rounding of inputs does not count: the oracle reads the rounded inputs in float64.
VALUE_ERROR = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def log_of(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def test_target_on_three_words_is_the_hand_computed_one():
    # pi_w = (1/2, 1/4, 1/4), pi_l = (1/4, 1/2, 1/4); alpha 2: pi_w^2 / pi_l = (1, 1/8, 1/4), sum 11/8.
    hidden = torch.eye(3, dtype=torch.float64)[:1].expand(3, 3)
    weight_w, weight_l = (
        torch.cat([log_of([probabilities]), torch.zeros(2, 3, dtype=torch.float64)]).t().contiguous()
        for probabilities in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])
    )
    token_ids = torch.tensor([0, 1, 2])
    targets, reference = contrastive_logprob(
        hidden, weight_w, hidden, weight_l, token_ids, 2.0, return_reference=True
    )
    torch.testing.assert_close(targets.exp(), torch.tensor([8 / 11, 1 / 11, 2 / 11], dtype=torch.float64))
    torch.testing.assert_close(reference.exp(), torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64))
    # alpha -1: pi_l^2 / pi_w = (1/8, 1, 1/4), sum 11/8.
    targets = contrastive_logprob(hidden, weight_w, hidden, weight_l, token_ids, -1.0)
    torch.testing.assert_close(targets.exp(), torch.tensor([1 / 11, 8 / 11, 2 / 11], dtype=torch.float64))


def test_loss_and_gradient_on_three_words_are_the_hand_computed_ones():
    # One row, pi = (1/2, 1/4, 1/4), y = 1, target log(1/2): residual l - t = -log 2, weight 3, denominator 2.
    hidden = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    weight = log_of([[0.5, 0.25, 0.25]]).t().contiguous().requires_grad_()
    loss, logprobs = squared_log_ratio_loss(
        hidden,
        weight,
        torch.tensor([1]),
        torch.tensor([math.log(0.5)], dtype=torch.float64),
        denominator=2,
        loss_mask=torch.tensor([3.0], dtype=torch.float64),
    )
    loss.backward()
    log2 = math.log(2)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25)], dtype=torch.float64))
    assert loss.item() == pytest.approx(1.5 * log2**2, rel=1e-14)
    # dL/dz = 2 * 3 / 2 * (-log 2) * (onehot - P) = -3 log 2 * (-1/2, 3/4, -1/4)
    expected = torch.tensor([[1.5], [-2.25], [0.75]], dtype=torch.float64) * log2
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(hidden.grad, (expected * weight.detach()).sum()[None, None])


def test_expected_loss_gradient_on_policy_samples_is_twice_the_kl_gradient():
    torch.manual_seed(3)
    dim, num_words = 6, 7
    state = torch.randn(1, dim, dtype=torch.float64)
    weight = torch.randn(num_words, dim, dtype=torch.float64, requires_grad=True)
    frozen_w, frozen_l = torch.randn(2, num_words, dim, dtype=torch.float64)
    words = torch.arange(num_words)
    rows = state.expand(num_words, dim).contiguous()
    targets = contrastive_logprob(rows, frozen_w, rows, frozen_l, words, 1.4)
    assert targets.exp().sum().item() == pytest.approx(1.0, abs=1e-13)
    probabilities = (state @ weight.detach().t()).softmax(dim=1)[0]
    # Weighting each word's row by its probability is the expectation over samples of the policy.
    loss, _ = squared_log_ratio_loss(rows, weight, words, targets, denominator=1, loss_mask=probabilities)
    (gradient,) = torch.autograd.grad(loss, weight)
    log_policy = (state @ weight.t()).log_softmax(dim=1)[0]
    (kl_gradient,) = torch.autograd.grad((log_policy.exp() * (log_policy - targets)).sum(), weight)
    assert (gradient - 2 * kl_gradient).abs().max().item() <= 1e-12


def test_alpha_one_is_the_better_model_and_alpha_zero_the_plain_one_exactly():
    better, plain = oracle.make_problem(9, 8, 33), oracle.make_problem(9, 5, 33, seed=1)

    def contrast(alpha):
        return contrastive_logprob(
            better.hidden,
            better.weight,
            plain.hidden,
            plain.weight,
            better.token_ids,
            alpha,
            bias_w=better.bias,
            bias_l=plain.bias,
            return_reference=True,
        )

    better_logprobs = linear_logprob(better.hidden, better.weight, better.token_ids, bias=better.bias)
    plain_logprobs = linear_logprob(plain.hidden, plain.weight, better.token_ids, bias=plain.bias)
    assert torch.equal(contrast(1.0)[0], better_logprobs)
    assert torch.equal(contrast(1)[0], better_logprobs)
    assert torch.equal(contrast(0.0)[0], plain_logprobs)
    assert torch.equal(contrast(1.4)[1], plain_logprobs)
    per_row = torch.tensor([1.0, 0.0] * 4 + [1.0])
    assert torch.equal(contrast(per_row)[0], torch.where(per_row == 1, better_logprobs, plain_logprobs))


@pytest.mark.parametrize("alpha", [-0.5, 1.0, 1.4, 30.0])
def test_identical_models_give_loss_zero(alpha):
    problem = oracle.make_problem(17, 12, 65, dtype=torch.float64)
    head = (problem.hidden, problem.weight)
    targets = contrastive_logprob(
        *head, *head, problem.token_ids, alpha, bias_w=problem.bias, bias_l=problem.bias
    )
    loss, _ = squared_log_ratio_loss(*head, problem.token_ids, targets, denominator=17, bias=problem.bias)
    assert loss.item() <= 1e-9
    for gradient in torch.autograd.grad(loss, head):
        assert gradient.abs().max().item() <= 1e-9


@pytest.mark.parametrize("dtype", list(VALUE_ERROR), ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("workspace_bytes", [None, 20_000])
def test_logprob_and_entropy_with_every_gradient_match_float64(dtype, settings, workspace_bytes):
    problem = oracle.make_problem(53, 24, 31, dtype=dtype, ignored=(0, 20))
    problem.token_ids.clamp_(max=28)
    truth = problem.to(torch.float64)
    log_probs = oracle.log_softmax(truth, **settings)
    expected = oracle.pick(log_probs, truth.token_ids), oracle.entropy(log_probs, truth.token_ids)
    actual = linear_logprob(
        problem.hidden,
        problem.weight,
        problem.token_ids,
        bias=problem.bias,
        return_entropy=True,
        workspace_bytes=workspace_bytes,
        **settings,
    )
    upstream = torch.randn(2, 53)
    for value, exact in zip(actual, expected, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (value - exact).abs().max().item() <= VALUE_ERROR[dtype]
    check_gradients(
        (actual[0] * upstream[0] + actual[1] * upstream[1]).sum(),
        (expected[0] * upstream[0] + expected[1] * upstream[1]).sum(),
        problem,
        truth,
    )


@pytest.mark.parametrize("dtype", list(VALUE_ERROR), ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("workspace_bytes", [None, 20_000])
def test_loss_with_every_gradient_matches_float64(dtype, settings, workspace_bytes):
    problem = oracle.make_problem(53, 24, 31, dtype=dtype, ignored=(0, 20))
    problem.token_ids.clamp_(max=28)
    truth = problem.to(torch.float64)
    targets, loss_mask = torch.randn(53), torch.rand(53)
    loss, logprobs = squared_log_ratio_loss(
        problem.hidden,
        problem.weight,
        problem.token_ids,
        targets,
        denominator=11.0,
        loss_mask=loss_mask,
        bias=problem.bias,
        workspace_bytes=workspace_bytes,
        **settings,
    )
    expected = oracle.pick(oracle.log_softmax(truth, **settings), truth.token_ids)
    residual = (targets - expected).masked_fill(truth.token_ids == oracle.IGNORED, 0.0)
    exact = (loss_mask * residual.square()).sum() / 11
    assert (logprobs - expected).abs().max().item() <= VALUE_ERROR[dtype]
    assert loss.item() == pytest.approx(exact.item(), rel=10 * VALUE_ERROR[dtype])
    check_gradients(3 * loss, 3 * exact, problem, truth)


def check_gradients(actual, exact, problem, truth):
    """Every leaf's gradient has the leaf's dtype and is within the table's relative error."""
    gradients = torch.autograd.grad(actual, problem.leaves)
    expected = torch.autograd.grad(exact, truth.leaves)
    for leaf, gradient, reference in zip(problem.leaves, gradients, expected, strict=True):
        assert gradient.dtype == leaf.dtype
        assert oracle.relative_error(gradient, reference) <= GRADIENT_ERROR[leaf.dtype]


@pytest.mark.parametrize("dtype", list(VALUE_ERROR), ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("workspace_bytes", [None, 5_000])
def test_contrast_and_sweep_match_float64(dtype, settings, workspace_bytes):
    better = oracle.make_problem(53, 24, 31, dtype=dtype, ignored=(1,))
    plain = oracle.make_problem(53, 10, 31, dtype=dtype, seed=1)
    token_ids = better.token_ids.clamp(max=28)
    log_w, log_l = (oracle.log_softmax(head.to(torch.float64), **settings) for head in (better, plain))
    heads = (better.hidden, better.weight, plain.hidden, plain.weight, token_ids)
    keywords = dict(
        bias_w=better.bias, bias_l=plain.bias, return_reference=True, workspace_bytes=workspace_bytes
    )
    alphas = [1.4, -0.7, 1.0, 0.0, 2.5]
    sweep, reference = contrastive_logprob_sweep(*heads, alphas=alphas, **keywords, **settings)
    assert (reference - oracle.pick(log_l, token_ids)).abs().max().item() <= VALUE_ERROR[dtype]
    for k, alpha in enumerate(alphas):
        exact = oracle.contrast(log_w, log_l, token_ids, alpha)
        assert (sweep[k] - exact).abs().max().item() <= 5 * VALUE_ERROR[dtype]
        single, _ = contrastive_logprob(*heads, alpha, **keywords, **settings)
        torch.testing.assert_close(single, sweep[k])
    alpha = torch.randn(53, dtype=sweep.dtype)
    per_row, _ = contrastive_logprob(*heads, alpha, **keywords, **settings)
    exact = oracle.contrast(log_w, log_l, token_ids, alpha.double())
    assert (per_row - exact).abs().max().item() <= 5 * VALUE_ERROR[dtype]


def test_log_prob_error_on_bf16_inputs_is_below_a_ten_thousandth_nat():
    problem = oracle.make_problem(64, 576, 4099, dtype=torch.bfloat16, bias=False)
    exact = oracle.pick(oracle.log_softmax(problem.to(torch.float64)), problem.token_ids)
    error = linear_logprob(problem.hidden, problem.weight, problem.token_ids) - exact
    assert error.square().mean().sqrt().item() <= 1e-4


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_peaked_logits_and_large_common_offsets_stay_exact(offset):
    """At P near 1 the gradient onehot - P is made before any rounding; an offset cancels."""
    hidden = torch.tensor([[12.0, offset]], requires_grad=True)
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1.0, 1.0]], requires_grad=True)
    truth = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logprobs = linear_logprob(hidden, weight, torch.tensor([0]))
    exact = (truth[0] @ truth[1].t()).log_softmax(dim=1)[:, 0]
    tolerance = 2e-7 if offset == 0 else 2e-3  # 1e4 has fp32 steps of 1e-3
    assert abs(logprobs.item() - exact.item()) <= tolerance
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    for gradient, reference in zip(gradients, torch.autograd.grad(exact.sum(), truth), strict=True):
        if offset == 0:
            torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-5)


@given(
    num_rows=st.integers(0, 40),
    dim=st.integers(1, 9),
    num_words=st.integers(1, 70),
    workspace_bytes=st.sampled_from([1, 3_000, 40_000, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_workspace_match_float64(num_rows, dim, num_words, workspace_bytes, dtype, seed):
    ignored = (0,) if num_rows % 3 == 1 else ()
    problem = oracle.make_problem(num_rows, dim, num_words, dtype=dtype, ignored=ignored, seed=seed)
    truth = problem.to(torch.float64)
    targets = torch.randn(num_rows)
    loss, logprobs = squared_log_ratio_loss(
        problem.hidden,
        problem.weight,
        problem.token_ids,
        targets,
        denominator=1,
        bias=problem.bias,
        workspace_bytes=workspace_bytes,
    )
    exact = oracle.pick(oracle.log_softmax(truth), truth.token_ids)
    torch.testing.assert_close(logprobs.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    residual = (exact - targets).masked_fill(truth.token_ids == oracle.IGNORED, 0.0)
    check_close = 1e-5 if dtype == torch.float32 else 1e-2
    expected = torch.autograd.grad(residual.square().sum(), truth.leaves)
    for gradient, reference in zip(torch.autograd.grad(loss, problem.leaves), expected, strict=True):
        torch.testing.assert_close(
            gradient.double(),
            reference,
            rtol=check_close,
            atol=check_close * (1 + reference.abs().max().item()) if reference.numel() else 0.0,
        )


def test_reference_formula_in_the_package_is_the_three_softmax_one():
    better = oracle.make_problem(13, 6, 19, dtype=torch.float64)
    plain = oracle.make_problem(13, 4, 19, dtype=torch.float64, seed=1)
    with torch.no_grad():
        better.bias[4], plain.bias[7] = -math.inf, -math.inf
    targets, reference = contrastive_reference(
        better.hidden,
        better.weight,
        plain.hidden,
        plain.weight,
        better.token_ids,
        1.4,
        bias_w=better.bias,
        bias_l=plain.bias,
        softcap=4.0,
        temperature=1.2,
    )
    log_w, log_l = (oracle.log_softmax(head, softcap=4.0, temperature=1.2) for head in (better, plain))
    torch.testing.assert_close(targets, oracle.contrast(log_w, log_l, better.token_ids, 1.4))
    torch.testing.assert_close(reference, oracle.pick(log_l, better.token_ids))


def _small_head(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(size, generator=generator) for size in ((6, 8), (11, 8), (11,)))
    return hidden, weight, bias, torch.randint(0, 11, (6,), generator=generator)


def test_one_weight_under_two_biases_is_two_heads():
    hidden, weight, bias, token_ids = _small_head()
    other = _small_head(1)[2]
    targets, plain = contrastive_logprob(
        hidden, weight, hidden, weight, token_ids, 1.4, bias_w=bias, bias_l=other, return_reference=True
    )
    z_w, z_l = (torch.nn.functional.linear(hidden, weight, b).double().log_softmax(1) for b in (bias, other))
    expected = (1.4 * z_w - 0.4 * z_l).log_softmax(1)
    for actual, rows in ((targets, expected), (plain, z_l)):
        torch.testing.assert_close(actual.double(), rows.gather(1, token_ids[:, None])[:, 0], rtol=0, atol=1e-5)


def test_the_entropy_alone_may_be_differentiated():
    hidden, weight, bias, token_ids = _small_head()
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    _, entropy = linear_logprob(hidden, weight, token_ids, bias=bias, return_entropy=True)
    rows = torch.nn.functional.linear(hidden, weight, bias).log_softmax(1)
    actual = torch.autograd.grad(entropy.sum(), inputs)
    expected = torch.autograd.grad(-(rows.exp() * rows).sum(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_loss_that_makes_gradients_leaves_removed_words_out_as_linear_logprob_does(softcap):
    hidden, weight, bias, token_ids = _small_head()
    removed = int(token_ids[0])
    bias[removed] = -math.inf
    counted = token_ids != removed
    denominator = torch.tensor(2.0, requires_grad=True)
    loss, logprobs = squared_log_ratio_loss(
        hidden.requires_grad_(),
        weight,
        token_ids,
        torch.zeros(6),
        denominator=denominator,
        loss_mask=counted,
        bias=bias,
        softcap=softcap,
    )
    assert torch.isneginf(logprobs[0])
    expected = linear_logprob(hidden, weight, token_ids, bias=bias, softcap=softcap)
    torch.testing.assert_close(logprobs, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected[counted].square().sum() / 2.0, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert denominator.grad is None
