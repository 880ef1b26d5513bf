"""Who is timed by gpu_suite.py: each contender is two steps, forward and backward, on the same inputs.

``squared_log_ratio_loss`` is this project's loss; cross-entropy libraries compute their mean cross-entropy
instead, which needs the same three matmuls. Errors are against float64 on sampled rows of each one's own loss.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from inverseq_kernels import contrastive_logprob, linear_logprob, squared_log_ratio_loss
from torch import Tensor

LOSS, LOGPROB, TARGET = "squared_log_ratio_loss", "linear_logprob", "contrastive_logprob"
OURS = "inverseq triton"
STORED = "inverseq triton, stored logits"  # the structure that the package does not choose for these inputs
OUR_OWN = frozenset({OURS, STORED, "inverseq torch"})
STEMS = ("contrastive", "logprob", "loss")
ALPHA = 1.4
# Columns of the float64 truth that are alive at once.
TRUTH_WORDS = 16384


@dataclass(frozen=True)
class Shape:
    """One line of the timing table."""

    num_rows: int
    num_words: int
    dim: int
    ops: tuple[str, ...] = (LOSS,)
    compiled: tuple[str, ...] = ()  # torch.compile takes tens of seconds for an op and shape


@dataclass
class Inputs:
    """What every contender reads; hidden and weight want gradients."""

    hidden: Tensor  # [A, D]
    weight: Tensor  # [V, D]
    hidden_plain: Tensor  # [A, D] of the plain view
    token_ids: Tensor  # [A]
    targets: Tensor  # [A] fp32
    upstream: Tensor  # [A] fp32
    rows: Tensor  # [R] sampled rows


@dataclass(frozen=True)
class Contender:
    """``forward`` returns what ``backward`` takes; a backward of None means that the op has none."""

    name: str
    op: str
    computes: str  # which truth it is compared with
    forward: Callable[[Inputs], object]
    backward: Callable[[Inputs, object], None] | None
    logprobs: Callable[[object], Tensor] | None = None


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, num_sampled: int = 256) -> Inputs:
    """Random hidden states and a head whose logits have the size of a chat model's."""
    generator = torch.Generator(device=device).manual_seed(shape.num_rows + shape.num_words)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)
        return values.mul_(scale)

    num_rows, num_words, dim = shape.num_rows, shape.num_words, shape.dim
    token_ids = torch.randint(0, num_words, (num_rows,), device=device, generator=generator)
    rows = torch.randperm(num_rows, device=device, generator=generator)[:num_sampled].sort().values
    weight = normal(num_words, dim, scale=3.0 / dim**0.5)
    # A token's own word is likely, as in text: hidden leans towards it by about 12 nats.
    hidden = (normal(num_rows, dim).float() + 1.3 * weight[token_ids].float()).to(dtype)
    noise = torch.empty(num_rows, device=device).normal_(generator=generator)
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        hidden_plain=normal(num_rows, dim),
        token_ids=token_ids,
        targets=noise - 4.0,
        upstream=torch.empty(num_rows, device=device).normal_(generator=generator),
        rows=rows,
    )


