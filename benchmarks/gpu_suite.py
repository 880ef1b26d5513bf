"""Everything that a GPU can tell about the kernels, in one command and under nine minutes.

    PYTHONPATH=.:kernels python benchmarks/gpu_suite.py --out DIR
    PYTHONPATH=.:kernels python benchmarks/gpu_suite.py --smoke --out DIR        # tiny; also on a CPU

From a source checkout with torch >= 2.11 and triton >= 3.6; nothing needs installing. In order: smoke over every
kernel, correctness in bf16 against float64, ``pytest -m gpu``, compute-sanitizer where it exists, timing, the
backends of packed attention, a short epoch_time.py (these two need the C++ packer). Rows are on disk as they come
(DIR/gpu_suite.json); a table and plots follow at the end. No new shape starts once the time budget is used up. Exit
status 1 when anything but a timing failed.
"""

import argparse
import gc
import os
import pathlib
import sys
import time

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import gpu_suite_contenders as contenders_module  # noqa: E402
import inverseq_kernels  # noqa: E402
from gpu_suite_contenders import LOGPROB, LOSS, TARGET, Contender, Inputs, Shape, Truth  # noqa: E402
from gpu_suite_report import Results, command_line  # noqa: E402
from gpu_suite_steps import run_attention, run_epoch_time, run_gpu_tests, run_sanitizer  # noqa: E402

ALL_OPS = (LOSS, TARGET, LOGPROB)

# The most telling shapes first, because the budget may end before the list does: A, V, D of goals and of chat models.
SHAPES = (
    Shape(8192, 128_256, 4096, ops=ALL_OPS, compiled=(LOSS, TARGET)),
    Shape(8192, 32_000, 4096, ops=ALL_OPS, compiled=(LOSS,)),
    Shape(32_768, 128_256, 4096),
    Shape(2048, 128_256, 4096, ops=(LOSS, TARGET)),
    Shape(8192, 151_936, 4096),
    Shape(8192, 262_144, 2304),
    Shape(16_384, 49_152, 576, ops=(LOSS, TARGET)),
    Shape(8192, 128_256, 8192),
    Shape(32_768, 32_000, 4096),
    Shape(8192, 49_152, 4096),
    Shape(2048, 32_000, 4096),
    Shape(512, 151_936, 2048),
)
SMOKE_SHAPES = (
    Shape(40, 300, 32, ops=ALL_OPS, compiled=ALL_OPS),
    Shape(9, 130, 16),
)
CORRECTNESS_SHAPES = (Shape(8192, 32_000, 4096, ops=ALL_OPS), Shape(2048, 128_256, 4096, ops=ALL_OPS))
LOGPROB_RMS = 1e-4  # nats
EPOCH_TIME_S = 120.0  # the most that the last step may take
GRADIENT_RATIO = 2.0  # times the error of eager PyTorch in the same dtype


