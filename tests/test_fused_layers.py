"""liger-kernel's layers: asked for where they run, and the same function of the weights as the model's own.

The installed liger-kernel's own kernels run here through Triton's interpreter, which lacks three things that are put in
its place below: a float argument as a tensor, and libdevice's rsqrt and tanh.
"""

import copy
import importlib
import sys

import numpy as np
import pytest
import torch

from inverseq.config import ModelConfig
from inverseq.fused_layers import check_fused_layers, fuse_layers
from inverseq.model import load_model
from tests.attention_oracle import make_pack, packed_hidden, random_sequences, tiny, with_gradients

FAMILIES = {"llama": "llama", "gemma2-softcap": "gemma2"}


@pytest.fixture
def liger(monkeypatch):
    """liger-kernel in the interpreter; what it replaces in transformers is put back."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without CUDA")
    pytest.importorskip("liger_kernel.transformers")
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    names = [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES.values()]
    before = {name: dict(vars(importlib.import_module(name))) for name in names}
    yield
    for name, contents in before.items():
        vars(sys.modules[name]).update(contents)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_layers_give_the_models_own_outputs_and_gradients(liger, name):
    model, pack = tiny(name), make_pack(random_sequences([7, 1, 5]))
    expected = packed_hidden(model, pack)
    gradients = with_gradients(model, expected)
    head = type(model).forward
    fuse_layers(model)
    assert type(model).forward is head and "forward" not in vars(model)  # no loss of liger-kernel's
    assert "forward" in vars(model.get_decoder().norm)  # but its layers
    actual = packed_hidden(model, pack)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    for gradient, own in zip(with_gradients(model, actual), gradients, strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())
    frozen = copy.deepcopy(model)  # as frozen_copy makes it: fused, with weights of its own
    with torch.no_grad():
        model.get_decoder().norm.weight.zero_()
        torch.testing.assert_close(packed_hidden(frozen, pack), expected, rtol=2e-5, atol=2e-5)


def test_a_cpu_is_refused_before_weights_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"model\.fused_layers=True: .*need a CUDA device; expected false"):
        load_model(tmp_path / "absent", ModelConfig(path="x", device="cpu", fused_layers=True))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ValueError, match=r"liger-kernel cannot be imported.*pip install 'inverseq\[liger\]'"):
        check_fused_layers(torch.device("cuda"))


def test_an_unknown_architecture_or_other_arguments_are_refused(monkeypatch):
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    model = tiny("llama")

    def apply_other(model, loss=True): ...

    monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", apply_other)
    with pytest.raises(ValueError, match="apply_other does not take cross_entropy, fused_linear_cross_entropy"):
        fuse_layers(model)
    monkeypatch.delitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama")
    with pytest.raises(ValueError, match="no layers for 'llama'"):
        fuse_layers(model)
