"""What callers build on, for every operation: memory, repeatability, large vocabularies, compilation, value checks.

Each test has the same body on both devices: large and compiled on a GPU, small and in triton's interpreter on a CPU.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from inverseq_kernels import (
    IGNORE_INDEX,
    contrastive_logprob,
    contrastive_logprob_sweep,
    linear_logprob,
    squared_log_ratio_loss,
)
from torch import Tensor

from tests.test_kernels_memory import peak_and_kept_bytes

pytest.importorskip("triton")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
LOGPROB_RMS = 1e-4


@dataclass
class Inputs:
    """Two heads and their rows; ``options`` go to every operation."""

    hidden: Tensor  # [A, D]
    plain: Tensor  # [A, D]
    weight: Tensor  # [V, D]
    other: Tensor  # [V, D] of the plain head
    token_ids: Tensor  # [A]
    targets: Tensor  # [A] fp32
    options: dict

    @property
    def heads(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.plain, self.other, self.token_ids


def make_inputs(num_rows, num_words, dim, device, **options) -> Inputs:
    generator = torch.Generator().manual_seed(num_words)
    hidden, plain = (torch.randn(num_rows, dim, generator=generator).bfloat16() for _ in range(2))
    weight, other = ((torch.randn(num_words, dim, generator=generator) * 3 / dim**0.5).bfloat16() for _ in range(2))
    token_ids = torch.randint(0, num_words, (num_rows,), generator=generator)
    token_ids[1::17] = IGNORE_INDEX
    targets = -8 * torch.rand(num_rows, generator=generator)
    moved = [tensor.to(device) for tensor in (hidden, plain, weight, other, token_ids, targets)]
    moved[0].requires_grad_()
    moved[2].requires_grad_()
    return Inputs(*moved, options)


# Each takes what may be made before it is measured, and returns the call to measure.
def contrast(inputs):
    return lambda: contrastive_logprob(*inputs.heads, 1.4, return_reference=True, **inputs.options)


def sweep(inputs):
    return lambda: (contrastive_logprob_sweep(*inputs.heads, alphas=[0.0, 1.0, 1.4], **inputs.options),)


def logprob(inputs):
    return lambda: (linear_logprob(inputs.hidden, inputs.weight, inputs.token_ids, **inputs.options),)


def entropy(inputs):
    return lambda: linear_logprob(
        inputs.hidden, inputs.weight, inputs.token_ids, return_entropy=True, **inputs.options
    )


def logprob_gradients(inputs):
    [logprobs] = logprob(inputs)()
    return lambda: torch.autograd.grad(logprobs, (inputs.hidden, inputs.weight), inputs.targets, retain_graph=True)


def entropy_gradients(inputs):
    logprobs, entropies = entropy(inputs)()
    total = (logprobs * inputs.targets + entropies).sum()
    return lambda: torch.autograd.grad(total, (inputs.hidden, inputs.weight), retain_graph=True)


def loss(inputs):
    return lambda: squared_log_ratio_loss(
        inputs.hidden, inputs.weight, inputs.token_ids, inputs.targets, denominator=9.0, **inputs.options
    )


def loss_gradients(inputs):
    value, _ = loss(inputs)()
    return lambda: torch.autograd.grad(value, (inputs.hidden, inputs.weight), retain_graph=True)


CALLS = [contrast, sweep, logprob, entropy, logprob_gradients, entropy_gradients, loss, loss_gradients]
on_every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


def peak_bytes(run, device) -> int:
    """Most bytes that the call had allocated beyond what was there before it."""
    if device == "cpu":
        return peak_and_kept_bytes(run)[0]
    run()  # libraries take workspaces of their own once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


# Rows, words, width, workspace. The interpreter copies what a launch is given, so a CPU measures the other backend.
SIZES = {
    "cpu": [(128, 2048, 16, 2**19), (512, 2048, 16, 2**19)],
    "cuda": [(2048, 32_000, 512, 2**26), (8192, 32_000, 512, 2**26)],
}


@on_each_device
@on_every_call
@pytest.mark.parametrize("size", [0, 1], ids=["few rows", "many rows"])
def test_memory_is_bounded_by_workspace_outputs_and_accumulator(call, size, device):
    num_rows, num_words, dim, workspace = SIZES[device][size]
    backend = "torch" if device == "cpu" else "triton"
    inputs = make_inputs(num_rows, num_words, dim, device, backend=backend, workspace_bytes=workspace)
    outputs = 8 * 4 * num_rows  # vectors, upstream gradients among them
    if call in (loss, loss_gradients, logprob_gradients, entropy_gradients):
        accumulator = 0 if call is loss_gradients else 4 * inputs.weight.numel()
        outputs += inputs.hidden.nbytes + inputs.weight.nbytes + accumulator
    assert peak_bytes(call(inputs), device) <= outputs + 1.05 * workspace


@on_each_device
@on_every_call
def test_two_calls_give_the_same_bits(call, device):
    size = (70, 300, 32) if device == "cpu" else (700, 5000, 256)
    inputs = make_inputs(*size, device, backend="triton", workspace_bytes=2**14 if device == "cpu" else 2**21)
    first, second = call(inputs)(), call(inputs)()
    assert len(first) > 0 and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@on_each_device
def test_two_heads_with_the_vocabulary_of_llama_3_agree_with_a_cpu(device):
    """Values and gradients against the torch backend in float64 on the CPU; V = 128,256 where kernels are compiled."""
    size = (3, 2006, 16) if device == "cpu" else (300, 128_256, 256)
    valid = size[1] - 6
    inputs = make_inputs(*size, device, backend="triton", num_valid_vocab=valid)
    exact = make_inputs(*size, "cpu", backend="torch", num_valid_vocab=valid)
    for one in (inputs, exact):
        one.token_ids.clamp_(max=valid - 1)
    for name in ("hidden", "plain", "weight", "other"):
        tensor = getattr(exact, name)
        setattr(exact, name, tensor.detach().double().requires_grad_(tensor.requires_grad))
    for call in (contrast, sweep, entropy):
        for actual, expected in zip(call(inputs)(), call(exact)(), strict=True):
            difference = actual.detach().double().cpu() - expected.detach()
            assert difference.square().mean().sqrt() <= LOGPROB_RMS
    for call in (loss_gradients, entropy_gradients):
        for actual, expected in zip(call(inputs)(), call(exact)(), strict=True):
            # The matrix of logit gradients and the result are rounded to bf16 once each.
            assert (actual.double().cpu() - expected).norm() <= 6e-3 * expected.norm()


@on_each_device
@pytest.mark.parametrize("call", [contrast, sweep, entropy], ids=lambda call: call.__name__)
def test_one_row_alone_has_the_values_that_it_has_among_others(call, device):
    """On stored logits, where torch may take another way through cuBLAS to add a product of a single row."""
    inputs = make_inputs(5, 515, 33, device, backend="triton")
    rows = {name: getattr(inputs, name).detach()[2:3].clone() for name in ("hidden", "plain", "token_ids", "targets")}
    for one, all_rows in zip(call(replace(inputs, **rows))(), call(inputs)(), strict=True):
        torch.testing.assert_close(one, all_rows[..., 2:3], rtol=0, atol=1e-4)


@on_each_device
def test_a_compiled_caller_has_no_graph_break_and_the_same_results(device):
    inputs = make_inputs(*((9, 130, 16) if device == "cpu" else (300, 1030, 80)), device, backend="triton")

    def step(hidden, weight, plain, other, token_ids):
        targets = contrastive_logprob(hidden, weight, plain, other, token_ids, 1.4, **inputs.options)
        value, logprobs = squared_log_ratio_loss(
            hidden * 2, weight, token_ids, targets - 1, denominator=9.0, **inputs.options
        )
        return value + linear_logprob(hidden, weight, token_ids, **inputs.options).sum(), logprobs

    def run(function):
        value, logprobs = function(*inputs.heads)
        return [value.detach(), logprobs, *torch.autograd.grad(value, (inputs.hidden, inputs.weight))]

    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = run(torch.compile(step, fullgraph=True, backend=backend))
    for actual, expected in zip(compiled, run(step), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@on_each_device
def test_values_are_checked_where_asked_for(device, monkeypatch):
    inputs = make_inputs(9, 130, 16, device, backend="triton")
    monkeypatch.setenv("INVERSEQ_CHECK", "1")
    loss(inputs)()
    inputs.token_ids[4] = 130
    for call in (contrast, sweep, logprob, entropy, loss):
        with pytest.raises(ValueError, match=r"token_ids\[4\] is 130"):
            call(inputs)()


@on_each_device
@pytest.mark.parametrize(("scale", "size"), [(2.0**20, 2.0**-10), (2.0**-30, 2.0**14)], ids=["loss scale", "mean"])
@pytest.mark.parametrize("dim", [32, 33], ids=["tiles", "logits"])
def test_an_upstream_gradient_beyond_fp16_reaches_a_gradient_within_it(scale, size, dim, device):
    inputs = make_inputs(40, 300, dim, device, backend="triton")
    hidden = inputs.hidden.detach().half().requires_grad_()
    logprobs = linear_logprob(hidden, (inputs.weight.detach() * size).half(), inputs.token_ids, **inputs.options)
    one, scaled = (
        torch.autograd.grad(logprobs.sum() * factor, hidden, retain_graph=True)[0].double() for factor in (1.0, scale)
    )
    torch.testing.assert_close(scaled, one * scale, rtol=1e-2, atol=2.0**-24)
    assert scaled.any()


@pytest.mark.gpu
def test_a_captured_graph_replays_loss_and_gradients_on_new_inputs():
    inputs = make_inputs(700, 5000, 256, "cuda", backend="triton", workspace_bytes=2**21)
    changed = make_inputs(700, 5000, 256, "cuda", backend="triton", workspace_bytes=2**21)
    with torch.no_grad():
        changed.hidden.mul_(-0.5)

    def step(one):
        value, logprobs = loss(one)()
        return [logprobs, *torch.autograd.grad(value, (one.hidden, one.weight))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    with torch.no_grad():
        inputs.hidden.copy_(changed.hidden)
    graph.replay()
    for actual, expected in zip(captured, step(changed), strict=True):
        assert torch.equal(actual, expected)
