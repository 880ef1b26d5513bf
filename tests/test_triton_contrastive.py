"""The Triton contrast against float64 on the same rounded inputs; temporaries and outputs start as NaN.

Every promise holds for both structures: tiles, and stored logits.
"""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from inverseq_kernels import IGNORE_INDEX, contrastive_logprob
from inverseq_kernels.triton_blocks import (
    CONTRAST,
    CONTRAST_PAIR,
    LOGITS,
    TILES,
    Blocks,
    choose_blocks,
    choose_logit_blocks,
)
from inverseq_kernels.triton_contrastive import contrastive_forward
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Tiles multiply half precision only.
KINDS = [(LOGITS, FP32), (TILES, FP16), (LOGITS, FP16), (TILES, BF16), (LOGITS, BF16)]
every_kind = pytest.mark.parametrize(("structure", "dtype"), KINDS, ids=str)
both_structures = pytest.mark.parametrize(("structure", "dtype"), [(TILES, BF16), (LOGITS, FP32)], ids=str)
# Logits of a few nats summed in fp32; the inputs' own rounding is not an error, float64 reads the same inputs.
FLOOR = 2e-5
SMALL = Blocks(16, 32, 16, num_warps=4, num_stages=1)
WIDE = Blocks(16, 8192, 16, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def nan_poison(monkeypatch):
    """Every new floating tensor starts as NaN, so that a value that no kernel wrote shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        result = new_empty(self, *args, **kwargs)
        return result.fill_(math.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def make_inputs(num_rows, num_words, dim_w, dim_l, dtype=FP32, structure=LOGITS, bias=True, seed=0):
    """Arguments of contrastive_forward up to the token ids, logits of a few nats; tiles get widths that they load."""
    if structure == TILES:
        dim_w, dim_l = (-(-dim // 16) * 16 for dim in (dim_w, dim_l))
    generator = torch.Generator().manual_seed(seed)

    def head(dim):
        hidden = torch.randn(num_rows, dim, generator=generator)
        weight = torch.randn(num_words, dim, generator=generator) * (2 / math.sqrt(dim))
        offsets = torch.randn(num_words, generator=generator) if bias else None
        return [None if tensor is None else tensor.to(DEVICE, dtype) for tensor in (hidden, weight, offsets)]

    token_ids = torch.randint(0, num_words, (num_rows,), generator=generator)
    return [*head(dim_w), *head(dim_l), token_ids.to(DEVICE)]


def expected(inputs, alphas, softcap=None, temperature=1.0, num_valid_vocab=None):
    """Targets [K, A] and log pi_l(y) [A] in float64 with full logits."""
    token_ids = inputs[6]
    ignored = token_ids == IGNORE_INDEX
    column = token_ids.clamp(min=0)[:, None]

    def logits(hidden, weight, bias):
        valid = num_valid_vocab or weight.shape[0]
        bias = torch.zeros(weight.shape[0]) if bias is None else bias
        bias = bias[:valid].cpu().double()
        z = hidden.cpu().double() @ weight[:valid].cpu().double().t() + bias.nan_to_num(neginf=0.0)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z / temperature, bias.isneginf()

    (z_w, dead_w), (z_l, dead_l) = logits(*inputs[:3]), logits(*inputs[3:6])
    column, ignored = column.cpu(), ignored.cpu()

    def pick(z, dead):
        log_probs = z.masked_fill(dead, -math.inf).log_softmax(1)
        return log_probs.gather(1, column)[:, 0].masked_fill(ignored, 0.0)

    alphas = alphas.cpu().double().expand(-1, len(token_ids))
    targets = [pick(a[:, None] * z_w + (1 - a)[:, None] * z_l, dead_w | dead_l) for a in alphas]
    return torch.stack(targets), pick(z_l, dead_l)


def run(inputs, structure, alphas, *, num_valid_vocab=None, workspace_bytes=1 << 20, blocks=SMALL, **settings):
    targets, reference = contrastive_forward(
        *inputs,
        alphas.to(DEVICE),
        num_valid_vocab=num_valid_vocab or inputs[1].shape[0],
        workspace_bytes=workspace_bytes,
        structure=structure,
        blocks=blocks,
        **{"softcap": None, "temperature": 1.0, **settings},
    )
    assert targets.dtype == reference.dtype == torch.float32
    return targets.cpu().double(), reference.cpu().double()


def check(inputs, structure, alphas, floor=FLOOR, workspace_bytes=1 << 20, blocks=SMALL, **settings):
    targets, reference = run(inputs, structure, alphas, workspace_bytes=workspace_bytes, blocks=blocks, **settings)
    true_targets, true_reference = expected(inputs, alphas, **settings)
    torch.testing.assert_close(targets, true_targets, rtol=1e-6, atol=floor)
    torch.testing.assert_close(reference, true_reference, rtol=1e-6, atol=floor)


def random_alphas(num_alphas: int, num_rows: int) -> Tensor:
    return torch.randn(num_alphas, num_rows, generator=torch.Generator().manual_seed(1)) * 1.5


@every_kind
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 2, 16, 16), (19, 70, 40, 23), (32, 64, 32, 16)])
@pytest.mark.parametrize(("num_alphas", "softcap"), [(1, None), (3, None), (1, 3.0)])
def test_matches_float64(structure, dtype, shape, num_alphas, softcap):
    inputs = make_inputs(*shape, dtype, structure)
    check(inputs, structure, random_alphas(num_alphas, shape[0]), softcap=softcap, temperature=1.3)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", [CONTRAST, CONTRAST_PAIR])
def test_matches_float64_with_the_tiles_of_a_gpu(dtype, capability, op):
    blocks = choose_blocks(op, capability)
    inputs = make_inputs(130, 260, 48, 64, dtype=dtype, bias=False)
    check(inputs, TILES, random_alphas(1 if op == CONTRAST else 2, 130), blocks=blocks)


@pytest.mark.parametrize("num_alphas", [1, 2])
def test_matches_float64_with_the_rows_of_a_gpu(num_alphas):
    """One row a program, and a last segment that ends at the pitch."""
    check(make_inputs(5, 4100, 16, 24), LOGITS, random_alphas(num_alphas, 5), blocks=choose_logit_blocks(90))


@pytest.mark.parametrize("dims", [(70, 70), (64, 80)])  # stored logits, tiles
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_matches_float64_with_the_default_choice(dims, softcap):
    check(make_inputs(40, 200, *dims, BF16), None, random_alphas(1, 1), blocks=None, softcap=softcap)


def test_heads_of_two_dtypes_match_float64():
    half, single = make_inputs(20, 100, 48, 48, BF16), make_inputs(20, 100, 48, 48)
    shared = [*single[:4], half[1], *single[5:]]  # one weight, read in each hidden's dtype
    for better, plain in ((half, single), (single, half), (half, shared)):
        check([*better[:3], *plain[3:]], None, random_alphas(1, 20), blocks=None)


@both_structures
@pytest.mark.parametrize("num_words", [50257, 128256])
def test_large_vocabularies_with_padding(structure, dtype, num_words):
    inputs = make_inputs(3, num_words + 44, 8, 8, dtype, structure)
    inputs[6][0] = num_words - 1
    inputs[6].clamp_(max=num_words - 1)
    check(inputs, structure, random_alphas(1, 3), num_valid_vocab=num_words, blocks=WIDE)


@both_structures
@pytest.mark.parametrize("num_alphas", [1, 2])
def test_words_past_the_valid_ones_may_hold_anything(structure, dtype, num_alphas):
    inputs = make_inputs(9, 70, 16, 16, dtype)
    inputs[6].clamp_(max=49)
    for index in (1, 2, 4, 5):
        inputs[index][50:] = math.nan
    check(inputs, structure, random_alphas(num_alphas, 9), num_valid_vocab=50)


@both_structures
@pytest.mark.parametrize("pair", [False, True])
def test_alpha_zero_and_one_are_exact(structure, dtype, pair):
    inputs = make_inputs(20, 90, 33, 33, dtype, structure)
    alphas = torch.tensor([[0.0], [1.0]]) if pair else torch.tensor([[0.0, 1.0, 1e-30, -1e-13] * 5])
    targets, reference = run(inputs, structure, alphas)
    swapped = [*inputs[3:6], *inputs[:3], inputs[6]]
    _, better = run(swapped, structure, torch.ones(1, 1))
    zero, one = (targets[0], targets[1]) if pair else (targets[0, 0::4], targets[0, 1::4])
    step = 1 if pair else 4
    torch.testing.assert_close(zero, reference[0::step], rtol=0, atol=2e-6)
    torch.testing.assert_close(one, better[0 if pair else 1 :: step], rtol=0, atol=2e-6)
    if not pair:
        torch.testing.assert_close(targets[0, 2::4], reference[2::4], rtol=0, atol=2e-6)
        torch.testing.assert_close(targets[0, 3::4], reference[3::4], rtol=0, atol=2e-6)


@pytest.mark.parametrize("structure", [TILES, LOGITS])
@pytest.mark.parametrize("alpha", [1.4, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("num_alphas", [1, 2])
def test_words_removed_by_either_bias_leave_the_mixture_and_only_l_the_reference(structure, alpha, num_alphas):
    inputs = make_inputs(12, 70, 16, 16, dtype=BF16)
    inputs[2][[3, 40]] = -math.inf
    inputs[5][[40, *range(64, 70)]] = -math.inf  # all words of the last tile too
    inputs[6].copy_(torch.tensor([3, 40, 69] + [5] * 9))
    alphas = torch.full((num_alphas, 1), alpha)
    check(inputs, structure, alphas)
    targets, reference = run(inputs, structure, alphas)
    assert targets[:, :3].isneginf().all() and targets[:, 3:].isfinite().all()
    assert reference.isneginf().tolist()[:4] == [False, True, True, False]


@both_structures
@pytest.mark.parametrize("num_alphas", [1, 2])
def test_ignored_rows_are_zero_whatever_they_hold(structure, dtype, num_alphas):
    inputs = make_inputs(21, 40, 16, 16, dtype)
    for row in (0, 7, 20):
        inputs[6][row] = IGNORE_INDEX
    clean = run(inputs, structure, random_alphas(num_alphas, 21))
    inputs[0][7] = inputs[3][0] = math.nan
    targets, reference = run(inputs, structure, random_alphas(num_alphas, 21))
    assert (targets[:, [0, 7, 20]] == 0).all() and (reference[[0, 7, 20]] == 0).all()
    assert torch.equal(targets, clean[0]) and torch.equal(reference, clean[1])
    inputs[6].fill_(IGNORE_INDEX)
    targets, reference = run(inputs, structure, random_alphas(num_alphas, 21))
    assert (targets == 0).all() and (reference == 0).all()


@both_structures
def test_empty_input_gives_empty_output(structure, dtype):
    inputs = make_inputs(0, 40, 16, 16, dtype)
    targets, reference = run(inputs, structure, torch.ones(2, 1))
    assert targets.shape == (2, 0) and reference.shape == (0,)


@pytest.mark.parametrize("structure", [TILES, LOGITS])
@pytest.mark.parametrize("num_alphas", [1, 3])
def test_many_chunks_equal_one_bit_for_bit(structure, num_alphas):
    inputs = make_inputs(50, 70, 16, 32, dtype=FP16)
    alphas = random_alphas(num_alphas, 50)
    once, chunked = (run(inputs, structure, alphas, workspace_bytes=size) for size in (1 << 20, 1))
    for one, many in zip(once, chunked, strict=True):
        # A CPU's matmul may add in another order for another number of rows.
        assert torch.equal(one, many) if structure == TILES else torch.allclose(one, many, rtol=0, atol=2e-6)


@both_structures
def test_peaked_logits_give_exactly_zero_and_the_runner_up_its_distance(structure, dtype):
    inputs = make_inputs(4, 64, 64, 64, dtype, bias=False)
    for index in (0, 3):
        inputs[index].copy_(100.0 * torch.eye(64)[:4])
        inputs[index + 1].copy_(torch.eye(64))
    inputs[6].copy_(torch.tensor([0, 1, 2, 9]))
    targets, reference = run(inputs, structure, torch.full((1, 1), 1.5))
    assert targets[0].tolist() == [0.0, 0.0, 0.0, -100.0] and reference.tolist() == [0.0, 0.0, 0.0, -100.0]


@both_structures
@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_a_common_offset_cancels(structure, dtype, offset):
    inputs = make_inputs(8, 70, 16, 16, dtype)
    inputs[2] += offset
    inputs[5] += offset
    check(inputs, structure, random_alphas(1, 8), floor=3e-3)


def test_a_shared_head_and_tma_descriptors_give_the_same_numbers():
    inputs = make_inputs(40, 100, 48, 48, dtype=BF16, bias=False)
    inputs[4] = inputs[1]
    alphas = random_alphas(1, 40)
    check(inputs, LOGITS, alphas)
    check(inputs, TILES, alphas)
    described = run(inputs, TILES, alphas, blocks=Blocks(16, 32, 32, num_warps=4, num_stages=1, tma=True))
    for one, other in zip(described, run(inputs, TILES, alphas), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOOR)


def test_the_public_operation_takes_sliced_inputs_and_never_falls_back():
    wide = make_inputs(30, 80, 40, 40, dtype=BF16)
    inputs = [wide[0][::2, 3:20], wide[1][:, 3:20], wide[2], wide[3][::2, :24], wide[4][:, :24], wide[5], wide[6][::2]]
    targets, reference = contrastive_logprob(
        *inputs[:2], *inputs[3:5], inputs[6], 1.4, bias_w=inputs[2], bias_l=inputs[5], return_reference=True,
        backend="triton",
    )  # fmt: skip
    true_targets, true_reference = expected(inputs, torch.full((1, 1), 1.4))
    torch.testing.assert_close(targets.cpu().double(), true_targets[0], rtol=1e-6, atol=FLOOR)
    torch.testing.assert_close(reference.cpu().double(), true_reference, rtol=1e-6, atol=FLOOR)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    shape=st.tuples(st.integers(1, 34), st.integers(1, 70), st.integers(1, 34), st.integers(1, 34)),
    num_alphas=st.integers(1, 2),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    cut=st.integers(0, 3),
    tma=st.booleans(),
)
def test_any_shape(shape, num_alphas, kind, bias, cut, tma):
    num_valid, (structure, dtype) = max(shape[1] - cut, 1), kind
    inputs = make_inputs(*shape, dtype, structure, bias=bias)
    inputs[6].clamp_(max=num_valid - 1)
    blocks = Blocks(16, 32, 16, num_warps=4, num_stages=1, tma=tma)
    check(inputs, structure, random_alphas(num_alphas, shape[0]), num_valid_vocab=num_valid, blocks=blocks)
