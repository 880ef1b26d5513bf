"""Peak memory of every operation stays within workspace and outputs.

The torch backend at A = 8192, V = 50,257; the triton backend's stored logits, through the interpreter, on less.
"""

import gc
import os

import pytest
import torch
from inverseq_kernels import (
    contrastive_logprob,
    contrastive_logprob_sweep,
    linear_logprob,
    squared_log_ratio_loss,
)
from torch.profiler import ProfilerActivity, profile

NUM_ROWS, DIM, NUM_WORDS = 8192, 8, 50_257
WORKSPACE_BYTES = 48 * 2**20  # the logits alone would be 1570 MiB


def peak_and_kept_bytes(run) -> tuple[int, int]:
    """Most bytes alive at once during ``run`` and bytes still alive after it, from the allocator's records."""
    gc.collect()  # what earlier tests left would be freed within
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = run()
        gc.collect()  # what only cycles keep alive is no output
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert records
    alive = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del outputs
    return peak, alive


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def head(request):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, DIM, generator=generator).to(request.param).requires_grad_()
    weight = torch.randn(NUM_WORDS, DIM, generator=generator).to(request.param).requires_grad_()
    token_ids = torch.randint(0, NUM_WORDS, (NUM_ROWS,), generator=generator)
    return hidden, weight, token_ids


def accumulator_bytes(weight: torch.Tensor) -> int:
    """The fp32 sum of the weight's gradient, which a half-precision weight needs over several chunks."""
    return 0 if weight.dtype == torch.float32 else 4 * weight.numel()


def test_contrast_and_sweep_stay_within_the_workspace(head):
    hidden, weight, token_ids = head
    heads = (hidden, weight, hidden, weight, token_ids)
    keywords = {"return_reference": True, "workspace_bytes": WORKSPACE_BYTES}
    if hidden.dtype == torch.float32:  # one alpha is mixed in place, several need a tile more
        peak, kept = peak_and_kept_bytes(lambda: contrastive_logprob(*heads, 1.4, **keywords))
    else:
        peak, kept = peak_and_kept_bytes(
            lambda: contrastive_logprob_sweep(*heads, alphas=[1.0, 1.4], **keywords)
        )
    assert peak <= WORKSPACE_BYTES + kept


def test_logprob_and_its_backward_stay_within_the_workspace(head):
    hidden, weight, token_ids = head
    outputs = []
    peak, kept = peak_and_kept_bytes(
        lambda: outputs.extend(
            linear_logprob(hidden, weight, token_ids, return_entropy=True, workspace_bytes=WORKSPACE_BYTES)
        )
    )
    assert peak <= WORKSPACE_BYTES + kept
    total = outputs[0].sum() + outputs[1].sum()
    peak, kept = peak_and_kept_bytes(lambda: torch.autograd.grad(total, (hidden, weight)))
    assert peak <= WORKSPACE_BYTES + kept + accumulator_bytes(weight)


def test_loss_stays_within_the_workspace_with_and_without_gradients(head):
    hidden, weight, token_ids = head

    def run():
        targets = torch.zeros(NUM_ROWS)
        return squared_log_ratio_loss(
            hidden, weight, token_ids, targets, denominator=1, workspace_bytes=WORKSPACE_BYTES
        )

    peak, kept = peak_and_kept_bytes(run)
    assert peak <= WORKSPACE_BYTES + kept + accumulator_bytes(weight)
    if weight.dtype == torch.bfloat16:
        with torch.no_grad():
            peak, kept = peak_and_kept_bytes(run)
        assert peak <= WORKSPACE_BYTES + kept


