"""The contrast strength α: what a list of values does to targets, and what runs at each value become.

Two modes. On fixed samples of a run, one pass over both heads gives the targets of every α: how far each pulls. And a
run per α, started here or found finished, is compared by quantities that mean the same whatever α is: the mean of
log π_w − log π_l over its own samples, their divergence from the plain model, their length, a reward model's score,
and win − lose of a judge. Losses and targets of different α are not comparable and are not compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import MAX_ALPHA
from .command import EvaluationError, Outcome, write_outcome

__all__ = ["add_parser", "run"]

DEFAULT_ALPHAS = "1.0,1.1,1.2,1.3,1.4,1.5"


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("sweep", help="what the contrast strength α does: to targets, or over whole runs")
    parser.add_argument("run_dir", nargs="?", metavar="RUN", help="score the fixed samples of this run with every α")
    parser.add_argument("--epoch", type=int, help="which samples of RUN (default: its held-out responses)")
    parser.add_argument("--alphas", default=DEFAULT_ALPHAS, help=f"comma-separated values (default: {DEFAULT_ALPHAS})")
    parser.add_argument("--runs", metavar="DIR", help="train a run per α in DIR/alpha-VALUE instead, resuming them")
    parser.add_argument("--config", metavar="RECIPE_OR_FILE", help="what the runs of --runs train")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="*", default=[], help="options on top of --config")
    parser.add_argument("--reward-model", metavar="M", help="also score the answers of the runs' last epochs")
    parser.add_argument(
        "--verdicts",
        metavar="ALPHA=FILE",
        nargs="*",
        default=[],
        help="verdicts of judged runs, model a being the run's",
    )
    parser.add_argument("--out", metavar="DIR", help="where results go (default: RUN/evaluation or DIR)")
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Write sweep.json, sweep.png and sweep.csv.

    Raises ValueError for arguments that do not fit together or name nothing, and for a run that cannot be read;
    EvaluationError when a training that it started failed.
    """
    alphas = parse_alphas(args.alphas)
    if args.runs and (args.run_dir or not args.config):
        raise ValueError("--runs: expected --config with it, and no RUN")
    if not args.runs and not args.run_dir:
        raise ValueError("expected a RUN for the targets of its samples, or --runs with --config")
    if args.runs:
        verdicts = parse_verdicts(args.verdicts, alphas)
        folders = [train_run(args, alpha) for alpha in alphas]
        rows = [
            compare_run(folder, alpha, args, verdicts.get(alpha)) for folder, alpha in zip(folders, alphas, strict=True)
        ]
        return finish(rows, Path(args.out or args.runs), "runs", y="mean_w_minus_l", x_label="α of the run")
    run_dir = Path(args.run_dir)
    rows = sweep_samples(run_dir, args.epoch, alphas)
    return finish(rows, Path(args.out or run_dir / "evaluation"), "targets", y="mean_target_gain", x_label="α")


def parse_alphas(text: str) -> list[float]:
    try:
        alphas = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--alphas {text}: expected numbers separated by commas") from None
    if not all(abs(alpha) <= MAX_ALPHA for alpha in alphas) or len(set(alphas)) != len(alphas):
        raise ValueError(f"--alphas {text}: expected finite numbers up to ±{MAX_ALPHA:g}, each once")
    return alphas


def parse_verdicts(words: Sequence[str], alphas: Sequence[float]) -> dict[float, Path]:
    found = {}
    for word in words:
        value, _, file = word.partition("=")
        try:
            alpha = float(value)
        except ValueError:
            raise ValueError(f"--verdicts {word}: expected ALPHA=FILE") from None
        if alpha not in alphas or not Path(file).is_file():
            raise ValueError(f"--verdicts {word}: expected one of the alphas and a file of verdicts")
        found[alpha] = Path(file)
    return found


