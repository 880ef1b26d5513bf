"""Errors of the fused operations against float64, beside same-dtype PyTorch, on any device.

    PYTHONPATH=.:kernels python benchmarks/precision.py [--out benchmarks/results/precision.jsonl] [--device cpu]

The truth is computed in float64 from the same rounded inputs. "pytorch" is a linear layer in the input dtype followed
by ``.float().log_softmax``, which is what trainers commonly do. Log-prob errors are in nats; gradient errors are
relative to the norm of the true gradient. Rows are appended to ``--out``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_suite_report import commit, device_name, versions
from inverseq_kernels import contrastive_logprob, linear_logprob, squared_log_ratio_loss
from torch import Tensor

SHAPE = {"A": 256, "D": 576, "V": 49152}
ALPHA = 1.4


def pytorch_logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]


def truth_logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.double() @ weight.double().T).log_softmax(-1)


def nats(actual: Tensor, expected: Tensor) -> dict[str, float]:
    error = actual.double() - expected
    return {"rms_error_nats": error.square().mean().sqrt().item(), "max_error_nats": error.abs().max().item()}


def gradient_errors(
    loss_of: Callable, hidden: Tensor, weight: Tensor, truth: tuple[Tensor, Tensor]
) -> dict[str, float]:
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    gradients = torch.autograd.grad(loss_of(*leaves), leaves)
    errors = [((g.double() - t).norm() / t.norm()).item() for g, t in zip(gradients, truth, strict=True)]
    return {"hidden_gradient_error": errors[0], "weight_gradient_error": errors[1]}


def measure(dtype: torch.dtype, device: str) -> list[dict]:
    """The rows of one dtype."""
    generator = torch.Generator().manual_seed(0)
    num_rows, width, vocab = SHAPE.values()
    hidden = torch.randn(num_rows, width, generator=generator).to(device, dtype)
    other = (hidden + 0.3 * torch.randn(num_rows, width, generator=generator).to(device)).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 2 / width**0.5).to(device, dtype)
    token_ids = torch.randint(0, vocab, (num_rows,), generator=generator).to(device)
    log_plain, log_better = truth_logprobs(hidden, weight), truth_logprobs(other, weight)
    superior = (ALPHA * log_better + (1 - ALPHA) * log_plain).log_softmax(-1)
    label = token_ids[:, None]
    logprobs, targets = log_plain.gather(1, label)[:, 0], superior.gather(1, label)[:, 0]

    coefficient = 2 * (logprobs - targets) / num_rows
    grad_logits = -log_plain.exp() * coefficient[:, None]
    grad_logits.scatter_add_(1, label, coefficient[:, None])
    truth = (grad_logits @ weight.double(), grad_logits.T @ hidden.double())

    def pytorch_loss(h: Tensor, w: Tensor) -> Tensor:
        return (targets.float() - pytorch_logprob(h, w, token_ids)).square().sum() / num_rows

    def fused_loss(h: Tensor, w: Tensor) -> Tensor:
        return squared_log_ratio_loss(h, w, token_ids, targets.float(), denominator=num_rows)[0]

    contrast = contrastive_logprob(other, weight, hidden, weight, token_ids, ALPHA)
    return [
        {"op": "linear_logprob", "backend": "inverseq", **nats(linear_logprob(hidden, weight, token_ids), logprobs)},
        {"op": "linear_logprob", "backend": "pytorch", **nats(pytorch_logprob(hidden, weight, token_ids), logprobs)},
        {"op": "contrastive_logprob", "backend": "inverseq", **nats(contrast, targets)},
        {"op": "squared_log_ratio_loss", "backend": "inverseq", **gradient_errors(fused_loss, hidden, weight, truth)},
        {"op": "squared_log_ratio_loss", "backend": "pytorch", **gradient_errors(pytorch_loss, hidden, weight, truth)},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    common = {"shapes": SHAPE, "alpha": ALPHA, "device": device_name(), "measured": True}
    common |= {"command": "python benchmarks/precision.py", "commit": commit(), "versions": versions()}
    common |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for dtype in (torch.float32, torch.bfloat16):
        for row in measure(dtype, arguments.device):
            line = json.dumps(row | {"dtype": str(dtype).removeprefix("torch.")} | common)
            print(line, flush=True)
            if arguments.out:
                with open(arguments.out, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
