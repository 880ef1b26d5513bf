"""What the Triton launchers keep inside their matrices and ranges, and which structure and blocks fit which call."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from inverseq_kernels import (  # noqa: E402
    IGNORE_INDEX,
    backends,
    contrastive_logprob,
    linear_logprob,
    squared_log_ratio_loss,
    triton_logprob,
    triton_loss,
)
from inverseq_kernels.triton_blocks import (  # noqa: E402
    CONTRAST,
    CONTRAST_PAIR,
    EXPONENTIAL,
    GRADIENT,
    LOGITS,
    STATISTICS,
    STATISTICS_RICH,
    TILES,
    choose_blocks,
    choose_loss_blocks,
    choose_structure,
    is_aligned,
)
from inverseq_kernels.triton_stored import StoredLogits  # noqa: E402

NUM_WORDS, PITCH, DIM = 70, 128, 16
SETTINGS = {"softcap": None, "temperature": 1.0, "num_valid_vocab": NUM_WORDS, "workspace_bytes": 2**24}


both_structures = pytest.mark.parametrize(
    ("structure", "dtype"), [(TILES, torch.bfloat16), (LOGITS, torch.float32), (LOGITS, torch.bfloat16)], ids=str
)


def make_inputs(num_rows, dtype=torch.float32):
    """hidden, weight, no bias, token ids; logits of one nat or so."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, DIM, generator=generator).to(dtype) for n in (num_rows, NUM_WORDS))
    return [hidden, weight / 4, None, torch.arange(num_rows) % NUM_WORDS]


def logprob_gradients(inputs, grad, structure):
    """Gradients of hidden and weight for upstream gradients [A] of the log-probs."""
    settings = SETTINGS | {"structure": structure}
    forward = triton_logprob.logprob_forward(*inputs, want_entropy=False, **settings)
    return triton_logprob.logprob_backward(grad, None, *inputs, *forward[1:], needs=(True, True, False), **settings)


def loss_forward(inputs, structure):
    num_rows = inputs[0].shape[0]
    ones = torch.ones(num_rows)
    return triton_loss.squared_log_ratio_forward(
        *inputs, -3 * ones, ones, torch.tensor(1.0), needs=(True, True, False), structure=structure, **SETTINGS
    )


@both_structures
def test_a_token_id_past_the_vocabulary_leaves_the_other_rows_alone(structure, dtype):
    inputs = make_inputs(2, dtype)
    expected = loss_forward(inputs, structure)[2]
    inputs[3][0] = PITCH + 5  # word 5 of the row below, were it not masked
    actual = loss_forward(inputs, structure)[2]
    torch.testing.assert_close(actual[1], expected[1])


@both_structures
def test_gradient_rows_are_stored_up_to_the_pitch(monkeypatch, structure, dtype):
    matrices = []
    add = triton_logprob._GradientSums.add

    def spy(self, gradient, *rest):
        matrices.append(gradient.as_strided((gradient.shape[0], PITCH), gradient.stride()).clone())
        add(self, gradient, *rest)

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(7))
    monkeypatch.setattr(triton_logprob._GradientSums, "add", spy)
    logprob_gradients(make_inputs(3, dtype), torch.ones(3), structure)
    assert len(matrices) == 1
    assert not matrices[0][:, NUM_WORDS:].any()
    assert matrices[0][:, :NUM_WORDS].all()


@pytest.mark.parametrize("structure", [TILES, LOGITS])
def test_the_upstream_gradient_of_an_ignored_row_does_not_choose_the_scale_of_fp16(structure):
    inputs, grad = make_inputs(4, torch.float16), torch.ones(4)
    inputs[3][1] = IGNORE_INDEX
    expected = logprob_gradients(inputs, grad, structure)
    grad[1] = 1e30
    for actual, plain in zip(logprob_gradients(inputs, grad, structure)[:2], expected[:2], strict=True):
        assert torch.equal(actual, plain)
        assert actual.any()


@pytest.mark.parametrize("structure", [TILES, LOGITS])
def test_fp16_gradients_leave_room_for_sums_over_rows(structure):
    inputs = make_inputs(40, torch.float16)
    inputs[3].zero_()
    inputs[0][:, 0], inputs[1][:, 0] = 8.0, 0.0  # the gradient's entry is 8 times 40 rows' 1 - p
    gradients = logprob_gradients(inputs, torch.ones(40), structure)
    assert all(gradient.isfinite().all() for gradient in gradients[:2]) and 250 < gradients[1][0, 0] < 320


