"""What the operations promise about masks, removed words, graphs, dtypes and arguments (torch backend)."""

import math

import pytest
import torch
from inverseq_kernels import (
    IGNORE_INDEX,
    contrastive_logprob,
    contrastive_logprob_sweep,
    linear_logprob,
    squared_log_ratio_loss,
    torch_loss,
)
from inverseq_kernels.torch_loss import squared_log_ratio_forward
from torch.utils.flop_counter import FlopCounterMode

from tests import kernels_oracle as oracle

INFINITY = math.inf


def run_loss(problem, targets, **keywords):
    keywords = {"denominator": 4.0, "bias": problem.bias, "backend": "torch"} | keywords
    return squared_log_ratio_loss(problem.hidden, problem.weight, problem.token_ids, targets, **keywords)


def test_ignored_rows_give_zero_and_no_gradient_whatever_they_hold():
    problem = oracle.make_problem(6, 5, 11)
    kept = oracle.make_problem(6, 5, 11)
    targets = torch.randn(6)
    problem.token_ids[2] = problem.token_ids[5] = IGNORE_INDEX
    with torch.no_grad():
        problem.hidden[2], problem.hidden[5] = math.nan, INFINITY
    rows = [0, 1, 3, 4]
    bad_targets = targets.clone()
    bad_targets[2], bad_targets[5] = math.nan, -INFINITY
    loss, logprobs = run_loss(problem, bad_targets)
    expected, expected_logprobs = squared_log_ratio_loss(
        kept.hidden[rows], kept.weight, kept.token_ids[rows], targets[rows], denominator=4.0, bias=kept.bias
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logprobs[rows], expected_logprobs)
    assert logprobs[2] == 0 and logprobs[5] == 0
    gradients = torch.autograd.grad(loss, problem.leaves)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, kept.leaves), strict=True):
        torch.testing.assert_close(gradient, reference)
    logprobs, entropy = linear_logprob(
        problem.hidden, problem.weight, problem.token_ids, bias=problem.bias, return_entropy=True
    )
    assert logprobs[[2, 5]].eq(0).all() and entropy[[2, 5]].eq(0).all()
    for gradient in torch.autograd.grad((logprobs + entropy).sum(), problem.leaves):
        assert gradient.isfinite().all()
    heads = (problem.hidden, problem.weight, problem.hidden, problem.weight, problem.token_ids)
    for values in contrastive_logprob(*heads, 1.4, return_reference=True):
        assert values[[2, 5]].eq(0).all() and values.isfinite().all()