def test_the_backward_of_the_loss_takes_no_more_than_the_gradients_it_returns(head):
    hidden, weight, token_ids = head
    hidden, token_ids = hidden[:64].detach().requires_grad_(), token_ids[:64]
    loss, _ = squared_log_ratio_loss(hidden, weight, token_ids, torch.zeros(64), denominator=1)
    peak, kept = peak_and_kept_bytes(lambda: torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
    assert hidden.nbytes + weight.nbytes <= kept and peak <= kept + 1024


def test_rounded_copies_of_an_fp32_weight_under_autocast_stay_within_the_workspace():
    """bf16 hidden states with an fp32 head that is larger than the workspace: it is rounded block by block."""
    hidden = torch.randn(16, 64).bfloat16().requires_grad_()
    weight = torch.randn(60_000, 64).requires_grad_()
    token_ids, limit = torch.arange(16), 6 * 2**20
    peak, kept = peak_and_kept_bytes(
        lambda: squared_log_ratio_loss(
            hidden, weight, token_ids, torch.zeros(16), denominator=1, workspace_bytes=limit
        )
    )
    assert weight.nbytes > 2 * limit
    assert peak <= limit + kept


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton's interpreter")
@pytest.mark.parametrize("op", ["contrast", "sweep", "logprob", "loss"])
def test_stored_logits_of_the_triton_backend_stay_within_the_workspace(op):
    """Gradients are written over the logits: no second matrix. All logits would be 5 workspaces."""
    num_rows, num_words, limit = 256, 4000, 3 * 2**18
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, DIM, generator=generator).requires_grad_() for n in (num_rows, num_words))
    token_ids, keywords = torch.arange(num_rows), {"workspace_bytes": limit, "backend": "triton"}
    heads, outputs = (hidden, weight, hidden, weight, token_ids), []
    runs = {
        "contrast": lambda: contrastive_logprob(*heads, 1.4, return_reference=True, **keywords),
        "sweep": lambda: contrastive_logprob_sweep(*heads, alphas=[1.0, 1.2, 1.4], **keywords),
        "logprob": lambda: outputs.extend(linear_logprob(hidden, weight, token_ids, return_entropy=True, **keywords)),
        "loss": lambda: squared_log_ratio_loss(
            hidden, weight, token_ids, torch.zeros(num_rows), denominator=1, **keywords
        ),
    }
    peak, kept = peak_and_kept_bytes(runs[op])
    assert limit / 2 < peak <= limit + kept
    if op == "logprob":
        total = outputs[0].sum() + outputs[1].sum()
        peak, kept = peak_and_kept_bytes(lambda: torch.autograd.grad(total, (hidden, weight)))
        assert limit / 2 < peak <= limit + kept


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton's interpreter")
def test_copies_of_hidden_states_wider_than_the_vocabulary_stay_within_the_workspace():
    """All of them would be two workspaces."""
    hidden, weight = (torch.randn(n, 512).requires_grad_() for n in (512, 64))
    token_ids, limit = torch.arange(512) % 64, 2**19
    total = linear_logprob(hidden, weight, token_ids, workspace_bytes=limit, backend="triton").sum()
    peak, kept = peak_and_kept_bytes(lambda: torch.autograd.grad(total, (hidden, weight)))
    assert hidden.nbytes + weight.nbytes <= kept and peak <= limit + kept
    inputs = (hidden.detach(), weight, token_ids, torch.zeros(512))  # no gradient of hidden lends its place
    peak, kept = peak_and_kept_bytes(
        lambda: squared_log_ratio_loss(*inputs, denominator=1, workspace_bytes=limit, backend="triton")
    )
    assert peak <= limit + kept


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton's interpreter")
@pytest.mark.parametrize("op", ["sweep", "logprob"])
def test_statistics_of_tiles_stay_within_the_workspace(op):
    """What is left of every tile, for every alpha: of all rows together it would be 2 and 3 workspaces."""
    num_rows, num_words, limit = 128, 1000, {"sweep": 2**14, "logprob": 2**12}[op]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (num_rows, num_words))
    token_ids, keywords = torch.arange(num_rows), {"workspace_bytes": limit, "backend": "triton"}
    runs = {
        "sweep": lambda: contrastive_logprob_sweep(
            hidden, weight, hidden, weight, token_ids, alphas=[1.0, 1.2, 1.4], **keywords
        ),
        "logprob": lambda: linear_logprob(hidden, weight, token_ids, return_entropy=True, **keywords),
    }
    peak, _ = peak_and_kept_bytes(runs[op])
    output_bytes = 4 * num_rows * {"sweep": 4, "logprob": 3}[op] + 64  # log pi_l and the log-sum-exp, and the alphas
    assert limit / 2 < peak - output_bytes <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_hidden", [False, True])
def test_buffers_of_the_tiles_of_the_loss_stay_within_the_workspace(needs_hidden, dtype):
    pytest.importorskip("triton")
    from inverseq_kernels import triton_loss
    from inverseq_kernels.torch_head import HeadSettings

    num_rows, num_words, dim = 960, 1000, 64
    hidden, weight = torch.zeros(num_rows, dim, dtype=dtype), torch.zeros(num_words, dim, dtype=dtype)
    row_bytes = 0 if needs_hidden else dim * dtype.itemsize
    limit = 480 * (2 * 1024 + 8 * 8 + 24 + row_bytes) - 1  # two chunks, but for a byte
    needs, kept = (needs_hidden, True, False), []

    def allocate():
        head = (hidden, weight, None)
        chunks = triton_loss._TileChunks(head, HeadSettings(None, 1.0, num_words), row_bytes, limit, None)
        kept.extend((chunks, triton_loss._GradientSums(head, weight, needs, chunks.num_rows)))

    peak, _ = peak_and_kept_bytes(allocate)
    gradients = 4 * weight.numel() + (hidden.nbytes if needs_hidden else 0)
    assert 0.6 * limit < peak - gradients <= limit
