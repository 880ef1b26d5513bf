"""The operations of inverseq_kernels written with full logits in plain PyTorch, for tests of any backend."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """One head with its rows; the leaves require a gradient."""

    hidden: Tensor  # [A, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [A] int64

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None)

    def to(self, dtype: torch.dtype) -> "Problem":
        """A copy in another dtype with leaves of its own."""
        hidden, weight, bias = (
            None if tensor is None else tensor.detach().to(dtype).requires_grad_()
            for tensor in (self.hidden, self.weight, self.bias)
        )
        return replace(self, hidden=hidden, weight=weight, bias=bias)


def make_problem(
    num_rows: int,
    dim: int,
    num_words: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    ignored: tuple[int, ...] = (),
    seed: int = 0,
) -> Problem:
    """Random head and rows with logits of a few nats; ``ignored`` rows carry IGNORE_INDEX."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, num_words, (num_rows,), generator=generator)
    token_ids[list(ignored)] = IGNORED
    problem = Problem(
        hidden=torch.randn(num_rows, dim, generator=generator),
        weight=torch.randn(num_words, dim, generator=generator) * (2 / math.sqrt(dim)),
        bias=torch.randn(num_words, generator=generator) if bias else None,
        token_ids=token_ids,
    )
    return problem.to(dtype)


def log_softmax(
    problem: Problem,
    softcap: float | None = None,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
) -> Tensor:
    """[A, V] log-probabilities in the problem's dtype; words that a -inf bias removes have -inf."""
    logits = problem.hidden @ problem.weight.t()
    removed = torch.zeros(problem.weight.shape[0], dtype=torch.bool)
    if problem.bias is not None:
        removed = problem.bias.detach() == -math.inf
        logits = logits + problem.bias.masked_fill(removed, 0.0)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if num_valid_vocab is not None:
        removed = removed | (torch.arange(problem.weight.shape[0]) >= num_valid_vocab)
    return (logits / temperature).masked_fill(removed, -math.inf).log_softmax(dim=1)


def pick(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """[A] entries of [A, V] at the token ids, 0 on ignored rows."""
    found = log_probs.gather(1, token_ids.clamp(min=0)[:, None]).squeeze(1)
    return found.masked_fill(token_ids == IGNORED, 0.0)


def entropy(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """[A] entropy in nats, 0 on ignored rows."""
    products = log_probs.exp() * log_probs.clamp(min=-1e4)
    return (-products.sum(dim=1)).masked_fill(token_ids == IGNORED, 0.0)


def contrast(better: Tensor, plain: Tensor, token_ids: Tensor, alpha: float | Tensor) -> Tensor:
    """[A] contrastive targets from two [A, V] log-probabilities, with all three softmaxes written out."""
    alpha = alpha[:, None] if isinstance(alpha, Tensor) else alpha
    removed = better.isneginf() | plain.isneginf()
    mixed = alpha * better.masked_fill(removed, 0.0) + (1 - alpha) * plain.masked_fill(removed, 0.0)
    return pick(mixed.masked_fill(removed, -math.inf).log_softmax(dim=1), token_ids)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius error over the norm of the expected value, or the plain error where that is 0."""
    difference = (actual.double() - expected.double()).norm()
    norm = expected.double().norm()
    return float(difference / norm if norm > 0 else difference)