def test_row_of_weight_zero_keeps_its_logprob_and_loses_loss_and_gradient():
    problem = oracle.make_problem(4, 5, 11)
    targets = torch.tensor([0.1, math.nan, -0.3, INFINITY])
    mask = torch.tensor([True, False, True, False])
    loss, logprobs = run_loss(problem, targets, loss_mask=mask)
    everything = linear_logprob(problem.hidden, problem.weight, problem.token_ids, bias=problem.bias)
    torch.testing.assert_close(logprobs, everything)
    gradient, _, _ = torch.autograd.grad(loss, problem.leaves)
    assert gradient[~mask].eq(0).all() and gradient[mask].ne(0).any(dim=1).all()
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(run_loss(problem, targets, loss_mask=weights)[0], loss)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("bad", [math.nan, INFINITY])
def test_row_of_weight_zero_never_reaches_the_gradients_whatever_it_holds(bad, softcap):
    results = []
    for value in (0.5, bad):
        problem = oracle.make_problem(4, 5, 11)
        with torch.no_grad():
            problem.hidden[1] = value
        weights = torch.tensor([1.0, 0.0, 1.0, 2.0])
        loss, _ = run_loss(problem, torch.zeros(4), loss_mask=weights, softcap=softcap)
        results.append((loss.detach(), *torch.autograd.grad(loss, problem.leaves)))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_weights_scale_rows_and_denominator_may_be_a_tensor():
    problem = oracle.make_problem(5, 4, 9)
    targets, weights = torch.randn(5), torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])
    loss, logprobs = run_loss(problem, targets, loss_mask=weights, denominator=torch.tensor(7.0))
    torch.testing.assert_close(loss, (weights * (targets - logprobs).square()).sum() / 7)
    torch.testing.assert_close(loss, run_loss(problem, targets, loss_mask=weights, denominator=7)[0])


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("alpha", [1.4, 0.5, -0.7, 1.0, 0.0])
def test_word_removed_under_either_head_is_left_out_of_the_target(alpha, softcap):
    better = oracle.make_problem(3, 5, 8, dtype=torch.float64)
    plain = oracle.make_problem(3, 5, 8, dtype=torch.float64, seed=1)
    with torch.no_grad():
        better.bias[2], plain.bias[6] = -INFINITY, -INFINITY
    token_ids = torch.tensor([0, 2, 6])
    targets, reference = contrastive_logprob(
        better.hidden,
        better.weight,
        plain.hidden,
        plain.weight,
        token_ids,
        alpha,
        bias_w=better.bias,
        bias_l=plain.bias,
        softcap=softcap,
        return_reference=True,
    )
    assert targets[1] == -INFINITY and targets[2] == -INFINITY
    kept = torch.tensor([0, 1, 3, 4, 5, 7])
    log_w, log_l = (oracle.log_softmax(head, softcap=softcap)[:, kept] for head in (better, plain))
    exact = (alpha * log_w + (1 - alpha) * log_l).log_softmax(dim=1)[0, 0]
    torch.testing.assert_close(targets[0], exact)
    # The plain model's own log-probability knows nothing of the other bias.
    torch.testing.assert_close(reference[1], oracle.log_softmax(plain, softcap=softcap)[1, 2])
    assert reference[2] == -INFINITY


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_removed_word_has_probability_zero_and_no_gradient(softcap):
    problem = oracle.make_problem(4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        problem.bias[3] = -INFINITY
    problem.token_ids.copy_(torch.tensor([0, 1, 2, 3]))
    logprobs, entropy = linear_logprob(
        problem.hidden,
        problem.weight,
        problem.token_ids,
        bias=problem.bias,
        softcap=softcap,
        return_entropy=True,
    )
    log_probs = oracle.log_softmax(problem, softcap=softcap)
    assert logprobs[3] == -INFINITY
    torch.testing.assert_close(entropy, oracle.entropy(log_probs, problem.token_ids))
    actual = torch.autograd.grad(logprobs[:3].sum() + entropy.sum(), problem.leaves)
    exact = log_probs[:3].gather(1, problem.token_ids[:3, None]).sum()
    kept = log_probs[:, [0, 1, 2, 4, 5, 6, 7]]
    exact = exact - (kept.exp() * kept).sum()
    for gradient, reference in zip(actual, torch.autograd.grad(exact, problem.leaves), strict=True):
        torch.testing.assert_close(gradient, reference)
    loss, _ = run_loss(problem, torch.randn(4, dtype=torch.float64), loss_mask=torch.arange(4) < 3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, problem.leaves))


def test_words_beyond_num_valid_vocab_have_no_probability_and_zero_gradient():
    problem = oracle.make_problem(6, 5, 12)
    problem.token_ids.clamp_(max=8)
    with torch.no_grad():
        problem.weight[9:], problem.bias[9:] = math.nan, math.nan
        problem.bias[9:] = 50.0
    loss, logprobs = run_loss(problem, torch.randn(6), num_valid_vocab=9)
    cut = linear_logprob(problem.hidden, problem.weight[:9], problem.token_ids, bias=problem.bias[:9])
    torch.testing.assert_close(logprobs, cut)
    hidden, weight, bias = torch.autograd.grad(loss, problem.leaves)
    assert weight[9:].eq(0).all() and bias[9:].eq(0).all() and hidden.isfinite().all()
    with pytest.raises(ValueError, match="token_ids"):
        run_loss(problem, torch.randn(6), num_valid_vocab=int(problem.token_ids.max()))


@pytest.mark.parametrize("num_rows", [0, 3])
def test_empty_or_all_ignored_input_gives_zero_loss_with_a_graph(num_rows):
    problem = oracle.make_problem(num_rows, 5, 7, ignored=tuple(range(num_rows)))
    loss, logprobs = run_loss(problem, torch.full((num_rows,), math.nan))
    assert loss.item() == 0 and logprobs.shape == (num_rows,)
    loss.backward()
    for leaf in problem.leaves:
        assert leaf.grad.shape == leaf.shape and leaf.grad.eq(0).all()
    logprobs, entropy = linear_logprob(
        problem.hidden, problem.weight, problem.token_ids, bias=problem.bias, return_entropy=True
    )
    for gradient in torch.autograd.grad(logprobs.sum() + entropy.sum(), problem.leaves):
        assert gradient.eq(0).all()
    heads = (problem.hidden, problem.weight, problem.hidden, problem.weight, problem.token_ids)
    assert contrastive_logprob_sweep(*heads, alphas=[1.0, 2.0]).tolist() == [[0.0] * num_rows] * 2


