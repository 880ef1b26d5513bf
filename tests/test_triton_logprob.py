"""Log-probs, entropy and gradients in Triton against float64 on the same rounded inputs; outputs start as NaN.

Every promise holds for both structures: tiles, and stored logits.
"""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from inverseq_kernels import IGNORE_INDEX, linear_logprob
from inverseq_kernels.triton_blocks import (
    GRADIENT,
    GRADIENT_RICH,
    LOGITS,
    STATISTICS,
    TILES,
    Blocks,
    choose_blocks,
    choose_logit_blocks,
)
from inverseq_kernels.triton_logprob import logprob_backward, logprob_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Tiles multiply half precision only.
KINDS = [(LOGITS, FP32), (TILES, FP16), (LOGITS, FP16), (TILES, BF16), (LOGITS, BF16)]
every_kind = pytest.mark.parametrize(("structure", "dtype"), KINDS, ids=str)
both_structures = pytest.mark.parametrize(("structure", "dtype"), [(TILES, BF16), (LOGITS, FP32)], ids=str)
FLOOR = 2e-5  # nats, logits of a few nats summed in fp32
# Relative Frobenius error of a gradient beyond twice that of same-dtype PyTorch.
GRADIENT_FLOOR = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}
SMALL = Blocks(16, 32, 16, num_warps=4, num_stages=1)
WIDE = Blocks(16, 8192, 16, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def nan_poison(monkeypatch):
    """Every new floating tensor starts as NaN, so that a value that nothing wrote shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(result):
        return result.fill_(math.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def make_inputs(num_rows, num_words, dim, dtype=FP32, structure=LOGITS, bias=True, seed=0):
    """hidden, weight, bias, token_ids with logits of a few nats; tiles get a width that they can load."""
    dim = -(-dim // 16) * 16 if structure == TILES else dim
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, dim, generator=generator)
    weight = torch.randn(num_words, dim, generator=generator) * (2 / math.sqrt(dim))
    offsets = torch.randn(num_words, generator=generator) if bias else None
    token_ids = torch.randint(0, num_words, (num_rows,), generator=generator)
    return [None if t is None else t.to(DEVICE, dtype) for t in (hidden, weight, offsets)] + [token_ids.to(DEVICE)]


def plain(inputs, dtype, softcap=None, temperature=1.0, num_valid_vocab=None):
    """Leaves, log-probs [A] and entropy [A] with full logits in ``dtype``, differentiable."""
    leaves = [None if t is None else t.detach().cpu().to(dtype).requires_grad_() for t in inputs[:3]]
    hidden, weight, bias = leaves
    token_ids = inputs[3].cpu()
    valid = num_valid_vocab or weight.shape[0]
    ignored = token_ids == IGNORE_INDEX
    z = hidden.masked_fill(ignored[:, None], 0.0) @ weight[:valid].t()
    dead = torch.zeros(valid, dtype=torch.bool)
    if bias is not None:
        dead = bias[:valid].isneginf()
        z = z + bias[:valid].masked_fill(dead, 0.0)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_probs = (z / temperature).masked_fill(dead, -math.inf).log_softmax(1)
    picked = log_probs.gather(1, token_ids.clamp(min=0)[:, None])[:, 0].masked_fill(ignored, 0.0)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(1).masked_fill(ignored, 0.0)
    return leaves, picked, entropy


def forward(inputs, structure, *, want_entropy=True, blocks=SMALL, workspace_bytes=1 << 20, **settings):
    settings = {"softcap": None, "temperature": 1.0, "num_valid_vocab": inputs[1].shape[0], **settings}
    return logprob_forward(
        *inputs,
        want_entropy=want_entropy,
        workspace_bytes=workspace_bytes,
        structure=structure,
        blocks=blocks,
        **settings,
    )


def upstream(num_rows, seed=3):
    return torch.randn(2, num_rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def backward(inputs, structure, grads, needs=(True, True, True), blocks=SMALL, workspace_bytes=1 << 20, **settings):
    settings = {"softcap": None, "temperature": 1.0, "num_valid_vocab": inputs[1].shape[0], **settings}
    _, lse, entropy = forward(inputs, structure, blocks=blocks, **settings)
    gradients = logprob_backward(
        grads[0],
        grads[1],
        *inputs,
        lse,
        entropy,
        needs=needs,
        workspace_bytes=workspace_bytes,
        structure=structure,
        blocks=blocks,
        **settings,
    )
    return [g if g is None else g.to(like.dtype) for g, like in zip(gradients, inputs[:3], strict=True)]


def check(inputs, structure, *, with_entropy=True, blocks=SMALL, workspace_bytes=1 << 20, floor=FLOOR, **settings):
    """Forward and all gradients against float64, allowed twice the error of same-dtype PyTorch plus a floor."""
    leaves, true_logprobs, true_entropy = plain(inputs, torch.float64, **settings)
    logprobs, _, entropy = forward(
        inputs, structure, want_entropy=with_entropy, blocks=blocks, workspace_bytes=workspace_bytes, **settings
    )
    torch.testing.assert_close(logprobs.cpu().double(), true_logprobs.detach(), rtol=1e-6, atol=floor)
    if with_entropy:
        torch.testing.assert_close(entropy.cpu().double(), true_entropy.detach(), rtol=1e-6, atol=floor)
    grads = upstream(len(logprobs))
    dtype = inputs[0].dtype
    half_leaves, half_logprobs, half_entropy = plain(inputs, dtype, **settings)
    for dt, outputs in ((torch.float64, (true_logprobs, true_entropy)), (dtype, (half_logprobs, half_entropy))):
        loss = (outputs[0] * grads[0].cpu().to(dt)).sum()
        (loss + (outputs[1] * grads[1].cpu().to(dt)).sum() if with_entropy else loss).backward()
    results = backward(
        inputs,
        structure,
        (grads[0], grads[1] if with_entropy else None),
        blocks=blocks,
        workspace_bytes=workspace_bytes,
        **settings,
    )
    for name, result, leaf, half in zip(("hidden", "weight", "bias"), results, leaves, half_leaves, strict=True):
        if leaf is None:
            assert result is None
            continue
        norm = leaf.grad.norm() + 1e-30
        allowed = 2 * (half.grad.double() - leaf.grad).norm() / norm + GRADIENT_FLOOR[dtype]
        assert result.dtype == dtype
        assert (result.cpu().double() - leaf.grad).norm() / norm <= allowed or leaf.grad.norm() < 1e-7, name


@every_kind
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 2, 16), (19, 70, 23), (32, 64, 32)])
@pytest.mark.parametrize(("softcap", "with_entropy"), [(None, False), (None, True), (3.0, True)])
def test_values_and_gradients_match_float64(structure, dtype, shape, softcap, with_entropy):
    inputs = make_inputs(*shape, dtype=dtype, structure=structure)
    check(inputs, structure, with_entropy=with_entropy, softcap=softcap, temperature=1.3)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(("capability", "op"), [(80, STATISTICS), (90, GRADIENT), (90, GRADIENT_RICH)])
def test_values_and_gradients_match_float64_with_the_tiles_of_a_gpu(dtype, capability, op):
    inputs = make_inputs(130, 260, 48, dtype=dtype, bias=False)
    check(inputs, TILES, with_entropy=op == GRADIENT_RICH, blocks=choose_blocks(op, capability))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_values_and_gradients_match_float64_with_the_rows_of_a_gpu(dtype):
    """One row a program, and a last segment that ends at the pitch."""
    check(make_inputs(5, 4100, 24, dtype=dtype), LOGITS, blocks=choose_logit_blocks(90))


@both_structures
@pytest.mark.parametrize("num_words", [50257, 128256])
def test_large_vocabularies_with_padding(structure, dtype, num_words):
    inputs = make_inputs(3, num_words + 44, 8, dtype, structure)
    inputs[3].clamp_(max=num_words - 1)
    inputs[3][0] = num_words - 1
    check(inputs, structure, num_valid_vocab=num_words, blocks=WIDE)


@both_structures
def test_statistics_of_many_tiles_are_rescaled_when_a_later_tile_holds_the_maximum(structure, dtype):
    inputs = make_inputs(4, 600, 8, dtype, structure)
    inputs[2] += torch.linspace(0, 6, 600, device=DEVICE).to(dtype)
    check(inputs, structure, blocks=Blocks(16, 16, 16, num_warps=4, num_stages=1))


@both_structures
def test_words_past_the_valid_ones_may_hold_anything_and_get_no_gradient(structure, dtype):
    inputs = make_inputs(9, 70, 16, dtype)
    inputs[3].clamp_(max=49)
    inputs[1][50:] = inputs[2][50:] = math.nan
    clean = [inputs[0], inputs[1].nan_to_num(), inputs[2].nan_to_num(), inputs[3]]
    check(clean, structure, num_valid_vocab=50)
    grads = upstream(9)
    _, weight, bias = backward(inputs, structure, grads, num_valid_vocab=50)
    assert (weight[50:] == 0).all() and (bias[50:] == 0).all()
    for dirty, wanted in zip((weight, bias), backward(clean, structure, grads, num_valid_vocab=50)[1:], strict=True):
        assert torch.equal(dirty, wanted)


@both_structures
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_words_removed_by_the_bias_have_no_probability(structure, dtype, softcap):
    inputs = make_inputs(8, 40, 16, dtype)
    removed = [0, *range(32, 40)]  # all words of the last tile too
    inputs[2][removed] = -math.inf
    inputs[3].fill_(7)
    check(inputs, structure, softcap=softcap)
    _, weight, bias = backward(inputs, structure, upstream(8), softcap=softcap)
    assert (weight[removed] == 0).all() and (bias[removed] == 0).all()
    inputs[3][0] = 33
    logprobs, lse, entropy = forward(inputs, structure, softcap=softcap)
    assert logprobs[0] == -math.inf and lse.isfinite().all() and entropy.isfinite().all()


@pytest.mark.parametrize("structure", [TILES, LOGITS])
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 20])
def test_ignored_rows_give_zero_and_spread_nothing(structure, workspace_bytes):
    inputs = make_inputs(21, 40, 16, dtype=BF16)
    inputs[3][[0, 7, 20]] = IGNORE_INDEX
    check(inputs, structure, workspace_bytes=workspace_bytes)
    grads = upstream(21)
    clean = backward(inputs, structure, grads, workspace_bytes=workspace_bytes)
    inputs[0][[0, 7]] = math.nan
    logprobs, _, entropy = forward(inputs, structure, workspace_bytes=workspace_bytes)
    assert (logprobs[[0, 7, 20]] == 0).all() and (entropy[[0, 7, 20]] == 0).all()
    for dirty, wanted in zip(backward(inputs, structure, grads, workspace_bytes=workspace_bytes), clean, strict=True):
        assert torch.equal(dirty, wanted)
    assert (clean[0][[0, 7, 20]] == 0).all()


@pytest.mark.parametrize("structure", [TILES, LOGITS])
@pytest.mark.parametrize("num_rows", [0, 5])
def test_empty_and_all_ignored_input_give_zero_gradients(structure, num_rows):
    inputs = make_inputs(num_rows, 40, 16, dtype=FP16)
    inputs[3].fill_(IGNORE_INDEX)
    logprobs, _, entropy = forward(inputs, structure)
    assert logprobs.shape == entropy.shape == (num_rows,) and (logprobs == 0).all() and (entropy == 0).all()
    for result, like in zip(backward(inputs, structure, upstream(num_rows)), inputs, strict=False):
        assert result.shape == like.shape and (result == 0).all()


@both_structures
def test_many_chunks_match_float64_and_repeat_bit_for_bit(structure, dtype):
    inputs = make_inputs(70, 40, 16, dtype=dtype)
    check(inputs, structure, workspace_bytes=1)
    grads = upstream(70)
    for one, other in zip(
        backward(inputs, structure, grads, workspace_bytes=1), backward(inputs, structure, grads), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3)
    for one, other in zip(forward(inputs, structure, workspace_bytes=1), forward(inputs, structure), strict=True):
        assert torch.equal(one, other)
    first, second = (backward(inputs, structure, grads, workspace_bytes=1) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@both_structures
def test_gradients_nobody_needs_are_not_made(structure, dtype):
    inputs = make_inputs(6, 40, 16, dtype)
    everything = backward(inputs, structure, upstream(6))
    for index in range(3):
        needs = tuple(position == index for position in range(3))
        some = backward(inputs, structure, upstream(6), needs=needs)
        assert [result is not None for result in some] == list(needs)
        assert torch.equal(some[index], everything[index])


@pytest.mark.parametrize("structure", [TILES, LOGITS])
def test_peaked_rows_keep_the_gradient_of_the_true_word(structure):
    # p = 0.9995: softmax rounded to bf16 would be 1 and its gradient 0.
    inputs = make_inputs(4, 33, 16, dtype=BF16, bias=False)
    inputs[0].fill_(1.0)
    inputs[1].zero_()
    inputs[1][5] = 0.6875
    inputs[3].fill_(5)
    check(inputs, structure, with_entropy=False)
    grads = torch.ones(2, 4, device=DEVICE)
    _, weight, _ = backward(inputs, structure, (grads[0], None))
    probability = math.exp(11.0) / (math.exp(11.0) + 32)
    assert weight[5, 0].item() == pytest.approx(4 * (1 - probability), rel=0.01)


@both_structures
def test_a_common_offset_cancels(structure, dtype):
    inputs = make_inputs(8, 70, 16, dtype)
    inputs[2] += 3000.0
    logprobs, _, entropy = forward(inputs, structure)
    _, true_logprobs, true_entropy = plain(inputs, torch.float64)
    torch.testing.assert_close(logprobs.cpu().double(), true_logprobs.detach(), rtol=0, atol=1e-3)
    torch.testing.assert_close(entropy.cpu().double(), true_entropy.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("structure", [TILES, LOGITS])
def test_tiny_upstream_gradients_survive_fp16(structure):
    inputs = make_inputs(8, 70, 16, dtype=FP16)
    grads = upstream(8)
    small = backward([t.float() if t.is_floating_point() else t for t in inputs], LOGITS, grads * 2.0**-14)
    for result, unscaled in zip(backward(inputs, structure, grads * 2.0**-14), small, strict=True):
        torch.testing.assert_close(result.float(), unscaled, rtol=2e-2, atol=1e-6)


def test_tma_descriptors_give_the_same_numbers():
    inputs = make_inputs(40, 100, 48, dtype=BF16)
    check(inputs, TILES, blocks=Blocks(16, 32, 32, num_warps=4, num_stages=1, tma=True))


def test_the_public_operation_takes_sliced_inputs_and_differentiates():
    wide = make_inputs(30, 80, 40, dtype=BF16)
    inputs = [wide[0][::2, 3:20], wide[1][:, 3:20], wide[2], wide[3][::2]]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    logprobs, entropy = linear_logprob(
        leaves[0], leaves[1], inputs[3], bias=leaves[2], return_entropy=True, backend="triton"
    )
    grads = upstream(15)
    (logprobs * grads[0] + entropy * grads[1]).sum().backward()
    true_leaves, true_logprobs, true_entropy = plain(inputs, torch.float64)
    torch.testing.assert_close(logprobs.detach().cpu().double(), true_logprobs.detach(), rtol=1e-6, atol=FLOOR)
    (true_logprobs * grads[0].cpu() + true_entropy * grads[1].cpu()).sum().backward()
    for leaf, true in zip(leaves, true_leaves, strict=True):
        assert (leaf.grad.cpu().double() - true.grad).norm() <= 8e-3 * true.grad.norm()


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    shape=st.tuples(st.integers(1, 34), st.integers(1, 70), st.integers(1, 34)),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    with_entropy=st.booleans(),
    cut=st.integers(0, 3),
)
def test_any_shape(shape, kind, bias, with_entropy, cut):
    num_valid, (structure, dtype) = max(shape[1] - cut, 1), kind
    inputs = make_inputs(*shape, dtype, structure, bias=bias)
    inputs[3].clamp_(max=num_valid - 1)
    check(inputs, structure, with_entropy=with_entropy, num_valid_vocab=num_valid, workspace_bytes=4096)
