"""Structures of the forward GEMM compared offline: one tile a program, and persistent programs over many tiles.

    PYTHONPATH=.:kernels python benchmarks/kernel_structures.py [--out benchmarks/results]
    PYTHONPATH=.:kernels python benchmarks/kernel_structures.py --hopper [--out benchmarks/results]

The kernels of ``inverseq_kernels`` give each program one tile. A persistent program walks over many tiles, so that with
flattened loops the next tile's loads run while the row work of the last one ends; a smaller tile lets two programs
share a multiprocessor to the same end; with warp specialisation, which triton does on sm_90 at four warps only, loads
have warps of their own. The candidates of hopper_kernels.py have such warps by their own source, in Gluon; ``--hopper``
compiles these alone and keeps the rows that other versions of triton made.

Compiled for sm_80 and sm_90 without a GPU and read from the machine code: what a GPU would say about time is not in
this table, only what each structure costs. ``loop`` counts the instructions of the shortest loop with a tensor-core
instruction, which for flattened loops holds the row work as well; ``tile loop`` those of the shortest one that has
exponentials in it too. What was concluded stands in kernels/README.md.
"""

import os

# The interpreter would replace the kernels that are to be compiled; triton reads this when it decorates them.
os.environ.pop("TRITON_INTERPRET", None)

import argparse  # noqa: E402
import datetime  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from inverseq_kernels.triton_blocks import Blocks, choose_loss_blocks  # noqa: E402
from inverseq_kernels.triton_common import EMPTY_MAX, LOG2_E, add_dots, store_label  # noqa: E402
from inverseq_kernels.triton_compile import compile_case, compile_offline  # noqa: E402
from inverseq_kernels.triton_exponentials import compile_cases  # noqa: E402
from inverseq_kernels.triton_rows import power_offset  # noqa: E402

try:
    from benchmarks.hopper_compile import KERNELS, compile_hopper
    from benchmarks.hopper_launch import EXPONENTIAL_RINGS, RINGS, Setup
    from benchmarks.kernel_report import SHARED_MEMORY_LIMIT, TENSOR_CORE, _commit, disassemble, resource_usage
except ImportError:  # run as a script
    from hopper_compile import KERNELS, compile_hopper
    from hopper_launch import EXPONENTIAL_RINGS, RINGS, Setup
    from kernel_report import SHARED_MEMORY_LIMIT, TENSOR_CORE, _commit, disassemble, resource_usage

NUM_PROGRAMS = {80: 108, 90: 132}  # multiprocessors of an A100 and an H100
REGISTERS_OF_SM = 65536
HOPPER_WARPS = 12  # 4 + 4 + 1, in whole warpgroups
COLUMNS = (
    "sm",
    "structure",
    "tile",
    "warps",
    "stages",
    "registers",
    "spills",
    "shared",
    "tensor",
    "instructions",
    "loop",
    "tile loop",
    "programs/SM",
    "setmaxnreg",
)


