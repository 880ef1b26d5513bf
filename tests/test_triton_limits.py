"""What the Triton launchers keep inside their matrices and ranges, and which blocks fit which GPU."""

import pytest
import torch

pytest.importorskip("triton")
from inverseq_kernels import IGNORE_INDEX, torch_loss, triton_logprob, triton_loss  # noqa: E402
from inverseq_kernels.triton_blocks import (  # noqa: E402
    CONTRAST,
    CONTRAST_PAIR,
    GRADIENT,
    STATISTICS_RICH,
    choose_blocks,
    choose_loss_blocks,
)

NUM_WORDS, PITCH, DIM = 70, 128, 16
SETTINGS = {"softcap": None, "temperature": 1.0, "num_valid_vocab": NUM_WORDS, "workspace_bytes": 2**24}


def make_inputs(num_rows, dtype=torch.float32):
    """hidden, weight, no bias, token ids; logits of one nat or so."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, DIM, generator=generator).to(dtype) for n in (num_rows, NUM_WORDS))
    return [hidden, weight / 4, None, torch.arange(num_rows) % NUM_WORDS]


def logprob_gradients(inputs, grad):
    """Gradients of hidden and weight for upstream gradients [A] of the log-probs."""
    forward = triton_logprob.logprob_forward(*inputs, want_entropy=False, **SETTINGS)
    return triton_logprob.logprob_backward(
        grad, None, *inputs, *forward[1:], needs=(True, True, False), **SETTINGS
    )


def loss_forward(inputs):
    num_rows = inputs[0].shape[0]
    ones = torch.ones(num_rows)
    return triton_loss.squared_log_ratio_forward(
        *inputs, -3 * ones, ones, torch.tensor(1.0), needs=(True, True, False), **SETTINGS
    )


def test_a_token_id_past_the_vocabulary_leaves_the_other_rows_alone():
    inputs = make_inputs(2)
    expected = loss_forward(inputs)[2]
    inputs[3][0] = PITCH + 5  # word 5 of the row below, were it not masked
    actual = loss_forward(inputs)[2]
    torch.testing.assert_close(actual[1], expected[1])


def test_gradient_rows_are_stored_up_to_the_pitch(monkeypatch):
    matrices = []
    add = triton_logprob._GradientSums.add

    def spy(self, gradient, *rest):
        matrices.append(gradient.as_strided((gradient.shape[0], PITCH), gradient.stride()).clone())
        add(self, gradient, *rest)

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(7))
    monkeypatch.setattr(triton_logprob._GradientSums, "add", spy)
    logprob_gradients(make_inputs(3), torch.ones(3))
    assert len(matrices) == 1
    assert not matrices[0][:, NUM_WORDS:].any()
    assert matrices[0][:, :NUM_WORDS].all()


def test_the_upstream_gradient_of_an_ignored_row_does_not_choose_the_scale_of_fp16():
    inputs, grad = make_inputs(4, torch.float16), torch.ones(4)
    inputs[3][1] = IGNORE_INDEX
    expected = logprob_gradients(inputs, grad)
    grad[1] = 1e30
    for actual, plain in zip(logprob_gradients(inputs, grad)[:2], expected[:2], strict=True):
        assert torch.equal(actual, plain)
        assert actual.any()


@pytest.mark.parametrize("backend", [torch_loss, triton_loss])
def test_an_fp16_sum_is_divided_before_it_is_stored(backend):
    hidden, weight, _, token_ids = make_inputs(64, torch.float16)
    hidden[:, 0] = 64.0  # one column whose sum over rows passes 65504
    weight[:, 0] = 0.0
    inputs = (hidden, weight, None, torch.zeros_like(token_ids))
    ones = torch.ones(64)
    expected, actual = (
        backend.squared_log_ratio_forward(
            *arguments, -40 * ones, ones, torch.tensor(1024.0), needs=(True, True, False), **SETTINGS
        )[3]
        for arguments in ((hidden.float(), weight.float(), *inputs[2:]), inputs)
    )
    assert 65504 < 1024 * expected.abs().amax() < 2**20
    torch.testing.assert_close(actual.float(), expected, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("op", [CONTRAST, CONTRAST_PAIR, GRADIENT, STATISTICS_RICH])
def test_hopper_blocks_are_for_hopper_and_its_kind(op):
    small_memory = choose_blocks(op, 120, torch.bfloat16)
    assert small_memory == choose_blocks(op, 80, torch.bfloat16)
    assert not small_memory.tma
    tile_bytes = (small_memory.rows + small_memory.words) * small_memory.dim * 2
    assert tile_bytes * small_memory.num_stages < 99 * 1024
    assert choose_blocks(op, 90, torch.bfloat16).tma
    assert choose_blocks(op, 100, torch.bfloat16).tma
    for capability, is_hopper in ((80, False), (90, True), (120, False)):
        assert choose_loss_blocks(capability, torch.bfloat16, True, True).tma == is_hopper