def sweep_samples(run_dir: Path, epoch: int | None, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """A row per α of what the superior policy is on the run's fixed samples."""
    from ..sample_files import held_out_path, read_samples, samples_path

    path = held_out_path(run_dir) if epoch is None else samples_path(run_dir, epoch)
    if not path.is_file():
        raise ValueError(f"{path}: no such samples")
    better_minus_plain, gains = score_alphas(run_dir, read_samples(path).samples, alphas)
    return [
        {
            "series": "targets",
            "alpha": alpha,
            "num_tokens": gain.numel(),
            "mean_w_minus_l": better_minus_plain.mean().item(),
            "mean_target_gain": gain.mean().item(),
            "rms_target_gain": gain.square().mean().sqrt().item(),
            "raised_tokens": (gain > 0).double().mean().item(),
        }
        for alpha, gain in zip(alphas, gains, strict=True)
    ]


def score_alphas(run_dir: Path, samples, alphas: Sequence[float]):
    """log π_w − log π_l [A] and log π̂_α − log π_l [len(alphas), A] of samples under a run's frozen pair, float64."""
    from ..config_loading import load_config
    from ..resolve import resolve_models
    from .credit import load_pair
    from .sweep_targets import sweep_targets

    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: holds no run (no config.yaml)")
    config = load_config(run_dir / "config.yaml")
    models = resolve_models(config)
    logprobs = sweep_targets(
        load_pair(models), samples, config, alphas=(0.0, 1.0, *alphas), num_valid_vocab=models.num_valid_vocab
    ).double()
    return logprobs[1] - logprobs[0], logprobs[2:] - logprobs[0]


def train_run(args: argparse.Namespace, alpha: float) -> Path:
    """The run of one α, trained by ``inverseq-train`` when it is not finished; it resumes a run that was stopped."""
    from ..config_loading import load_config

    folder = Path(args.runs) / f"alpha-{alpha:g}"
    overrides = [*args.set, f"contrast.alpha={alpha}", f"run_dir={folder}"]
    config = load_config(args.config, overrides)
    every = config.evaluation.every
    if args.reward_model and (not every or config.epochs % every):
        raise ValueError(
            f"--reward-model: scores the test answers of the last epoch, and evaluation.every={every} with "
            f"epochs={config.epochs} draws none there; put a divisor of the epochs into --set evaluation.every=…"
        )
    if (folder / "export" / "config.json").is_file():
        if load_config(folder / "config.yaml") != config:
            raise ValueError(f"{folder}: holds a finished run of another configuration")
        return folder
    resume = ["--resume"] if (folder / "config.yaml").is_file() else []
    command = [sys.executable, "-m", "inverseq.cli", "--config", args.config, *resume, *overrides]
    sys.stderr.flush()
    status = subprocess.run(command, stdout=2).returncode  # its table to stderr: with --json stdout is one object
    if status:
        raise EvaluationError(f"{folder}: training ended with status {status}; the same command goes on from there")
    return folder


def compare_run(folder: Path, alpha: float, args: argparse.Namespace, verdicts: Path | None) -> dict[str, Any]:
    """One row of quantities that do not move with α by themselves; None where nothing was given to measure one."""
    from ..metrics import read_metrics
    from ..sample_files import read_samples, samples_path

    last = read_metrics(folder, "epoch")[-1]
    scored = read_samples(samples_path(folder, last["epoch"]))
    better_minus_plain, _ = score_alphas(folder, scored.samples, ())
    row = {
        "series": "runs",
        "alpha": alpha,
        "epoch": last["epoch"],
        "mean_w_minus_l": better_minus_plain.mean().item(),
        "kl_to_plain": last["kl_to_plain"],
        "response_length": last["response_length"],
        "reward": None,
        "win_minus_lose": None,
    }
    if args.reward_model:
        from .reward_model import RewardModel
        from .rewards import answer_files, answers_by_id

        rows = answers_by_id(answer_files(folder)[last["epoch"]]).values()
        rewards = RewardModel(args.reward_model).score([(one["messages"], one["response"]) for one in rows])
        row["reward"] = sum(rewards) / len(rewards)
    if verdicts is not None:
        from .pairwise import combine_orders, read_verdicts, summarize

        found = summarize(combine_orders(read_verdicts([verdicts])))["win_minus_lose"]
        row["win_minus_lose"] = None if found is None else found["value"]
    return row


def finish(rows: list[dict[str, Any]], out: Path, kind: str, *, y: str, x_label: str) -> Outcome:
    """Plot, files and table of the rows."""
    from .plots import draw_curves, save_plot

    written = save_plot(out / "sweep.png", rows, draw_curves("alpha", y, x_label=x_label, y_label=AXES[y]))
    if any(row.get("win_minus_lose") is not None for row in rows):
        draw = draw_curves("alpha", "win_minus_lose", x_label=x_label, y_label=AXES["win_minus_lose"])
        written += save_plot(out / "sweep_win_minus_lose.png", rows, draw)
    data = {"kind": "sweep", "mode": kind, "rows": rows}
    written.append(write_outcome(out / "sweep.json", data))
    keys = [key for key in rows[0] if key != "series"]
    lines = ["  ".join(f"{key:>16}" for key in keys)]
    for row in rows:
        lines.append("  ".join(f"{'–' if row[key] is None else format(row[key], '.4g'):>16}" for key in keys))
    return Outcome(data=data, text="\n".join(lines), files=written)


AXES = {
    "mean_w_minus_l": "mean log π_w − log π_l of the run's samples (nats a token)",
    "mean_target_gain": "mean log π̂ − log π_l of the fixed samples (nats a token)",
    "win_minus_lose": "win − lose",
}
