"""Reward curves: a reward model scores the test answers of every epoch of a run.

    increment_e = (mean reward of epoch e − mean reward of epoch 0) / s

s is the standard deviation of the epochs' means. A baseline, another run or one file of answers to the same prompts,
is measured from the same zero and divided by the same s, so that the lines can be compared. Intervals are 95 % of a
bootstrap over prompts with s held fixed.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import read_jsonl, write_jsonl
from .command import Outcome, write_outcome
from .generate import model_files

__all__ = ["add_parser", "increments", "run"]

RESAMPLES = 2000


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("rewards", help="a reward model's curve over the epochs of a run")
    parser.add_argument("run_dir", metavar="RUN", help="a run with eval/epoch_*.jsonl (evaluation.every)")
    parser.add_argument("--model", required=True, help="reward model: a folder or hub id of a sequence classifier")
    parser.add_argument("--objective", help="which output of a model with several: a label or an index")
    parser.add_argument("--baseline", metavar="RUN_OR_FILE", help="another run, or one file of answers, beside it")
    parser.add_argument("--batch-size", type=int, default=8, help="answers scored together (default: 8)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the reward model's own code")
    parser.add_argument("--out", metavar="DIR", help="where results go (default: RUN/evaluation)")
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Score what is not scored yet, then write rewards.json, rewards.png and rewards.csv."""
    from .plots import draw_curves, save_plot

    run_dir = Path(args.run_dir)
    out = Path(args.out) if args.out else run_dir / "evaluation"
    files = answer_files(run_dir)
    baseline = baseline_files(args.baseline, files) if args.baseline else {}
    scorer = LazyScorer(args)
    rewards = {epoch: scored_rows(path, scorer, out) for epoch, path in files.items()}
    others = {epoch: scored_rows(path, scorer, out) for epoch, path in baseline.items()}
    name, other = series_names(run_dir, args.baseline)
    rows = increments(rewards, series=name)
    if others:
        rows += increments(others, series=other, zero=rewards, scale=scale_of(rewards))
        if len(others) == 1:  # one file: a level line over all epochs
            rows += [{**rows[-1], "epoch": epoch} for epoch in files if epoch]
    label = "increment over epoch 0, in standard deviations across epochs"
    written = save_plot(out / "rewards.png", rows, draw_curves("epoch", "increment", y_label=label))
    data = {"kind": "rewards", "reward_model": args.model, "scale": scale_of(rewards), "rows": rows}
    written.append(write_outcome(out / "rewards.json", data))
    lines = [f"{'series':20} {'epoch':>5} {'reward':>9} {'increment':>9}  95 % interval"]
    for row in rows:
        interval = f"{row['increment_low']:+.2f} … {row['increment_high']:+.2f}"
        lines.append(
            f"{row['series'][:20]:20} {row['epoch']:5d} {row['reward']:9.4f} {row['increment']:+9.2f}  {interval}"
        )
    return Outcome(data=data, text="\n".join(lines), files=written)


def series_names(run_dir: Path, baseline: str | None) -> tuple[str, str]:
    """What the lines of a run and its baseline are called: the last parts of their paths that tell them apart."""
    ours = run_dir.resolve()
    if baseline is None:
        return ours.name, ""
    theirs = Path(baseline).resolve()
    theirs = theirs if theirs.is_dir() else theirs.with_suffix("")
    for count in range(1, 1 + max(len(ours.parts), len(theirs.parts))):
        names = tuple("/".join(path.parts[-count:]) for path in (ours, theirs))
        if names[0] != names[1]:
            return names
    raise ValueError(f"--baseline {baseline}: is the run itself")


def answer_files(run_dir: Path) -> dict[int, Path]:
    """Epoch → file of test answers; ValueError without at least epoch 0 and one more."""
    found = {}
    for path in sorted((run_dir / "eval").glob("epoch_*.jsonl")):
        match = re.fullmatch(r"epoch_(\d+)", path.stem)
        if match:
            found[int(match[1])] = path
    if 0 not in found or len(found) < 2:
        have = ", ".join(map(str, found)) or "none"
        raise ValueError(f"{run_dir}: expected test answers of epoch 0 and of a later one, found {have}; "
                         f"train with evaluation.every=1")  # fmt: skip
    return found


