"""What the Triton kernels touch: nothing outside the tensors of a launch, and nothing that another program writes.

The interpreter runs programs one after the other and reads past a tensor without a word; here every address of every
load and store is looked at. On a GPU the first is a fault or a wrong number, the second a race.
"""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("addresses are watched in the interpreter", allow_module_level=True)
import numpy as np  # noqa: E402
from inverseq_kernels import IGNORE_INDEX  # noqa: E402
from inverseq_kernels.triton_blocks import LOGITS, TILES, Blocks  # noqa: E402
from inverseq_kernels.triton_contrastive import contrastive_forward  # noqa: E402
from inverseq_kernels.triton_logprob import logprob_backward, logprob_forward  # noqa: E402
from inverseq_kernels.triton_loss import squared_log_ratio_forward  # noqa: E402
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

NUM_ROWS, NUM_WORDS = 19, 200
BLOCKS = {
    TILES: Blocks(8, 64, 32, num_warps=4, num_stages=1, group_rows=2),
    LOGITS: Blocks(8, 64, 0, num_warps=4, num_stages=1),
}
NOT_HELD = -1  # a word of another rank


class Watch:
    """The tensors of the current launch, and which program used each address: none, one, or several."""

    NONE, SEVERAL = -1, -2

    def __init__(self):
        self.kernels, self.name, self.spans = set(), "", []

    def begin(self, name: str, arguments) -> None:
        """A launch: the bytes of its tensors, those that overlap together, which no program has used yet."""
        bases = [value.base if isinstance(value, TensorDescriptor) else value for value in arguments]
        tensors = [base for base in bases if isinstance(base, torch.Tensor) and base.numel() > 0]
        spans = []
        for start, tensor in sorted(((tensor.data_ptr(), tensor) for tensor in tensors), key=lambda pair: pair[0]):
            # A matrix ends with its last row's padding, which its kernels may read, but not beyond its storage.
            length = max((n * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)), default=1)
            storage = tensor.untyped_storage()
            stop = min(start + length * tensor.itemsize, storage.data_ptr() + storage.nbytes())
            if spans and start < spans[-1][1]:
                spans[-1][1] = max(stop, spans[-1][1])
            else:
                spans.append([start, stop])
        self.name = name
        self.spans = [(start, stop, *np.full((2, stop - start), self.NONE)) for start, stop in spans]
        self.kernels.add(name.removesuffix("_kernel"))

    def touch(self, grid_index, pointers, mask, *, is_store: bool) -> None:
        """Loads or stores of one program."""
        size, program = pointers.get_element_ty().primitive_bitwidth // 8, grid_index[0] * 2**20 + grid_index[1]
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        num_outside = addresses.size
        for start, stop, readers, writers in self.spans:
            at = addresses[(addresses >= start) & (addresses + size <= stop)] - start
            num_outside -= at.size
            is_alone = [(users[at] == self.NONE) | (users[at] == program) for users in (readers, writers)]
            meets_others = not is_alone[1].all() or (is_store and not is_alone[0].all())
            assert not meets_others, f"{self.name}: program {grid_index} and others use what one of them writes"
            (writers if is_store else readers)[at] = np.where(is_alone[is_store], program, self.SEVERAL)
        assert num_outside == 0, f"{self.name}: {num_outside} addresses outside all tensors"


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    call, builder = GridExecutor.__call__, InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_call(self, *args, **kwargs):
        watch.begin(self.fn.__name__, [*args, *kwargs.values()])
        return call(self, *args, **kwargs)

    def watched_load(self, pointers, mask, *rest, **options):
        watch.touch(self.grid_idx, pointers, mask, is_store=False)
        return load(self, pointers, mask, *rest, **options)

    def watched_store(self, pointers, value, mask, *rest, **options):
        watch.touch(self.grid_idx, pointers, mask, is_store=True)
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(GridExecutor, "__call__", watched_call)
    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    return watch


def make_head(dim: int, seed: int, bias: bool):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NUM_ROWS, dim, generator=generator).half()
    weight = torch.randn(NUM_WORDS, dim, generator=generator).half() / math.sqrt(dim)
    return [hidden, weight, torch.randn(NUM_WORDS, generator=generator).half() if bias else None]


def make_token_ids(num_valid: int):
    """Ids as a GPU may get them unchecked: first and last words, ignored, another rank's, padding, past everything."""
    token_ids = torch.arange(NUM_ROWS) * 31 % num_valid
    odd = [0, num_valid - 1, IGNORE_INDEX, NOT_HELD, num_valid, num_valid + 5, 2**40, 63, 64]
    token_ids[: len(odd)] = torch.tensor(odd)
    token_ids[15] = token_ids[-1] = NUM_WORDS + 100  # the last rows of two chunks: nothing follows them
    return token_ids


def launch_all(num_valid: int, *, bias: bool, **settings) -> None:
    """Every operation on a ragged problem."""
    settings["num_valid_vocab"] = num_valid
    head, plain = make_head(48, 0, bias), make_head(80, 1, bias)
    token_ids, ones = make_token_ids(num_valid), torch.ones(NUM_ROWS)
    for alphas in (torch.full((1, 1), 1.4), torch.rand(1, NUM_ROWS), torch.rand(2, NUM_ROWS)):
        contrastive_forward(*head, *plain, token_ids, alphas, **settings)
    _, lse, entropy = logprob_forward(*head, token_ids, want_entropy=bias, **settings)
    upstream = (ones, ones if bias else None)
    logprob_backward(*upstream, *head, token_ids, lse, entropy, needs=(True, True, True), **settings)
    for needs in ((True, True, True), (False, True, False))[: 1 + bias]:
        squared_log_ratio_forward(*head, token_ids, -ones, ones, torch.tensor(2.0), needs=needs, **settings)


@pytest.mark.parametrize("structure", [TILES, LOGITS])
def test_no_program_leaves_its_tensors_or_meets_another(watch, structure):
    common = {"structure": structure, "blocks": BLOCKS[structure], "temperature": 0.7}
    # Tiles and segments that end with the words, all rows in one launch; and neither, the last chunk ragged.
    launch_all(128, bias=False, softcap=None, workspace_bytes=2**24, **common)
    launch_all(130, bias=True, softcap=3.0, workspace_bytes=1, **common)
    expected = {
        TILES: {"contrast", "contrast_pair", "statistics", "gradient", "exponential", "row_factor", "logit_gradient"},
        LOGITS: {"contrast_rows", "statistics_rows", "gradient_rows", "loss_rows"},
    }[structure]
    assert watch.kernels == expected | {"combine", "scale_rows", "column_sum"}