class Clock:
    """Time since start, device events, and peak memory; host clock and no memory on a CPU."""

    def __init__(self, budget_s: float):
        self.start, self.budget_s = time.monotonic(), budget_s
        self.on_gpu = torch.cuda.is_available()

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.start)

    def mark(self) -> object:
        """A moment, ordered with the work before it."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, first: object, second: object) -> float:
        """Milliseconds between two moments; the second has happened."""
        return first.elapsed_time(second) if self.on_gpu else 1e3 * (second - first)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def reset_memory(self) -> int:
        """Empty the cache, forget the peak, return what is allocated now."""
        gc.collect()
        if not self.on_gpu:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self, before: int) -> int | None:
        return torch.cuda.max_memory_allocated() - before if self.on_gpu else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="every step on tiny shapes; also on a CPU")
    parser.add_argument("--budget-s", type=float, default=370.0, help="no new shape after this (default: %(default)s)")
    parser.add_argument("--kernels-only", action="store_true", help="only the smoke step (what the sanitizer runs)")
    arguments = parser.parse_args()
    clock = Clock(arguments.budget_s)
    if not clock.on_gpu and not arguments.smoke:
        parser.error("no CUDA device: only --smoke runs on a CPU")
    # The interpreter multiplies bf16 bit patterns; fp16 is right there.
    dtype = torch.bfloat16 if clock.on_gpu else torch.float16
    results = Results(arguments.out, command_line())
    run_smoke(results, clock)
    if not arguments.kernels_only:
        shapes = SMOKE_SHAPES[:1] if arguments.smoke else CORRECTNESS_SHAPES
        for shape in shapes:
            check_shape(shape, dtype, results, clock)
        run_gpu_tests(results, clock.left_s())
        run_sanitizer(results, arguments.out)
        for shape in SMOKE_SHAPES if arguments.smoke else SHAPES:
            if clock.left_s() <= 0:
                results.add(kind="budget", op="timing", passed=True, detail=f"stopped before {shape}")
                break
            time_shape(shape, dtype, results, clock, reps=3 if arguments.smoke else 20)
        clock.reset_memory()
        run_attention(results, arguments.out)
        run_epoch_time(results, arguments.out, tiny=arguments.smoke, limit_s=EPOCH_TIME_S)
    print(results.write_table())
    print("plots:", results.write_plots())
    failed = [row for row in results.rows if row.get("passed") is False]
    print(f"{len(results.rows)} rows, {len(failed)} failed, {time.monotonic() - clock.start:.0f} s")
    return 1 if failed else 0


def run_smoke(results: Results, clock: Clock) -> None:
    """Every kernel on a tiny problem, with and without options, against the torch backend."""
    device = "cuda" if clock.on_gpu else "cpu"
    generator = torch.Generator().manual_seed(0)
    cases = [(torch.float16, False), (torch.float32, True)]
    cases += [(torch.bfloat16, has_options) for has_options in (False, True) if clock.on_gpu]
    for dtype, has_options in cases:
        dim, num_words = (33, 150) if has_options else (64, 260)
        hidden, plain = (torch.randn(37, dim, generator=generator).to(dtype).to(device) for _ in range(2))
        weight = (torch.randn(num_words, dim, generator=generator) / 4).to(dtype).to(device)
        options = {}
        if has_options:
            options = {"softcap": 5.0, "temperature": 0.8, "num_valid_vocab": num_words - 3}
        ids = torch.randint(0, num_words - 3, (37,), generator=generator).to(device)
        ids[3] = inverseq_kernels.IGNORE_INDEX
        bias = torch.randn(num_words, generator=generator).to(dtype).to(device) if has_options else None
        worst = {}
        for backend in ("torch", "triton"):
            worst[backend] = _run_every_op(hidden, plain, weight, bias, ids, options, backend)
        difference = max(
            ((ours.double() - reference.double()).norm() / (reference.double().norm() + 1e-6)).item()
            for ours, reference in zip(worst["triton"], worst["torch"], strict=True)
        )
        allowed = 1e-4 if dtype == torch.float32 else 3e-2
        results.add(
            kind="smoke",
            op=f"every operation, {dtype}, {'all' if has_options else 'no'} options",
            passed=difference <= allowed,
            detail=f"largest relative difference between backends {difference:.1e}, allowed {allowed:.0e}",
        )
    clock.synchronize()


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


def check_shape(shape: Shape, dtype: torch.dtype, results: Results, clock: Clock) -> None:
    """Log-probs and hidden's gradient of sampled rows against float64; eager PyTorch sets the allowed error."""
    try:
        inputs = contenders_module.make_inputs(shape, dtype, "cuda" if clock.on_gpu else "cpu")
        truth = contenders_module.make_truth(inputs, shape.ops)
        for op in shape.ops:
            errors = {}
            for contender in contenders_module.list_contenders(op, False)[0]:
                if contender.name in ("inverseq triton", "eager"):
                    errors[contender.name] = measure_error(contender, inputs, truth)
            logprob_rms, gradient = errors["inverseq triton"]
            eager_rms, eager_gradient = errors["eager"]
            passed = logprob_rms <= LOGPROB_RMS
            if gradient is not None:
                passed = passed and gradient <= GRADIENT_RATIO * eager_gradient
            results.add(
                kind="correctness",
                op=op,
                passed=passed,
                **_shape_facts(shape, dtype),
                logprob_rms=logprob_rms,
                gradient_error=gradient,
                eager_logprob_rms=eager_rms,
                eager_gradient_error=eager_gradient,
                detail=f"{shape} log-prob rms {logprob_rms:.1e} (eager {eager_rms:.1e}), gradient {gradient}",
            )
    except torch.OutOfMemoryError as error:
        results.add(kind="correctness", op="all", passed=True, **_shape_facts(shape, dtype), failure=_short(error))


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


