"""LMDeploy as the engine: what it is asked, which answers pass, and processes that die, hang or do not wake up.

The server is a stand-in that answers in LMDeploy's format; test_sampling_lmdeploy_contract.py ties that format to it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import inverseq.sampling_lmdeploy as module
from inverseq.config import LmdeployConfig, SamplingConfig
from inverseq.sampling import make_sampler, sample_responses
from inverseq.sampling_lmdeploy import LmdeployError, LmdeploySampler, check_lmdeploy
from inverseq.sampling_lmdeploy_client import Answer
from inverseq.sampling_lmdeploy_server import GUARD, ApiServer, held_port
from tests.test_sampling import make_model, make_prompt, make_tokenizer, responses_of

STAND_IN = Path(__file__).with_name("lmdeploy_stand_in.py")
STOP = 2
VOCAB = 512


class StandInServer(ApiServer):
    """Starts the stand-in instead of LMDeploy."""

    def __init__(self, config, folder: Path):
        super().__init__(config, log_path=folder / "lmdeploy.log")
        self.script = folder / "script.json"

    def command(self, model_dir, port):
        return [sys.executable, str(STAND_IN), str(model_dir), str(port), str(self.script)]

    @property
    def version(self):
        return "0.18.0"

    def lines(self, ending: str) -> list[dict]:
        path = Path(f"{self.script}.{ending}")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def paths(self) -> list[str]:
        return [line["path"] for line in self.lines("log")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that makes a sampler whose stand-in reads a script; all processes are gone at the end."""

    def save_marker(model, tokenizer, folder, stop_ids):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "weights.txt").write_bytes(bytes([model.marker]))

    monkeypatch.setattr(module, "save_weights", save_marker)
    samplers = []

    def make(script: dict | None = None, *, synced: bool = True, **options) -> LmdeploySampler:
        options = {"timeout_s": 120.0, "start_s": 600.0} | options
        config = SamplingConfig(backend="lmdeploy", max_new_tokens=8, batch_size=3, lmdeploy=LmdeployConfig(**options))
        engine = StandInServer(config, tmp_path)
        engine.script.write_text(json.dumps(script or {}))
        sampler = LmdeploySampler(
            config,
            make_tokenizer(),
            stop_ids=(STOP, 9999),
            num_valid_vocab=VOCAB,
            weights_dir=tmp_path / "weights",
            engine=engine,
        )
        samplers.append(sampler)
        if synced:
            sampler.sync(policy(0), 0)
        return sampler

    yield make
    for sampler in samplers:
        sampler.close()
        for start in sampler.engine.lines("starts"):
            assert gone(start["pid"])


def gone(pid: int, *, within_s: float = 120.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def policy(marker: int):
    model = make_model()
    model.marker = marker
    return model


def prompts(count: int = 7):
    return [make_prompt(f"p{i}", [3] * i + [10 + i]) for i in range(1, count + 1)]


def expected(count: int = 7, *, weights: int = 0) -> list[list[int]]:
    return [[10 + i, 100 + weights, STOP] for i in range(1, count + 1)]


def sample(sampler, count: int = 7):
    return sample_responses(sampler, prompts(count), seed=4)


def test_answers_come_from_the_weights_of_the_last_sync_and_the_engine_sleeps_between(run):
    sampler = run()
    samples = sample(sampler)
    assert responses_of(samples) == expected()
    response = samples[0].response
    assert (response.finish_reason, response.seed, response.engine, response.engine_version, response.weights_step) == (
        "stop", 4, "lmdeploy", "0.18.0 server", 0,
    )  # fmt: skip
    assert sampler.is_asleep and sampler.engine.paths()[-1] == "/sleep"
    sampler.sync(policy(0), 0)  # nothing new: the engine is not started again, and is woken up when it is asked
    assert responses_of(sample(sampler)) == expected()
    assert sampler.engine.paths().count("/wakeup") == 1 and len(sampler.engine.lines("starts")) == 1
    sampler.sync(policy(7), 3)
    samples = sample(sampler)
    assert responses_of(samples) == expected(weights=7) and samples[0].response.weights_step == 3
    assert len(sampler.engine.lines("starts")) == 2


def test_every_setting_is_sent_and_long_prompts_go_first(run):
    sampler = run()
    sampler.engine.batch_size = 1
    sample(sampler)
    bodies = [line["body"] for line in sampler.engine.lines("log") if line["path"] == "/generate"]
    assert [len(body["input_ids"]) for body in bodies] == [8, 7, 6, 5, 4, 3, 2]
    settings = {name: bodies[0][name] for name in bodies[0] if name not in ("input_ids", "max_tokens", "stream")}
    assert settings == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "repetition_ngram_size": 0, "repetition_ngram_threshold": 0, "ignore_eos": False, "skip_special_tokens": False,
        "include_stop_str_in_output": True, "stop_token_ids": [STOP],
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["error", "abort", "no_stop", "junk", "500", "503"])
def test_an_answer_that_must_not_be_trained_on_is_asked_for_again(run, fault):
    sampler = run({"faults": {"/generate": [fault]}})
    assert responses_of(sample(sampler)) == expected()
    assert sampler.engine.paths().count("/generate") == 8 and len(sampler.engine.lines("starts")) == 1


