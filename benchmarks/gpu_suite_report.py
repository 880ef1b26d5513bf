"""Rows of gpu_suite.py as they are stored and read: one JSON, one text table, at most five plots."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import torch

VERSIONED = ("torch", "triton", "inverseq-kernels", "liger-kernel", "cut-cross-entropy", "quack-kernels")
COLUMNS = ("op", "contender", "A", "V", "D", "phase", "ms", "ratio", "TFLOP/s", "peak MiB", "beyond outputs", "error")


class Results:
    """The rows of one run; every added row is on disk before the next one is measured."""

    def __init__(self, folder: pathlib.Path, command: str, stem: str = "gpu_suite"):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stem, self.rows = folder, stem, []
        self.path = folder / f"{stem}.json"
        self.facts = {
            "device": device_name(),
            "measured": torch.cuda.is_available(),  # the interpreter's times say nothing
            "command": command,
            "commit": commit(),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }

    def reload(self) -> None:
        """Read the rows again that another process has added to the file."""
        if self.path.exists():
            known, self.rows = len(self.rows), json.loads(self.path.read_text())
            for row in self.rows[known:]:
                self._show(row)

    def add(self, **row: object) -> None:
        """Store one flat row with the run's facts and show it."""
        self.rows.append(self.facts | row)
        temporary = self.folder / f"{self.stem}.json.tmp"
        temporary.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(temporary, self.path)
        self._show(row)

    def _show(self, row: dict) -> None:
        shown = {key: value for key, value in row.items() if value is not None and key not in self.facts}
        print("ROW", json.dumps(shown), flush=True)

    def write_text(self, lines: list[str]) -> str:
        """Write and return the run's facts and these lines."""
        facts = "\n".join(f"{key}: {value}" for key, value in self.facts.items())
        text = f"{facts}\n\n" + "\n".join(lines) + "\n"
        (self.folder / f"{self.stem}.txt").write_text(text)
        return text

    def write_plots(self) -> list[str]:
        """Draw what there is to draw; names of the files, none without matplotlib."""
        if importlib.util.find_spec("matplotlib") is None:
            print("matplotlib is not installed: no plots")
            return []
        import matplotlib

        matplotlib.use("Agg")
        timed = [row for row in self.rows if row.get("kind") == "timing" and row.get("phase") == "together"]
        loss = [row for row in timed if row["op"] == "squared_log_ratio_loss" and row["ms"] is not None]
        specs = [
            ("time_by_vocabulary", loss, "num_words", "ms", "num_rows"),
            ("time_by_rows", loss, "num_rows", "ms", "num_words"),
            ("memory_by_rows", loss, "num_rows", "peak_bytes", "num_words"),
            ("error_by_time", loss, "ms", "error", None),
        ]
        return [name for spec in specs if (name := _plot(self.folder, *spec)) is not None]


def _plot(folder: pathlib.Path, name: str, rows: list[dict], x: str, y: str, fixed: str | None) -> str | None:
    """One figure over the rows that share the most common value of ``fixed`` and the hidden size."""
    import matplotlib.pyplot as plt

    colors = sorted({row["contender"] for row in rows})  # a contender has one colour in all figures
    rows = [row for row in rows if row.get(x) and row.get(y)]
    if fixed is not None and rows:
        groups = [(row[fixed], row["dim"]) for row in rows]
        common = max(set(groups), key=groups.count)
        rows = [row for row in rows if (row[fixed], row["dim"]) == common]
        title = f"{fixed} {common[0]}, dim {common[1]}"
    else:
        title = "all shapes"
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for contender in sorted({row["contender"] for row in rows}):
        points = sorted((row[x], row[y]) for row in rows if row["contender"] == contender)
        style = {"color": f"C{colors.index(contender)}", "linestyle": "-" if fixed else ""}
        axes.plot(*zip(*points, strict=True), marker="o", label=contender, **style)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=f"squared log-ratio loss: {title}")
    if fixed is not None:
        axes.set_xticks(sizes := sorted({row[x] for row in rows}), [f"{size:,}" for size in sizes], rotation=30)
        axes.minorticks_off()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return f"{name}.png"


def table_lines(rows: list[dict]) -> list[str]:
    """Timings side by side, then every other row."""
    cells = [list(COLUMNS)]
    for row in rows:
        if row.get("kind") == "timing":
            cells.append(_cells(row, rows))
    widths = [max(len(line[index]) for line in cells) for index in range(len(COLUMNS))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for row in rows:
        if row.get("kind") != "timing":
            detail = row.get("failure") or row.get("detail") or ""
            lines.append(f"{row['kind']}: {row['op']} {'passed' if row['passed'] else 'FAILED'} {detail}")
    return lines


def _cells(row: dict, rows: list[dict]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    same = ("op", "num_rows", "num_words", "dim", "phase")
    bare = [
        other["ms"]
        for other in rows
        if other.get("kind") == "timing"
        and other["contender"].startswith("cuBLAS")
        and all(other[key] == row[key] for key in same)
    ]
    ratio = row["ms"] / bare[0] if row["ms"] is not None and bare and bare[0] else None
    tflops = row["flops"] / row["ms"] / 1e9 if row["ms"] else None
    peak, beyond = row["peak_bytes"], row["beyond_output_bytes"]
    error = row["failure"] or number(row["error"], ".1e")
    return [
        row["op"],
        row["contender"],
        *(str(row[key]) for key in ("num_rows", "num_words", "dim")),
        row["phase"],
        number(row["ms"], ".3f"),
        number(ratio, ".2f"),
        number(tflops, ".0f"),
        number(None if peak is None else peak / 2**20, ".0f"),
        number(None if beyond is None else beyond / 2**20, ".0f"),
        error[:90],
    ]


def shape_facts(shape: Any, dtype: torch.dtype) -> dict:
    """Shape and dtype as every row has them."""
    return {
        "num_rows": shape.num_rows,
        "num_words": shape.num_words,
        "dim": shape.dim,
        "dtype": str(dtype).removeprefix("torch."),
    }


def short(error: Exception) -> str:
    """The first line of an error, for a row."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU (interpreter)"


def versions() -> dict[str, str]:
    """Installed versions of what a number depends on."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of this checkout, marked when files differ from it; in a copy without git what INVERSEQ_COMMIT says."""
    folder = str(pathlib.Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout.strip()
    return os.environ.get("INVERSEQ_COMMIT", "unknown")


def command_line(stem: str = "gpu_suite") -> str:
    """The command as it was typed."""
    return " ".join(["python", f"benchmarks/{stem}.py", *sys.argv[1:]])
