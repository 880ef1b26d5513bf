"""What the compiler makes of every Triton kernel for sm_80 and sm_90, read without a GPU; also a gate.

    PYTHONPATH=.:kernels python benchmarks/kernel_report.py [--all] [--out benchmarks/results]

Each ``triton_*.py`` of the package lists, in ``compile_cases``, the configurations that its launchers can
choose. The report compiles each one and reads registers, stack, spills and tensor-core instructions from the
machine code (the tools come with the triton wheel), shared memory from triton, and integer widths of addresses
from its IR. Exit status 1 where the gate finds something: a spill, more shared memory than the chip has, a GEMM without
tensor-core instructions, a 32-bit product in an address, or a kernel that no case covers.
"""

import os

# The interpreter would replace the kernels that are to be compiled; triton reads this when it decorates them.
os.environ.pop("TRITON_INTERPRET", None)

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import datetime  # noqa: E402
import importlib  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import pathlib  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import types  # noqa: E402
from typing import Any  # noqa: E402

import triton  # noqa: E402

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
COLUMNS = (
    "sm",
    "kernel",
    "case",
    "warps",
    "stages",
    "registers",
    "stack",
    "spills",
    "shared",
    "HMMA",
    "HGMMA",
    "problems",
)


def find_modules(package: str) -> list[str]:
    """Dotted names of a package's triton_*.py files."""
    folder = pathlib.Path(importlib.import_module(package).__file__).parent
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("triton_*.py"))]


def module_cases(name: str, capability: int, dtypes: list[str]) -> list:
    """The configurations that one module lists; none where it only holds shared functions."""
    module = importlib.import_module(name)
    return module.compile_cases(capability, dtypes) if hasattr(module, "compile_cases") else []


def jit_functions(module: types.ModuleType) -> dict[str, triton.JITFunction]:
    """The JIT functions that a module defines itself, by qualified name."""
    return {
        f"{module.__name__}.{name}": value
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__
    }


def reached_from(kernel: triton.JITFunction) -> set[int]:
    """Identities of a kernel and of the JIT functions that it calls, directly or not."""
    reached, queue = set(), [kernel]
    while queue:
        function = queue.pop()
        if id(function) in reached:
            continue
        reached.add(id(function))
        scope = inspect.getclosurevars(function.fn).globals
        queue += [value for value in scope.values() if isinstance(value, triton.JITFunction)]
    return reached


def uncovered_kernels(package: str, dtypes: list[str]) -> list[str]:
    """JIT functions of the package that no compiled case contains."""
    names = find_modules(package)
    covered = set()
    for name in names:
        for case in module_cases(name, 90, dtypes):
            covered |= reached_from(case.kernel)
    functions = {}
    for name in names:
        functions |= jit_functions(importlib.import_module(name))
    return sorted(name for name, function in functions.items() if id(function) not in covered)


def compile_row(task: tuple[str, int, int, list[str]]) -> dict:
    """Compile one case and read what came out; runs in a worker process."""
    module, index, capability, dtypes = task
    case = module_cases(module, capability, dtypes)[index]
    from inverseq_kernels.triton_compile import compile_offline

    compiled = compile_offline(case, capability)
    sass = disassemble(compiled, "-sass")
    registers, stack = resource_usage(compiled)
    row = {
        "sm": capability,
        "module": module,
        "kernel": case.kernel.fn.__name__,
        "case": case.name,
        "warps": case.num_warps,
        "stages": case.num_stages,
        "is_gemm": case.is_gemm,
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "HMMA": len(re.findall(r"\bHMMA\b", sass)),
        "HGMMA": len(re.findall(r"\bHGMMA\b", sass)),
        "int32_products": int32_address_products(compiled.asm["ttir"]),
    }
    return row | {"problems": row_problems(row)}