def time_shape(shape: Shape, dtype: torch.dtype, results: Results, clock: Clock, reps: int) -> None:
    """All contenders of all operations of one shape, interleaved on the same inputs."""
    try:
        inputs = contenders_module.make_inputs(shape, dtype, "cuda" if clock.on_gpu else "cpu")
        truth = contenders_module.make_truth(inputs, shape.ops)
    except torch.OutOfMemoryError as error:
        results.add(kind="timing_inputs", op="inputs", passed=True, **_shape_facts(shape, dtype), failure=_short(error))
        return
    for op in shape.ops:
        if clock.left_s() <= 0:
            results.add(kind="budget", op=op, passed=True, detail=f"stopped inside {shape}")
            break
        listed, missing = contenders_module.list_contenders(op, op in shape.compiled)
        if missing:
            print("not installed:", ", ".join(missing))
        ready, measured = [], {}
        for contender in listed:
            measured[contender.name] = prepare(contender, inputs, truth, clock)
            if measured[contender.name]["failure"] is None:
                ready.append(contender)
        slowest_s = sum(measured[contender.name]["warm_ms"] for contender in ready) / 1e3
        rounds = max(3, min(reps, int(6.0 / max(slowest_s, 1e-6))))
        samples = {contender.name: [] for contender in ready}
        for _ in range(rounds):
            for contender in list(ready):
                try:
                    samples[contender.name].append(run_once(contender, inputs, clock))
                except torch.OutOfMemoryError as error:
                    measured[contender.name]["failure"] = _short(error)
                    ready.remove(contender)
        for contender in listed:
            _add_timing(results, shape, dtype, contender, measured[contender.name], samples.get(contender.name, []))
    del inputs, truth
    clock.reset_memory()


def prepare(contender: Contender, inputs: Inputs, truth: Truth, clock: Clock) -> dict:
    """Warm up, measure error and peak memory. Whatever goes wrong in a contender is its result."""
    facts = {"failure": None, "error": None, "logprob_rms": None, "peak_bytes": None, "warm_ms": 0.0}
    try:
        facts["logprob_rms"], facts["error"] = measure_error(contender, inputs, truth)
        before = clock.reset_memory()
        run_once(contender, inputs, clock, keep_gradients=True)
        facts["peak_bytes"] = clock.peak_bytes(before)
        facts["warm_ms"] = sum(run_once(contender, inputs, clock))
    except Exception as error:  # a peer may raise anything; the row says what
        facts["failure"] = _short(error)
    inputs.hidden.grad = inputs.weight.grad = None
    return facts


def run_once(contender: Contender, inputs: Inputs, clock: Clock, keep_gradients: bool = False) -> tuple[float, float]:
    """Milliseconds of one forward and one backward."""
    inputs.hidden.grad = inputs.weight.grad = None
    start = clock.mark()
    result = contender.forward(inputs)
    middle = clock.mark()
    if contender.backward is not None:
        contender.backward(inputs, result)
    end = clock.mark()
    clock.synchronize()
    del result
    if not keep_gradients:
        inputs.hidden.grad = inputs.weight.grad = None
    return clock.between_ms(start, middle), clock.between_ms(middle, end)


def _add_timing(
    results: Results,
    shape: Shape,
    dtype: torch.dtype,
    contender: Contender,
    measured: dict,
    samples: list[tuple[float, float]],
) -> None:
    """One row for each phase: forward, backward and both."""
    gemm = 2 * shape.num_rows * shape.num_words * shape.dim
    forward_flops = (2 if contender.op == TARGET else 1) * gemm
    phases = {"forward": forward_flops, "backward": 2 * gemm, "together": forward_flops + 2 * gemm}
    outputs = dtype.itemsize * shape.dim * (shape.num_rows + shape.num_words) + 8 * shape.num_rows
    if contender.backward is None:
        phases, outputs = {"together": forward_flops}, 4 * shape.num_rows
    for phase, flops in phases.items():
        index = {"forward": slice(0, 1), "backward": slice(1, 2), "together": slice(0, 2)}[phase]
        times = torch.tensor([sum(sample[index]) for sample in samples], dtype=torch.float64)
        quantiles = dict.fromkeys(("ms", "ms_p20", "ms_p80"))
        if len(samples) > 0:
            values = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
            quantiles = dict(zip(quantiles, values, strict=True))
        peak = measured["peak_bytes"] if phase == "together" else None
        results.add(
            kind="timing",
            op=contender.op,
            contender=contender.name,
            computes=contender.computes or "matmuls only",
            phase=phase,
            **_shape_facts(shape, dtype),
            reps=len(samples),
            **quantiles,
            flops=flops,
            peak_bytes=peak,
            beyond_output_bytes=None if peak is None else peak - outputs,
            accumulator_bytes=4 * shape.num_words * shape.dim if contender.op != TARGET else 0,
            error=measured["error"] if contender.op != TARGET else measured["logprob_rms"],
            logprob_rms=measured["logprob_rms"],
            failure=measured["failure"],
        )


def _shape_facts(shape: Shape, dtype: torch.dtype) -> dict:
    return {
        "num_rows": shape.num_rows,
        "num_words": shape.num_words,
        "dim": shape.dim,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _short(error: Exception) -> str:
    """The first line of an error, for a row."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


if __name__ == "__main__":
    sys.exit(main())