def test_an_answer_that_is_late_ends_the_run(run):
    """The server takes no seed; drawn again, what takes long would become rarer than the policy says it."""
    sampler = run({"faults": {"/generate": [None, None, None, "hang"]}}, timeout_s=3.0)
    with pytest.raises(LmdeployError, match=r"'p\d': no answer within sampling.lmdeploy.timeout_s=3: drawn"):
        sample(sampler)
    assert len(sampler.engine.lines("starts")) == 1


def test_an_engine_that_is_lost_in_a_batch_is_started_again_with_the_same_weights(run):
    # Three are in flight at a time: the fourth is sent when one has been answered.
    sampler = run({"faults": {"/generate": [None, None, None, "die"]}})
    sampler.policy.marker = 5  # the folder of all ranks holds other weights by now
    rechecks = []
    sampler.recheck = lambda: rechecks.append(sampler.engine.is_running)
    announced = []
    samples = sample_responses(sampler, prompts(), seed=4, advance=announced.append)
    assert len(samples) == 7 and announced == [1] * 7 and rechecks == [True]
    starts = sampler.engine.lines("starts")
    assert [Path(start["model_dir"]).name for start in starts] == ["weights", "weights_rank0"]
    assert {ids[1] for ids in responses_of(samples)} == {100, 105}  # before and after, by the marker


def test_when_retries_are_spent_the_run_stops_and_says_how_many_prompts_are_missing(run):
    sampler = run({"faults": {"/generate": ["error"] * 100}}, retries=1)
    with pytest.raises(LmdeployError, match=r"7 of 7 prompts are unanswered after 2 attempts: finish reason 'error'"):
        sample(sampler)
    sampler = run({"faults": {"/generate": ["die"] * 3}}, retries=1)
    with pytest.raises(LmdeployError, match=r"7 of 7 prompts are unanswered after 2 attempts: POST /generate"):
        sample(sampler)


def test_a_request_that_is_refused_is_not_repeated(run):
    sampler = run({"faults": {"/generate": ["400"]}})
    with pytest.raises(LmdeployError, match=r"refuses prompt 'p\d'.*status 400.*planted"):
        sample(sampler)


def test_an_answer_that_is_cut_off_ends_the_run(run):
    """LMDeploy's PyTorch engine lowers max_new_tokens to the room that is left; drawn again, short ones would pass."""
    sampler = run({"faults": {"/generate": ["short"]}})
    with pytest.raises(LmdeployError, match=r"prompt 'p\d': its answer was cut off after 1 of 8 tokens"):
        sample(sampler)


def test_a_caller_that_stops_early_leaves_an_engine_that_sleeps(run):
    sampler = run({"delay_s": 0.2})
    answers = sampler.generate(prompts(), seed=0)
    next(answers)
    answers.close()
    assert sampler.is_asleep
    sampler.close()
    assert not sampler.engine.is_running


