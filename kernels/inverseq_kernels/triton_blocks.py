"""Tile sizes and launch options of the GEMM-like kernels: a plain function of chip, dtype and alignment.

What the choices rest on is in kernels/README.md; every configuration compiles without spills for sm_80 and sm_90
(benchmarks/results/kernel_report.txt).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Contrast with one accumulator, contrast with two, statistics of one head, logit gradient of one head; the
# rich ones have a softcap or an entropy, whose epilogues keep a second tile in registers.
CONTRAST, CONTRAST_PAIR, STATISTICS, GRADIENT = "contrast", "contrast_pair", "statistics", "gradient"
STATISTICS_RICH, GRADIENT_RICH = "statistics_rich", "gradient_rich"
# The loss's exponentials of one head.
EXPONENTIAL = "exponential"
TWO_TILES = frozenset({CONTRAST_PAIR, STATISTICS_RICH, GRADIENT_RICH})
# Up to this width the row work of a tile is a large part of its time: tiles of half the words, so that two programs
# share a multiprocessor and one multiplies while the other works on its rows. By offline counts, not by a GPU.
SHORT_DIM = 1024
PAIRED = frozenset({STATISTICS, GRADIENT, EXPONENTIAL})


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch options of one GEMM-like kernel."""

    rows: int
    words: int
    dim: int
    num_warps: int
    num_stages: int
    group_rows: int = 16  # row blocks that walk through the vocabulary together and share it in L2
    tma: bool = False  # read tiles through TMA descriptors where addresses allow it


def is_hopper_like(capability: int) -> bool:
    """Whether blocks for Hopper fit: TMA and 227 KiB of shared memory, which sm_120 (99 KiB) has not."""
    return 90 <= capability < 120


def choose_blocks(op: str, capability: int, dtype: torch.dtype, aligned: bool = True, dim: int = 4096) -> Blocks:
    """Tile sizes for a kernel family on a device: capability 80, 90, ..., or 0 for the CPU interpreter.

    ``aligned`` is ``is_aligned`` of the matrices; without it neither TMA nor asynchronous copies can load a
    tile, every element goes through registers, and only small tiles leave room for that.
    """
    if capability == 0:
        return Blocks(32, 128, 64, num_warps=4, num_stages=1)
    small = op in TWO_TILES
    if dtype == torch.float32:
        narrow = small or not aligned or op == CONTRAST
        return Blocks(64, 32 if narrow else 64, 32, num_warps=4, num_stages=2)
    if not aligned:
        return Blocks(64, 64, 32, num_warps=4, num_stages=2)
    if op in PAIRED and dim <= SHORT_DIM:
        is_hopper = is_hopper_like(capability)
        return Blocks(128, 128, 64 if is_hopper else 32, num_warps=8, num_stages=3, tma=is_hopper)
    if not is_hopper_like(capability):
        if op == CONTRAST_PAIR:
            return Blocks(128, 64, 64, num_warps=4, num_stages=3)
        return Blocks(128, 128 if small else 256, 32, num_warps=8, num_stages=4 if small else 3)
    if small:
        return Blocks(128, 128, 64, num_warps=8, num_stages=6, tma=True)
    # A fourth stage makes the contrast's two loops spill.
    return Blocks(128, 256, 64, num_warps=8, num_stages=3 if op == CONTRAST else 4, tma=True)


def choose_loss_blocks(
    capability: int, dtype: torch.dtype, aligned: bool, has_softcap: bool, dim: int = 4096
) -> Blocks:
    """Tile sizes of ``exponential_kernel``: with a softcap's derivative, tiles of 256 words spill registers."""
    if has_softcap and aligned and capability > 0 and dtype != torch.float32:
        is_hopper = is_hopper_like(capability)
        return Blocks(128, 128, 64 if is_hopper else 32, num_warps=8, num_stages=3, tma=is_hopper)
    return choose_blocks(EXPONENTIAL, capability, dtype, aligned, dim)


def capability_of(tensor: Tensor) -> int:
    """Compute capability of a tensor's GPU as 80, 90, ...; 0 for a CPU tensor (interpreter)."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def is_aligned(*matrices: Tensor) -> bool:
    """Whether row-major matrices can be loaded in 16-byte pieces that the compiler knows of, or by TMA."""
    return all(matrix.data_ptr() % 16 == 0 and matrix.shape[1] % 16 == 0 and matrix.shape[1] > 0 for matrix in matrices)


def can_use_tma(*matrices: Tensor) -> bool:
    """Whether row-major matrices meet TMA's rules, which ``is_aligned`` includes."""
    return is_aligned(*matrices)
