"""Which structure serves a call, and its tile sizes and launch options: plain functions of chip, dtype and alignment.

    tiles    a Triton GEMM whose epilogue does the row work; no fp32 logits are stored
    logits   cuBLAS stores a row chunk's logits in fp32, one Triton kernel a purpose does the row work on them

What the choices rest on is in kernels/README.md; every configuration compiles without spills for sm_80 and sm_90
(benchmarks/results/kernel_report.txt).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILES, LOGITS = "tiles", "logits"
# Contrast with one accumulator, contrast with two, statistics of one head, logit gradient of one head; the
# rich ones have a softcap or an entropy, whose epilogues keep a second tile in registers. With a bias a contrast of 256
# words a tile stores registers on sm_90 (triton 3.6).
CONTRAST, CONTRAST_PAIR, STATISTICS, GRADIENT = "contrast", "contrast_pair", "statistics", "gradient"
CONTRAST_BIAS = "contrast_bias"
STATISTICS_RICH, GRADIENT_RICH = "statistics_rich", "gradient_rich"
# The loss's exponentials of one head.
EXPONENTIAL = "exponential"
TWO_TILES = frozenset({CONTRAST_PAIR, CONTRAST_BIAS, STATISTICS_RICH, GRADIENT_RICH})
# Up to this width the row work of a tile is a large part of its time: tiles of half the words, so that two programs
# share a multiprocessor and one multiplies while the other works on its rows. By offline counts, not by a GPU.
SHORT_DIM = 1024
PAIRED = frozenset({STATISTICS, GRADIENT, EXPONENTIAL})


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch options of one kernel."""

    rows: int
    words: int
    dim: int
    num_warps: int
    num_stages: int
    group_rows: int = 16  # row blocks that walk through the vocabulary together and share it in L2
    tma: bool = False  # read tiles through TMA descriptors


def is_hopper_like(capability: int) -> bool:
    """Whether blocks for Hopper fit: TMA and 227 KiB of shared memory, which sm_120 (99 KiB) has not."""
    return 90 <= capability < 120


def choose_structure(capability: int, dtype: torch.dtype | None, aligned: bool) -> str:
    """TILES or LOGITS, by what is known without a GPU's timings.

    ``dtype`` is that of all heads of the call, None where they differ; ``aligned`` is ``is_aligned`` of their matrices:
    without it neither TMA nor asynchronous copies can load a tile. Exact fp32 products use no tensor core, where
    cuBLAS's own kernels leave nothing to win; the tiles are sized for tensor cores that read bf16, sm_80 and later.
    """
    can_tile = dtype in (torch.float16, torch.bfloat16) and aligned and not 0 < capability < 80
    return TILES if can_tile else LOGITS


def choose_blocks(op: str, capability: int, dim: int = 4096) -> Blocks:
    """Tile sizes for a kernel family on a device: capability 80, 90, ..., or 0 for the CPU interpreter."""
    if capability == 0:
        return Blocks(32, 128, 64, num_warps=4, num_stages=1)
    is_hopper = is_hopper_like(capability)
    if op in PAIRED and dim <= SHORT_DIM:
        return Blocks(128, 128, 64 if is_hopper else 32, num_warps=8, num_stages=3, tma=is_hopper)
    small = op in TWO_TILES
    if not is_hopper:
        if op == CONTRAST_PAIR:
            return Blocks(128, 64, 64, num_warps=4, num_stages=3)
        return Blocks(128, 128 if small else 256, 32, num_warps=8, num_stages=4 if small else 3)
    if small:
        return Blocks(128, 128, 64, num_warps=8, num_stages=6, tma=True)
    # A fourth stage makes the contrast's two loops spill.
    return Blocks(128, 256, 64, num_warps=8, num_stages=3 if op == CONTRAST else 4, tma=True)


def choose_loss_blocks(capability: int, has_softcap: bool, dim: int = 4096) -> Blocks:
    """Tile sizes of ``exponential_kernel``: with a softcap's derivative, tiles of 256 words spill registers."""
    return choose_blocks(EXPONENTIAL, capability, SHORT_DIM if has_softcap else dim)


def choose_logit_blocks(capability: int) -> Blocks:
    """Rows of a program and words of a segment where stored logits are read: one row a program on a GPU."""
    if capability == 0:
        return Blocks(32, 1024, 0, num_warps=4, num_stages=1)
    return Blocks(1, 4096, 0, num_warps=8, num_stages=1)


def capability_of(tensor: Tensor) -> int:
    """Compute capability of a tensor's GPU as 80, 90, ...; 0 for a CPU tensor (interpreter)."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def is_aligned(*matrices: Tensor) -> bool:
    """Whether row-major matrices can be loaded in 16-byte pieces that the compiler knows of, and by TMA."""
    return all(matrix.data_ptr() % 16 == 0 and matrix.shape[1] % 16 == 0 and matrix.shape[1] > 0 for matrix in matrices)