def test_an_engine_that_does_not_go_to_sleep_is_stopped_and_started_again(run):
    sampler = run({"faults": {"/sleep": ["500"]}})
    sample(sampler)
    assert not sampler.engine.is_running and not sampler.is_asleep
    assert responses_of(sample(sampler)) == expected()


def test_weights_are_updated_in_memory_layer_by_layer_when_asked_for(run):
    sampler = run(engine="pytorch", weights="update")
    sample(sampler)
    sampler.sync(policy(1), 1)
    log = [line for line in sampler.engine.lines("log") if line["path"] != "/generate"]
    updates = [line for line in log if line["path"] == "/update_weights"]
    assert [(line["path"], line["query"]) for line in log if line not in updates] == [
        ("/sleep", "level=1"), ("/wakeup", "tags=weights"), ("/wakeup", "tags=kv_cache"),
    ]  # fmt: skip
    assert [line["body"]["finished"] for line in updates] == [False, False, True]  # two layers and the rest
    assert len(sampler.engine.lines("starts")) == 1 and sampler.weights_step == 1
    assert len(sample(sampler)) == 7


@pytest.mark.parametrize("path", ["/update_weights", "/wakeup"])
def test_weights_that_are_not_taken_are_reloaded_from_then_on(run, path):
    sampler = run({"faults": {path: ["500"]}}, engine="pytorch", weights="update")
    sample(sampler)
    sampler.sync(policy(3), 1)
    assert responses_of(sample(sampler)) == expected(weights=3)
    sampler.sync(policy(4), 2)
    assert responses_of(sample(sampler)) == expected(weights=4)
    assert sampler.engine.paths().count("/update_weights") <= 1 and len(sampler.engine.lines("starts")) == 3


def test_the_probe_is_greedy_and_wakes_the_engine_up(run):
    sampler = run()
    sample(sampler)
    answer = sampler.probe(make_prompt("probe", [3, 44]), 5)
    assert answer.token_ids.tolist() == [44, 100, STOP] and answer.logprobs is None
    body = sampler.engine.lines("log")[-1]["body"]
    assert (body["top_k"], body["max_tokens"]) == (1, 5)


def test_a_server_that_does_not_come_up_is_an_error_with_its_last_words(run):
    sampler = run({"refuses_to_start": True}, synced=False)
    with pytest.raises(RuntimeError, match=r"(?s)lmdeploy_stand_in.py.* ended: .*planted: no such model"):
        sampler.sync(policy(0), 0)
    with pytest.raises(ValueError, match="policy is a Linear"):
        sampler.sync(torch.nn.Linear(1, 1), 0)


class RecordedEngine:
    """An engine that writes down what happens to it and gives the first request for each prompt a bad outcome."""

    form, version, can_update, is_running = "pipeline", "0.18.0", False, False
    first: Answer | Exception = Answer([7], "stop")

    def __init__(self, events):
        self.events, self.requests = events, []

    def start(self, folder):
        self.events.append(f"start {folder.name}")
        self.is_running = True

    def stop(self):
        self.events.append("stop")
        self.is_running = False

    def sleep(self):
        self.events.append("sleep")

    def wake_up(self, tags=()):
        self.events.append("wake up")

    update = None

    def answers(self, requests):
        for request in requests:
            self.requests.append(request)
            seen = sum(one.index == request.index for one in self.requests)
            yield request, Answer([7, STOP], "stop") if seen > 1 else self.first


def recorded(events, tmp_path, monkeypatch, *, is_main=True) -> LmdeploySampler:
    monkeypatch.setattr(module, "save_weights", lambda *arguments: events.append("save"))
    monkeypatch.setattr(module, "wait_for_all_ranks", lambda: events.append("wait"))
    monkeypatch.setattr(module, "release_unused_memory", lambda: events.append("release"))
    return LmdeploySampler(
        SamplingConfig(backend="lmdeploy"),
        make_tokenizer(),
        stop_ids=(STOP,),
        num_valid_vocab=VOCAB,
        weights_dir=tmp_path / "weights",
        is_main=is_main,
        engine=RecordedEngine(events),
    )