def leaves_of(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**10])
def test_an_fp16_sum_over_rows_past_its_range_comes_out_divided_by_the_denominator(backend, loss_scale):
    hidden, weight, _, token_ids = make_inputs(600, torch.float16)
    hidden[:, 0] = 8.0  # one column whose sum over rows passes 65504
    weight[:, 0] = 0.0
    weight, bias, targets = weight[:9].contiguous(), torch.zeros(9).half(), torch.full((600,), -80.0)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaves = leaves_of(*(tensor.to(dtype) for tensor in (hidden, weight, bias)))
        loss, _ = squared_log_ratio_loss(
            *leaves[:2],
            torch.zeros_like(token_ids),
            targets.to(torch.promote_types(dtype, torch.float32)),
            denominator=2.0**15,
            bias=leaves[2],
            backend=backend if dtype == torch.float16 else "torch",
        )
        (loss * loss_scale if dtype == torch.float16 else loss).backward()
        gradients.append([leaf.grad.double() for leaf in leaves])
    halves, truths = gradients
    assert 2.0**15 * truths[1].abs().amax() > 65504 and 2.0**15 * truths[2].abs().amax() > 65504
    for half, truth in zip(halves, truths, strict=True):
        torch.testing.assert_close(half / loss_scale, truth, rtol=5e-3, atol=2e-3 * truth.abs().amax().item())