def resource_usage(compiled: Any) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack in a compiled kernel."""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", disassemble(compiled, "-res-usage")).groups()
    return int(registers), int(stack)


def row_problems(row: dict) -> list[str]:
    """What the gate objects to in one row."""
    problems = []
    if row["spills"] or row["stack"]:
        problems.append(f"spills: {row['spills']} local loads and stores, {row['stack']} bytes of stack")
    limit = SHARED_MEMORY_LIMIT[row["sm"]]
    if row["shared"] > limit:
        problems.append(f"shared memory {row['shared']} > {limit}")
    if row["is_gemm"] and not row[TENSOR_CORE[row["sm"]]]:
        problems.append(f"no {TENSOR_CORE[row['sm']]} instruction")
    if row["int32_products"]:
        problems.append(f"32-bit products in addresses: {', '.join(row['int32_products'])}")
    return problems


_OPERATION = re.compile(r"^\s*(%[\w]+) = ([\w.]+)\s+(.*?) : (.*?)(?: loc\(.*\))?$")
# Through these an address offset passes unchanged in size, or grows by a sum or a product.
_TRANSPARENT = {
    "arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.extui", "arith.select", "arith.minsi",
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape",
}  # fmt: skip


def int32_address_products(ttir: str) -> list[str]:
    """Products of two run-time numbers made in 32 bits on the way to a pointer: A * V does not fit there.

    A factor that is constant or a position inside a tile (``make_range``) is small; a quotient or remainder
    of program numbers ends the search, because it is bounded by the grid.
    """
    operations = {}
    for line in ttir.splitlines():
        match = _OPERATION.match(line)
        if match:
            result, name, body, kind = match.groups()
            operations[result] = (name, re.findall(r"%[\w]+", body), kind)

    def is_small(value: str) -> bool:
        name, operands, _ = operations.get(value, ("argument", [], ""))
        if name in ("arith.constant", "tt.make_range"):
            return True
        return name in _TRANSPARENT and bool(operands) and all(is_small(operand) for operand in operands)

    found, seen = set(), set()
    queue = [operands[-1] for name, operands, _ in operations.values() if name == "tt.addptr"]
    while queue:
        value = queue.pop()
        if value in seen or value not in operations:
            continue
        seen.add(value)
        name, operands, kind = operations[value]
        if name == "arith.muli" and re.search(r"\bi32|xi32", kind) and not any(map(is_small, operands)):
            found.add(f"{value} = {operands[0]} * {operands[1]}")
        if name in _TRANSPARENT:
            queue += operands
    return sorted(found)


def build_report(package: str, dtypes: list[str], jobs: int) -> tuple[list[dict], list[str]]:
    """Rows of every case on both chips, and everything the gate objects to."""
    tasks = [
        (module, index, capability, dtypes)
        for capability in SHARED_MEMORY_LIMIT
        for module in find_modules(package)
        for index in range(len(module_cases(module, capability, dtypes)))
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        rows = list(pool.map(compile_row, tasks))
    problems = [f"sm_{row['sm']} {row['case']}: {text}" for row in rows for text in row["problems"]]
    problems += [f"{name} is in no compile case" for name in uncovered_kernels(package, dtypes)]
    return rows, problems


def format_table(rows: list[dict]) -> str:
    """The rows as aligned text."""
    cells = [list(COLUMNS)]
    for row in rows:
        texts = {column: str(row[column]) for column in COLUMNS}
        texts["problems"] = "; ".join(row["problems"]) or "-"
        cells.append([texts[column] for column in COLUMNS])
    widths = [max(len(line[index]) for line in cells) for index in range(len(COLUMNS))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines) + "\n"


def disassemble(compiled: Any, option: str) -> str:
    """What cuobjdump prints of a compiled kernel."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _commit() -> str:
    folder = pathlib.Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="fp16 and fp32 as well as bf16")
    parser.add_argument("--out", type=pathlib.Path, help="folder for kernel_report.txt and kernel_report.json")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: %(default)s)")
    parser.add_argument("--package", default="inverseq_kernels", help="package with triton_*.py (default: %(default)s)")
    arguments = parser.parse_args()
    dtypes = ["bf16", "fp16", "fp32"] if arguments.all else ["bf16"]
    rows, problems = build_report(arguments.package, dtypes, arguments.jobs)
    table = format_table(rows)
    print(table)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        head = {
            "command": "python benchmarks/kernel_report.py" + (" --all" if arguments.all else ""),
            "commit": _commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "triton": triton.__version__,
            "problems": problems,
        }
        (arguments.out / "kernel_report.json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
        facts = "\n".join(f"{key}: {head[key]}" for key in ("command", "commit", "date", "triton"))
        (arguments.out / "kernel_report.txt").write_text(f"{facts}\n\n{table}")
    for problem in problems:
        print(f"GATE {problem}")
    print(f"{len(rows)} kernels compiled, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
