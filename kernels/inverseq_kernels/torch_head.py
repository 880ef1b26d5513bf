"""What the torch backend's operations share: reading a head block by block, and the log-sum-exp state.

Logits are made in fp32 (float64 for float64 inputs). Half-precision operands are multiplied as fp32
copies of a block on devices without an fp32-output matmul, and by cuBLAS with fp32 output on CUDA.
Every buffer is allocated once per call and counted against the workspace.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX, accumulate_dtype

# Below this the limit is raised: a tile of 16 rows is the smallest that a call works with.
MIN_ROWS = 16
# Start of a running maximum: finite, so that rescaling an empty state is exp(-1e30 - m) = 0, never NaN.
EMPTY_MAX = -1e30
# Token id of a row whose word another rank holds: it has a log-sum-exp here and no label.
NOT_IN_SHARD = -1


@dataclass(frozen=True)
class HeadSettings:
    """The numbers that turn hidden @ weight.T into log-softmax inputs."""

    softcap: float | None
    temperature: float
    num_valid_vocab: int


class Head:
    """One head's weight and bias, cut to the valid words, read in blocks of the vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: HeadSettings):
        valid = settings.num_valid_vocab
        self.settings = settings
        self.weight = weight[:valid]  # [V, D]
        self.num_words, self.dim = self.weight.shape
        self.read_dtype = hidden.dtype
        self.dtype = accumulate_dtype(hidden.dtype)
        self.half_matmul = hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16)
        self.operand_dtype = hidden.dtype if self.half_matmul else self.dtype
        # Under autocast an fp32 weight is rounded to hidden's dtype before it becomes an fp32 operand.
        self.rounds = weight.dtype != self.read_dtype and self.read_dtype != self.operand_dtype
        self.converts = self.rounds or weight.dtype != self.operand_dtype
        self.bias = self.removed = None
        if bias is not None:
            bias = bias[:valid].to(self.read_dtype).to(self.dtype)
            dead = bias == -math.inf
            self.bias = bias.masked_fill(dead, 0.0)  # [V] finite
            self.removed = torch.zeros_like(self.bias).masked_fill_(dead, -math.inf)  # [V] 0 or -inf
        self._scratch = None
        self._cached = None

    def bytes_per_scratch_word(self) -> int:
        """Bytes of one converted row of the weight, with the copy in hidden's dtype where that rounds."""
        if not self.converts:
            return 0
        size = self.operand_dtype.itemsize + (self.read_dtype.itemsize if self.rounds else 0)
        return self.dim * size

    def bias_bytes(self) -> int:
        """Bytes of the bias and its removed words in the accumulation dtype, with what makes them."""
        return 0 if self.bias is None else 4 * self.num_words * self.dtype.itemsize

    def weight_block(self, start: int, stop: int, block_words: int) -> Tensor:
        """[stop-start, D] of the weight as matmul operand; a view where nothing needs converting."""
        block = self.weight[start:stop]
        if not self.converts:
            return block
        if self._scratch is None:
            self._scratch = block.new_empty((block_words, self.dim), dtype=self.operand_dtype)
        out = self._scratch[: stop - start]
        if self._cached != (start, stop):
            out.copy_(block.to(self.read_dtype) if self.rounds else block)
            self._cached = (start, stop)
        return out

    def write_logits(self, out: Tensor, hidden: Tensor, start: int, stop: int, block_words: int) -> None:
        """out [R, stop-start] = finite logits of a row block; words removed by the bias still take part."""
        matmul_into(out, hidden, self.weight_block(start, stop, block_words).t())
        if self.bias is not None:
            out.add_(self.bias[start:stop])
        softcap, temperature = self.settings.softcap, self.settings.temperature
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)
        if temperature != 1.0:
            out.div_(temperature)

    def remove_words(self, logits: Tensor, start: int, stop: int) -> None:
        """Give the words that the bias removed a logit of -inf, in place."""
        if self.removed is not None:
            logits.add_(self.removed[start:stop])


