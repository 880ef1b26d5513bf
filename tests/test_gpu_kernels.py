"""The four operations compiled on a GPU, in bf16 against float64: gradients, chunks, memory and repeatability."""

import pytest
import torch
from inverseq_kernels import (
    IGNORE_INDEX,
    contrastive_logprob,
    contrastive_logprob_sweep,
    linear_logprob,
    squared_log_ratio_loss,
)

pytestmark = pytest.mark.gpu

# Rows, words and hidden size: aligned, a hidden size that is no multiple of the block, and unaligned.
SHAPES = [(700, 5000, 256), (300, 1030, 80), (130, 515, 33)]
LOGPROB_RMS = 1e-4


def make_inputs(num_rows, num_words, dim):
    generator = torch.Generator().manual_seed(num_rows)
    hidden, plain = (torch.randn(num_rows, dim, generator=generator) for _ in range(2))
    weight = torch.randn(num_words, dim, generator=generator) * 3 / dim**0.5
    ids = torch.randint(0, num_words - 10, (num_rows,), generator=generator)
    ids[::17] = IGNORE_INDEX
    targets = -8 * torch.rand(num_rows, generator=generator)
    bias = torch.randn(num_words, generator=generator)
    half = [tensor.to("cuda", torch.bfloat16) for tensor in (hidden, plain, weight, bias)]
    return *half, ids.cuda(), targets.cuda()


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


def gradients(function, leaves, dtype):
    """Outputs and gradients of a function of fresh leaves in ``dtype``."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    scalar, logprobs = function(*leaves)
    return logprobs.detach(), torch.autograd.grad(scalar, leaves)


def eager_logprobs(hidden, weight, bias, ids, valid, softcap):
    logits_AV = torch.nn.functional.linear(hidden, weight, bias)[:, :valid]
    if softcap is not None:
        logits_AV = softcap * torch.tanh(logits_AV / softcap)
    logprobs = logits_AV.log_softmax(1).gather(1, ids.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(ids == IGNORE_INDEX, 0.0, logprobs)


def check_gradients(function, eager_function, leaves):
    """Log-probs within the limit; every gradient at most twice as far off as eager PyTorch in bf16."""
    logprobs, ours = gradients(function, leaves, torch.bfloat16)
    truth_logprobs, truth = gradients(eager_function, leaves, torch.float64)
    _, eager = gradients(eager_function, leaves, torch.bfloat16)
    assert (logprobs.double() - truth_logprobs).square().mean().sqrt() <= LOGPROB_RMS
    for actual, reference, expected in zip(ours, eager, truth, strict=True):
        assert relative_error(actual, expected) <= 2 * relative_error(reference, expected) + 1e-4


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_its_gradients_match_float64(shape, softcap):
    hidden, _, weight, bias, ids, targets = make_inputs(*shape)
    valid = shape[1] - 7

    def ours(hidden, weight, bias):
        return squared_log_ratio_loss(
            hidden, weight, ids, targets, bias=bias, denominator=50.0, softcap=softcap, num_valid_vocab=valid,
            workspace_bytes=2**20, backend="triton",
        )  # fmt: skip

    def eager(hidden, weight, bias):
        logprobs = eager_logprobs(hidden, weight, bias, ids, valid, softcap)
        active = ids != IGNORE_INDEX
        return torch.where(active, targets - logprobs, 0.0).square().sum() / 50.0, logprobs

    check_gradients(ours, eager, (hidden, weight, bias))


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprobs_and_their_gradients_match_float64(shape, softcap):
    hidden, _, weight, bias, ids, upstream = make_inputs(*shape)
    valid = shape[1] - 7

    def ours(hidden, weight, bias):
        logprobs = linear_logprob(
            hidden, weight, ids, bias=bias, softcap=softcap, num_valid_vocab=valid, workspace_bytes=2**20,
            backend="triton",
        )  # fmt: skip
        return (logprobs * upstream).sum(), logprobs

    def eager(hidden, weight, bias):
        logprobs = eager_logprobs(hidden, weight, bias, ids, valid, softcap)
        return (logprobs * upstream).sum(), logprobs

    check_gradients(ours, eager, (hidden, weight, bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.4])
def test_contrastive_targets_match_float64(shape, alpha):
    hidden, plain, weight, bias, ids, _ = make_inputs(*shape)
    inputs = (hidden, weight, plain, weight, ids)
    targets, reference = contrastive_logprob(
        *inputs, alpha, bias_w=bias, bias_l=bias, return_reference=True, backend="triton"
    )
    sweep = contrastive_logprob_sweep(*inputs, alphas=[alpha, 0.5], bias_w=bias, bias_l=bias, backend="triton")
    truth, truth_reference = contrastive_logprob(
        hidden.double(), weight.double(), plain.double(), weight.double(), ids, alpha,
        bias_w=bias.double(), bias_l=bias.double(), return_reference=True, backend="torch",
    )  # fmt: skip
    for actual, expected in ((targets, truth), (reference, truth_reference), (sweep[0], truth)):
        assert (actual.double() - expected).square().mean().sqrt() <= LOGPROB_RMS


def test_two_calls_give_the_same_bits():
    hidden, _, weight, bias, ids, targets = make_inputs(*SHAPES[0])

    def ours(hidden, weight, bias):
        return squared_log_ratio_loss(
            hidden, weight, ids, targets, bias=bias, denominator=50.0, workspace_bytes=2**21, backend="triton"
        )

    first, second = (gradients(ours, (hidden, weight, bias), torch.bfloat16) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("num_rows", [2048, 8192])
def test_memory_of_the_loss_is_bounded_by_the_workspace(num_rows):
    hidden, _, weight, _, ids, targets = make_inputs(num_rows, 32_000, 512)
    hidden.requires_grad_()
    weight.requires_grad_()
    workspace = 64 * 2**20
    arguments = {"denominator": 9.0, "workspace_bytes": workspace, "backend": "triton"}
    squared_log_ratio_loss(hidden, weight, ids, targets, **arguments)[0].backward()  # cuBLAS takes its own workspace
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = squared_log_ratio_loss(hidden, weight, ids, targets, **arguments)
    peak = torch.cuda.max_memory_allocated() - before
    outputs = 2 * (hidden.numel() + weight.numel()) + 4 * weight.numel()  # gradients and the fp32 accumulator
    assert peak <= outputs + 1.05 * workspace
    assert loss.isfinite()