def test_a_sum_that_fp16_gradients_cannot_reach_stays_infinite_or_not_a_number():
    """A loss scaler must see it: the power of two is taken from finite sums only."""
    weight = torch.zeros(3, 2, dtype=torch.float16)
    for bad in (torch.inf, torch.nan):
        total = torch.tensor([[1.0, bad], [0.0, 0.0], [2.0, -4.0]])
        _, stored, _, powers = backends.finish_scaled_gradients((None, total, None), (weight, weight, None))
        assert not stored[0, 1].isfinite() and stored[2, 1] == -4 and powers.tolist() == [1.0, 1.0]
    negative = -torch.tensor([[1e6, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert backends.finish_scaled_gradients((None, negative, None), (weight, weight, None))[1].isfinite().all()
    for size in (0.0, 1e-40, 1e-5, 3e38):
        total = torch.tensor([[size, -size], [0.0, 0.0], [0.0, size / 2]])
        _, stored, _, powers = backends.finish_scaled_gradients((None, total, None), (weight, weight, None))
        assert stored.isfinite().all() and (size == 0 or size == 1e-40 or 2**14 <= stored.max() < 2**15)
        torch.testing.assert_close(stored.double() * powers[0].double(), total.double(), rtol=1e-3, atol=1e-38)


@pytest.mark.parametrize("workspace_bytes", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_an_fp32_weight_beside_half_precision_is_not_rounded_to_it(dtype, workspace_bytes):
    hidden, weight, _, token_ids = make_inputs(50, dtype)
    weight, bias = weight.to(dtype).float() + 1e-6, torch.zeros(NUM_WORDS)
    losses = {
        "loss": lambda h, w, b, backend: squared_log_ratio_loss(
            h, w, token_ids, -torch.ones(50), denominator=64, bias=b, workspace_bytes=workspace_bytes, backend=backend
        )[0],
        "logprob": lambda h, w, b, backend: linear_logprob(
            h, w, token_ids, bias=b, workspace_bytes=workspace_bytes, backend=backend
        ).mean(),
    }
    for name, loss in losses.items():
        results = {}
        for backend in ("torch", "triton"):
            leaves = leaves_of(hidden, weight, bias)
            loss(*leaves, backend).backward()
            results[backend] = [leaf.grad for leaf in leaves]
        assert results["triton"][0].dtype == dtype
        for actual, expected in zip(results["triton"][1:], results["torch"][1:], strict=True):
            assert actual.dtype == torch.float32
            assert (actual != actual.to(dtype).float()).float().mean() > 0.5, name
            error = (actual - expected).norm() / expected.norm()
            assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype], (name, error)


@both_structures
def test_chunks_add_up_the_gradient_of_a_half_precision_weight_in_fp32(structure, dtype):
    inputs = make_inputs(40, dtype)
    for workspace_bytes, summed in ((2**24, dtype), (1, torch.float32)):
        settings = SETTINGS | {"structure": structure, "workspace_bytes": workspace_bytes}
        forward = triton_logprob.logprob_forward(*inputs, want_entropy=False, **settings)
        rest = (*inputs, *forward[1:])
        gradients = triton_logprob.logprob_backward(torch.ones(40), None, *rest, needs=(True, True, False), **settings)
        ones = torch.ones(40)
        loss = (*inputs, -ones, ones, torch.tensor(1.0))
        *_, of_loss, _ = triton_loss.squared_log_ratio_forward(*loss, needs=(True, True, False), **settings)
        assert gradients[1].dtype == of_loss.dtype == summed


@pytest.mark.parametrize("capability", [80, 90])
def test_short_widths_take_tiles_of_half_the_words_with_equal_results(capability):
    for op in (EXPONENTIAL, GRADIENT, STATISTICS):
        narrow, wide = (choose_blocks(op, capability, dim) for dim in (1024, 1025))
        assert (narrow.words, wide.words) == (128, 256)
    assert choose_loss_blocks(capability, False, 576).words == 128
    inputs, ones = make_inputs(40, torch.bfloat16), torch.ones(40)
    results = [
        triton_loss.squared_log_ratio_forward(
            *inputs,
            -3 * ones,
            ones,
            torch.tensor(1.0),
            needs=(True, True, False),
            structure=TILES,
            blocks=choose_loss_blocks(capability, False, dim),
            **SETTINGS,
        )[:4]
        for dim in (1024, 1025)
    ]
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide)


def test_tiles_take_aligned_half_precision_on_tensor_cores_and_stored_logits_the_rest():
    half = make_inputs(3, torch.bfloat16)[0]
    assert is_aligned(half) and not any(is_aligned(half[:, :dim].contiguous()) for dim in (8, 15))
    assert not is_aligned(half.view(-1)[1:33].view(2, 16))
    for capability in (0, 80, 86, 90, 100, 120):
        for dtype in (torch.float16, torch.bfloat16):
            assert choose_structure(capability, dtype, True) == TILES
            assert choose_structure(capability, dtype, False) == LOGITS
        for dtype in (torch.float32, None):
            assert choose_structure(capability, dtype, True) == LOGITS
    assert choose_structure(75, torch.float16, True) == LOGITS  # no bf16, and less shared memory than tiles take


@pytest.mark.parametrize("op", ["logprob", "loss", "contrast"])
@pytest.mark.parametrize(
    "dtype, dim, expected", [(torch.bfloat16, 16, False), (torch.bfloat16, 15, True), (torch.float32, 16, True)]
)
def test_every_operation_asks_which_structure_fits_its_tensors(monkeypatch, op, dtype, dim, expected):
    writes, write = [], StoredLogits.write

    def spy(self, *rest, **options):
        writes.append(self)
        write(self, *rest, **options)

    monkeypatch.setattr(StoredLogits, "write", spy)
    hidden, weight, _, token_ids = make_inputs(4, dtype)
    hidden, weight = leaves_of(hidden[:, :dim], weight[:, :dim])
    if op == "contrast":
        contrastive_logprob(hidden, weight, hidden, weight, token_ids, 1.4, backend="triton")
    elif op == "loss":
        squared_log_ratio_loss(hidden, weight, token_ids, torch.zeros(4), denominator=1, backend="triton")
    else:
        linear_logprob(hidden, weight, token_ids, backend="triton").sum().backward()
    assert bool(writes) == expected


@pytest.mark.parametrize("op", [CONTRAST, CONTRAST_PAIR, GRADIENT, STATISTICS_RICH])
def test_hopper_blocks_are_for_hopper_and_its_kind(op):
    small_memory = choose_blocks(op, 120)
    assert small_memory == choose_blocks(op, 80)
    assert not small_memory.tma
    tile_bytes = (small_memory.rows + small_memory.words) * small_memory.dim * 2
    assert tile_bytes * small_memory.num_stages < 99 * 1024
    assert choose_blocks(op, 90).tma
    assert choose_blocks(op, 100).tma
    for capability, is_hopper in ((80, False), (90, True), (120, False)):
        assert choose_loss_blocks(capability, True).tma == is_hopper


COMPILE = """
import json, re
from inverseq_kernels.triton_compile import compile_offline
from inverseq_kernels.triton_stored_rows import compile_cases

orders = {}
for case in compile_cases(90, ["bf16"]):
    if case.name in ("gradient_rows bf16", "loss_rows bf16", "statistics_rows rescale"):
        ptx = compile_offline(case, 90).asm["ptx"]
        found = re.findall(r"ld\\.global\\.v\\d|bar(?:rier)?\\.(?:cta\\.)?sync|st\\.global\\.v\\d", ptx)
        orders[case.name] = "".join({"l": "L", "b": "B", "s": "S"}[name[0]] for name in found)
print(json.dumps(orders))
"""


def test_all_warps_have_read_a_segment_before_one_writes_over_it():
    """The interpreter has one thread: what holds warps together on a GPU is read from the machine's code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    orders = json.loads(result.stdout)
    assert len(orders) == 3
    for name, order in orders.items():  # vector loads of a segment, barriers, its vector stores
        before, *stores = order.replace("S", " S").split()
        assert len(stores) > 1 and "B" in before[before.rindex("L") :], (name, order)