def matmul_into(out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> None:
    """out (+)= left @ right with fp32 products of half operands where the device has such a matmul."""
    if left.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, left, right, out=out)
        else:
            torch.mm(left, right, out=out)
    elif accumulate:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def load_rows(hidden: Tensor, token_ids: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """[R, D] copy of a row block as matmul operand, ignored rows zeroed: whatever they hold never spreads."""
    ignored = token_ids[rows] == IGNORE_INDEX
    copy = torch.empty_like(hidden[rows], dtype=dtype).copy_(hidden[rows])
    return copy.masked_fill_(ignored[:, None], 0.0)


def blocks(total: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) pairs that cover range(total)."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def disabled_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast is still on inside a custom operation and would make its fp32 matmuls half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


class OnlineLogSumExp:
    """Running maximum and sum of exponentials of [A] rows, or of [K, A], over vocabulary blocks."""

    def __init__(self, like: Tensor, num_rows: int, want_entropy: bool = False):
        self.maximum = like.new_full((num_rows,), EMPTY_MAX)  # [A]
        self.sum = like.new_zeros(num_rows)  # [A]
        # sum of exp(z - max) * (z - max), from which the entropy follows
        self.moment = like.new_zeros(num_rows) if want_entropy else None  # [A] or None

    def add_(self, logits: Tensor, rows: slice, scratch: Tensor | None = None) -> None:
        """Take a tile [R, Vb] in and destroy it; ``scratch`` of its shape is needed for the entropy."""
        old, total = self.maximum[rows], self.sum[rows]
        new = torch.maximum(old, logits.amax(dim=1))
        shift = old - new
        scale = shift.exp()
        logits.sub_(new[:, None])
        if self.moment is None:
            weights = logits.exp_()
        else:
            weights = torch.exp(logits, out=scratch)
            # a removed word has weight 0 and shift -inf: bound the shift so that their product is 0
            products = logits.clamp_(min=EMPTY_MAX).mul_(weights)
            moment = self.moment[rows]
            moment.add_(total * shift).mul_(scale).add_(products.sum(dim=1))
        total.mul_(scale).add_(weights.sum(dim=1))
        old.copy_(new)

    def reduce_(self, group: dist.ProcessGroup) -> None:
        """Combine with the states of the group's other ranks, which hold other words of the same rows."""
        total = self.maximum.clone()
        dist.all_reduce(total, dist.ReduceOp.MAX, group=group)
        shift = self.maximum - total
        scale = shift.exp()
        if self.moment is not None:
            self.moment.add_(self.sum * shift).mul_(scale)
            dist.all_reduce(self.moment, group=group)
        dist.all_reduce(self.sum.mul_(scale), group=group)
        self.maximum.copy_(total)

    def value(self) -> Tensor:
        """[A] log-sum-exp."""
        return self.maximum + self.sum.log()

    def logprobs(self, labels: Tensor) -> Tensor:
        """[A] labels minus log-sum-exp; the maximum goes first, so that a large one is not rounded into it."""
        return (labels - self.maximum) - self.sum.log()

    def entropy(self) -> Tensor:
        """[A] entropy of the softmax in nats."""
        return self.sum.log() - self.moment / self.sum


def end_logsumexp(
    state: OnlineLogSumExp, labels: Tensor, token_ids: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, log-sum-exp and entropy (empty when not wanted), 0 in ignored rows; with ``group`` of all its words.

    ``labels`` is 0 where another rank holds the word.
    """
    if group is not None:
        state.reduce_(group)
        dist.all_reduce(labels, group=group)
    ignored = token_ids == IGNORE_INDEX
    logprobs = state.logprobs(labels).masked_fill_(ignored, 0.0)
    entropy = labels.new_empty(0) if state.moment is None else state.entropy().masked_fill_(ignored, 0.0)
    return logprobs, state.value(), entropy


def gather_labels_(labels: Tensor, logits: Tensor, token_ids: Tensor, start: int, stop: int) -> None:
    """Write the logit of each row's token into labels [R] where that token lies in this block."""
    inside = (token_ids >= start) & (token_ids < stop)
    column = (token_ids - start).clamp_(0, stop - start - 1)
    found = logits.gather(1, column[:, None]).squeeze(1)
    labels.copy_(torch.where(inside, found, labels))
