"""The measured goals of the operations, answered from the rows of gpu_suite.py: one line a goal, met or missed."""

from gpu_suite_checks import GRADIENT_RATIO, LOGPROB_RMS
from gpu_suite_contenders import LOSS, OUR_OWN, OURS, TARGET
from inverseq_kernels.backends import CUDA_WORKSPACE_BYTES

GOAL_SHAPES = ((8192, 32_000, 4096), (8192, 128_256, 4096))  # A, V, D
TARGET_TFLOPS = 600.0
OVER_GEMMS = 1.25  # the loss, forward and backward, over its three bare GEMMs
OVER_WORKSPACE = 1.05


def goal_lines(rows: list[dict]) -> list[str]:
    """A line for every goal and shape. What was not measured is said to be so, never to be met."""
    lines = []
    for shape in GOAL_SHAPES:
        lines += [_speed_of_target(rows, shape), _loss_over_gemms(rows, shape), *_peers(rows, shape)]
    lines += [_memory(rows), _worst(rows, "log-prob rms in nats", "logprob_rms", LOGPROB_RMS), _gradients(rows)]
    return lines


def _line(goal: str, value: float | None, limit: float, *, at_least: bool = False, detail: str = "") -> str:
    """``goal ...: value against limit: met``; a value of None was not measured."""
    if value is None:
        return f"goal {goal}: not measured"
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    return f"goal {goal}: {value:.3g} {sign} {limit:.3g}: {'met' if met else 'MISSED'}{detail}"


def _times(rows: list[dict], op: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Milliseconds by contender, forward and backward together."""
    return {
        row["contender"]: row["ms"]
        for row in rows
        if row["kind"] == "timing"
        and (row["op"], row["phase"]) == (op, "together")
        and (row["num_rows"], row["num_words"], row["dim"]) == shape
        and row["measured"]
        and row["ms"] is not None
    }


def _named(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))


def _speed_of_target(rows: list[dict], shape: tuple[int, int, int]) -> str:
    ours = _times(rows, TARGET, shape).get(OURS)
    num_rows, num_words, dim = shape
    tflops = None if ours is None else 4 * num_rows * num_words * dim / ours / 1e9
    return _line(f"target {_named(shape)}, TFLOP/s", tflops, TARGET_TFLOPS, at_least=True)


def _loss_over_gemms(rows: list[dict], shape: tuple[int, int, int]) -> str:
    times = _times(rows, LOSS, shape)
    ours, bare = times.get(OURS), times.get("cuBLAS, 3 GEMMs")
    ratio = ours / bare if ours and bare else None
    return _line(f"loss {_named(shape)}, time over three bare GEMMs", ratio, OVER_GEMMS)


def _peers(rows: list[dict], shape: tuple[int, int, int]) -> list[str]:
    times = _times(rows, LOSS, shape)
    ours = times.get(OURS)
    peers = {name: ms for name, ms in times.items() if name not in OUR_OWN and not name.startswith("cuBLAS")}
    if ours is None or not peers:
        return [f"goal loss {_named(shape)}, ahead of peers: not measured"]
    return [_line(f"loss {_named(shape)}, time over {name}'s", ours / ms, 1.0) for name, ms in sorted(peers.items())]


def _memory(rows: list[dict]) -> str:
    """The largest peak of any operation beyond outputs and accumulator, over the default workspace.

    The loss's is that of its forward: its backward makes the gradients once more, scaled, and nothing else.
    """
    beyond = {
        f"{row['op']} {row['num_rows']} x {row['num_words']} x {row['dim']}": row["beyond_output_bytes"]
        - row["accumulator_bytes"]
        for row in rows
        if row["kind"] == "timing" and row["contender"] == OURS and row["beyond_output_bytes"] is not None
        if row["phase"] == ("forward" if row["op"] == LOSS else "together")
    }
    if not beyond:
        return _line("peak beyond outputs and accumulator over workspace", None, OVER_WORKSPACE)
    worst = max(beyond, key=beyond.get)
    value = beyond[worst] / CUDA_WORKSPACE_BYTES
    return _line("peak beyond outputs and accumulator over workspace", value, OVER_WORKSPACE, detail=f" ({worst})")


def _worst(rows: list[dict], name: str, key: str, limit: float) -> str:
    checked = [row for row in rows if row["kind"] == "correctness" and row["measured"] and row.get(key) is not None]
    if not checked:
        return _line(name, None, limit)
    worst = max(checked, key=lambda row: row[key])
    return _line(name, worst[key], limit, detail=f" ({worst['op']})")


def _gradients(rows: list[dict]) -> str:
    ratios = {
        row["op"]: row["gradient_error"] / row["eager_gradient_error"]
        for row in rows
        if row["kind"] == "correctness" and row["measured"] and row.get("gradient_error") is not None
    }
    name = "gradient error over eager PyTorch's"
    if not ratios:
        return _line(name, None, GRADIENT_RATIO)
    worst = max(ratios, key=ratios.get)
    return _line(name, ratios[worst], GRADIENT_RATIO, detail=f" ({worst})")
