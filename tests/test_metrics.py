import json
import math
import os
import pty
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from inverseq.config import LoggingConfig
from inverseq.metrics import MetricsLog, metrics_path, read_metrics
from inverseq.progress import COLUMNS, Progress, fitting_table

ROOT = Path(__file__).resolve().parent.parent
PLAIN = LoggingConfig(tensorboard=False)


def write_epoch(log, epoch, steps=2, offset=0.0):
    for step in range(steps):
        log.step({"epoch": epoch, "step": (epoch - 1) * steps + step + 1, "loss": offset + epoch + step / 10})
    log.epoch({"epoch": epoch, "step": epoch * steps, "held_out/mean_squared_log_ratio": offset + 1 / (1 + epoch)})


def write_run(run_dir, epochs=3, logging=PLAIN):
    log = MetricsLog(run_dir, logging)
    log.epoch({"epoch": 0, "step": 0, "held_out/mean_squared_log_ratio": 1.0})
    for epoch in range(1, epochs + 1):
        write_epoch(log, epoch)
    log.close()
    return log


def test_rows_are_flat_objects_in_order_and_on_the_disk_when_the_call_returns(tmp_path):
    log = MetricsLog(tmp_path, PLAIN)
    log.epoch({"epoch": 0, "held_out/mean_squared_log_ratio": 0.1 + 0.2})
    assert metrics_path(tmp_path).read_text() == (
        '{"kind": "epoch", "epoch": 0, "held_out/mean_squared_log_ratio": 0.30000000000000004}\n'
    )
    log.step({"epoch": 1, "step": 1, "loss": np.float32(0.5), "tokens": torch.tensor(3), "note": "a\nb", "flag": True})
    log.close()
    log.close()
    expected = {"kind": "step", "epoch": 1, "step": 1, "loss": 0.5, "tokens": 3, "note": "a\nb", "flag": True}
    assert read_metrics(tmp_path)[1] == expected
    assert read_metrics(tmp_path, "step") == [expected]
    assert [row["epoch"] for row in read_metrics(tmp_path, "epoch")] == [0]


def test_a_row_is_whole_and_synced_however_little_a_write_takes(tmp_path, monkeypatch):
    synced, write, sync = [], os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(metrics_path(tmp_path).read_text()), sync(descriptor))
    )
    log = MetricsLog(tmp_path, PLAIN)
    log.step({"epoch": 1, "step": 1, "loss": 0.5})
    log.close()
    assert synced == ['{"kind": "step", "epoch": 1, "step": 1, "loss": 0.5}\n']
    assert metrics_path(tmp_path).read_text() == synced[0]


def test_numbers_that_are_not_finite_are_null_and_every_row_is_strict_json(tmp_path):
    log = MetricsLog(tmp_path, PLAIN)
    log.step({"epoch": 1, "step": 1, "a": math.nan, "b": -math.inf, "c": torch.tensor(math.inf), "d": 1e308})
    log.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    row = json.loads(metrics_path(tmp_path).read_text(), parse_constant=refuse)
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, None, 1e308)


def test_a_nested_metric_is_refused_by_name(tmp_path):
    log = MetricsLog(tmp_path, PLAIN)
    with pytest.raises(ValueError, match="lengths"):
        log.epoch({"epoch": 1, "lengths": [1, 2]})
    assert read_metrics(tmp_path) == []


def test_truncation_drops_later_epochs_and_a_torn_line_and_the_run_goes_on(tmp_path):
    write_run(tmp_path / "whole", epochs=3)
    whole = metrics_path(tmp_path / "whole").read_bytes()
    for cut in (0, 1, 30):
        run_dir = tmp_path / f"cut{cut}"
        write_run(run_dir, epochs=2)
        log = MetricsLog(run_dir, PLAIN)
        log.step({"epoch": 3, "step": 5, "loss": 99.0})
        log.step({"epoch": 3, "step": 6, "loss": 99.0})
        log.close()
        with open(metrics_path(run_dir), "rb+") as file:
            file.truncate(metrics_path(run_dir).stat().st_size - cut)
        assert len(read_metrics(run_dir, "step")) == 6 - (cut > 0)
        log = MetricsLog(run_dir, PLAIN)
        log.truncate_after(2)
        assert [row["epoch"] for row in read_metrics(run_dir)] == [0, 1, 1, 1, 2, 2, 2]
        write_epoch(log, 3)
        log.close()
        assert metrics_path(run_dir).read_bytes() == whole
        assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_truncation_without_a_checkpoint_or_a_file_leaves_no_rows(tmp_path):
    write_run(tmp_path / "run")
    for run_dir in (tmp_path / "run", tmp_path / "new"):
        log = MetricsLog(run_dir, PLAIN)
        log.truncate_after(-1)
        log.close()
        assert read_metrics(run_dir) == []


