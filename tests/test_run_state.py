"""Which engine a run gets, and what neither can do."""

from importlib.metadata import PackageNotFoundError

import pytest

from inverseq.config_loading import load_config
from inverseq.distributed import Ranks
from inverseq.memory import Placement
from inverseq.run_state import check_same_attention, engine_kind

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
