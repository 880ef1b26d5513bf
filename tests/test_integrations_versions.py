"""A package outside the tested range gives one clear message: older ones an error, newer ones a line in the log."""

import logging
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from inverseq.integrations import versions
from inverseq.integrations.causal_lm import CausalLMLogprobs, check_gathered
from inverseq.integrations.hf_trainer import NextTokenLoss
from inverseq.integrations.trl import LinearLogprob
from inverseq.lora import check_lora
from inverseq.zero_loading import check_deepspeed
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("versions") / "model", scale=0.2)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(versions, "said", set())


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def gathered_by_deepspeed(path):
    """The forward of a module whose head looks like a gathered weight of ZeRO-3."""
    module = CausalLMLogprobs(load(path))
    module.model.lm_head.weight.ds_id = 0
    return module(torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 5]]))


def gathered_by_trl(path):
    """A head that looks like a gathered weight of ZeRO-3 where TRL's trainers read it."""
    pytest.importorskip("trl", reason="the extra trl is not installed")
    weight = nn.Parameter(torch.randn(8, 4))
    weight.ds_id = 0
    LinearLogprob().apply(torch.randn(2, 4), weight, None, torch.tensor([1, 2]), 1.0, 8, None, 1.0, ("log_probs",))


USES = {
    "transformers": [lambda path: CausalLMLogprobs(load(path)), lambda path: NextTokenLoss(load(path))],
    "peft": [lambda path: check_lora()],
    "deepspeed": [lambda path: check_deepspeed(), gathered_by_deepspeed, gathered_by_trl],
}
CASES = [(package, use) for package, uses in USES.items() for use in uses]


@pytest.fixture
def installed(monkeypatch):
    """Makes a package seem to be installed in another version."""
    real = versions.version
    return lambda package, found: monkeypatch.setattr(
        versions, "version", lambda name: found if name == package else real(name)
    )


@pytest.mark.parametrize(("package", "use"), CASES)
def test_an_older_package_is_one_error(package, use, model_path, installed):
    installed(package, "0.9.1")
    message = f"{package} 0.9.1: .* was tested with {versions.describe_tested(package)}"
    with pytest.raises(ValueError, match=message):
        use(model_path)


@pytest.mark.parametrize(("package", "use"), CASES)
def test_a_newer_package_is_one_line_in_the_log(package, use, model_path, installed, caplog):
    installed(package, "99.0")
    with caplog.at_level(logging.WARNING, logger="inverseq"):
        use(model_path)
        use(model_path)
    said = [record.getMessage() for record in caplog.records if "was tested with" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"{package} 99.0: "), said


@pytest.mark.parametrize("package", versions.TESTED)
def test_the_oldest_tested_package_is_welcome(package, installed, caplog):
    installed(package, versions.TESTED[package][0])
    with caplog.at_level(logging.WARNING, logger="inverseq"):
        versions.check_version(package, extra="trl", what="this test")
    assert not caplog.records


@pytest.mark.parametrize(("package", "use"), CASES)
def test_the_installed_packages_are_tested_ones(package, use, model_path, caplog):
    pytest.importorskip(package, reason="its extra is not installed")
    with caplog.at_level(logging.WARNING, logger="inverseq"):
        use(model_path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("found", "is_tested"),
    [
        ("1.16.0", True), ("1.16.9", True), ("1.9.0", False), ("1.160.0", False), ("1.17.0.dev0", False),
        ("1.17rc1", False), ("2.0", False),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(found, is_tested):
    assert versions.is_tested("trl", found) == is_tested


def test_the_extras_ask_for_what_was_tested():
    quoted = re.findall(r'"([\w-]+>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    named = [item for item in map(Requirement, quoted) if item.name in versions.TESTED]
    assert {item.name for item in named} == set(versions.TESTED)
    for item in named:
        first, _ = versions.TESTED[item.name]
        assert f">={first}" in str(item.specifier), item


def test_a_head_that_an_engine_has_spread_over_processes_is_refused(model_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for weight in (distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]), torch.empty(0)):
            with pytest.raises(ValueError, match="spread over processes where it is read: wrap the module"):
                check_gathered(weight, "wrap the module")
    finally:
        torch.distributed.destroy_process_group()
    module = CausalLMLogprobs(load(model_path))
    module.model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="wrap the CausalLMLogprobs, not the model inside"):
        module(torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 5]]))
    model = load(model_path)
    loss = NextTokenLoss(model)
    ids = torch.tensor([[3, 4, 5]])
    outputs = model.train()(ids)
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="train without FSDP and ZeRO-3, or wrap the model"):
        loss(outputs, ids)