def list_contenders(op: str, compiled: bool) -> tuple[list[Contender], list[str]]:
    """The contenders of one operation and the names of the peers that are not installed."""
    compile_backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    contenders, missing = [], []
    if op == TARGET:
        contenders += [
            Contender(OURS, op, op, lambda i: _target(i, "triton"), None, _itself),
            Contender(STORED, op, op, on_stored_logits(lambda i: _target(i, "triton")), None, _itself),
            Contender("inverseq torch", op, op, lambda i: _target(i, "torch"), None, _itself),
            Contender("cuBLAS, 2 GEMMs", op, "", _bare_target, None),
            Contender("eager", op, op, lambda i: _eager_target(*_target_arguments(i)), None, _itself),
        ]
        if compiled:
            function = torch.compile(_eager_target, backend=compile_backend, dynamic=False)
            contenders.append(
                Contender("torch.compile", op, op, lambda i: function(*_target_arguments(i)), None, _itself)
            )
        return contenders, missing
    ours, eager = (_loss, _eager_loss) if op == LOSS else (_logprob, _eager_logprob)
    backward = _backward_scalar if op == LOSS else _backward_rows
    contenders += [
        Contender(OURS, op, op, lambda i: ours(i, "triton"), backward, _second),
        Contender(
            STORED, op, op, on_stored_logits(lambda i: ours(i, "triton")), on_stored_logits(backward), _second
        ),
        Contender("inverseq torch", op, op, lambda i: ours(i, "torch"), backward, _second),
        Contender("cuBLAS, 3 GEMMs", op, "", _bare_forward, _bare_backward),
        Contender("eager", op, op, lambda i: eager(*_loss_arguments(i)), backward, _second),
    ]
    if compiled:
        function = torch.compile(eager, backend=compile_backend, dynamic=False)
        contenders.append(
            Contender("torch.compile", op, op, lambda i: function(*_loss_arguments(i)), backward, _second)
        )
    if op == LOSS:
        peers, missing = _list_peers()
        contenders += peers
    return contenders, missing


def on_stored_logits(function: Callable) -> Callable:
    """The function with triton's "logits" structure wherever the package would choose."""

    def run(*arguments):
        modules = [importlib.import_module(f"inverseq_kernels.triton_{stem}") for stem in STEMS]
        choosers = [module.choose_structure for module in modules]
        try:
            for module in modules:
                module.choose_structure = lambda *_: "logits"
            return function(*arguments)
        finally:
            for module, chooser in zip(modules, choosers, strict=True):
                module.choose_structure = chooser

    return run


def _itself(result: Tensor) -> Tensor:
    return result


def _second(result: tuple[Tensor, Tensor]) -> Tensor:
    return result[1]


def _loss_arguments(inputs: Inputs) -> tuple:
    return inputs.hidden, inputs.weight, inputs.token_ids, inputs.targets


def _target_arguments(inputs: Inputs) -> tuple:
    return inputs.hidden.detach(), inputs.weight.detach(), inputs.hidden_plain, inputs.token_ids


def _loss(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    hidden, weight, token_ids, targets = _loss_arguments(inputs)
    return squared_log_ratio_loss(
        hidden, weight, token_ids, targets, denominator=float(hidden.shape[0]), backend=backend
    )


def _eager_logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor, _targets: Tensor) -> tuple[Tensor, Tensor]:
    logits_AV = torch.nn.functional.linear(hidden, weight)
    logprobs = -torch.nn.functional.cross_entropy(logits_AV.float(), token_ids, reduction="none")
    return logprobs, logprobs.detach()


