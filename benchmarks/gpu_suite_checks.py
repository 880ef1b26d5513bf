"""What gpu_suite.py checks before it times anything: every kernel on tiny problems, and precision in bf16."""

import gpu_suite_contenders as contenders_module
import inverseq_kernels
import torch
from gpu_suite_clock import Clock
from gpu_suite_contenders import OURS, Contender, Inputs, Shape, Truth
from gpu_suite_report import Results, shape_facts, short

LOGPROB_RMS = 1e-4  # nats
GRADIENT_RATIO = 2.0  # times the error of eager PyTorch in the same dtype
SMOKE_CASES = tuple(
    (dtype, has_options) for dtype in (torch.float16, torch.float32, torch.bfloat16) for has_options in (False, True)
)


def check_every_kernel(case: tuple[torch.dtype, bool], results: Results, clock: Clock) -> None:
    """Every operation on a tiny problem, with or without options, against the torch backend."""
    dtype, has_options = case
    if not clock.on_gpu and (dtype == torch.bfloat16 or has_options == (dtype == torch.float16)):
        return  # the interpreter multiplies bf16 bit patterns, and is slow
    device = "cuda" if clock.on_gpu else "cpu"
    generator = torch.Generator().manual_seed(0)
    dim, num_words = (33, 150) if has_options else (64, 260)
    hidden, plain = (torch.randn(37, dim, generator=generator).to(dtype).to(device) for _ in range(2))
    weight = (torch.randn(num_words, dim, generator=generator) / 4).to(dtype).to(device)
    options = {}
    if has_options:
        options = {"softcap": 5.0, "temperature": 0.8, "num_valid_vocab": num_words - 3}
    ids = torch.randint(0, num_words - 3, (37,), generator=generator).to(device)
    ids[3] = inverseq_kernels.IGNORE_INDEX
    bias = torch.randn(num_words, generator=generator).to(dtype).to(device) if has_options else None
    reference, ours = (
        _run_every_op(hidden, plain, weight, bias, ids, options, backend) for backend in ("torch", "triton")
    )
    difference = max(
        ((one.double() - other.double()).norm() / (other.double().norm() + 1e-6)).item()
        for one, other in zip(ours, reference, strict=True)
    )
    allowed = 1e-4 if dtype == torch.float32 else 3e-2
    results.add(
        kind="smoke",
        op=f"every operation, {dtype}, {'all' if has_options else 'no'} options",
        passed=difference <= allowed,
        detail=f"largest relative difference between backends {difference:.1e}, allowed {allowed:.0e}",
    )


def _run_every_op(hidden, plain, weight, bias, ids, options, backend) -> list[torch.Tensor]:
    """Outputs and gradients of all four operations."""
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
        options = options | {"bias": leaves[2]}
    contrast = {key: value for key, value in options.items() if key != "bias"} | {"bias_w": bias, "bias_l": bias}
    inputs = (hidden, weight, plain, weight, ids)
    outputs = [
        *inverseq_kernels.contrastive_logprob(*inputs, 1.4, return_reference=True, backend=backend, **contrast),
        inverseq_kernels.contrastive_logprob_sweep(*inputs, alphas=[0.0, 1.0, 1.3], backend=backend, **contrast),
    ]
    logprobs, entropy = inverseq_kernels.linear_logprob(
        *leaves[:2], ids, return_entropy=True, backend=backend, **options
    )
    outputs += [logprobs.detach(), entropy.detach()]
    upstream = torch.linspace(-1, 1, ids.shape[0], device=ids.device)
    outputs += torch.autograd.grad((logprobs * upstream + entropy * upstream.flip(0)).sum(), leaves)
    plain_logprobs = inverseq_kernels.linear_logprob(*leaves[:2], ids, backend=backend, **options)
    outputs += torch.autograd.grad((plain_logprobs * upstream).sum(), leaves)
    loss, logprobs = inverseq_kernels.squared_log_ratio_loss(
        *leaves[:2], ids, upstream - 4, denominator=30.0, backend=backend, workspace_bytes=64 * 1024, **options
    )
    return [*outputs, loss.detach(), logprobs, *torch.autograd.grad(loss, leaves)]


def check_operation(op: str, shape: Shape, dtype: torch.dtype, results: Results, clock: Clock) -> None:
    """Log-probs and hidden's gradient of sampled rows against float64; eager PyTorch sets the allowed error."""
    try:
        inputs = contenders_module.make_inputs(shape, dtype, "cuda" if clock.on_gpu else "cpu")
        truth = contenders_module.make_truth(inputs, (op,))
        errors = {}
        for contender in contenders_module.list_contenders(op, False)[0]:
            if contender.name in (OURS, "eager"):
                errors[contender.name] = measure_error(contender, inputs, truth)
    except torch.OutOfMemoryError as error:
        results.add(kind="correctness", op=op, passed=True, **shape_facts(shape, dtype), failure=short(error))
        return
    logprob_rms, gradient = errors[OURS]
    eager_rms, eager_gradient = errors["eager"]
    passed = logprob_rms <= LOGPROB_RMS
    if gradient is not None:
        passed = passed and gradient <= GRADIENT_RATIO * eager_gradient
    results.add(
        kind="correctness",
        op=op,
        passed=passed,
        **shape_facts(shape, dtype),
        logprob_rms=logprob_rms,
        gradient_error=gradient,
        eager_logprob_rms=eager_rms,
        eager_gradient_error=eager_gradient,
        detail=f"{shape} log-prob rms {logprob_rms:.1e} (eager {eager_rms:.1e}), gradient {gradient}",
    )


def measure_error(contender: Contender, inputs: Inputs, truth: Truth) -> tuple[float | None, float | None]:
    """(rms log-prob error in nats, relative error of hidden's gradient) on the sampled rows."""
    inputs.hidden.grad = inputs.weight.grad = None
    result = contender.forward(inputs)
    logprob_rms = gradient_error = None
    if contender.logprobs is not None:
        difference = contender.logprobs(result).detach()[inputs.rows].double() - truth.logprobs[contender.op]
        logprob_rms = difference.square().mean().sqrt().item()
    if contender.backward is not None and contender.computes:
        contender.backward(inputs, result)
        expected = truth.hidden_gradient[contender.computes]
        gradient_error = ((inputs.hidden.grad[inputs.rows].double() - expected).norm() / expected.norm()).item()
    inputs.hidden.grad = inputs.weight.grad = None
    return logprob_rms, gradient_error
