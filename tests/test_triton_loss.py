"""The fused Triton squared log-ratio loss against float64, in the interpreter, with every buffer starting as NaN.

Gradients may be off by twice the error of plain PyTorch in the same dtype plus a floor, and never by more than a
cap. The interpreter truncates where a GPU rounds to bfloat16, so bf16 is about twice as far off here as there.
Every promise holds for both structures: tiles, and stored logits.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inverseq_kernels import IGNORE_INDEX, squared_log_ratio_loss

pytest.importorskip("triton")
from inverseq_kernels import torch_loss, triton_loss  # noqa: E402
from inverseq_kernels.triton_blocks import LOGITS, TILES, Blocks, choose_logit_blocks  # noqa: E402
from inverseq_kernels.triton_common import pitch_of  # noqa: E402
from inverseq_kernels.triton_stored import stored_rows  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

# dtype, floor and cap of a gradient's relative error, log-prob rms error in nats
ACCURACY = {
    torch.float32: (5e-6, 2e-4, 1e-5),  # some CPUs' sgemm adds 128,256 products one after the other: 4e-5
    torch.float16: (1e-3, 4e-3, 1e-4),
    torch.bfloat16: (8e-3, 2e-2, 1e-4),
}
FP32, FP16, BF16 = DTYPES = list(ACCURACY)
# Tiles multiply half precision only.
KINDS = [(LOGITS, FP32), (TILES, FP16), (LOGITS, FP16), (TILES, BF16), (LOGITS, BF16)]
every_kind = pytest.mark.parametrize(("structure", "dtype"), KINDS, ids=str)
both_structures = pytest.mark.parametrize(("structure", "dtype"), [(TILES, BF16), (LOGITS, FP32)], ids=str)
WIDE = Blocks(16, 4096, 16, num_warps=4, num_stages=1)
SEGMENTS = Blocks(16, 64, 0, num_warps=4, num_stages=1)
KIB = 1024


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    """Whatever the launcher allocates holds NaN until it is written."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def make_case(num_rows, dim, num_words, dtype, *, size=3.0, has_bias=True, valid=None, seed=0):
    """Inputs of one call as a dict; the first rows are ignored, weightless with a NaN target, and ordinary."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    valid = valid or num_words
    case = {
        "hidden": normal(num_rows, dim).to(dtype),
        "weight": (normal(num_words, dim) * size / math.sqrt(dim)).to(dtype),
        "bias": normal(num_words).to(dtype) if has_bias else None,
        "token_ids": torch.randint(0, valid, (num_rows,), generator=generator),
        "targets": -5 * torch.rand(num_rows, generator=generator),
        "row_weights": torch.rand(num_rows, generator=generator) + 0.1,
        "denominator": torch.tensor(7.0),
    }
    if num_rows > 2:
        case["token_ids"][0] = IGNORE_INDEX
        case["row_weights"][:2] = 0.0
        case["targets"][:2] = math.nan
    return case


def run(case, function=triton_loss.squared_log_ratio_forward, dtype=None, **options):
    """One call of a backend; ``dtype`` converts the floating point inputs."""
    settings_ = {
        "softcap": None,
        "temperature": 1.0,
        "num_valid_vocab": case["weight"].shape[0],
        "needs": (True, True, case["bias"] is not None),
        "workspace_bytes": 2**26,
    }
    if dtype is not None:
        case = {
            name: value.to(dtype) if value is not None and value.is_floating_point() else value
            for name, value in case.items()
        }
        options.pop("blocks", None)
        options.pop("structure", None)
    loss, logprobs, *gradients = function(*case.values(), **(settings_ | options))
    likes = (case["hidden"], case["weight"], case["bias"])
    return loss, logprobs, *[g if g is None else g.to(like.dtype) for g, like in zip(gradients, likes, strict=True)]


def eager_gradients(case, options):
    """Plain PyTorch in the inputs' dtype: logits, log_softmax and everything after them are rounded."""
    names = ("hidden", "weight", "bias")
    leaves = [None if case[name] is None else case[name].clone().requires_grad_() for name in names]
    hidden, weight, bias = leaves
    valid = options.get("num_valid_vocab", weight.shape[0])
    z_AV = torch.nn.functional.linear(hidden, weight, bias)[:, :valid]
    if options.get("softcap") is not None:
        z_AV = options["softcap"] * torch.tanh(z_AV / options["softcap"])
    logprobs_AV = (z_AV / options.get("temperature", 1.0)).log_softmax(dim=1)
    logprobs = logprobs_AV.gather(1, case["token_ids"].clamp(min=0)[:, None]).squeeze(1)
    active = case["row_weights"] > 0
    residual = torch.where(active, logprobs - torch.where(active, case["targets"], 0.0), 0.0)
    loss = (case["row_weights"] * residual.square()).sum() / case["denominator"]
    loss.backward()
    return [None if leaf is None else leaf.grad for leaf in leaves]


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def check(case, **options):
    """Forward and every gradient of one case against float64; returns the triton results."""
    dtype = case["hidden"].dtype
    floor, cap, logprob_error = ACCURACY[dtype]
    loss, logprobs, *gradients = run(case, **options)
    truth_loss, truth_logprobs, *truth_gradients = run(
        case, torch_loss.squared_log_ratio_forward, torch.float64, **options
    )
    scale = max(1.0, truth_logprobs.abs().max().item() / 100) if len(logprobs) else 1.0
    assert (logprobs - truth_logprobs).square().mean().sqrt() <= logprob_error * scale or not len(logprobs)
    assert abs(loss - truth_loss) <= 1e-5 * scale * max(abs(truth_loss), 1.0)
    eager = eager_gradients(case, options)
    names = ("hidden", "weight", "bias")
    for name, gradient, truth, reference in zip(names, gradients, truth_gradients, eager, strict=True):
        if truth is None:
            assert gradient is None
            continue
        assert gradient.dtype == dtype and gradient.shape == truth.shape
        allowed = 2 * relative_error(reference, truth) + floor
        allowed = cap if math.isnan(allowed) else min(allowed, cap)
        assert relative_error(gradient, truth) <= allowed, name
    return loss, logprobs, *gradients