def _eager_loss(hidden: Tensor, weight: Tensor, token_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs, detached = _eager_logprob(hidden, weight, token_ids, targets)
    return (targets - logprobs).square().sum() / hidden.shape[0], detached


def _logprob(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    logprobs = linear_logprob(inputs.hidden, inputs.weight, inputs.token_ids, backend=backend)
    return logprobs, logprobs.detach()


def _target(inputs: Inputs, backend: str) -> Tensor:
    hidden, weight, hidden_plain, token_ids = _target_arguments(inputs)
    return contrastive_logprob(hidden, weight, hidden_plain, weight, token_ids, ALPHA, backend=backend)


def _eager_target(hidden: Tensor, weight: Tensor, hidden_plain: Tensor, token_ids: Tensor) -> Tensor:
    better_AV = torch.nn.functional.linear(hidden, weight).float()
    mixed_AV = better_AV.mul(ALPHA).add(torch.nn.functional.linear(hidden_plain, weight).float(), alpha=1 - ALPHA)
    return -torch.nn.functional.cross_entropy(mixed_AV, token_ids, reduction="none")


def _bare_target(inputs: Inputs) -> Tensor:
    hidden, weight, hidden_plain, _ = _target_arguments(inputs)
    logits_AV = hidden @ weight.t()
    return torch.mm(hidden_plain, weight.t(), out=logits_AV)


def _bare_forward(inputs: Inputs) -> Tensor:
    return inputs.hidden.detach() @ inputs.weight.detach().t()


def _bare_backward(inputs: Inputs, logits_AV: object) -> None:
    inputs.hidden.grad = logits_AV @ inputs.weight.detach()
    inputs.weight.grad = logits_AV.t() @ inputs.hidden.detach()


def _backward_scalar(_inputs: Inputs, result: object) -> None:
    (result[0] if isinstance(result, tuple) else result).backward()


def _backward_rows(inputs: Inputs, result: object) -> None:
    result[0].backward(inputs.upstream)


def _list_peers() -> tuple[list[Contender], list[str]]:
    """Cross-entropy of the same shape in other libraries, where they are installed."""
    entries = []
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        entries.append(("F.linear_cross_entropy", _torch_linear_cross_entropy))
    missing = []
    for package, name, function in (
        ("liger_kernel", "liger-kernel", _liger),
        ("cut_cross_entropy", "cut-cross-entropy", _cut_cross_entropy),
        ("quack", "quack-kernels", _quack),
    ):
        if importlib.util.find_spec(package) is None:
            missing.append(name)
        else:
            entries.append((name, function))
    return [Contender(name, LOSS, "cross_entropy", function, _backward_scalar) for name, function in entries], missing


def _torch_linear_cross_entropy(inputs: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.token_ids, options=options)


def _liger(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(inputs.weight, inputs.hidden, inputs.token_ids)


def _cut_cross_entropy(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs.hidden, inputs.weight, inputs.token_ids)


def _quack(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.token_ids, chunk_size=4096)


@dataclass(frozen=True)
class Truth:
    """float64 values of the sampled rows."""

    logprobs: dict[str, Tensor]  # op -> [R]
    hidden_gradient: dict[str, Tensor]  # what is computed -> [R, D]


def make_truth(inputs: Inputs, ops: tuple[str, ...]) -> Truth:
    """Log-probs and hidden's gradient of the sampled rows, in float64 by blocks of the vocabulary."""
    weight, rows = inputs.weight.detach(), inputs.rows
    hidden = inputs.hidden.detach()[rows].double()
    ids, num_rows = inputs.token_ids[rows], inputs.hidden.shape[0]
    logprobs = {}
    label_weight = weight[ids].double()
    if LOSS in ops or LOGPROB in ops:
        lse, mean_weight = _log_sum_exp(hidden, weight)
        logprobs[LOSS] = logprobs[LOGPROB] = (hidden * label_weight).sum(1) - lse
    if TARGET in ops:
        mixed = ALPHA * hidden + (1 - ALPHA) * inputs.hidden_plain[rows].double()
        logprobs[TARGET] = (mixed * label_weight).sum(1) - _log_sum_exp(mixed, weight)[0]
    gradients = {}
    if LOSS in ops or LOGPROB in ops:
        direction = label_weight - mean_weight  # d log-prob / d hidden
        residual = logprobs[LOSS] - inputs.targets[rows].double()
        gradients[LOSS] = (2.0 * residual / num_rows)[:, None] * direction
        gradients[LOGPROB] = inputs.upstream[rows].double()[:, None] * direction
        gradients["cross_entropy"] = -direction / num_rows
    return Truth(logprobs, gradients)


def _log_sum_exp(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [R] of hidden @ weight.T and the softmax's mean weight [R, D]."""
    blocks = [weight[start : start + TRUTH_WORDS] for start in range(0, weight.shape[0], TRUTH_WORDS)]
    maximum = torch.full_like(hidden[:, 0], -torch.inf)
    for block in blocks:
        maximum = torch.maximum(maximum, (hidden @ block.double().t()).amax(1))
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(hidden)
    for block in blocks:
        block = block.double()
        part = (hidden @ block.t() - maximum[:, None]).exp()
        total += part.sum(1)
        weighted += part @ block
    return maximum + total.log(), weighted / total[:, None]
