"""The "logits" structure: cuBLAS stores a row chunk's products with all words in fp32, Triton does the row work.

The products of R rows take 4 bytes a word of the workspace, whatever is made of them: gradients are written over the
logits that they come from, and a contrast adds the better head's products to the rescaled ones of the plain head.
What reads them is in triton_stored_rows.py; chunks of rows are cut by triton_logprob.py, triton_loss.py and
triton_contrastive.py.
"""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from inverseq_kernels.torch_head import HeadSettings
from inverseq_kernels.triton_blocks import Blocks, capability_of, choose_logit_blocks
from inverseq_kernels.triton_common import matmul_into, pitch_of, rows_within
from inverseq_kernels.triton_stored_rows import gradient_rows_kernel, loss_rows_kernel, statistics_rows_kernel

# cuBLAS multiplies in tiles of 128 rows; where the workspace does not hold that many, in some multiple of 16.
FULL_ROWS, FEWEST_ROWS = 128, 16


class StoredLogits:
    """One buffer of fp32 products [rows, pitch], refilled for every chunk of a call, and what kernels make of it."""

    def __init__(self, hidden: Tensor, settings: HeadSettings, rows: int, blocks: Blocks | None = None):
        self.settings = settings
        self.blocks = choose_logit_blocks(capability_of(hidden)) if blocks is None else blocks
        shape = (min(rows, hidden.shape[0]), pitch_of(settings.num_valid_vocab))
        self.products = hidden.new_empty(shape, dtype=torch.float32)

    def write(self, hidden: Tensor, weight: Tensor, beta: float = 0.0) -> None:
        """products = beta * products + hidden [R, D] @ weight [V, D].T, by cuBLAS, in fp32."""
        matmul_into(self.products[: hidden.shape[0], : weight.shape[0]], hidden, weight.t(), beta=beta)

    def write_statistics(
        self,
        bias: Tensor | None,  # [pitch] of ``padded_bias``
        token_ids: Tensor,  # [R]
        outputs: Sequence[Tensor | None],  # maxima [R], totals [R], moments [R] or None, labels [R]
        *,
        other_bias: Tensor | None = None,  # [pitch]
        rescale: Tensor | None = None,  # alphas [R] or [1] for which z_l is left as the start of the mixture's sum
        mixed: Tensor | None = None,  # alphas of the mixture whose sum the buffer holds
    ) -> None:
        """Launch ``statistics_rows_kernel``."""
        alphas = mixed if rescale is None else rescale
        statistics_rows_kernel[self.grid(token_ids)](
            self.products,
            bias,
            other_bias,
            token_ids,
            alphas,
            *outputs,
            *self.sizes(token_ids),
            0 if alphas is None or alphas.shape[0] == 1 else 1,
            *self.numbers(),
            HAS_OTHER_BIAS=other_bias is not None,
            HAS_MOMENT=outputs[2] is not None,
            RESCALE=rescale is not None,
            MIXED=mixed is not None,
            **self.constants(bias),
        )

    def write_gradient(
        self,
        bias: Tensor | None,  # [pitch]
        token_ids: Tensor,  # [R]
        rows: Sequence[Tensor | None],  # lse, gradients of log-probs and entropy, entropy; the last two may be None
        dtype: torch.dtype,
    ) -> Tensor:
        """Launch ``gradient_rows_kernel``; G [R, V] in ``dtype``, in the buffer."""
        gradient = self.products.view(dtype)
        gradient_rows_kernel[self.grid(token_ids)](
            self.products,
            gradient,
            bias,
            token_ids,
            *rows,
            *self.sizes(token_ids),
            gradient.stride(0),
            *self.numbers(),
            HAS_ENTROPY=rows[2] is not None,
            **self.constants(bias),
        )
        return gradient[: token_ids.shape[0], : self.settings.num_valid_vocab]

    def write_loss_gradient(
        self,
        bias: Tensor | None,  # [pitch]
        token_ids: Tensor,  # [R]
        inputs: Sequence[Tensor],  # targets [R], row weights [R], the scale of coefficients and what undoes it, 0-d
        outputs: Sequence[Tensor],  # log-probs, weight factors, hidden factors, [R]
        dtype: torch.dtype,
    ) -> Tensor:
        """Launch ``loss_rows_kernel``; G [R, V] in ``dtype``, in the buffer."""
        gradient = self.products.view(dtype)
        loss_rows_kernel[self.grid(token_ids)](
            self.products,
            gradient,
            bias,
            token_ids,
            *inputs,
            *outputs,
            *self.sizes(token_ids),
            gradient.stride(0),
            *self.numbers(),
            TIGHT=dtype == torch.float16,
            **self.constants(bias),
        )
        return gradient[: token_ids.shape[0], : self.settings.num_valid_vocab]

    def grid(self, token_ids: Tensor) -> tuple[int]:
        return (triton.cdiv(token_ids.shape[0], self.blocks.rows),)

    def sizes(self, token_ids: Tensor) -> tuple[int, int, int]:
        return token_ids.shape[0], self.settings.num_valid_vocab, self.products.stride(0)

    def numbers(self) -> tuple[float, float]:
        softcap = self.settings.softcap
        return 1.0 if softcap is None else softcap, 1.0 / self.settings.temperature

    def constants(self, bias: Tensor | None) -> dict:
        """What every kernel on stored logits is compiled for."""
        return {
            "ROWS": self.blocks.rows,
            "SEGMENT": self.blocks.words,
            "HAS_BIAS": bias is not None,
            "HAS_SOFTCAP": self.settings.softcap is not None,
            "num_warps": self.blocks.num_warps,
            "num_stages": self.blocks.num_stages,
        }


def stored_rows(workspace_bytes: int, bytes_per_row: int, num_rows: int) -> int:
    """Rows of equal chunks whose logits, and what else a row needs, fit the workspace."""
    block_rows = FULL_ROWS if workspace_bytes >= FULL_ROWS * bytes_per_row else FEWEST_ROWS
    return rows_within(workspace_bytes, bytes_per_row, num_rows, block_rows)



def padded_bias(bias: Tensor | None, num_valid: int) -> Tensor | None:
    """Bias [pitch] in fp32 with -inf past the valid words: kernels read it in 16-byte pieces, and who is absent."""
    if bias is None:
        return None
    padded = bias.new_full((pitch_of(num_valid),), -math.inf, dtype=torch.float32)
    padded[:num_valid] = bias[:num_valid]
    return padded
