"""The candidate kernels for Hopper: their source under random schedules, against float64, and what bugs would do."""

import importlib.util
import json
import math
import pathlib
import sys

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import hopper_forward  # noqa: E402
import hopper_kernels  # noqa: E402
import hopper_launch  # noqa: E402
import hopper_measure  # noqa: E402
from hopper_launch import Setup  # noqa: E402

from tests.gluon_memory import Barrier, Hazard  # noqa: E402
from tests.gluon_simulator import Deadlock, simulate  # noqa: E402

# rows, words, plain width, better width, temperature, programs; tiles are 8 rows x 64 words, stages 16 wide.
SHAPES = {
    "one row, one word, one stage": (1, 1, 16, 16, 1.0, 3),
    "one tile, fewer stages than the ring": (8, 64, 32, 16, 1.0, 1),
    "one tile, as many as the ring": (8, 64, 64, 64, 0.7, 1),
    "one tile, many stages": (8, 64, 208, 144, 1.0, 1),
    "nothing a multiple": (13, 150, 40, 104, 1.3, 2),
    "more programs than tiles": (9, 70, 72, 24, 1.0, 7),
    "many tiles for one program": (21, 250, 48, 24, 1.0, 1),
    "groups of row blocks, the last one short": (37, 130, 24, 8, 1.0, 3),
}


def make_setup(programs, seed, stages=4, kernels=hopper_kernels):
    def start(kernel, num_programs, arguments, constants):
        simulate(kernel, num_programs, arguments, constants, seed)

    return Setup(programs, half=4, words=64, dim=16, stages=stages, group_rows=3, start=start, kernels=kernels)


@pytest.fixture(autouse=True)
def outputs_start_as_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_head(num_rows, num_words, dim, seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, dim, generator=generator).bfloat16()
    return hidden, (torch.randn(num_words, dim, generator=generator) * scale / dim**0.5).bfloat16()


def make_ids(num_rows, num_words, seed):
    return torch.randint(0, num_words, (num_rows,), generator=torch.Generator().manual_seed(seed))


def logits64(head, temperature):
    return head[0].double() @ head[1].double().T / temperature


def picked(logits, ids):
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def check_statistics(shape, setup, seed):
    num_rows, num_words, dim, _, temperature, _ = shape
    head, ids = make_head(num_rows, num_words, dim, seed), make_ids(num_rows, num_words, seed)
    ids[0] = -100
    logprobs = hopper_launch.statistics_logprob(*head, ids, setup, temperature)
    expected = picked(logits64(head, temperature), ids.clamp(min=0))
    expected[0] = 0
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-5)


def check_contrast(shape, setup, seed):
    num_rows, num_words, dim_l, dim_w, temperature, _ = shape
    better, plain = make_head(num_rows, num_words, dim_w, seed), make_head(num_rows, num_words, dim_l, seed + 1)
    ids = make_ids(num_rows, num_words, seed)
    generator = torch.Generator().manual_seed(seed)
    alphas = torch.tensor([1.4]) if seed % 2 else torch.randn(num_rows, generator=generator) + 1.0
    alphas[0] = (1.0, 0.0, -0.5, 1.4)[seed % 4]
    targets, reference = hopper_launch.contrast_logprob(better, plain, ids, alphas, setup, temperature)
    rates = alphas.double()[:, None]
    z_w, z_l = logits64(better, temperature), logits64(plain, temperature)
    torch.testing.assert_close(reference.double(), picked(z_l, ids), rtol=0, atol=2e-5)
    torch.testing.assert_close(targets.double(), picked(rates * z_w + (1 - rates) * z_l, ids), rtol=0, atol=1e-4)


def check_exponentials(shape, setup, seed):
    num_rows, num_words, dim, _, temperature, _ = shape
    # Logits up to some hundreds: rows whose offsets are not zero.
    head, ids = make_head(num_rows, num_words, dim, seed, scale=60.0), make_ids(num_rows, num_words, seed)
    stored, maxima, logprobs = hopper_launch.exponentials(*head, ids, setup, temperature)
    logits = logits64(head, temperature)
    torch.testing.assert_close(logprobs.double(), picked(logits, ids), rtol=1e-5, atol=1e-4)
    bits = maxima.double().repeat_interleave(setup.words, 0)[:num_words].T / math.log(2.0)
    offsets = torch.floor(bits / 128 + 0.5) * 128.0
    # Over the largest of their tile, which is 2**-64 at least, so that fp32 keeps what is over 2**-62 beside it.
    values = stored[:, :num_words].double() / torch.exp2(bits - offsets)
    expected = torch.exp2(logits / math.log(2.0) - bits)
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=2.0**-62)
    assert (stored[:, num_words:] == 0).all()