@triton.jit
def write_tile(
    tile,
    hidden,  # [R, D] or its descriptor
    weight,  # [V, D] or its descriptor
    token_ids,  # [R] int64
    exponentials,  # [R, pitch] out
    maxima,  # [word blocks, R] fp32 out
    totals,  # [word blocks, R] fp32 out
    labels,  # [R] fp32 out
    num_rows,
    num_valid,
    dim,
    pitch,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """One tile of ``exponential_kernel`` without bias and softcap; the loop over D may have warps that only load."""
    num_row_blocks, num_word_blocks = tl.cdiv(num_rows, ROWS), tl.cdiv(num_valid, WORDS)
    per_group = GROUP_ROWS * num_word_blocks
    group = tile // per_group
    size = tl.minimum(num_row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    inside = tile - group * per_group
    row_start = (group * GROUP_ROWS + inside % size) * ROWS
    word_block = inside // size
    word_start = word_block * WORDS
    rows = row_start + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    logits = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    if SPECIALIZE:
        for start in tl.range(0, dim, DIM, warp_specialize=True):
            logits = tl.dot(hidden.load([row_start, start]), weight.load([word_start, start]).T, logits)
    else:
        logits = add_dots(
            logits, hidden, weight, row_start, word_start, num_rows, num_valid, dim, ROWS, WORDS, DIM, True, TMA
        )
    words = word_start + tl.arange(0, WORDS)
    logits = tl.where((words < num_valid)[None, :], logits * inverse_temperature, float("-inf"))
    store_label(labels, logits, token_ids, rows, row_mask, word_start, WORDS)
    maximum = tl.maximum(tl.max(logits, axis=1), EMPTY_MAX)
    values = tl.exp2((logits - maximum[:, None]) * LOG2_E)
    at = word_block.to(tl.int64) * num_rows + rows
    tl.store(maxima + at, maximum, mask=row_mask)
    tl.store(totals + at, tl.sum(values, axis=1), mask=row_mask)
    values = values * tl.exp2(maximum * LOG2_E - power_offset(maximum, False))[:, None]
    begin = exponentials + row_start.to(tl.int64) * pitch + word_start
    offsets = tl.arange(0, ROWS)[:, None] * pitch + tl.arange(0, WORDS)[None, :]
    mask = row_mask[:, None] & (words < pitch)[None, :]
    tl.store(begin + offsets.to(tl.int64), values.to(exponentials.dtype.element_ty), mask=mask)


@triton.jit
def one_tile_kernel(
    hidden,
    weight,
    token_ids,
    exponentials,
    maxima,
    totals,
    labels,
    num_rows,
    num_valid,
    dim,
    pitch,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """One tile a program."""
    write_tile(
        tl.program_id(0), hidden, weight, token_ids, exponentials, maxima, totals, labels, num_rows, num_valid, dim,
        pitch, inverse_temperature, ROWS, WORDS, DIM, GROUP_ROWS, TMA, SPECIALIZE,
    )  # fmt: skip


@triton.jit
def persistent_kernel(
    hidden,
    weight,
    token_ids,
    exponentials,
    maxima,
    totals,
    labels,
    num_rows,
    num_valid,
    dim,
    pitch,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """One program for every multiprocessor, each with many tiles."""
    num_tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(num_valid, WORDS)
    for tile in tl.range(tl.program_id(0), num_tiles, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        write_tile(
            tile, hidden, weight, token_ids, exponentials, maxima, totals, labels, num_rows, num_valid, dim,
            pitch, inverse_temperature, ROWS, WORDS, DIM, GROUP_ROWS, TMA, False,
        )  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """One configuration; ``specialize`` gives loads warps of their own."""

    name: str
    blocks: Blocks
    persistent: bool = True
    flatten: bool = False
    specialize: bool = False


def structures(capability: int) -> list[Structure]:
    """The configurations compared on a chip, on bf16 tiles read as the package reads them there."""
    chosen = choose_loss_blocks(capability, False)

    def tile(rows, words, warps, stages):
        return Blocks(rows, words, chosen.dim, num_warps=warps, num_stages=stages, tma=chosen.tma)

    found = [
        Structure("one tile, two programs fit", tile(128, 128, 8, 3), persistent=False),
        Structure("one tile, two programs fit", tile(128, 128, 4, 3), persistent=False),
        Structure("persistent", chosen),
        Structure("persistent, flattened", chosen, flatten=True),
        Structure("persistent, flattened", tile(128, 128, 8, chosen.num_stages), flatten=True),
    ]
    if capability >= 90:
        found += [
            Structure("one tile, specialised", tile(128, 128, 4, 4), persistent=False, specialize=True),
            Structure("one tile, specialised", tile(128, 256, 4, 3), persistent=False, specialize=True),
            Structure("persistent, specialised", tile(128, 128, 4, 4), specialize=True),
            Structure("persistent, specialised", tile(128, 256, 4, 3), specialize=True),
            Structure("persistent, specialised, flattened", tile(128, 128, 4, 4), flatten=True, specialize=True),
        ]
    return found


def case_of(structure: Structure, capability: int):
    """The compile case of a configuration: bf16, no bias, no softcap."""
    blocks = structure.blocks
    pointers = {name: "*fp32" for name in ("maxima", "totals", "labels")}
    pointers |= {"token_ids": "*i64", "exponentials": "*bf16"}
    for name, size in (("hidden", blocks.rows), ("weight", blocks.words)):
        pointers[name] = f"tensordesc<bf16[{size}, {blocks.dim}]>" if blocks.tma else "*bf16"
    constexprs = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "TMA": blocks.tma,
        "SPECIALIZE": structure.specialize,
    }
    if structure.persistent:
        constexprs |= {"PROGRAMS": NUM_PROGRAMS[capability], "FLATTEN": structure.flatten}
    return compile_case(
        persistent_kernel if structure.persistent else one_tile_kernel,
        structure.name,
        pointers=pointers,
        floats=("inverse_temperature",),
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=True,
        divisible=("pitch", "dim"),
    )


def row_of(case, capability: int) -> dict:
    """Compile one case and count; a configuration that does not compile is a row with its error."""
    tile = "x".join(str(case.constexprs[name]) for name in ("ROWS", "WORDS", "DIM"))
    row = {"sm": capability, "structure": case.name, "tile": tile, "warps": case.num_warps, "stages": case.num_stages}
    try:
        compiled = compile_offline(case, capability)
    except Exception as error:
        return row | {"error": f"does not compile: {str(error).splitlines()[0]}"}
    return row | counts_of(compiled, max(case.num_warps, total_warps(compiled.asm["ttgir"])), capability)


def counts_of(compiled, warps: int, capability: int) -> dict:
    """What machine code says about a program of so many warps."""
    sass, shared = disassemble(compiled, "-sass"), compiled.metadata.shared
    registers, _ = resource_usage(compiled)
    resident = min(REGISTERS_OF_SM // (registers * 32 * warps), SHARED_MEMORY_LIMIT[capability] // max(shared, 1))
    return {
        "warps": warps,
        "registers": registers,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": shared,
        "tensor": len(re.findall(rf"\b{TENSOR_CORE[capability]}\b", sass)),
        "instructions": len(instructions_of(sass)),
        "loop": loop_length(sass, TENSOR_CORE[capability]),
        "tile loop": loop_length(sass, TENSOR_CORE[capability], r"MUFU\.EX2"),
        "programs/SM": resident,
        "setmaxnreg": "/".join(sorted(set(re.findall(r"setmaxnreg\S+\s+(\d+)", compiled.asm["ptx"])), key=int)),
    }


def hopper_rows() -> list[dict]:
    """The candidates in Gluon: two warpgroups that multiply and a warp that loads, in twelve warps."""
    rows = []
    for name in KERNELS:
        for dim, stages in EXPONENTIAL_RINGS if "exponential" in name else RINGS:
            setup = Setup(NUM_PROGRAMS[90], dim=dim, stages=stages)
            tile = f"{2 * setup.half}x{setup.words}x{dim}"
            structure = f"a warp that loads, {name.split('_')[1]}"
            row = {"sm": 90, "structure": structure, "tile": tile, "stages": stages}
            rows.append(row | counts_of(compile_hopper(name, setup), HOPPER_WARPS, 90))
    return rows


def total_warps(ttgir: str) -> int:
    """Warps of a program with those that specialisation adds; 0 where nothing is specialised."""
    found = re.search(r'"ttg.total-num-warps" = (\d+)', ttgir)
    return int(found[1]) if found else 0


def instructions_of(sass: str) -> list[tuple[int, str]]:
    """Address and text of every instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    return [(int(address, 16), text) for address, text in found]


def loop_length(sass: str, *wanted: str) -> int | None:
    """Instructions of the shortest loop (a branch backwards) with all of the wanted instructions in it.

    What stands behind the last EXIT waits for barriers and jumps back to where it came from: no loop of the kernel.
    """
    instructions, lengths = instructions_of(sass), []
    end = max(position for position, (_, text) in enumerate(instructions) if "EXIT" in text)
    for position, (address, text) in enumerate(instructions[:end]):
        target = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))", text)
        if target and target[1] and int(target[1], 16) < address:
            body = [text for at, text in instructions[: position + 1] if at >= int(target[1], 16)]
            if all(any(re.search(rf"\b{name}\b", text) for text in body) for name in wanted):
                lengths.append(len(body))
    return min(lengths, default=None)


def format_table(rows: list[dict]) -> str:
    """The rows as aligned text; an error takes the place of the numbers."""
    cells = [list(COLUMNS)] + [[str(row.get(column, "")) for column in COLUMNS] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(COLUMNS))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for index, row in enumerate(rows):
        if "error" in row:
            lines[index + 1] += f"  {row['error']}"
    return "\n".join(lines) + "\n"


def facts_of_run(command: str) -> dict[str, str]:
    """What a result file says about how it came to be."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"command": command, "commit": _commit(), "date": date, "triton": triton.__version__}


def write_hopper(rows: list[dict], out: pathlib.Path | None) -> int:
    """Show the candidates' rows, put them in the place of this triton's, and say whether they keep to the limits."""
    print(format_table(rows))
    if out is not None:
        path = out / "hopper_structures.json"
        kept = json.loads(path.read_text()) if path.exists() else []
        facts = facts_of_run("python benchmarks/kernel_structures.py --hopper")
        kept = [row for row in kept if row["triton"] != triton.__version__] + [facts | row for row in rows]
        path.write_text(json.dumps(sorted(kept, key=lambda row: row["triton"]), indent=1) + "\n")
    within = all(
        row["spills"] == 0 and row["shared"] <= SHARED_MEMORY_LIMIT[90] and row["tensor"] and row["setmaxnreg"]
        for row in rows
    )
    return 0 if within else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder for kernel_structures.txt and kernel_structures.json")
    parser.add_argument("--hopper", action="store_true", help="only the candidates, into hopper_structures.json")
    arguments = parser.parse_args()
    if arguments.hopper:
        return write_hopper(hopper_rows(), arguments.out)
    rows = []
    for capability in SHARED_MEMORY_LIMIT:
        # The package's own kernel first: bf16 without bias and softcap.
        cases = [case for case in compile_cases(capability, ["bf16"]) if case.name.startswith("exponential bf16")][:1]
        rows += [row_of(case, capability) | {"structure": "one tile (the package's)"} for case in cases]
        rows += [row_of(case_of(structure, capability), capability) for structure in structures(capability)]
        rows += hopper_rows() if capability == 90 else []
        print(format_table(rows), flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        head = facts_of_run("python benchmarks/kernel_structures.py")
        (arguments.out / "kernel_structures.json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
        facts = "\n".join(f"{key}: {value}" for key, value in head.items())
        (arguments.out / "kernel_structures.txt").write_text(f"{facts}\n\n{format_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
