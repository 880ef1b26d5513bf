"""What the method does to a small chat model: runs over seeds and over α, compared by what α does not move.

    PYTHONPATH=.:kernels python benchmarks/convergence.py --hh DIR [--runs runs/convergence]
        [--out benchmarks/results/convergence.jsonl] [--set key=value …] [--alphas 1.0 … 1.5] [--seeds 0 1 2]

DIR holds Anthropic-HH files harmless-base/{train,test}.jsonl.gz (pairs of chosen and rejected).
A run for each α with the first seed, and for α = 1.4 with every seed; finished runs are kept and stopped ones resumed.
Every epoch of every run is a row: the held-out mean (log π̂ − log π_θ)² relative to epoch 0 (its own target: not
comparable across α), and what is: mean log π_w − log π_l of the epoch's samples under the frozen model, their
divergence from the plain model, their length, and the score of a reward proxy on the answers to fixed prompts. The
proxy is a logistic regression on TF-IDF features of HH pairs; its share of rightly ranked held-out pairs stands in
every row. A 135M model cannot follow a principle: nothing here is about safety.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from gpu_suite_report import commit, versions
from packing import cpu_name

from inverseq.config_loading import load_config
from inverseq.evaluation.plots import COLORS
from inverseq.evaluation.sweep import score_alphas
from inverseq.metrics import read_metrics
from inverseq.sample_files import eval_path, read_evaluation, read_samples, samples_path

ALPHAS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
SEEDS = (0, 1, 2)
MAIN_ALPHA = 1.4


class RewardProxy:
    """P(chosen over rejected) by a linear model of words and pairs of words in the final answer."""

    def __init__(self, folder: Path):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        train, test = read_pairs(folder, "train"), read_pairs(folder, "test")
        self.vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        self.vectorizer.fit([text for pair in train for text in pair])
        differences = self.features([a for a, _ in train]) - self.features([b for _, b in train])
        signs = [1 if index % 2 else -1 for index in range(len(train))]  # half of the pairs the other way round
        flipped = differences.multiply([[sign] for sign in signs]).tocsr()
        self.model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(flipped, signs)
        margins = self.score([a for a, _ in test]) - self.score([b for _, b in test])
        self.accuracy = float((margins > 0).mean())

    def features(self, texts: list[str]):
        return self.vectorizer.transform(texts)

    def score(self, texts: list[str]):
        """Log-odds up to a constant, [number of texts] float64."""
        return self.features(texts) @ self.model.coef_[0]


def read_pairs(folder: Path, split: str) -> list[tuple[str, str]]:
    """(chosen, rejected) final answers of the harmless subset; the helpful one prefers what this one rejects."""
    path = folder / "harmless-base" / f"{split}.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"--hh {folder}: {path} does not exist")
    pairs = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            chosen, rejected = (row[key].rpartition("Assistant:")[2].strip() for key in ("chosen", "rejected"))
            if chosen and rejected and chosen != rejected:
                pairs.append((chosen, rejected))
    return pairs


def run_options(arguments: argparse.Namespace, alpha: float, seed: int) -> list[str]:
    return [
        f"contrast.alpha={alpha}", f"seed={seed}", f"run_dir={arguments.runs}/alpha-{alpha:g}-seed-{seed}",
        f"prompts.path={arguments.hh}/harmless-base/train.jsonl.gz", "evaluation.every=1", "logging.tensorboard=false",
        *arguments.set,
    ]  # fmt: skip


def train_run(arguments: argparse.Namespace, alpha: float, seed: int) -> Path:
    """The finished run of one α and seed, trained or resumed when it is not finished."""
    overrides = run_options(arguments, alpha, seed)
    folder = Path(load_config("demo", overrides).run_dir)
    if not (folder / "export" / "config.json").is_file():
        resume = ["--resume"] if (folder / "config.yaml").is_file() else []
        command = [sys.executable, "-m", "inverseq.cli", "--config", "demo", *resume, *overrides]
        subprocess.run(command, check=True)
    return folder


def rows_of_run(folder: Path, alpha: float, seed: int, proxy: RewardProxy) -> list[dict]:
    """One row an epoch."""
    epochs = read_metrics(folder, "epoch")
    first = epochs[0]["held_out/mean_squared_log_ratio"]
    rows = []
    for metrics in epochs:
        epoch = metrics["epoch"]
        answers = [row["response"] for row in read_evaluation(eval_path(folder, epoch))]
        row = {
            "op": "convergence", "alpha": alpha, "seed": seed, "epoch": epoch,
            "held_out_relative": metrics["held_out/mean_squared_log_ratio"] / first,
            "held_out": metrics["held_out/mean_squared_log_ratio"],
            "reward_proxy": float(proxy.score(answers).mean()), "proxy_accuracy": proxy.accuracy,
            "num_answers": len(answers), "mean_w_minus_l": None, "kl_to_plain": None, "response_length": None,
            "loss": metrics.get("loss"), "epoch_duration_s": metrics.get("epoch_duration_s"),
        }  # fmt: skip
        if epoch:
            scored = read_samples(samples_path(folder, epoch))
            better_minus_plain, _ = score_alphas(folder, scored.samples, ())
            row |= {
                "mean_w_minus_l": better_minus_plain.mean().item(),
                "kl_to_plain": metrics["kl_to_plain"],
                "response_length": metrics["response_length"],
            }
        rows.append(row)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Two rows of panels: epochs of the main α over its seeds, and the last epoch against α."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(2, 5)
    keys = ("held_out_relative", "mean_w_minus_l", "kl_to_plain", "response_length", "reward_proxy")
    labels = (
        "held-out (log ratio)² / epoch 0", "log π_w − log π_l (nats a token)", "log π_θ − log π_l (nats a token)",
        "response tokens", "reward proxy",
    )  # fmt: skip
    last = max(row["epoch"] for row in rows)
    for (above, below), key, label in zip(panels.T, keys, labels, strict=True):
        for seed, color, marker in zip(sorted({row["seed"] for row in rows}), COLORS, "os^", strict=False):
            points = [r for r in rows if r["alpha"] == MAIN_ALPHA and r["seed"] == seed and r[key] is not None]
            style = {"color": color, "marker": marker, "label": f"seed {seed}"}
            above.plot([r["epoch"] for r in points], [r[key] for r in points], markersize=4, **style)
            if points and seed != SEEDS[0]:
                below.plot(MAIN_ALPHA, points[-1][key], markersize=5, **style)
        above.set(xlabel=f"epoch, α = {MAIN_ALPHA}", ylabel=label)
        points = sorted((r for r in rows if r["epoch"] == last and r["seed"] == SEEDS[0]), key=lambda r: r["alpha"])
        below.plot([r["alpha"] for r in points], [r[key] for r in points], marker="o", markersize=4, color=COLORS[0])
        below.set(xlabel=f"α, epoch {last}; seeds as above", ylabel=label)
        if key == "held_out_relative":
            below.set_title("each α against its own target", fontsize=8)
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hh", required=True, type=Path, help="folder with harmless-base/")
    parser.add_argument("--runs", default="runs/convergence")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/convergence.jsonl"))
    parser.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    started = time.perf_counter()
    proxy = RewardProxy(arguments.hh)
    print(f"reward proxy: {proxy.accuracy:.1%} of held-out pairs ranked rightly", flush=True)
    jobs = [(alpha, arguments.seeds[0]) for alpha in arguments.alphas]
    jobs += [(MAIN_ALPHA, seed) for seed in arguments.seeds if (MAIN_ALPHA, seed) not in jobs]
    jobs.sort(key=lambda job: (job[0] != MAIN_ALPHA, job))
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "measured": True, "date": datetime.now(timezone.utc).date().isoformat(), "commit": commit(),
        "versions": versions(), "command": "python benchmarks/convergence.py", "options": arguments.set,
        "load_average": None,
    }  # fmt: skip
    rows: list[dict] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for alpha, seed in jobs:
        folder = train_run(arguments, alpha, seed)
        about["load_average"] = os.getloadavg()[0]
        rows += [{**row, **about} for row in rows_of_run(folder, alpha, seed, proxy)]
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = rows[-1]
        print(
            f"alpha {alpha:g} seed {seed}: held-out {done['held_out_relative']:.3f} of epoch 0, log w - l "
            f"{done['mean_w_minus_l']:+.4f}, length {done['response_length']:.1f}, proxy {done['reward_proxy']:+.3f} "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