def baseline_files(name: str, files: dict[int, Path]) -> dict[int, Path]:
    """The baseline's answers: those of a run, or a single file as epoch 0."""
    path = Path(name)
    if not path.exists():
        raise ValueError(f"--baseline {name}: no such run or file")
    found = answer_files(path) if path.is_dir() else {0: path}
    for one in found.values():
        if set(answers_by_id(one)) != set(answers_by_id(files[0])):
            raise ValueError(f"--baseline {name}: {one} does not answer the prompts of {files[0]}")
    return found


def answers_by_id(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a file of answers by prompt id; ValueError for an id that stands twice."""
    from ..sample_files import read_evaluation

    rows = {}
    for row in read_evaluation(path):
        if row["id"] in rows:
            raise ValueError(f"{path}: the id {row['id']!r} stands in it twice")
        rows[row["id"]] = row
    if not rows:
        raise ValueError(f"{path}: no answers in this file")
    return rows


def scale_of(rewards: dict[int, dict[str, float]]) -> float:
    """Standard deviation (n − 1) of the epochs' mean rewards; ValueError when they are all equal."""
    scale = float(np.std([np.mean(list(by_id.values())) for by_id in rewards.values()], ddof=1))
    if not scale > 0:
        raise ValueError("the mean reward is the same in all epochs: increments have no scale")
    return scale


def increments(
    rewards: dict[int, dict[str, float]],
    *,
    series: str,
    zero: dict[int, dict[str, float]] | None = None,
    scale: float | None = None,
) -> list[dict[str, Any]]:
    """Rows {series, epoch, reward, increment, increment_low, increment_high}, ordered by epoch.

    ``rewards`` is epoch → {prompt id: reward}; ``zero`` has the epoch 0 that increments count from (default: the
    same), ``scale`` what they are divided by (default: ``scale_of(rewards)``). Raises ValueError for an epoch with
    other prompts than epoch 0, and where the default scale would be 0.
    """
    scale = scale_of(rewards) if scale is None else scale
    first = (zero or rewards)[0]
    ids = sorted(first)
    start = np.array([first[i] for i in ids])
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(ids), (RESAMPLES, len(ids)))
    rows = []
    for epoch in sorted(rewards):
        if set(rewards[epoch]) != set(ids):
            raise ValueError(f"{series}, epoch {epoch}: answers other prompts than epoch 0")
        now = np.array([rewards[epoch][i] for i in ids])
        low, high = np.percentile((now - start)[picks].mean(axis=1) / scale, [2.5, 97.5])
        rows.append(
            {
                "series": series,
                "epoch": epoch,
                "reward": float(now.mean()),
                "increment": float((now - start).mean() / scale),
                "increment_low": float(low),
                "increment_high": float(high),
            }
        )
    return rows


def scored_rows(path: Path, scorer: LazyScorer, out: Path) -> dict[str, float]:
    """{prompt id: reward} of a file of answers, from the cache when this model has scored exactly these answers."""
    rows = list(answers_by_id(path).values())
    key = zlib.crc32(f"{scorer.identity}\n{path.read_text(encoding='utf-8')}".encode())
    cache = out / "rewards" / f"{path.stem}-{key:08x}.jsonl"
    if cache.is_file():
        return {row["id"]: row["reward"] for _, row in read_jsonl(cache)}
    rewards = scorer.score([(row["messages"], row["response"]) for row in rows])
    result = {row["id"]: reward for row, reward in zip(rows, rewards, strict=True)}
    write_jsonl(cache, ({"id": name, "reward": reward} for name, reward in result.items()))
    return result


class LazyScorer:
    """The reward model, loaded when the first answer is not in the cache."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.identity = f"{args.model}\n{args.objective}\n{model_files(args.model)}"
        self._model: Any = None

    def score(self, conversations: Sequence[tuple[Sequence[dict[str, str]], str]]) -> list[float]:
        from .reward_model import RewardModel

        if self._model is None:
            self._model = RewardModel(
                self.args.model, objective=self.args.objective, trust_remote_code=self.args.trust_remote_code
            )
        return self._model.score(conversations, batch_size=self.args.batch_size)