CASES = {
    "one row, one word": (dict(num_rows=1, dim=1, num_words=1), {}),
    "two words": (dict(num_rows=5, dim=16, num_words=2), {}),
    "ragged": (dict(num_rows=37, dim=48, num_words=300), {}),
    "no bias, many chunks": (dict(num_rows=70, dim=41, num_words=257, has_bias=False), dict(workspace_bytes=20 * KIB)),
    "softcap, temperature, valid words, chunks": (
        dict(num_rows=40, dim=64, num_words=400, valid=350),
        dict(softcap=4.0, temperature=0.7, num_valid_vocab=350, workspace_bytes=30 * KIB),
    ),
    "peaked": (dict(num_rows=20, dim=32, num_words=300, size=30.0), {}),
}


@every_kind
@pytest.mark.parametrize("name", CASES)
def test_loss_logprobs_and_gradients_match_float64(name, structure, dtype):
    shape, options = CASES[name]
    if structure == TILES:  # widths that they can load
        shape = {**shape, "dim": -(-shape["dim"] // 16) * 16}
    else:
        options = {**options, "blocks": SEGMENTS}
    check(make_case(**shape, dtype=dtype), structure=structure, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_gpu_match_float64(dtype):
    """One row a program, and a last segment that ends at the pitch."""
    check(make_case(6, 24, 4100, dtype), structure=LOGITS, blocks=choose_logit_blocks(90))


@every_kind
@pytest.mark.parametrize("num_words, valid", [(50257, 50257), (128320, 128256)])
def test_large_vocabularies_match_float64(num_words, valid, structure, dtype):
    case = make_case(4, 16, num_words, dtype, valid=valid, has_bias=False)
    case["token_ids"][3] = valid - 1
    *_, weight_gradient, _ = check(case, num_valid_vocab=valid, blocks=WIDE, structure=structure)
    assert not weight_gradient[valid:].any()


@every_kind
def test_no_rows_and_only_ignored_rows_give_zero_loss_and_gradients(structure, dtype):
    empty = make_case(0, 16, 20, dtype)
    ignored = make_case(3, 16, 20, dtype)
    ignored["token_ids"].fill_(IGNORE_INDEX)
    ignored["row_weights"].zero_()
    ignored["hidden"][1] = math.nan
    for case in (empty, ignored):
        loss, logprobs, *gradients = run(case, num_valid_vocab=18, structure=structure)
        assert loss == 0 and not logprobs.any()
        assert all(not gradient.any() for gradient in gradients)
        assert [gradient.shape for gradient in gradients] == [case[n].shape for n in ("hidden", "weight", "bias")]


@every_kind
def test_a_row_without_weight_never_reaches_the_gradients_whatever_it_holds(structure, dtype):
    case = make_case(9, 16, 140, dtype)
    clean = run(case, structure=structure)
    case["hidden"][:2] = math.nan
    poisoned = run(case, structure=structure)
    for before, after in zip(clean[2:], poisoned[2:], strict=True):
        assert torch.equal(before, after)
    assert not poisoned[2][:2].any() and torch.equal(clean[0], poisoned[0])


@every_kind
@pytest.mark.parametrize("step", [-150.0, 60.0, 150.0])
def test_tiles_of_one_row_may_lie_many_powers_of_two_apart(step, structure, dtype):
    """Blocks of words are shifted by multiples of ``step`` nats, so each tile has an offset of its own."""
    case = make_case(6, 16, 400, dtype, size=1.0)
    case["bias"] += step * (torch.arange(400) // 130)
    # Tokens in the winning tile, else the log-prob itself is some hundreds of nats.
    case["token_ids"][2:] = torch.tensor([395, 391, 3, 7])
    case["targets"][2:] = torch.tensor([-2.0, -3.0, -1.0, -300.0])
    check(case, structure=structure, blocks=None if structure == TILES else SEGMENTS)


def test_rows_on_both_sides_of_an_offset_boundary_keep_their_gradient(monkeypatch):
    """The sum's exponent rounds up where its tiles' round down: 64 bits are 44.36 nats. A GPU's exp2(-128) is 0."""
    flushed = lambda self, bits: self.unary_op(bits, lambda x: np.exp2(np.where(x < -126, -np.inf, x)))  # noqa: E731
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", flushed)
    case = make_case(16, 16, 300, BF16, size=0.05)
    case["bias"].copy_(torch.linspace(40.0, 44.4, 300))
    check(case, structure=TILES)


def test_exponentials_just_below_a_power_of_two_do_not_overflow_fp16():
    case = make_case(5, 16, 130, FP16, size=0.0)
    case["bias"].fill_(24.953125)  # 35.99975 bits
    check(case, structure=TILES)


@every_kind
def test_large_common_offset_changes_nothing(structure, dtype):
    case = make_case(6, 16, 200, dtype, has_bias=False)
    plain = run(case, structure=structure)
    case["bias"] = torch.full((200,), 512.0, dtype=dtype)
    shifted = run(case, needs=(True, True, False), structure=structure)
    for before, after in zip(plain[1:4], shifted[1:4], strict=True):
        assert relative_error(after, before.double()) < (1e-3 if dtype == torch.float32 else ACCURACY[dtype][1])


@every_kind
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_words_with_bias_minus_infinity_have_no_gradient(softcap, structure, dtype):
    case = make_case(7, 16, 300, dtype)
    case["bias"][128:256] = -math.inf  # a whole tile
    case["bias"][5] = -math.inf
    case["token_ids"] = torch.where(case["token_ids"] > 256, case["token_ids"], 7)
    case["token_ids"][0] = IGNORE_INDEX
    _, _, _, weight_gradient, bias_gradient = check(case, structure=structure, softcap=softcap)
    assert not weight_gradient[128:256].any() and not bias_gradient[128:256].any() and not weight_gradient[5].any()


@pytest.mark.parametrize(("structure", "dtype"), KINDS[1:], ids=str)
def test_the_gradient_of_a_nearly_certain_token_survives_rounding(structure, dtype):
    """With p = 0.9999, rounding the softmax before subtracting one would leave 0 for the token's own word."""
    case = make_case(4, 16, 64, dtype, size=0.0)
    case["token_ids"].fill_(3)
    case["row_weights"].fill_(1.0)
    case["targets"].fill_(-2.0)
    case["bias"].zero_()
    case["bias"][3] = 13.375  # 1 - p = 63 exp(-13.4) = 1e-4
    *_, bias_gradient = check(case, structure=structure)
    truth = run(case, torch_loss.squared_log_ratio_forward, torch.float64)[4]
    assert relative_error(bias_gradient[3], truth[3]) < 2e-2 and truth[3] != 0


@pytest.mark.parametrize("structure", [TILES, LOGITS])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_small_row_weights_do_not_sink_below_the_range_of_fp16(num_chunks, structure):
    case = make_case(70, 16, 130, torch.float16)
    case["row_weights"] *= 1e-6
    case["denominator"] = torch.tensor(1e-6)
    check(case, workspace_bytes=2**20 if num_chunks == 1 else 12 * KIB, structure=structure)


@pytest.mark.parametrize("structure", [TILES, LOGITS])
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize(("size", "log_ratio"), [(2000.0, 24.0), (2.0**-12, 0.01)])
def test_large_and_small_hidden_states_fit_fp16(size, log_ratio, num_chunks, structure):
    """A row of hidden times its log-ratio may be past fp16's range, or below, where the gradient is within it."""
    case = make_case(70, 16, 130, torch.float16, size=0.5)
    case["hidden"][:, 1:] *= min(size, 1.0)
    case["hidden"][:, 0] = size
    case["weight"][:, 0] = 0.0
    case["targets"] = run(case)[1] - log_ratio
    case["denominator"] = torch.tensor(size * log_ratio)
    case["hidden"][0] = 60_000.0  # an ignored row does not choose the scale
    check(case, workspace_bytes=2**20 if num_chunks == 1 else 12 * KIB, structure=structure)


@both_structures
def test_every_subset_of_gradients_equals_the_full_call(structure, dtype):
    case = make_case(40, 16, 150, dtype)
    options = {"workspace_bytes": 16 * KIB, "structure": structure}
    full = run(case, **options)
    for mask in range(8):
        needs = tuple(bool(mask & bit) for bit in (1, 2, 4))
        loss, logprobs, *gradients = run(case, needs=needs, **options)
        torch.testing.assert_close((loss, logprobs), full[:2])
        for need, gradient, expected in zip(needs, gradients, full[2:], strict=True):
            assert (gradient is not None) == need
            assert gradient is None or relative_error(gradient, expected.double()) <= 1e-6


def test_tile_descriptors_load_what_pointers_load():
    case = make_case(20, 48, 200, torch.bfloat16)
    blocks = Blocks(16, 64, 32, num_warps=4, num_stages=1)
    by_pointer = run(case, blocks=blocks, structure=TILES)
    by_descriptor = run(case, blocks=Blocks(16, 64, 32, num_warps=4, num_stages=1, tma=True), structure=TILES)
    for expected, actual in zip(by_pointer, by_descriptor, strict=True):
        assert relative_error(actual, expected.double()) < 4e-3  # the dot may add in another order


@both_structures
def test_two_calls_are_bitwise_equal_and_chunks_only_reorder_fp32_sums(structure, dtype):
    case = make_case(100, 16, 150, dtype)
    chunked = [run(case, workspace_bytes=24 * KIB, structure=structure) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*chunked, strict=True))
    for one_chunk, many in zip(run(case, structure=structure), chunked[0], strict=True):
        assert relative_error(one_chunk, many.double()) <= (1e-5 if dtype == FP32 else 4e-3)


@given(
    num_rows=st.integers(1, 40_000),
    num_words=st.integers(1, 300_000),
    dim=st.sampled_from([0, 576, 4096, 8192]),
    dtype=st.sampled_from(DTYPES),
    workspace=st.integers(1, 2**31),
)
# Two row blocks of tiles fit, and one of stored logits; then two of tiles but for a byte.
@example(num_rows=1024, num_words=128_256, dim=0, dtype=BF16, workspace=256 * 260_544)
@example(num_rows=1024, num_words=128_256, dim=0, dtype=BF16, workspace=256 * 260_544 - 1)
def test_chunks_cover_the_rows_and_fit_the_workspace(num_rows, num_words, dim, dtype, workspace):
    blocks = Blocks(128, 256, 64, num_warps=8, num_stages=3)
    row_bytes, pitch = dim * dtype.itemsize, pitch_of(num_words)
    assert pitch % 64 == 0 and 0 <= pitch - num_words < 64
    tile_bytes = pitch * dtype.itemsize + 8 * math.ceil(num_words / 256) + 24 + row_bytes
    logit_bytes = 4 * pitch + row_bytes
    for rows, used, block in (
        (triton_loss.tile_rows(num_rows, num_words, row_bytes, dtype, blocks, workspace), tile_bytes, 128),
        (stored_rows(workspace, logit_bytes, num_rows), logit_bytes, 128 if 128 * logit_bytes <= workspace else 16),
    ):
        assert 1 <= rows <= num_rows and (rows % block == 0 or rows == num_rows)
        assert rows * used <= workspace or rows <= block
        most = max(workspace // used // block, 1) * block
        assert math.ceil(num_rows / rows) == math.ceil(num_rows / most)


def test_default_workspace_gives_hopper_chunks_of_2048_rows():
    blocks = Blocks(128, 256, 64, num_warps=8, num_stages=3)
    assert triton_loss.tile_rows(8192, 128_256, 0, BF16, blocks, 512 * 2**20) == 2048
    assert stored_rows(512 * 2**20, 4 * 128_256 + 24, 8192) == 1024


@settings(max_examples=10)
@given(
    num_rows=st.integers(1, 40),
    num_words=st.integers(1, 300),
    dim=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_float64(num_rows, num_words, dim, kind, softcap, seed):
    (structure, dtype), valid = kind, max(1, num_words - seed % 7)
    dim, blocks = (-(-dim // 16) * 16, None) if structure == TILES else (dim, SEGMENTS)
    case = make_case(num_rows, dim, num_words, dtype, valid=valid, seed=seed)
    options = {"workspace_bytes": (1 + seed) * 4 * KIB, "structure": structure, "blocks": blocks}
    check(case, softcap=softcap, num_valid_vocab=valid, **options)


@pytest.mark.parametrize("dim", [24, 32])  # stored logits, tiles
def test_public_function_reads_sliced_inputs_and_scales_by_the_upstream_gradient(dim):
    case = make_case(21, dim, 90, torch.bfloat16)
    hidden = torch.randn(dim, 40).to(torch.bfloat16).t()[3:24].requires_grad_()  # [21, dim], columns contiguous
    weight = case["weight"].repeat(1, 2)[:, ::2].requires_grad_()
    bias = case["bias"].repeat_interleave(2)[::2].requires_grad_()
    mask = case["row_weights"]
    inputs, results = (hidden, weight, bias), {}
    for backend in ("triton", "torch"):
        loss, logprobs = squared_log_ratio_loss(
            hidden, weight, case["token_ids"], case["targets"], bias=bias,
            denominator=3.0, loss_mask=mask, backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(-2.5 * loss, inputs, retain_graph=True)
        again = torch.autograd.grad(-2.5 * loss, inputs)
        assert all(torch.equal(first, second) for first, second in zip(gradients, again, strict=True))
        assert not logprobs.requires_grad
        results[backend] = (loss.detach(), logprobs, *gradients)
    for ours, reference in zip(results["triton"], results["torch"], strict=True):
        assert relative_error(ours, reference.double()) < ACCURACY[torch.bfloat16][1]