CHECKS = {"statistics": check_statistics, "contrast": check_contrast, "exponentials": check_exponentials}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_float64_whatever_the_schedule(shape, check):
    for seed in range(5):
        CHECKS[check](SHAPES[shape], make_setup(SHAPES[shape][-1], seed, stages=(4, 2, 3)[seed % 3]), seed)


LATE_ARRIVALS = """        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=start > 0)
        count += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
"""
EARLY_ARRIVALS = """        mbarrier.arrive(empty.index(stage), count=1)
        count += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
"""
# A place of the kernels' source and what would stand there by mistake.
BUGS = {
    "arrival for products that still run": (LATE_ARRIVALS, EARLY_ARRIVALS),
    "phase of full": ("full.index(stage), (count // STAGES) & 1)", "full.index(stage), ((count // STAGES) & 1) ^ 1)"),
    "phase of empty": ("((count // STAGES) & 1) ^ 1)", "(count // STAGES) & 1)"),
    "phase never turns": ("full.index(stage), (count // STAGES) & 1)", "full.index(stage), 0)"),
    "no wait for an empty stage": ("mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)", "pass"),
    "no wait for a full stage": ("mbarrier.wait(full.index(stage), (count // STAGES) & 1)", "pass"),
    "no arrival in the loop": ("pred=start > 0)", "pred=False)"),
    "no arrival at the end": ("    mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)\n", ""),
    "arrival before the first products": ("count=1, pred=start > 0)", "count=1)"),
    "arrival at the wrong stage": ("(count + STAGES - 1) % STAGES), count=1, p", "count % STAGES), count=1, p"),
    "arrival without the wait": ("        sums = warpgroup_mma_wait(1, deps=[sums])\n", ""),
    "two products outstanding": ("warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(2, deps"),
    "no wait for the last products": ("warpgroup_mma_wait(0, deps=[sums])", "warpgroup_mma_wait(1, deps=[sums])"),
    "bytes of one half only": ("2 * hidden.block_type.nbytes", "hidden.block_type.nbytes"),
    "too many bytes": ("2 * hidden.block_type.nbytes", "3 * hidden.block_type.nbytes"),
    "ring too long to fill": ("count % STAGES\n        # In the first", "count % (STAGES + 1)\n        # In the first"),
    "ring too short to read": ("count % STAGES\n        mbarrier.wait", "count % (STAGES - 1)\n        mbarrier.wait"),
    "halves in one place": ("hidden_stages.index(2 * stage + 1))", "hidden_stages.index(2 * stage))"),
    "halves exchanged": ("index(2 * stage + WHICH)", "index(2 * stage + 1 - WHICH)"),
    "one warpgroup counted": ("init(empty.index(stage), count=2)", "init(empty.index(stage), count=1)"),
    "three warpgroups counted": ("init(empty.index(stage), count=2)", "init(empty.index(stage), count=3)"),
    "no fence behind new barriers": ("    fence_async_shared()\n    return", "    return"),
    "count starts anew": ("return sums, count\n", "return sums, 0\n"),
    "absent words stay": ("if word_start + WORDS > num_valid:", "if word_start > num_valid:"),
    "a tile left out": ("gl.program_id(0), num_tiles, gl", "gl.program_id(0), num_tiles - 1, gl"),
    "heads in the wrong order": ("hidden_l, weight_l, row_start", "hidden_w, weight_w, row_start"),
    "statistics of the other set": ("store_statistics(maxima + set_size", "store_statistics(maxima"),
    "labels left out": ("axis=0) > 0:", "axis=0) > 1:"),
    "no fence before a store": ("            fence_async_shared()\n            word =", "            word ="),
    "buffer written too soon": ("tma.store_wait(1)", "tma.store_wait(2)"),
    "stores in flight at the end": ("    tma.store_wait(0)\n", ""),
    "one buffer for both warpgroups": ("staging.index(2 * WHICH + quarter)", "staging.index(quarter)"),
}


