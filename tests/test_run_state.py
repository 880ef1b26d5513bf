"""Which engine a run gets, what neither can do, and what is checked and moved beside it."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from inverseq import run_state
from inverseq.config_loading import load_config
from inverseq.distributed import Ranks
from inverseq.memory import Placement
from inverseq.resolve import resolve
from inverseq.run_state import State, build_state, check_same_attention, engine_kind
from tests.tiny import make_tiny_model
from tests.tiny_run import tiny_run_options

ONE, TWO = Ranks(), Ranks(rank=1, world_size=2)


def kind(*overrides, ranks=ONE, **placement):
    config = load_config("demo", ["model.path=m", "run_dir=r", *overrides])
    options = {"offload_optimizer": False, "offload_parameters": False, "frozen": "replicated"} | placement
    return engine_kind(config, Placement(zero_stage=0, gradient_checkpointing=False, **options), ranks)


def test_one_process_needs_no_deepspeed_and_gets_it_when_asked():
    assert kind() == "torch"
    assert kind("engine.kind=deepspeed") == "deepspeed"
    assert kind("engine.kind=torch") == "torch"


@pytest.mark.parametrize(
    "options, named",
    [
        ({"ranks": TWO}, "2 processes"),
        ({"offload_optimizer": True}, "engine.offload_optimizer='cpu'"),
        ({"offload_parameters": True}, "engine.offload_parameters='cpu'"),
        ({"frozen": "sharded"}, "engine.frozen='sharded'"),
    ],
)
def test_what_one_process_cannot_do_takes_deepspeed_and_is_refused_to_torch(options, named):
    assert kind(**options) == "deepspeed"
    with pytest.raises(ValueError, match=r"engine\.kind='torch': .*" + named):
        kind("engine.kind=torch", **options)


def test_a_missing_package_is_one_error_that_names_the_extra(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("inverseq.integrations.versions.version", missing)
    assert kind() == "torch"
    with pytest.raises(ValueError, match=r"needs deepspeed \(pip install 'inverseq\[deepspeed\]'\)"):
        kind(ranks=TWO)


def test_ranks_whose_attention_would_round_apart_are_refused_by_all():
    class Three(Ranks):
        def gather(self, value):
            return ["varlen", value, "flash_attn"]

    check_same_attention("sdpa", ONE)
    for own in ("varlen", "flash_attn"):
        with pytest.raises(ValueError, match=r"is varlen on rank 0 and flash_attn on rank \d; .*set model\.attention"):
            check_same_attention(own, Three(rank=1, world_size=3))


def test_every_model_of_a_run_is_checked_and_the_attention_of_all_ranks(tmp_path, monkeypatch):
    class Two(Ranks):
        """One rank that hears of another, whose attention is its own."""

        def gather(self, value):
            return [value, "flash_attn" if isinstance(value, str) else value]

    policy, plain = (str(make_tiny_model(tmp_path / name, seed=seed)) for seed, name in enumerate(("policy", "plain")))
    checked, check_head = [], run_state.check_head
    monkeypatch.setattr(
        run_state, "check_head", lambda model, *rest: (checked.append(model.name_or_path), check_head(model, *rest))
    )
    contrast = ("contrast.kind=model", f"contrast.plain_model={plain}", "contrast.principle=")
    options = tiny_run_options(f"model.path={policy}", f"run_dir={tmp_path / 'run'}", *contrast)
    resolved = resolve(load_config("demo", options))
    with pytest.raises(ValueError, match="sdpa on rank 0 and flash_attn on rank 1"):
        build_state(resolved, Two())
    checked.clear()
    build_state(resolved, ONE).log.close()
    assert sorted(checked) == sorted([policy, plain])


def test_frozen_weights_on_the_host_come_to_the_device_and_go_home_again_whatever_happens():
    home = [SimpleNamespace(to=lambda device, non_blocking: f"there, on {device}") for _ in range(3)]
    weights = [SimpleNamespace(data=data) for data in home]
    state = SimpleNamespace(
        frozen=SimpleNamespace(parameters=lambda: iter(weights)),
        engine=SimpleNamespace(device="cuda"),
        policy=SimpleNamespace(model=torch.nn.Linear(1, 1)),
    )
    for where, seen in (("host", ["there, on cuda"] * 3), ("replicated", home), ("sharded", home)):
        state.placement = SimpleNamespace(frozen=where)
        with pytest.raises(KeyboardInterrupt), State.frozen_on_device(state) as frozen:
            assert frozen is state.frozen and [weight.data for weight in weights] == seen
            raise KeyboardInterrupt
        assert [weight.data for weight in weights] == home


@pytest.mark.parametrize("recomputed", [True, False])
def test_a_state_recomputes_activations_as_placed_and_plans_all_updates(tmp_path, recomputed):
    words = (f"model.gradient_checkpointing={str(recomputed).lower()}", "optim.schedule=linear", "epochs=3")
    options = tiny_run_options(f"model.path={make_tiny_model(tmp_path / 'm')}", f"run_dir={tmp_path / 'run'}", *words)
    state = build_state(resolve(load_config("demo", options)), ONE)  # 6 samples an epoch, 4 an update
    state.log.close()
    modules = state.policy.model.modules()
    assert any(getattr(module, "gradient_checkpointing", False) for module in modules) is recomputed
    [factor] = state.engine.scheduler.lr_lambdas
    assert [factor(update) for update in (0, 3, 6)] == [1.0, 0.5, 0.0]
    assert not any(weight.requires_grad for weight in state.frozen.parameters())


def test_seconds_of_phases_are_reported_once():
    state = SimpleNamespace(memory=SimpleNamespace(row=lambda: {"peak": 1}), durations_s={"train_duration_s": 2.0})
    assert State.phase_row(state) == {"peak": 1, "train_duration_s": 2.0}
    assert State.phase_row(state) == {"peak": 1}


def test_a_frozen_copy_that_shall_not_stand_whole_on_the_device_is_made_on_the_host(tmp_path, monkeypatch):
    options = tiny_run_options(f"model.path={make_tiny_model(tmp_path / 'm')}", f"run_dir={tmp_path / 'run'}")
    resolved = resolve(load_config("demo", options))
    made, initial = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr(run_state, "frozen_copy", lambda model, device: made.append(device) or model)
    for where in ("replicated", "host"):
        run_state.build_frozen(resolved, Placement(2, False, False, where, False), ONE, initial)
    assert made == [None, "cpu"]