def test_second_backward_gives_equal_gradients_and_upstream_scales_them():
    problem = oracle.make_problem(6, 5, 12)
    targets = torch.randn(6)
    loss, _ = run_loss(problem, targets)
    logprobs = linear_logprob(problem.hidden, problem.weight, problem.token_ids, bias=problem.bias)
    for output in (loss, logprobs.sum()):
        first = torch.autograd.grad(output, problem.leaves, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(output, problem.leaves, retain_graph=True)
        scaled = torch.autograd.grad(output * -2, problem.leaves)
        for gradients in zip(kept, first, second, scaled, strict=True):
            assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
            torch.testing.assert_close(gradients[3], -2 * gradients[0])


def test_double_backward_raises():
    problem = oracle.make_problem(6, 5, 12)
    loss, _ = run_loss(problem, torch.randn(6))
    logprobs = linear_logprob(problem.hidden, problem.weight, problem.token_ids)
    for output in (loss, logprobs.square().sum()):
        (gradient,) = torch.autograd.grad(output, problem.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.square().sum().backward()


def test_any_upstream_gradient_reaches_linear_logprob():
    problem = oracle.make_problem(6, 5, 12, dtype=torch.float64)
    for reduce in (torch.sum, lambda x: (x * torch.arange(12.0)[::2]).sum(), lambda x: x[::2].exp().mean()):
        actual = reduce(linear_logprob(problem.hidden, problem.weight, problem.token_ids, bias=problem.bias))
        exact = reduce(oracle.pick(oracle.log_softmax(problem), problem.token_ids))
        for gradient, reference in zip(
            torch.autograd.grad(actual, problem.leaves),
            torch.autograd.grad(exact, problem.leaves),
            strict=True,
        ):
            torch.testing.assert_close(gradient, reference)


def test_gradients_that_nobody_needs_are_not_made(monkeypatch):
    made = []
    original = torch_loss.squared_log_ratio_forward

    def record(*tensors, needs, **keywords):
        outputs = original(*tensors, needs=needs, **keywords)
        made.append((needs, [gradient is not None for gradient in outputs[2:]]))
        return outputs

    monkeypatch.setattr(torch_loss, "squared_log_ratio_forward", record)
    problem = oracle.make_problem(4, 3, 5)
    targets = torch.randn(4)
    problem.weight.requires_grad_(False)
    loss, logprobs = run_loss(problem, targets)
    assert made.pop() == ((True, False, True), [True, False, True])
    assert not logprobs.requires_grad and loss.requires_grad
    with torch.no_grad():
        without_grad, _ = run_loss(problem, targets)
    assert made.pop() == ((False, False, False), [False, False, False])
    torch.testing.assert_close(without_grad, loss.detach())
    loss.backward()
    assert problem.weight.grad is None and problem.hidden.grad is not None


@pytest.mark.parametrize(("needs", "num_matmuls"), [((True, True, False), 3), ((False, False, False), 1)])
def test_without_grad_the_loss_costs_one_matmul(needs, num_matmuls):
    problem = oracle.make_problem(64, 32, 256, bias=False)
    # A custom operation hides its inside from the counter, so its implementation is called.
    with FlopCounterMode(display=False) as counter:
        squared_log_ratio_forward(
            problem.hidden.detach(),
            problem.weight.detach(),
            None,
            problem.token_ids,
            torch.zeros(64),
            torch.ones(64),
            torch.ones(()),
            softcap=None,
            temperature=1.0,
            num_valid_vocab=256,
            needs=needs,
            workspace_bytes=20_000,
        )
    assert counter.get_total_flops() == num_matmuls * 2 * 64 * 32 * 256


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_bytes", [None, 3000])
def test_weight_is_read_in_hiddens_dtype_and_gradients_keep_their_own(
    hidden_dtype, weight_dtype, workspace_bytes
):
    problem = oracle.make_problem(40, 8, 23)
    hidden = problem.hidden.detach().to(hidden_dtype).requires_grad_()
    weight, bias = (t.detach().to(weight_dtype).requires_grad_() for t in (problem.weight, problem.bias))
    read = oracle.Problem(hidden, weight.to(hidden_dtype), bias.to(hidden_dtype), problem.token_ids)
    truth = read.to(torch.float64)
    exact = oracle.pick(oracle.log_softmax(truth), truth.token_ids)
    targets = torch.randn(40)
    loss, logprobs = squared_log_ratio_loss(
        hidden, weight, problem.token_ids, targets, denominator=1, bias=bias, workspace_bytes=workspace_bytes
    )
    torch.testing.assert_close(logprobs.double(), exact.detach(), rtol=0, atol=1e-5)
    expected = torch.autograd.grad((exact - targets).square().sum(), truth.leaves)
    for gradients in (
        torch.autograd.grad(loss, (hidden, weight, bias)),
        torch.autograd.grad(
            (linear_logprob(hidden, weight, problem.token_ids, bias=bias) - targets).square().sum(),
            (hidden, weight, bias),
        ),
    ):
        for leaf, gradient, reference in zip((hidden, weight, bias), gradients, expected, strict=True):
            assert gradient.dtype == leaf.dtype
            assert oracle.relative_error(gradient, reference) <= 6e-3


def test_autocast_does_not_touch_the_fp32_logits():
    problem = oracle.make_problem(12, 64, 50)
    hidden = problem.hidden.detach().bfloat16()
    plain = linear_logprob(hidden, problem.weight, problem.token_ids)
    full = linear_logprob(problem.hidden, problem.weight, problem.token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logprob(hidden, problem.weight, problem.token_ids), plain)
        assert torch.equal(linear_logprob(problem.hidden, problem.weight, problem.token_ids), full)
        loss, _ = run_loss(problem, torch.randn(12))
        gradients = torch.autograd.grad(loss, problem.leaves)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)


def test_backends_run_with_autocast_off(monkeypatch):
    modes = []

    def record(*tensors, **keywords):
        modes.append(torch.is_autocast_enabled("cpu"))
        return squared_log_ratio_forward(*tensors, **keywords)

    monkeypatch.setattr(torch_loss, "squared_log_ratio_forward", record)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run_loss(oracle.make_problem(3, 4, 5), torch.zeros(3))
    assert modes == [False]


def test_float64_stays_float64_and_everything_else_is_fp32():
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        problem = oracle.make_problem(3, 4, 5, dtype=dtype)
        loss, logprobs = run_loss(problem, torch.zeros(3))
        heads = (problem.hidden, problem.weight) * 2
        outputs = contrastive_logprob(*heads, problem.token_ids, 1.4, return_reference=True)
        for output in (loss, logprobs, *outputs):
            assert output.dtype == expected and (output is loss or not output.requires_grad)


def test_half_precision_gradients_survive_a_large_denominator_until_the_loss_scale():
    problem = oracle.make_problem(8, 4, 16, dtype=torch.float16)
    targets = torch.randn(8)
    small = torch.autograd.grad(run_loss(problem, targets, denominator=1e7)[0] * 1e7, problem.leaves)
    exact = torch.autograd.grad(run_loss(problem, targets, denominator=1.0)[0], problem.leaves)
    for gradient, reference in zip(small, exact, strict=True):
        assert oracle.relative_error(gradient, reference) <= 1e-3


def test_workspace_below_one_row_block_is_raised_and_changes_nothing():
    problem = oracle.make_problem(50, 8, 40)
    targets = torch.randn(50)
    small, logprobs = run_loss(problem, targets, workspace_bytes=1)
    large, expected = run_loss(problem, targets, workspace_bytes=2**30)
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(logprobs, expected)


def test_two_heads_that_start_at_the_same_word_are_not_taken_for_one():
    both, hidden, token_ids = torch.randn(12, 4), torch.randn(3, 4), torch.arange(3)
    targets = [
        contrastive_logprob(hidden, both[:6], hidden, plain, token_ids, 1.4)
        for plain in (both[::2], both[::2].clone())
    ]
    assert torch.equal(*targets)


def test_non_contiguous_and_sliced_inputs_give_the_same_values():
    problem = oracle.make_problem(7, 6, 13)
    targets = torch.randn(7)
    expected, _ = run_loss(problem, targets)
    gradients = torch.autograd.grad(expected, problem.leaves)
    wide = torch.randn(14, 12)
    wide[::2, ::2] = problem.hidden.detach()
    strided = oracle.Problem(
        wide.requires_grad_()[::2, ::2],
        problem.weight.detach().t().contiguous().t().requires_grad_(),
        problem.bias,
        problem.token_ids.repeat_interleave(2)[::2],
    )
    loss, _ = run_loss(strided, torch.stack([targets, targets], dim=1)[:, 0])
    torch.testing.assert_close(loss, expected)
    wide_gradient, weight_gradient = torch.autograd.grad(loss, (wide, strided.weight))
    torch.testing.assert_close(wide_gradient[::2, ::2], gradients[0])
    torch.testing.assert_close(weight_gradient, gradients[1])
