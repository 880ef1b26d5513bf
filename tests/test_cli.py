"""The command line: help that lists every option, one line for every mistake, and the exit status of each ending."""

import operator
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from inverseq import __version__
from inverseq.cli import Terminated, main, stopping_cleanly
from inverseq.config import iter_options
from inverseq.config_loading import load_config, recipe_names
from inverseq.run_directory import write_run_config
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def error_line(capsys, *words, status=2):
    """The one line that a failing command leaves on stderr."""
    try:
        found = main(words)
    except SystemExit as exit:
        found = exit.code
    captured = capsys.readouterr()
    assert found == status and captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("INFO ")]
    assert len(lines) == 1 and lines[0].startswith("inverseq-train: "), captured.err
    return lines[0]


def test_help_lists_every_option_with_its_default_in_100_columns(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    defaults = {"optim.lr": "1e-06", "contrast.alpha": "1.4", "model.path": '""', "logging.wandb": "false"}
    for key, _, default, help_text in iter_options():
        assert re.search(rf"^  {re.escape(key)}=", text, flags=re.MULTILINE), key
        assert f"{key}={defaults.get(key, default if isinstance(default, str) and default else '')}" in text
        assert help_text in words or help_text in text.replace("\n" + " " * 42, " "), key
    for option in ("--config", "--resume", "--dry-run", "--version", *recipe_names()):
        assert option in text


def test_defaults_in_the_help_can_be_given_back_as_overrides(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = re.findall(r"^  ([a-z_.]+)=(\[.*?\]|\S+)", capsys.readouterr().out, flags=re.MULTILINE)
    unset = ("model.path", "run_dir", "section.key")
    overrides = [f"{key}={value}" for key, value in shown if key not in unset]
    assert len(overrides) == len([*iter_options()]) - 2
    config = load_config("demo", overrides)
    for key, _, default, _ in iter_options():
        if key not in unset:
            assert operator.attrgetter(key)(config) == default, key


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.split() == ["inverseq-train", __version__]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: --config"),
        (["--config"], "expected one argument"),
        (["--conf", "demo"], "required: --config"),
        (["--config", "demo", "--fast"], "unrecognized arguments: --fast"),
        (["--config", "demo", "--epochs", "3"], "options of the configuration are words without dashes"),
        (["--config", "dmeo"], "did you mean demo?"),
        (["--config", "none.yaml"], "no such file"),
        (["--config", "demo", "foo"], "expected section.key=value"),
        (["--config", "demo", "contrast.alhpa=1"], "did you mean contrast.alpha?"),
        (["--config", "demo", "contrast.alpha=nan"], "contrast.alpha=nan: expected a finite number"),
        (["--config", "demo", "epochs=1", "epochs=2"], "epochs is given twice"),
        (["epochs=1", "--config", "demo", "seed=x"], "seed='x': expected an integer"),
        (["--config", "demo", "model.path=./nowhere"], "model.path='./nowhere': no such folder"),
        (["--config", "demo", "--dry-run", "model.path=./nowhere"], "model.path='./nowhere': no such folder"),
        (["--config", "demo", "model.path=./two\nlines"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, *words)
    assert expected in line and "error: " in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_of_another_run_is_status_2_and_stays_as_it_is(capsys, tmp_path, model_path):
    run_dir = tmp_path / "run"
    words = ["--config", "demo", f"model.path={model_path}", f"run_dir={run_dir}"]
    write_run_config(load_config("demo", words[2:]), run_dir)
    before = (run_dir / "config.yaml").read_bytes()
    assert "contrast.alpha: 1.1 here, 1.4 there" in error_line(capsys, *words, "contrast.alpha=1.1", "--resume")
    assert "--resume continues it" in error_line(capsys, *words)
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    assert (run_dir / "config.yaml").read_bytes() == before


def test_a_dry_run_prints_its_plan_and_ends_with_status_0(capsys, tmp_path, model_path):
    words = ["--config", "demo", "--dry-run", f"model.path={model_path}", f"run_dir={tmp_path / 'run'}", "epochs=2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "epochs: 2" in out and "A synthetic epoch" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_that_does_not_fit_prints_its_plan_and_ends_with_status_2(capsys, tmp_path, model_path):
    words = ["--config", "demo", "--dry-run", f"model.path={model_path}", f"run_dir={tmp_path / 'run'}"]
    assert main([*words, "--hardware", "8xA800"]) == 0
    assert "Placement on 8xA800, 8 ranks" in capsys.readouterr().out
    assert main([*words, "--hardware", "8xA800", "engine.workspace_mib=1000000"]) == 2
    out, err = capsys.readouterr()
    assert "A synthetic epoch" in out and "DOES NOT FIT" in out
    assert err.splitlines()[-1].startswith("inverseq-train: error: the estimate does not fit")
    assert error_line(capsys, *words, "--hardware", "8xT4").startswith("inverseq-train: error: --hardware '8xT4'")
    assert "goes with --dry-run" in error_line(
        capsys, *[word for word in words if word != "--dry-run"], "--hardware", "1x80GB"
    )


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_its_status_and_the_command_that_continues_the_run(tmp_path, model_path, number):
    run_dir = tmp_path / "a run"
    words = ["--config", "demo", f"model.path={model_path}", f"run_dir={run_dir}", "epochs=100000"]
    words += ["model.device=cpu", "prompts.held_out=2", "sampling.samples_per_epoch=2", "sampling.max_new_tokens=4"]
    command = [sys.executable, "-m", "inverseq.cli", *words]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (run_dir / "checkpoints" / "epoch_0001").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    errors = ""
    if number == signal.SIGTERM:  # schedulers send one to a process and another, at any time after, to its group
        process.send_signal(number)
        for line in process.stderr:
            errors += line
            if "interrupted" in line:
                process.send_signal(number)
    errors += process.communicate(timeout=600)[1]
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    continued = errors.splitlines()[-1].partition("interrupted; continue with: inverseq-train ")[2]
    assert shlex.split(continued) == [*words, "--resume"]


class Destroyed:
    """An object that sends this process a signal and is still busy when the handler runs."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_within_a_destructor_is_not_lost(number):
    handlers = signal.getsignal(number), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt) as caught, stopping_cleanly():
        destroyed = Destroyed(number)
        del destroyed
        time.sleep(30)
    assert (type(caught.value) is Terminated) == (number == signal.SIGTERM)
    if number == signal.SIGTERM:  # the program is at its end, and a second one would replace its exit status
        assert signal.signal(number, handlers[0]) == signal.SIG_IGN
    assert (signal.getsignal(number), sys.unraisablehook) == handlers


def test_a_run_that_fails_on_the_way_is_status_1_in_one_line(capsys, tmp_path, model_path):
    words = ["--config", "demo", f"model.path={model_path}", f"run_dir={tmp_path / 'run'}", "epochs=1"]
    words += ["model.device=cpu", "prompts.held_out=0", "sampling.samples_per_epoch=2", "sampling.max_new_tokens=2"]
    words += ["contrast.alpha=1e20"]  # the loss overflows
    assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("inverseq-train: error: optimizer step 1: loss inf") and last.endswith("checkpoint is kept")


def test_debugging_shows_where_an_error_arose(monkeypatch):
    monkeypatch.setenv("INVERSEQ_DEBUG", "1")
    with pytest.raises(ValueError, match="no such recipe"):
        main(["--config", "nothing"])


UNBUFFERED = """
import logging
from inverseq.cli import show_log_lines
from inverseq.progress import Progress
show_log_lines()
logging.getLogger("inverseq.trainer").info("a line of the log")
with Progress().phase("epoch 1", "sample", 1) as advance:
    advance()
"""


def test_every_line_is_one_write_so_that_processes_do_not_write_into_each_others():
    """A packet socket as stderr keeps the writes apart; ``-u`` is how launchers run Python."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        subprocess.run([sys.executable, "-u", "-c", UNBUFFERED], stderr=theirs, check=True)
        written = [ours.recv(4096) for _ in range(2)]
    assert written[0] == b"INFO a line of the log\n"
    assert re.fullmatch(rb"epoch 1 sample: 1 samples in .* s \(.*/s\)\n", written[1])


def test_help_of_the_installed_command_needs_neither_torch_nor_transformers():
    code = "import sys; sys.argv = ['inverseq-train', '--help']\nfrom inverseq.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\nassert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), stdout=subprocess.DEVNULL)
