"""The timing of gpu_suite.py: contenders of one shape in turn on the same inputs, with memory and error beside."""

import gpu_suite_contenders as contenders_module
import torch
from gpu_suite_checks import measure_error
from gpu_suite_clock import Clock
from gpu_suite_contenders import LOSS, OUR_OWN, OURS, TARGET, Contender, Inputs, Shape, Truth
from gpu_suite_report import Results, shape_facts, short
from inverseq_kernels.backends import CUDA_WORKSPACE_BYTES
from inverseq_kernels.triton_blocks import GRADIENT, capability_of, choose_blocks, choose_loss_blocks
from inverseq_kernels.triton_common import pitch_of, rows_within
from inverseq_kernels.triton_loss import tile_rows

TIMING_S = 4.0  # of all contenders of one operation and shape together


def time_shape(shape: Shape, dtype: torch.dtype, results: Results, clock: Clock, reps: int) -> None:
    """All contenders of all operations of one shape, interleaved on the same inputs."""
    try:
        inputs = contenders_module.make_inputs(shape, dtype, "cuda" if clock.on_gpu else "cpu")
        truth = contenders_module.make_truth(inputs, shape.ops)
    except torch.OutOfMemoryError as error:
        results.add(kind="timing_inputs", op="inputs", passed=True, **shape_facts(shape, dtype), failure=short(error))
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
        rounds = max(3, min(reps, int(TIMING_S / max(slowest_s, 1e-6))))
        samples = {contender.name: [] for contender in ready}
        for _ in range(rounds):
            for contender in list(ready):
                try:
                    samples[contender.name].append(run_once(contender, inputs, clock))
                except Exception as error:  # as above; what it took until then is kept
                    measured[contender.name]["failure"] = short(error)
                    ready.remove(contender)
                    if not clock.is_usable():
                        raise
        for contender in listed:
            _add_timing(results, shape, dtype, contender, measured[contender.name], samples.get(contender.name, []))
    del inputs, truth
    clock.reset_memory()


def prepare(contender: Contender, inputs: Inputs, truth: Truth, clock: Clock) -> dict:
    """Warm up, measure error and peak memory. Whatever goes wrong in a contender is its result, but a lost device."""
    facts = {"failure": None, "error": None, "logprob_rms": None, "warm_ms": 0.0, "peaks": {}}
    try:
        facts["logprob_rms"], facts["error"] = measure_error(contender, inputs, truth)
        before = clock.reset_memory()
        result = contender.forward(inputs)
        facts["peaks"]["forward"] = clock.peak_bytes(before)
        if contender.backward is not None:
            contender.backward(inputs, result)
        del result
        facts["peaks"]["together"] = clock.peak_bytes(before)
        facts["warm_ms"] = sum(run_once(contender, inputs, clock))
    except Exception as error:  # a peer may raise anything; the row says what
        facts["failure"] = short(error)
        if not clock.is_usable():
            raise
    inputs.hidden.grad = inputs.weight.grad = None
    return facts


def run_once(contender: Contender, inputs: Inputs, clock: Clock) -> tuple[float, float]:
    """Milliseconds of one forward and one backward."""
    inputs.hidden.grad = inputs.weight.grad = None
    clock.lead()
    start = clock.mark()
    result = contender.forward(inputs)
    middle = clock.mark()
    if contender.backward is not None:
        contender.backward(inputs, result)
    end = clock.mark()
    clock.synchronize()
    del result
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
    if contender.backward is None:
        phases = {"together": forward_flops}
    for phase, flops in phases.items():
        index = {"forward": slice(0, 1), "backward": slice(1, 2), "together": slice(0, 2)}[phase]
        times = torch.tensor([sum(sample[index]) for sample in samples], dtype=torch.float64)
        quantiles = dict.fromkeys(("ms", "ms_p20", "ms_p80"))
        if len(samples) > 0:
            values = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
            quantiles = dict(zip(quantiles, values, strict=True))
        peak = measured["peaks"].get(phase)
        results.add(
            kind="timing",
            op=contender.op,
            contender=contender.name,
            computes=contender.computes or "matmuls only",
            phase=phase,
            **shape_facts(shape, dtype),
            reps=len(samples),
            **quantiles,
            flops=flops,
            peak_bytes=peak,
            beyond_output_bytes=None if peak is None else peak - output_bytes(shape, dtype, contender, phase),
            accumulator_bytes=accumulator_bytes(shape, dtype, contender.op) if contender.name == OURS else None,
            error=measured["error"] if contender.op != TARGET else measured["logprob_rms"],
            logprob_rms=measured["logprob_rms"],
            failure=measured["failure"],
        )


def output_bytes(shape: Shape, dtype: torch.dtype, contender: Contender, phase: str) -> int:
    """Bytes that a phase leaves: vectors, and gradients, which our loss has from its forward on."""
    if contender.backward is None:
        return 4 * shape.num_rows
    has_gradients = phase != "forward" or (contender.op == LOSS and contender.name in OUR_OWN)
    gradients = dtype.itemsize * shape.dim * (shape.num_rows + shape.num_words)
    return 8 * shape.num_rows + has_gradients * gradients


def accumulator_bytes(shape: Shape, dtype: torch.dtype, op: str) -> int:
    """Bytes of the fp32 sum of the weight's gradient, which our tiles need where their rows take several chunks."""
    if op == TARGET:
        return 0
    capability = capability_of(torch.empty(0, device="cuda")) if torch.cuda.is_available() else 0
    if op == LOSS:
        blocks = choose_loss_blocks(capability, False, shape.dim)
        chunk = tile_rows(shape.num_rows, shape.num_words, 0, dtype, blocks, CUDA_WORKSPACE_BYTES)
    else:
        blocks = choose_blocks(GRADIENT, capability, shape.dim)
        row_bytes = 16 + dtype.itemsize * (shape.dim + pitch_of(shape.num_words))
        chunk = rows_within(CUDA_WORKSPACE_BYTES, row_bytes, shape.num_rows, blocks.rows)
    return 4 * shape.num_words * shape.dim if chunk < shape.num_rows else 0
