"""The command ``inverseq-report``: a run as one self-contained HTML page.

Epochs, curves, time, samples with their credit, what was evaluated, and the configuration. It reads the run directory
and the results in RUN/evaluation (or the folders given), loads no model, and asks no network. A missing part is left
out and said to be missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..atomic import atomic_file
from ..config import Config
from ..config_loading import load_config, to_yaml
from ..metrics import read_metrics
from ..sample_files import read_samples
from .credit import TokenCredit, credit_of
from .credit_cli import tokenizer_of_run
from .heatmap import credit_html, messages_html, value_figure
from .page import document, escape, figure_svg, table
from .plots import COLORS
from .report_results import find_results, plots_below, results_sections

__all__ = ["main", "report"]

PROGRAM = "inverseq-report"
# (heading, metrics key)
COLUMNS = (
    ("epoch", "epoch"),
    ("held-out (log ratio)²", "held_out/mean_squared_log_ratio"),
    ("loss", "loss"),
    ("rms log ratio", "rms_log_ratio"),
    ("KL to plain", "kl_to_plain"),
    ("KL to initial", "kl_to_initial"),
    ("response tokens", "response_length"),
    ("ended by EOS", "eos_rate"),
    ("gradient norm", "grad_norm"),
    ("sampled tokens/s", "sample_tokens_per_second"),
    ("trained tokens/s", "train_tokens_per_second"),
    ("epoch, s", "epoch_duration_s"),
)
# (caption, axis label, kind of row, keys)
CURVES = (
    ("Distance to the superior policy on held-out responses", "mean (log ratio)²", "epoch",
     ("held_out/mean_squared_log_ratio",)),
    ("Training loss of every optimizer step", "loss", "step", ("loss",)),
    ("Divergence from the plain model on the policy's own samples", "nats a token", "epoch", ("kl_to_plain",)),
    ("Divergence from the initial model on the policy's own samples", "nats a token", "epoch", ("kl_to_initial",)),
    ("Length of sampled responses", "tokens", "epoch", ("response_length",)),
    ("How responses end", "share", "epoch", ("eos_rate", "truncation_rate")),
    ("Gradient norm before clipping", "norm", "step", ("grad_norm",)),
)  # fmt: skip
LABELS = {"eos_rate": "ended by themselves (EOS)", "truncation_rate": "cut at sampling.max_new_tokens"}
ENDS = {"stop": "ended by itself", "length": "cut at the length limit"}
PHASES = {"sample": "sample", "score": "score", "train": "train", "held_out": "held-out score"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 for bad input, with one line on stderr."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument("--samples", type=int, default=6, help="samples shown with their credit (default: 6)")
    parser.add_argument(
        "--results", metavar="DIR", nargs="*", help="folders with results of inverseq-eval (default: RUN/evaluation)"
    )
    arguments = parser.parse_args(argv)
    try:
        results = None if arguments.results is None else [Path(name) for name in arguments.results]
        path = report(arguments.run, arguments.out, num_samples=arguments.samples, results=results)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {path}")
    return 0


def report(
    run_dir: Path | str, out: Path | str | None = None, *, num_samples: int = 6, results: Sequence[Path] | None = None
) -> Path:
    """Write the page of a run and return its path; ValueError for a folder that holds no run."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: holds no run (no config.yaml)")
    if num_samples < 0:
        raise ValueError(f"--samples {num_samples}: expected 0 or more")
    config = load_config(run_dir / "config.yaml")
    epochs, steps = read_metrics(run_dir, "epoch"), read_metrics(run_dir, "step")
    plots = plots_below(run_dir / "evaluation") if results is None else find_results(results)
    sections = [
        overview(config, epochs, steps),
        *curve_sections(epochs, steps),
        timing_section(epochs),
        *sample_sections(config, run_dir, num_samples),
        *results_sections(plots),
        "<h2>Configuration</h2>",
        f"<pre>{escape(to_yaml(config))}</pre>",
    ]
    path = Path(out) if out else run_dir / "report.html"
    with atomic_file(path) as file:
        file.write(document(f"Inverse-Q*: {run_dir.resolve().name}", sections).encode())
    return path


def overview(config: Config, epochs: list[dict], steps: list[dict]) -> str:
    """What was run, how far it is, and the table of its epochs."""
    contrast = config.contrast
    second = f"against {contrast.plain_model}" if contrast.kind == "model" else f"principle {contrast.principle}"
    done = max((row["epoch"] for row in epochs), default=0)
    optim = config.optim
    facts = [
        ("initial policy", config.model.path),
        ("contrast", f"{contrast.kind}, {second}, α = {contrast.alpha:g}"),
        ("prompts", config.prompts.path),
        ("epochs", f"{done} of {config.epochs}, {config.sampling.samples_per_epoch} samples each"),
        ("optimizer steps", f"{len(steps)}, {optim.samples_per_step} samples each, learning rate {optim.lr:g}"),
    ]
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in epochs)]
    rows = ([row.get(key) for _, key in columns] for row in epochs)
    body = table([heading for heading, _ in columns], rows) if epochs else '<p class="note">No epoch yet.</p>'
    return f'<table class="facts">{lines}</table><h2>Epochs</h2>{body}'


