"""How much row work the two warpgroups of hopper_kernels.py hide, by a timeline of a multiprocessor; not measured.

    PYTHONPATH=.:kernels python benchmarks/hopper_timeline.py [--out benchmarks/results/projected]

Assumed: 4,096 operations a cycle; the products of a stage are made for one warpgroup after the other, in the order in
which they were issued, and a warpgroup issues a stage's while those before are made. A stage is loaded when both
warpgroups have read what was in its place, over a port of 64 bytes a cycle and with a latency. Row work takes a cycle
an instruction (four schedulers, four warps of a warpgroup), two while both warpgroups are at it. What comes out is the
time from tile to tile, so how much row work is hidden.
"""

import argparse
import datetime
import json
import pathlib
from dataclasses import dataclass, field

ROWS, WORDS, WIDTH = 128, 256, 4096
OPERATIONS, PORT_BYTES = 4096, 64  # of a multiprocessor in a cycle
STEP = 8  # cycles


@dataclass
class Warpgroup:
    """What it has issued, what has been made of that, and row work that is left."""

    num_issued: int = 0
    num_made: int = 0
    row_work: float = 0.0
    ends: list[int] = field(default_factory=list)  # when the products of its tiles were made


def tile_cycles(dim: int, stages: int, row_work: int, latency: int, num_tiles: int = 16) -> float:
    """Cycles from one tile to the next, once the first tiles are over."""
    in_tile, stage_bytes = WIDTH // dim, 2 * (ROWS + WORDS) * dim
    product_cycles, total = ROWS * WORDS * dim // OPERATIONS, num_tiles * (WIDTH // dim)
    groups, queue, landed = (Warpgroup(), Warpgroup()), [], []
    now, port_free, current, left = 0, 0.0, None, 0
    while any(group.num_made < total for group in groups):
        while len(landed) < min(total, min(group.num_made for group in groups) + stages):
            port_free = max(now, port_free) + stage_bytes / PORT_BYTES
            landed.append(port_free + latency)
        for group in groups:
            while (
                group.row_work == 0
                and group.num_issued < min(len(landed), group.num_made + 2)
                and landed[group.num_issued] <= now
                and group.num_issued // in_tile == group.num_made // in_tile
            ):
                queue.append(group)
                group.num_issued += 1
        if current is None and queue:
            current, left = queue.pop(0), product_cycles
        if current is not None:
            left -= STEP
            if left <= 0:
                current.num_made += 1
                if current.num_made % in_tile == 0:
                    current.row_work = row_work
                    current.ends.append(now)
                current = None
        working = [group for group in groups if group.row_work > 0]
        for group in working:
            group.row_work = max(0.0, group.row_work - STEP / len(working))
        now += STEP
    ends = groups[1].ends
    return (ends[-1] - ends[num_tiles // 3]) / (num_tiles - 1 - num_tiles // 3)


def rows() -> list[dict]:
    """One flat row for each ring, amount of row work and latency."""
    products, found = ROWS * WORDS * WIDTH * 2 // OPERATIONS, []
    for row_work in (1000, 1500):
        for latency in (500, 800, 1200):
            for dim, stages in ((64, 4), (32, 9)):
                cycles = tile_cycles(dim, stages, row_work, latency)
                found.append(
                    {
                        "op": "one tile of 128 x 256, D = 4096",
                        "device": "none: a timeline",
                        "measured": False,
                        "command": "python benchmarks/hopper_timeline.py",
                        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                        "stage_width": dim,
                        "stages": stages,
                        "row_work_instructions": row_work,
                        "load_latency_cycles": latency,
                        "product_cycles": products,
                        "tile_cycles": round(cycles),
                        "product_share": round(products / cycles, 4),
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder for hopper_timeline.jsonl")
    arguments = parser.parse_args()
    lines = [json.dumps(row) for row in rows()]
    for row in map(json.loads, lines):
        names = ("stage_width", "stages", "row_work_instructions", "load_latency_cycles", "product_share")
        print(*(f"{name} {row[name]}" for name in names), sep=", ")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "hopper_timeline.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
