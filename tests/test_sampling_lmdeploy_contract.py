"""What we use of LMDeploy is there and behaves so: its own classes, server and command line, with a fake engine below.

Runs where lmdeploy is installed (`make lmdeploy-test`, no GPU needed). Real are the request handling, the pipeline, the
HTTP application with its middleware and the argument parser; the engine that would decode on a GPU is a script.
"""

import ast
import dataclasses
import importlib.util
import json
import pickle
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

lmdeploy = pytest.importorskip("lmdeploy", reason="LMDeploy has an environment of its own: make lmdeploy-test")

import uvicorn  # noqa: E402
from lmdeploy.messages import EngineOutput, GenerationConfig, ResponseType  # noqa: E402
from lmdeploy.serve.core.async_engine import AsyncEngine  # noqa: E402
from lmdeploy.serve.core.exceptions import ErrorCode  # noqa: E402
from lmdeploy.serve.openai import api_server  # noqa: E402
from lmdeploy.serve.openai.protocol import GenerateReqInput, GenerateReqOutput, UpdateParamsRequest  # noqa: E402

from inverseq.config import LmdeployConfig, SamplingConfig  # noqa: E402
from inverseq.sampling_lmdeploy_client import (  # noqa: E402
    Answer,
    BadAnswer,
    EngineLost,
    Request,
    RequestRefused,
    check_answer,
)
from inverseq.sampling_lmdeploy_pipeline import LOST, REFUSED, InProcess, engine_arguments  # noqa: E402
from inverseq.sampling_lmdeploy_server import ApiServer, held_port  # noqa: E402
from inverseq.sampling_lmdeploy_weights import serialized  # noqa: E402
from tests.tiny import make_tiny_model  # noqa: E402

FOLDER = Path(lmdeploy.__file__).parent
STOP, OTHER_STOP = 2, 5  # the tiny tokenizer's EOS, and one more
NEVER, SHORT, LONG, FAILS, IS_CANCELLED = 300, 301, 302, 303, 304  # last token of a prompt: what the engine does


class FakeInstance:
    """Answers by the last token of the prompt."""

    def __init__(self, engine):
        self.engine = engine

    async def async_stream_infer(self, session_id, input_ids, gen_config, **kwargs):
        self.engine.seen.append(gen_config)
        kind = input_ids[-1]
        if kind == FAILS:
            yield EngineOutput(ResponseType.INTERNAL_ENGINE_ERROR, [])
            return
        if kind == IS_CANCELLED:
            yield EngineOutput(ResponseType.SUCCESS, [50])
            yield EngineOutput(ResponseType.CANCEL, [])
            return
        tokens = {SHORT: [50, 51, STOP], LONG: [60] * gen_config.max_new_tokens}.get(kind, [70, OTHER_STOP])
        yield EngineOutput(ResponseType.SUCCESS, tokens[:1])
        yield EngineOutput(ResponseType.FINISH, tokens[1:])

    async def async_cancel(self, session_id):
        pass

    async def async_end(self, session_id):
        pass


class FakeEngine:
    """What ``AsyncEngine`` asks of an engine."""

    def __init__(self, engine_config):
        self.engine_config = engine_config
        self.engine_config.max_batch_size = self.engine_config.max_batch_size or 8
        self.seen, self.calls = [], []

    def create_instance(self, cuda_stream_id=0):
        return FakeInstance(self)

    async def sleep(self, level):
        self.calls.append(("sleep", level))

    def wakeup(self, tags):
        self.calls.append(("wakeup", sorted(tags)))

    def update_params(self, request):
        self.calls.append(("update_params", request))

    async def get_health_status(self):
        return {"alive": True, "message": "", "schedule_metrics": None}

    def start_loop(self):
        return True

    def close(self):
        self.calls.append(("close",))