def curve_sections(epochs: list[dict], steps: list[dict]) -> Iterator[str]:
    """The curves that there are numbers for."""
    from matplotlib.figure import Figure

    yield "<h2>Curves</h2>"
    for caption, label, kind, keys in CURVES:
        rows = epochs if kind == "epoch" else steps
        present = [key for key in keys if sum(row.get(key) is not None for row in rows) > 1]
        if not present:
            continue
        figure = Figure(figsize=(7, 2.6))
        axes = figure.add_subplot()
        for key, color in zip(present, COLORS, strict=False):
            points = [(row[kind], row[key]) for row in rows if row.get(key) is not None]
            style = {"color": color, "linewidth": 1.4, "label": LABELS.get(key, key)}
            axes.plot(*zip(*points, strict=True), marker="o" if kind == "epoch" else None, markersize=3.5, **style)
            axes.update_datalim([(points[0][0], 0.0)])  # zero is in sight
        axes.set(xlabel="epoch" if kind == "epoch" else "optimizer step", ylabel=label)
        axes.autoscale_view()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(present) > 1:
            axes.legend(frameon=False)
        yield figure_svg(figure, caption)


def timing_section(epochs: list[dict]) -> str:
    """Seconds of each phase of each epoch, stacked."""
    from matplotlib.figure import Figure

    rows = [row for row in epochs if row.get("epoch_duration_s")]
    if not rows:
        return '<h2>Time</h2><p class="note">No finished epoch yet.</p>'
    figure = Figure(figsize=(7, 2.6))
    axes = figure.add_subplot()
    bottom = [0.0] * len(rows)
    positions = [row["epoch"] for row in rows]
    for (phase, label), color in zip(PHASES.items(), COLORS, strict=False):
        heights = [row.get(f"{phase}_duration_s") or 0.0 for row in rows]
        axes.bar(positions, heights, bottom=bottom, label=label, color=color)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.bar(
        positions,
        [max(row["epoch_duration_s"] - low, 0.0) for row, low in zip(rows, bottom, strict=True)],
        bottom=bottom, label="other", color="#bbb",
    )  # fmt: skip
    ends = [max(row["epoch_duration_s"], low) for row, low in zip(rows, bottom, strict=True)]
    heights = [row.get("checkpoint_duration_s") or 0.0 for row in rows]
    axes.bar(positions, heights, bottom=ends, label="checkpoint", color=COLORS[len(PHASES)])
    axes.set(xlabel="epoch", ylabel="seconds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    mean = sum(row["epoch_duration_s"] for row in rows) / len(rows)
    return "<h2>Time</h2>" + figure_svg(figure, f"Seconds by phase; {mean:.1f} s an epoch in the mean")


def sample_sections(config: Config, run_dir: Path, count: int) -> Iterator[str]:
    """The newest epoch's samples with the highest and lowest credit a token, in alternation."""
    files = sorted((run_dir / "samples").glob("epoch_*.jsonl"))
    yield "<h2>Samples and their credit</h2>"
    if not files or not count:
        yield '<p class="note">No samples are shown.</p>'
        return
    try:
        tokenizer = tokenizer_of_run(config, run_dir)
    except ValueError as error:
        yield f'<p class="note">No samples are shown: {escape(error)}</p>'
        return
    scored = read_samples(files[-1])
    lengths = [max(sample.num_actions, 1) for sample in scored.samples]
    gain = (scored.targets - scored.plain_logprobs).double()
    means = [gain[scored.offsets[i] : scored.offsets[i + 1]].sum().item() / lengths[i] for i in range(len(lengths))]
    order = sorted(range(len(means)), key=lambda index: -means[index])
    chosen = [order[i // 2] if i % 2 == 0 else order[-1 - i // 2] for i in range(min(count, len(order)))]
    yield (
        f'<p class="note">Credit β (log π̂ − log π_l) with β = 1: blue tokens are those that the superior policy likes '
        f"better than the plain model does, red ones it likes less. {len(chosen)} of the {len(order)} samples of "
        f"{escape(files[-1].stem.replace('_', ' '))}, those of highest and lowest credit a token.</p>"
    )
    for position, index in enumerate(chosen):
        yield sample_section(credit_of(scored, index, tokenizer), is_open=position < 2)


def sample_section(credit: TokenCredit, *, is_open: bool) -> str:
    count = len(credit.credit)
    end = ENDS.get(credit.finish_reason, credit.finish_reason)
    numbers = f": credit {credit.total:+.2f} nats over {count:,} tokens, {end}"
    return "".join(
        [
            f"<details{' open' if is_open else ''}>",
            f"<summary><bdi>{escape(credit.prompt_id)}</bdi>{escape(numbers)}</summary>",
            messages_html(credit.messages),
            '<div class="role">assistant</div>',
            credit_html(credit),
            value_figure(credit),
            "</details>",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
