"""The public API stands in tests/public_api.txt. A change of a name or signature is made there too, on purpose:

python -m tests.test_public_api > tests/public_api.txt
"""

import importlib
import inspect
from pathlib import Path

LISTING = Path(__file__).with_name("public_api.txt")
MODULES = (
    "inverseq",
    "inverseq_kernels",
    "inverseq.integrations.causal_lm",
    "inverseq.integrations.hf_trainer",
    "inverseq.integrations.trl",
)


def describe(name, value):
    """One line for a function or constant; for a class its constructor and public methods."""
    if inspect.isclass(value):
        lines = [f"{name}{inspect.signature(value)}"]
        methods = {key: method for key, method in vars(value).items() if key == "__call__" or not key.startswith("_")}
        return lines + [f"{name}.{key}{inspect.signature(m)}" for key, m in methods.items() if inspect.isfunction(m)]
    return [f"{name}{inspect.signature(value)}"] if callable(value) else [f"{name}: {type(value).__name__}"]


def public_api():
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            lines += describe(f"{module_name}.{name}", getattr(module, name))
    return "".join(f"{line}\n" for line in lines)


def test_the_public_api_is_the_listed_one():
    assert public_api() == LISTING.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(public_api(), end="")
