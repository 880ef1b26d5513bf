"""Test-wide settings: the Triton interpreter on CPU machines, derandomised examples and generators, and SIGINT.

The interpreter is read when ``@triton.jit`` decorates, so the variable is set before any import of
the kernels. Its ``tl.dot`` multiplies the raw bit patterns of bfloat16 operands; the wrapper below
hands it their float32 values, which are exact, so that bf16 kernels can be checked without a GPU.
"""

import os
import random
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A shell's background job ignores SIGINT, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _patch_interpreter_bf16_dot() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def to_float32(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot_bf16(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, to_float32(a), to_float32(b), d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.create_dot = create_dot_bf16


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_interpreter_bf16_dot()


@pytest.hookimpl(tryfirst=True)  # before the fixtures of modules
def pytest_runtest_setup() -> None:
    """Give every test the same random numbers: which files ran before it in its process depends on how fast others are.

    Two files at a time take the next one as they end.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run where a CUDA device is; elsewhere they are skipped and say why."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