class FakeAsyncEngine(AsyncEngine):
    """LMDeploy's own engine front with the fake behind it."""

    def _build_turbomind(self, model_path, backend_config=None, **kwargs):
        return FakeEngine(backend_config)

    def _build_pytorch(self, model_path, backend_config=None, **kwargs):
        return FakeEngine(backend_config)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny model whose generation_config.json asks for what training must not follow."""
    path = make_tiny_model(tmp_path_factory.mktemp("lmdeploy") / "model")
    hostile = {"eos_token_id": [STOP, OTHER_STOP], "temperature": 0.3, "top_k": 5, "min_p": 0.4}
    hostile |= {"repetition_penalty": 3.0, "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(hostile))
    return path


def sampling(**options) -> SamplingConfig:
    return SamplingConfig(backend="lmdeploy", batch_size=4, lmdeploy=LmdeployConfig(timeout_s=20.0, **options))


def request(kind: int, *, index: int = 0, seed: int = 11, **options) -> Request:
    return Request(index, [20, 21, kind], 6, (STOP, OTHER_STOP), seed, **options)


@pytest.fixture(scope="module")
def in_process(model_dir):
    """Our in-process form on LMDeploy's own pipeline."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sys.modules["lmdeploy.pipeline"], "get_task", lambda *args, **kwargs: ("llm", FakeAsyncEngine))
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    engine = InProcess(sampling(form="pipeline"))
    engine.start(model_dir)
    yield engine
    engine.stop()
    patch.undo()


