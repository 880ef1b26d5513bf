"""Weights for a server in another process: saved whole to a folder, then loaded by the user's command or request.

The folder is replaced in one step, so a server that reads it sees all of the old weights or all of the new ones. Its
generation_config.json asks for untempered sampling: servers fill what a request leaves open from it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .atomic import atomic_directory, naming_file
from .config import ServerConfig
from .lora import has_adapters, merged_model

__all__ = ["fill_template", "one_at_a_time", "refresh", "save_weights"]

logger = logging.getLogger(__name__)

TAIL = 300  # characters of a command's or a server's last words in an error


def fill_template(template: str, model_dir: Path, step: int) -> str:
    """``{model_dir}`` and ``{step}`` replaced; other braces stand for themselves (JSON has many)."""
    return template.replace("{model_dir}", str(model_dir)).replace("{step}", str(step))


def save_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, stop_ids: tuple[int, ...]
) -> None:
    """Write model and tokenizer to ``folder``, replacing what is there whole; OSError names it when it cannot.

    Adapters are merged into the weights, so that a server needs to know nothing of them.
    """
    if has_adapters(model):
        model = merged_model(model)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bos_token_id=own.bos_token_id,
        pad_token_id=own.pad_token_id,
        eos_token_id=list(stop_ids),
    )
    try:
        with atomic_directory(folder) as temporary, naming_file(folder):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    finally:
        model.generation_config = own


def refresh(config: ServerConfig, model_dir: Path, step: int) -> None:
    """Make the server load the weights in ``model_dir``, by ``refresh_command`` or ``refresh_url``.

    Returns when the command or the request has; RuntimeError with its last words when it fails or takes longer than
    ``wait_s``.
    """
    if config.refresh_command:
        words = [fill_template(word, model_dir, step) for word in shlex.split(config.refresh_command)]
        run_command(words, config.wait_s)
    else:
        escaped = Path(json.dumps(str(model_dir))[1:-1])  # inside a JSON string
        body = fill_template(config.refresh_body, escaped, step)
        post(fill_template(config.refresh_url, model_dir, step), body, config.wait_s)
    logger.info("%s was told to load step %d from %s", config.url, step, model_dir)


def run_command(words: list[str], wait_s: float) -> None:
    what = f"sampling.server.refresh_command={shlex.join(words)!r}"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=wait_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{what}: still running after sampling.server.wait_s={wait_s:g} seconds") from None
    except OSError as error:
        raise RuntimeError(f"{what}: cannot be run: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{what}: ended with status {done.returncode}: {(done.stderr or done.stdout)[-TAIL:]}")


def post(url: str, body: str, wait_s: float) -> None:
    headers = {"Content-Type": "application/json"}
    what = f"sampling.server.refresh_url={url!r}"
    request = urllib.request.Request(url, data=body.encode(), headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=wait_s) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise RuntimeError(f"{what}: answered {error.code}: {text[-TAIL:]}") from error
    except OSError as error:
        raise RuntimeError(f"{what}: {error}") from error
    if says_failure(text):
        raise RuntimeError(f"{what}: answered {text[-TAIL:]}")


def says_failure(text: str) -> bool:
    """True for ``{"success": false, …}``, which SGLang answers with status 200 in some releases."""
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("success") is False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Only one process of this machine is in the block: ranks that have lost the server bring it back once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