def test_a_spoilt_line_in_the_middle_is_an_error_with_file_and_line(tmp_path):
    write_run(tmp_path)
    lines = metrics_path(tmp_path).read_bytes().splitlines(keepends=True)
    for spoilt in (b"{\n", b"3\n", b'{"kind": "step"}\n', b"\n", b"\xff\n"):
        metrics_path(tmp_path).write_bytes(lines[0] + spoilt + lines[2])
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a metrics row"):
            read_metrics(tmp_path)


FULL_DISK = """
import resource, signal, sys
from tests.test_metrics import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write_run(sys.argv[1])
before = metrics_path(sys.argv[1]).read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, len(before) + 20))
log = MetricsLog(sys.argv[1], PLAIN)
try:
    write_epoch(log, 4)
except OSError as error:
    assert "File too large" in str(error) and str(error).endswith(f"'{metrics_path(sys.argv[1])}'"), error
else:
    raise AssertionError("no error")
log.close()
assert metrics_path(sys.argv[1]).read_bytes() == before
"""


def test_a_full_disk_is_one_error_naming_the_file_and_no_half_row_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shown(folder, tag):
    """What TensorBoard shows of a tag: (step, value), purged ones left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def move_to_the_second_before(folder):
    """Let event files be of an earlier second, as those of a run that is resumed are.

    TensorBoard reads files in the order of their names: the second, the process, then a number that counts the
    process's writers and is compared as text, so that of one second's files the tenth comes before the ninth.
    """
    for file in folder.glob("*/events.out.tfevents.*"):
        name = re.sub(r"(?<=tfevents\.)\d+", lambda second: f"{int(second[0]) - 1:010d}", file.name)
        file.rename(file.with_name(name))


def test_tensorboard_shows_a_resumed_run_as_if_it_had_never_stopped(tmp_path):
    logging = LoggingConfig(tensorboard=True)
    write_run(tmp_path, epochs=2, logging=logging)
    move_to_the_second_before(tmp_path / "tensorboard")
    log = MetricsLog(tmp_path, logging)
    log.truncate_after(1)
    for epoch in (2, 3):
        write_epoch(log, epoch, offset=100.0)
    log.close()
    steps = shown(tmp_path / "tensorboard" / "steps", "step/loss")
    assert steps == [(1, 1.0), (2, 1.1), (3, 102.0), (4, 102.1), (5, 103.0), (6, 103.1)]
    epochs = shown(tmp_path / "tensorboard" / "epochs", "epoch/held_out/mean_squared_log_ratio")
    assert epochs == [(0, 1.0), (1, 0.5), (2, 100 + 1 / 3), (3, 100.25)]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_its_package_is_a_clear_error_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"logging\.wandb=True: the package wandb is not installed"):
        MetricsLog(tmp_path / "run", LoggingConfig(wandb=True))
    assert not (tmp_path / "run").exists()


def test_where_there_is_no_terminal_a_phase_is_one_plain_line(tmp_path, capfd):
    write_run(tmp_path)
    progress = Progress()
    with progress.phase("epoch 1", "train", 10) as advance:
        advance(4)
        advance(6)
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(r"epoch 1 train: 10 samples in \d+\.\d s \([\d.]+/s\)\n", err)
    progress.summary(tmp_path)
    out, _ = capfd.readouterr()
    assert str(tmp_path) in out and "0.3333" in out and "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["0", "1", "2", "3"]
    assert ["epoch", "(log", "ratio)²"] in lines  # columns that no row has are left out


@pytest.mark.parametrize("width", [140, 100, 80, 60, 40])
def test_a_narrow_terminal_shows_fewer_columns_and_cuts_no_number(width, capfd):
    rows = [{key: epoch if key == "epoch" else 1234.5678 for _, key, _ in COLUMNS} for epoch in (0, 10)]
    table, left_out = fitting_table(rows, width)
    Console(width=width).print(table)
    out, _ = capfd.readouterr()
    assert "…" not in out and max(map(len, out.splitlines())) <= width
    assert len(table.columns) + len(left_out) == len(COLUMNS) and bool(left_out) == (width < 140)
    assert out.count("1234.5678") == 2 * sum("4f" in spec for heading, _, spec in COLUMNS if heading not in left_out)
    assert [column.header for column in table.columns][:2] == ["epoch", "held-out\n(log ratio)²"]


def test_on_a_terminal_a_phase_is_a_live_bar(tmp_path):
    script = (
        "from inverseq.progress import Progress\n"
        "with Progress().phase('epoch 1', 'sample', 3) as advance:\n    advance(1)\n    advance(2)\n"
    )
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    shown = os.read(main, 100_000).decode()
    os.close(main)
    assert "epoch 1 sample" in shown and "3/3" in shown and "\x1b[" in shown
