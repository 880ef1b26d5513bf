"""Launchers of hopper_kernels.py: what the package's kernels leave and ``combine`` reads, from bf16 matrices.

Every launcher takes a ``Setup``, which says how large the tiles are, how many programs there are and what starts a
kernel: a GPU, or the simulator of the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from inverseq_kernels import IGNORE_INDEX
from inverseq_kernels.triton_common import combine
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

try:
    from benchmarks import hopper_kernels
except ImportError:  # run as a script
    import hopper_kernels

PITCH_WORDS = 64
# Width and number of a ring's stages that are compared: 192 and 216 KiB. Exponentials leave through another 32 KiB.
RINGS, EXPONENTIAL_RINGS = ((64, 4), (32, 9)), ((64, 4), (32, 8))


def start_on_gpu(kernel: Any, num_programs: int, arguments: tuple, constants: dict[str, int]) -> None:
    """Start a kernel; its first warpgroup is ``num_warps``, the other warps are its own matter."""
    kernel[(num_programs,)](*arguments, **constants, num_warps=4)


@dataclass(frozen=True)
class Setup:
    """Tile sizes and how a kernel is started: 192 KiB of stages as they stand here."""

    num_programs: int  # multiprocessors of the GPU
    half: int = 64  # rows of a warpgroup
    words: int = 256
    dim: int = 64
    stages: int = 4
    group_rows: int = 16
    start: Callable[[Any, int, tuple, dict[str, int]], None] = start_on_gpu
    kernels: Any = hopper_kernels  # the module; the tests plant bugs in copies of it

    def launch(self, kernel: Any, num_rows: int, num_words: int, arguments: tuple) -> None:
        """Start at most one program a tile."""
        num_tiles = triton.cdiv(num_rows, 2 * self.half) * triton.cdiv(num_words, self.words)
        constants = {"STAGES": self.stages, "GROUP_ROWS": self.group_rows}
        self.start(kernel, min(self.num_programs, num_tiles), arguments, constants)

    def sources(self, hidden: Tensor, weight: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
        """What a kernel reads a head through."""
        return descriptor(hidden, [self.half, self.dim]), descriptor(weight, [self.words, self.dim])

    def statistics(self, hidden: Tensor, num_words: int, num_sets: int) -> tuple[Tensor, Tensor, Tensor]:
        """Maxima and totals [sets, word blocks, A] and labels [sets, A], not written yet."""
        shape = (num_sets, triton.cdiv(num_words, self.words), hidden.shape[0])
        maxima, totals = hidden.new_empty((2, *shape), dtype=torch.float32)
        return maxima, totals, hidden.new_empty((num_sets, hidden.shape[0]), dtype=torch.float32)


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor of a row-major matrix that TMA loads or stores in blocks."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block, layout)


def statistics_logprob(
    hidden: Tensor,  # [A, D] bf16
    weight: Tensor,  # [V, D] bf16
    token_ids: Tensor,  # [A] int64
    setup: Setup,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs [A] fp32 of the tokens, as linear_logprob's."""
    (num_rows, dim), num_words = hidden.shape, weight.shape[0]
    maxima, totals, labels = setup.statistics(hidden, num_words, 1)
    arguments = (*setup.sources(hidden, weight), token_ids, maxima, totals, labels)
    arguments += (num_rows, num_words, dim, 1.0 / temperature)
    setup.launch(setup.kernels.hopper_statistics_kernel, num_rows, num_words, arguments)
    return ended(maxima, totals, labels, token_ids)[0]


def contrast_logprob(
    better: tuple[Tensor, Tensor],  # hidden [A, D_w] and weight [V, D_w], bf16
    plain: tuple[Tensor, Tensor],  # hidden [A, D_l] and weight [V, D_l]
    token_ids: Tensor,  # [A] int64
    alphas: Tensor,  # [A] or [1] fp32
    setup: Setup,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Targets and log pi_l(y), both [A] fp32, as contrastive_logprob's with return_reference."""
    num_rows, num_words = better[0].shape[0], better[1].shape[0]
    maxima, totals, labels = setup.statistics(better[0], num_words, 2)
    arguments = (*setup.sources(*better), *setup.sources(*plain), token_ids, alphas, maxima, totals, labels)
    arguments += (num_rows, num_words, better[0].shape[1], plain[0].shape[1])
    arguments += (0 if alphas.shape[0] == 1 else 1, 1.0 / temperature)
    setup.launch(setup.kernels.hopper_contrast_kernel, num_rows, num_words, arguments)
    mixed, reference = ended(maxima, totals, labels, token_ids)
    return mixed, reference


def exponentials(
    hidden: Tensor,  # [R, D] bf16
    weight: Tensor,  # [V, D] bf16
    token_ids: Tensor,  # [R] int64
    setup: Setup,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """2**-o exp(z) [R, pitch] bf16, the maxima [word blocks, R] that give o, and the tokens' log-probs [R]."""
    (num_rows, dim), num_words = hidden.shape, weight.shape[0]
    maxima, totals, labels = setup.statistics(hidden, num_words, 1)
    matrix = hidden.new_empty((num_rows, triton.cdiv(num_words, PITCH_WORDS) * PITCH_WORDS))
    arguments = (*setup.sources(hidden, weight), token_ids, descriptor(matrix, [setup.half, setup.words // 4]))
    arguments += (maxima, totals, labels, num_rows, num_words, dim, 1.0 / temperature)
    setup.launch(setup.kernels.hopper_exponential_kernel, num_rows, num_words, arguments)
    return matrix, maxima[0], ended(maxima, totals, labels, token_ids)[0]


def ended(maxima: Tensor, totals: Tensor, labels: Tensor, token_ids: Tensor) -> Tensor:
    """The package's end of the log-sum-exp: log-probs [sets, A]."""
    logprobs = torch.empty_like(labels)
    combine(maxima, totals, None, labels, token_ids, logprobs, ignore_index=IGNORE_INDEX)
    return logprobs