@pytest.fixture(scope="module")
def served(model_dir):
    """Our server form on LMDeploy's own HTTP application, as ``lmdeploy serve api_server`` sets it up."""
    patch, apps = pytest.MonkeyPatch(), []
    patch.setattr(api_server, "get_task", lambda *args, **kwargs: ("llm", FakeAsyncEngine))
    patch.setattr(api_server.uvicorn, "run", lambda app, **kwargs: apps.append(app))
    patch.setattr(api_server, "ServerContext", type("Context", (api_server.ServerContext,), {"all": []}))
    made = []
    init = api_server.ServerContext.__init__
    patch.setattr(api_server.ServerContext, "__init__", lambda self: (init(self), made.append(self))[0])
    api_server.serve(str(model_dir), backend="turbomind", generation_config="lmdeploy", log_level="ERROR",
                     backend_config=lmdeploy.TurbomindEngineConfig(enable_metrics=False))  # fmt: skip
    holder = held_port()
    port = holder.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(apps[0], host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    engine = ApiServer(sampling(), log_path=model_dir / "log")
    engine.url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while not engine.is_healthy():
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    yield engine, made[0].async_engine.engine
    server.should_exit = True
    thread.join(20)
    holder.close()
    patch.undo()


@pytest.fixture(params=["pipeline", "server"])
def engine_and_fake(request):
    if request.param == "server":
        return request.getfixturevalue("served")
    engine = request.getfixturevalue("in_process")
    return engine, engine.pipe.async_engine.engine


def only_answer(engine, asked: Request) -> Answer:
    [(same, outcome)] = engine.answers([asked])
    assert same is asked
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def test_lmdeploy_is_the_version_that_was_read():
    assert lmdeploy.__version__ == "0.18.0"


@pytest.mark.parametrize("kind", [SHORT, LONG, NEVER])
def test_answers_keep_the_stop_token_and_pass_our_check(engine_and_fake, kind):
    answer = only_answer(engine_and_fake[0], request(kind))
    expected = {SHORT: ([50, 51, STOP], "stop"), LONG: ([60] * 6, "length"), NEVER: ([70, OTHER_STOP], "stop")}[kind]
    assert (answer.token_ids, answer.finish_reason) == expected
    ids, reason = check_answer(answer, request(kind), num_valid_vocab=512)
    assert (ids.tolist(), reason) == expected


def test_settings_arrive_whatever_generation_config_json_says(engine_and_fake):
    engine, fake = engine_and_fake
    only_answer(engine, request(SHORT))
    arrived = fake.seen[-1]
    settings = (arrived.do_sample, arrived.temperature, arrived.top_p, arrived.top_k, arrived.min_p)
    assert settings == (True, 1.0, 1.0, 0, 0.0)
    assert (arrived.repetition_penalty, arrived.repetition_ngram_size, arrived.bad_words) == (1.0, 0, None)
    assert set(arrived.stop_token_ids) == {STOP, OTHER_STOP} and arrived.max_new_tokens == 6
    only_answer(engine, request(SHORT, greedy=True))
    assert fake.seen[-1].top_k == 1


def test_each_prompt_has_its_own_seed_where_lmdeploy_takes_one(in_process, served):
    for seed in (11, 2**63 - 1):
        only_answer(in_process, request(SHORT, seed=seed))
        assert in_process.pipe.async_engine.engine.seen[-1].random_seed == seed
    assert not {"seed", "random_seed"} & set(GenerateReqInput.model_fields)  # why the server form cannot be repeated
    assert not {"seed", "random_seed"} & set(request(SHORT).http_body())


def test_many_answers_come_back_to_their_requests(engine_and_fake):
    asked = [request(SHORT if i % 2 else LONG, index=i) for i in range(20)]
    found = {one.index: outcome.token_ids for one, outcome in engine_and_fake[0].answers(asked)}
    assert found == {i: [50, 51, STOP] if i % 2 else [60] * 6 for i in range(20)}


def test_failures_of_the_engine_are_not_answers(engine_and_fake):
    engine, _ = engine_and_fake
    with pytest.raises(BadAnswer):
        only_answer(engine, request(FAILS))
    answer = only_answer(engine, request(IS_CANCELLED))
    assert answer.finish_reason == "abort"
    with pytest.raises(BadAnswer, match="finish reason 'abort'"):
        check_answer(answer, request(IS_CANCELLED), num_valid_vocab=512)
    too_long = Request(0, [20] * 5000, 6, (STOP,), 1)
    with pytest.raises(RequestRefused, match="(?i)context"):
        only_answer(engine, too_long)


def test_the_stop_token_is_dropped_unless_asked_for(in_process):
    """The trap that ``include_stop_str_in_output`` is for."""
    pipe = in_process.pipe

    async def answer(**options):
        prepared = await pipe.async_engine.preprocess(
            None, pipe.session_mgr.get(), GenerationConfig(do_sample=True, **options), input_ids=[20, SHORT]
        )
        return [token for part in [p async for p in pipe.async_engine.generate(prepared)] for token in part.token_ids]

    assert in_process.run(answer()) == [50, 51]
    assert in_process.run(answer(include_stop_str_in_output=True)) == [50, 51, STOP]


def test_an_engine_that_sleeps_answers_again_when_all_of_it_is_awake(served):
    engine, fake = served
    engine.sleep()
    assert engine.is_healthy()
    for tags in ([], ["weights"]):
        if tags:
            engine.wake_up(tags)
        with pytest.raises(BadAnswer, match="503.*sleeping"):
            only_answer(engine, request(SHORT))
    engine.wake_up(["kv_cache"])
    assert only_answer(engine, request(SHORT)).token_ids == [50, 51, STOP]
    engine.sleep()
    engine.wake_up()
    assert only_answer(engine, request(SHORT)).token_ids == [50, 51, STOP]
    assert fake.calls[:2] == [("sleep", 1), ("wakeup", ["weights"])]


def test_an_engine_in_this_process_sleeps_and_wakes(in_process):
    front = in_process.pipe.async_engine
    in_process.sleep()
    assert front.is_sleeping and front.sleeping_tags == {"weights", "kv_cache"}
    in_process.wake_up(["weights"])
    assert front.sleeping_tags == {"kv_cache"}
    in_process.wake_up(["weights", "kv_cache"])
    assert front.is_sleeping  # a call that names what is awake does nothing
    in_process.wake_up()
    assert not front.is_sleeping


def test_weights_reach_the_engines_call(engine_and_fake):
    engine, fake = engine_and_fake
    tensors = {"model.layers.0.a": torch.arange(3.0), "model.layers.0.b": torch.ones(2, 2)}
    engine.update(serialized(tensors), finished=True)
    name, update = fake.calls[-1]
    assert name == "update_params" and isinstance(update, UpdateParamsRequest)
    assert update.finished and update.load_format is None
    from lmdeploy.utils import serialize_state_dict

    ours, theirs = (decode(text) for text in (update.serialized_named_tensors, serialize_state_dict(tensors)))
    assert [name for name, _ in ours] == [name for name, _ in theirs] == list(tensors)
    for (_, (function, arguments)), (_, (same, others)) in zip(ours, theirs, strict=True):
        assert function is same and len(arguments) == len(others)


def decode(text: str):
    import base64

    return pickle.loads(base64.b64decode(text))


def test_the_command_line_is_one_that_lmdeploy_takes():
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe

    SubCliServe.add_parsers()
    for options, more in (
        ({}, {}),
        ({"engine": "pytorch"}, {}),
        ({"engine": "pytorch", "weights": "update"}, {}),
        ({}, {"samples_per_prompt": 2}),
    ):
        config = dataclasses.replace(sampling(**options), **more)
        words = ApiServer(config, log_path=Path("log")).command(Path("/models/x"), 4321)
        assert words[1:3] == ["-m", "lmdeploy"] and importlib.util.find_spec("lmdeploy.__main__")
        found = CLI.parser.parse_args(words[3:])
        assert (found.model_path, found.server_name, found.server_port) == ("/models/x", "127.0.0.1", 4321)
        assert (found.max_batch_size, found.cache_max_entry_count, found.tp) == (4, 0.8, 1)
        assert found.generation_config == "lmdeploy"
        assert found.backend == ("pytorch" if options.get("engine") else "turbomind")
        assert found.distributed_executor_backend == ("ray" if "weights" in options else None)
        assert found.enable_prefix_caching == bool(more) and found.disable_metrics


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
@pytest.mark.parametrize("weights", ["reload", "update"])
def test_engine_arguments_are_fields_of_its_configuration(backend, weights):
    config = LmdeployConfig(engine="pytorch", weights=weights)
    arguments = engine_arguments(config, backend, 4, 0, share_prompts=True)
    made = {"turbomind": lmdeploy.TurbomindEngineConfig, "pytorch": lmdeploy.PytorchEngineConfig}[backend](**arguments)
    assert {name: getattr(made, name) for name in arguments} == arguments
    assert arguments["enable_prefix_caching"] == (weights == "reload")


def test_fields_of_requests_and_answers():
    fields = {field.name for field in dataclasses.fields(GenerationConfig)}
    assert set(request(SHORT).generation_arguments()) <= fields
    assert set(request(SHORT).http_body()) <= set(GenerateReqInput.model_fields)
    assert {"output_ids", "meta_info"} <= set(GenerateReqOutput.model_fields)
    untold = GenerationConfig()  # why everything is told
    defaults = (untold.do_sample, untold.temperature, untold.top_k, untold.random_seed)
    assert defaults == (False, 0.8, 50, None) and not untold.include_stop_str_in_output
    assert {*LOST, *REFUSED} <= {code.name for code in ErrorCode}


def source_of(*parts: str) -> ast.Module:
    return ast.parse((FOLDER.joinpath(*parts)).read_text(encoding="utf-8"))


def test_only_the_ray_executor_takes_weights():
    """Why ``weights=update`` asks for ray, also on one GPU."""
    takes = {}
    for name in ("uni", "mp", "ray"):
        tree = source_of("pytorch", "engine", "executor", f"{name}_executor.py")
        takes[name] = "update_params" in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert takes == {"uni": False, "mp": False, "ray": True}


def test_turbominds_update_uses_members_that_nothing_creates():
    """Why TurboMind is given new weights by starting it again; a release that repairs it fails here."""
    attributes = {
        (node.attr, type(node.ctx).__name__)
        for path in FOLDER.joinpath("turbomind").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    for name in ("_update_params_que", "_export_iter"):
        assert (name, "Load") in attributes and (name, "Store") not in attributes


def test_without_a_gpu_lmdeploy_ends_the_process_or_asserts(model_dir, monkeypatch):
    """Why ``check_lmdeploy`` comes first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys.modules["lmdeploy.pipeline"], "get_task", sys.modules["lmdeploy.archs"].get_task)
    with pytest.raises((SystemExit, AssertionError, RuntimeError)):
        lmdeploy.pipeline(str(model_dir), log_level="CRITICAL")


def test_a_lost_server_is_told_from_a_bad_answer():
    engine = ApiServer(sampling(), log_path=Path("log"))
    with held_port() as holder, pytest.raises(EngineLost):  # nobody listens there
        engine.url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        only_answer(engine, request(SHORT))