def with_bug(folder, old, new):
    """A copy of the kernels' module with one place changed everywhere that it stands."""
    source = (ROOT / "benchmarks" / "hopper_kernels.py").read_text()
    assert old in source
    path = folder / "hopper_kernels_with_bug.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(tmp_path, bug):
    kernels = with_bug(tmp_path, *BUGS[bug])
    shape = SHAPES["nothing a multiple"]
    with pytest.raises((AssertionError, Hazard, Deadlock)) as caught:
        for seed in range(8):
            for check in CHECKS.values():
                check(shape, make_setup(2, seed, kernels=kernels), seed)
    print(f"{bug}: {caught.typename} {str(caught.value).splitlines()[0]}")


def test_a_barrier_counts_arrivals_and_bytes():
    barrier = Barrier("full", 1)
    assert barrier.has_completed(1) and not barrier.has_completed(0)
    barrier.change(1, 48)  # what mbarrier.expect does
    barrier.change(0, -40)
    assert not barrier.has_completed(0)
    barrier.change(0, -8)
    assert barrier.has_completed(0) and not barrier.has_completed(1)
    with pytest.raises(Hazard, match="more arrivals than 1"):
        barrier.change(2, 0)


HANGS = """
for one in "$@"; do
    echo "TRY $one"
    test $one = contrast-64 && exit 3
    echo "AT $one: tiny"
    test $one = contrast-32 && exec sleep 60
    echo 'ROW {"kind": "check", "contender": "'$one'", "passed": true}'
done
"""


def test_a_candidate_that_hangs_costs_its_own_rows_only():
    names = hopper_forward.CANDIDATES
    rows = list(hopper_forward.run_all(["sh", "-c", HANGS, "sh"], list(names), silence_s=3, limit_s=60))
    assert [row["contender"] for row in rows] == list(names)
    assert [row["kind"] for row in rows] == ["failure"] * 2 + ["check"] * 4
    assert "exit status 3" in rows[0]["failure"] and rows[0]["at"] == "start"
    assert "without a word" in rows[1]["failure"] and rows[1]["at"] == "contrast-32: tiny"


@pytest.mark.parametrize("candidate", [name for name in hopper_forward.CANDIDATES if "64" in name])
def test_what_a_gpu_will_run_runs_here(monkeypatch, capsys, candidate):
    """Every line of hopper_measure.py on tiny shapes, the candidates simulated."""
    shape = (9, 70, 32)
    monkeypatch.setattr(hopper_measure, "make_setup", lambda dim, stages: make_setup(3, 0))
    monkeypatch.setattr(hopper_measure, "SMALL_SHAPES", ((1, 1, 16),))
    monkeypatch.setattr(hopper_measure, "GOAL_SHAPES", (shape,))
    monkeypatch.setattr(hopper_measure, "REPS", 1)
    hopper_measure.main([candidate], smoke=False)
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix("ROW ")) for line in lines if line.startswith("ROW ")]
    assert lines[0] == f"TRY {candidate}" and sum(line.startswith("AT ") for line in lines) == 4
    checks, times = ([row for row in rows if row["kind"] == kind] for kind in ("check", "timing"))
    assert len(checks) == 3 and all(row["passed"] for row in checks)
    assert [row["contender"] for row in times] == ["gluon, 4 stages of 64", "today's kernel", "cuBLAS"]
    assert all(row["ms"] > 0 and row["reps"] == 1 and row["measured"] is torch.cuda.is_available() for row in times)


def test_a_wrong_candidate_is_not_timed(monkeypatch, capsys, tmp_path):
    kernels = with_bug(tmp_path, *BUGS["halves exchanged"])
    monkeypatch.setattr(hopper_measure, "make_setup", lambda dim, stages: make_setup(3, 0, kernels=kernels))
    monkeypatch.setattr(hopper_measure, "SMALL_SHAPES", ((9, 70, 32),))
    hopper_measure.main(["contrast-64"], smoke=False)
    rows = [line.removeprefix("ROW ") for line in capsys.readouterr().out.splitlines() if line.startswith("ROW ")]
    assert [(row["kind"], row["passed"]) for row in map(json.loads, rows)] == [("check", False)]


def test_without_a_hopper_nothing_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hopper_forward.py", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        hopper_forward.main()
    assert ended.value.code == 2 and "capability 9.0" in capsys.readouterr().err and not list(tmp_path.iterdir())