def test_one_rank_saves_the_weights_and_all_load_them_after_that(tmp_path, monkeypatch):
    main, other = [], []
    recorded(main, tmp_path, monkeypatch).sync(policy(0), 0)
    recorded(other, tmp_path, monkeypatch, is_main=False).sync(policy(0), 0)
    assert main == ["stop", "save", "wait", "release", "start weights"]
    assert other == ["stop", "wait", "release", "start weights"]


def test_the_engine_finds_the_gpu_memory_that_training_left_in_torchs_cache(tmp_path, monkeypatch):
    events = []
    sampler = recorded(events, tmp_path, monkeypatch)
    sampler.sync(policy(0), 0)
    events.clear()
    sampler.rest()
    sampler.rouse()
    sampler.restart()
    assert events == ["sleep", "release", "wake up", "stop", "save", "release", "start weights_rank0"]


def test_weights_need_a_folder():
    with pytest.raises(ValueError, match="sampling.lmdeploy.weights_dir='': expected a folder"):
        LmdeploySampler(
            SamplingConfig(backend="lmdeploy"), make_tokenizer(), stop_ids=(STOP,), num_valid_vocab=9, weights_dir=None
        )


def test_the_server_and_what_it_started_end_when_the_run_is_killed(run, tmp_path):
    sampler = run(synced=False)
    (tmp_path / "weights.txt").write_bytes(b"a")
    child = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"  # a server has workers
    holder = held_port()
    command = [sys.executable, "-c", child, *sampler.engine.command(tmp_path, holder.getsockname()[1])]
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE).wait()"
    guarded = [sys.executable, str(GUARD), str(tmp_path / "log"), *command]
    process = subprocess.Popen([sys.executable, "-c", code, *guarded])
    deadline = time.monotonic() + 300
    while not sampler.engine.lines("starts") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [start] = sampler.engine.lines("starts")
    assert gone(start["pid"])
    holder.close()


def test_without_cuda_lmdeploy_is_refused_at_once_and_others_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = SamplingConfig(backend="lmdeploy")
    message = "(?s)needs a CUDA device.*sampling.backend=transformers.*sampling.backend=server"
    with pytest.raises(ValueError, match=message):
        check_lmdeploy(config)
    with pytest.raises(ValueError, match=message):
        make_sampler(config, make_model(), make_tokenizer(), num_valid_vocab=12)


@pytest.mark.parametrize("flag", ["--dry-run", None])
def test_the_command_line_says_so_too(flag, tmp_path, capsys):
    from inverseq.cli import main
    from tests.tiny import make_tiny_model

    model = make_tiny_model(tmp_path / "model")
    arguments = ["--config", "demo", *([flag] if flag else []), f"run_dir={tmp_path / 'run'}", f"model.path={model}"]
    arguments += ["sampling.backend=lmdeploy", "model.device=cpu"]
    assert main(arguments) != 0
    said = capsys.readouterr()
    assert "needs a CUDA device" in said.err + said.out and not (tmp_path / "run").exists()


def test_an_environment_without_lmdeploy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for python, message in (
        ("", r"pip install 'inverseq\[lmdeploy\]'"),
        (str(tmp_path / "none"), "cannot be run"),
        (sys.executable, "has no package lmdeploy"),
    ):
        with pytest.raises(ValueError, match=message):
            check_lmdeploy(SamplingConfig(backend="lmdeploy", lmdeploy=LmdeployConfig(python=python)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "thread"}, "sampling.lmdeploy.form='thread'"),
        ({"form": "pipeline", "python": "python3"}, "sampling.lmdeploy.python='python3': expected nothing"),
        ({"weights": "update"}, "sampling.lmdeploy.weights='update': expected reload unless"),
        ({"cache_fraction": 1.0}, "sampling.lmdeploy.cache_fraction=1.0"),
        ({"retries": -1}, "sampling.lmdeploy.retries=-1"),
        ({"start_s": 0.0}, "sampling.lmdeploy.start_s=0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LmdeployConfig(**options)
