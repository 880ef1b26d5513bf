"""A run directory is new, or belongs to the configuration that is resumed; nothing is overwritten."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from inverseq.config_loading import load_config
from inverseq.run_directory import check_run_directory, is_locked_by_us, sole_writer, write_run_config


def config_for(run_dir, *overrides):
    return load_config("demo", [f"run_dir={run_dir}", *overrides])


def error_of(config, *, resume=False):
    with pytest.raises(ValueError) as caught:
        check_run_directory(config, resume=resume)
    assert "run_dir" in str(caught.value)
    return str(caught.value)


@pytest.fixture
def started_run(tmp_path):
    run_dir = tmp_path / "run"
    write_run_config(config_for(run_dir), run_dir)
    (run_dir / "metrics.jsonl").write_text("{}\n")
    return run_dir


def test_a_new_run_takes_an_absent_or_empty_folder_and_writes_nothing(tmp_path):
    assert check_run_directory(config_for(tmp_path / "a" / "b"), resume=False) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".config.yaml.tmp").write_text("left by a killed write")
    check_run_directory(config_for(tmp_path / "empty"), resume=False)


def test_resume_needs_a_run(tmp_path):
    assert "holds no run to resume" in error_of(config_for(tmp_path / "none"), resume=True)


def test_an_existing_run_is_continued_only_when_asked(started_run):
    assert "--resume continues it" in error_of(config_for(started_run))
    assert check_run_directory(config_for(started_run), resume=True) == started_run


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_another_run_names_what_differs(started_run, resume):
    message = error_of(config_for(started_run, "contrast.alpha=1.2", "optim.samples_per_step=4"), resume=resume)
    assert "holds another run" in message and f"(--config {started_run / 'config.yaml'} --resume" in message
    assert "contrast.alpha: 1.2 here, 1.4 there" in message and "optim.samples_per_step: 4 here, 8 there" in message
    assert "epochs" not in message


def test_a_resumed_run_may_move_log_elsewhere_and_train_longer(started_run, tmp_path):
    moved = started_run.rename(tmp_path / "moved")
    longer = config_for(moved, "logging.tensorboard=false", "checkpoint.keep_last=3", "epochs=9")
    check_run_directory(longer, resume=True)


def test_epochs_may_not_change_under_a_schedule_that_depends_on_them(tmp_path):
    run_dir = tmp_path / "run"
    write_run_config(config_for(run_dir, "optim.schedule=linear"), run_dir)
    message = error_of(config_for(run_dir, "optim.schedule=linear", "epochs=9"), resume=True)
    assert "epochs: 9 here, 4 there" in message


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (False, True):
        message = error_of(config_for(tmp_path), resume=resume)
        assert "is not empty and holds no run" in message and "thesis.tex" in message


def test_a_file_and_a_folder_below_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file" in error_of(config_for(tmp_path / "file"))
    assert "is a file" in error_of(config_for(tmp_path / "file" / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in error_of(config_for(tmp_path / "run"))


def test_a_run_that_can_no_longer_be_written_is_not_resumed(started_run, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written to" in error_of(config_for(started_run), resume=True)


def test_a_damaged_configuration_in_the_run_directory_is_reported(started_run):
    (started_run / "config.yaml").write_text("model: [")
    assert "cannot be read" in error_of(config_for(started_run), resume=True)


HOLDER = """
import sys
from pathlib import Path
from inverseq.config_loading import load_config
from inverseq.run_directory import sole_writer, write_run_config
config = load_config("demo", [f"run_dir={sys.argv[1]}"])
with sole_writer(config, resume=False):
    write_run_config(config, Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_only_one_process_writes_and_a_killed_one_lets_go(tmp_path):
    run_dir, pipes = tmp_path / "run", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process trains there"):
                sole_writer(config_for(run_dir), resume=resume).__enter__()
        holder.send_signal(signal.SIGKILL)
    assert (run_dir / ".lock").exists()
    with sole_writer(config_for(run_dir), resume=True):
        pass
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def test_a_lock_on_a_file_that_was_removed_meanwhile_holds_nothing(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        assert is_locked_by_us(file, "run_dir='run'")
        (tmp_path / ".lock").unlink()  # as by the process that held it
        assert not is_locked_by_us(file, "run_dir='run'")


def test_a_file_system_that_knows_no_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def fail(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        return flock

    for number in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
        monkeypatch.setattr("fcntl.flock", fail(number))
        caplog.clear()
        with sole_writer(config_for(tmp_path / "run"), resume=False):
            assert "start no other run there" in caplog.text
    monkeypatch.setattr("fcntl.flock", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), sole_writer(config_for(tmp_path / "run"), resume=False):
        pass


def test_a_run_begun_since_the_check_is_not_written_over(tmp_path):
    config = config_for(tmp_path / "run")
    check_run_directory(config, resume=False)
    write_run_config(config, tmp_path / "run")
    with pytest.raises(ValueError, match="--resume continues it"):
        sole_writer(config, resume=False).__enter__()
    with sole_writer(config, resume=True):  # the refusal let go of the lock
        pass


def test_a_folder_in_which_no_run_began_goes_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), sole_writer(config_for(tmp_path / "run"), resume=False):
        assert (tmp_path / "run").is_dir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
