"""Everything about a run that can be checked before model weights are loaded.

``resolve`` finds the models' folders, loads tokenizers, model configurations and prompts, and checks that they fit
each other, the packing budgets and the run directory. It writes nothing. Left out: the weights themselves.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from .architecture import adapted_modules, check_architecture, check_cached_heads, empty_model
from .attention import check_backend
from .chat import ChatRenderer, load_chat_template, load_principle
from .checkpoint import check_or_offer_older, checkpoint_epoch, latest_checkpoint
from .config import Config, ModelConfig
from .distributed import Ranks
from .fused_layers import check_fused_layers
from .lora import check_lora
from .model import first_line, resolve_device, resolve_dtype
from .packing import write_pack
from .prompt_files import ReadReport, load_prompts
from .prompts import PromptStream
from .records import PackedViews, Prompt, RenderedPrompt, Response, Sample
from .run_directory import check_run_directory
from .sample_files import eval_path, read_evaluation
from .sampling_lmdeploy import check_lmdeploy
from .sampling_replay import sample_files_of
from .sampling_server_client import check_server
from .small_model import MODEL_NAME, small_model_path

__all__ = ["Resolved", "ResolvedModels", "resolve", "resolve_model_path", "resolve_models"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedModels:
    """The models of a contrast without their weights, and how their conversations are rendered."""

    config: Config
    model_path: str  # a folder or hub id
    plain_model_path: str | None  # π_l of the model contrast
    model_config: PretrainedConfig
    plain_model_config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase
    num_valid_vocab: int  # token ids are smaller; logits from here on are padding
    renderer: ChatRenderer

    def probe_pack(self) -> PackedViews:
        """A small pack of one short sequence, to compare a model's head with its own logits."""
        ids = np.arange(min(16, self.num_valid_vocab), dtype=np.int32)
        rendered = RenderedPrompt(Prompt("probe", ()), prefix_ids=(ids[:0],), prompt_ids=ids[:8])
        response = Response(ids[8:], "length", seed=0, engine="probe", engine_version="", weights_step=0)
        return write_pack([Sample(rendered, response)], [0], (-1,))


@dataclass(frozen=True)
class Resolved(ResolvedModels):
    """What a run needs beside the weights, checked."""

    run_dir: Path
    prompts: PromptStream
    read_report: ReadReport  # what became of the rows of prompts.path
    test_prompts: Sequence[RenderedPrompt]  # empty unless evaluation.every is set


def resolve(config: Config, *, resume: bool = False, ranks: Ranks | None = None) -> Resolved:
    """Check a configuration against the world; ValueError names the key, the value and what was expected.

    ``ranks`` share the work of checking a checkpoint; without them this process does it alone.
    """
    run_dir = check_run_directory(config, resume=resume)
    check_environment(config)
    if resume:
        check_resumable(config, run_dir, ranks)
    models = resolve_models(config)
    if config.sampling.backend == "transformers":
        check_cached_heads(models.model_path, models.model_config)
    if config.policy.lora.rank:
        trust = config.model.trust_remote_code
        adapted_modules(empty_model(models.model_config, trust_remote_code=trust), config.policy.lora)
    prompts, read_report = load_stream(config, models.renderer)
    logger.info("%s", read_report)
    logger.info("%s", prompts.report)
    test_prompts = load_test_prompts(config, models.renderer, prompts.held_out)
    if resume:
        check_same_test_prompts(run_dir, test_prompts)
    check_lengths(config, [*prompts.training, *prompts.held_out, *test_prompts])
    check_positions(
        config, [*prompts.training, *prompts.held_out, *test_prompts], models.model_path, models.model_config
    )
    if models.plain_model_config is not None:
        check_positions(
            config, [*prompts.training, *prompts.held_out], models.plain_model_path, models.plain_model_config
        )
    return Resolved(
        **vars(models),
        run_dir=run_dir,
        prompts=prompts,
        read_report=read_report,
        test_prompts=test_prompts,
    )


def resolve_models(config: Config) -> ResolvedModels:
    """Find the models, check that they can be contrasted, and load what renders their conversations."""
    model_path = resolve_model_path("model.path", config.model.path)
    model_config = load_model_config("model.path", model_path, config.model)
    tokenizer = load_tokenizer("model.path", model_path, config.model)
    num_valid_vocab = count_valid_vocab(tokenizer, model_config, model_path)
    plain_path, plain_config = None, None
    if config.contrast.kind == "model":
        plain_path = resolve_model_path("contrast.plain_model", config.contrast.plain_model)
        plain_config = load_model_config("contrast.plain_model", plain_path, config.model)
        plain_tokenizer = load_tokenizer("contrast.plain_model", plain_path, config.model)
        check_same_vocabulary(model_path, tokenizer, plain_path, plain_tokenizer)
        check_same_logits(model_path, model_config, plain_path, plain_config)
    renderer = ChatRenderer(
        tokenizer,
        principle_text=load_principle(config.contrast.principle),
        plain_system=config.contrast.plain_system,
        chat_template=load_chat_template(config.model.chat_template),
    )
    return ResolvedModels(
        config=config,
        model_path=model_path,
        plain_model_path=plain_path,
        model_config=model_config,
        plain_model_config=plain_config,
        tokenizer=tokenizer,
        num_valid_vocab=num_valid_vocab,
        renderer=renderer,
    )


def check_resumable(config: Config, run_dir: Path, ranks: Ranks | None = None) -> None:
    """Raise ValueError when the newest checkpoint is damaged or is of a later epoch than the run shall have."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        logger.info("%s holds no complete checkpoint: the run starts from its beginning", run_dir)
        return
    check_or_offer_older(checkpoint, ranks)
    if checkpoint_epoch(checkpoint) > config.epochs:
        raise ValueError(f"epochs={config.epochs}: the run has finished epoch {checkpoint_epoch(checkpoint)} already")


def check_same_test_prompts(run_dir: Path, test_prompts: Sequence[RenderedPrompt]) -> None:
    """Raise ValueError when the run has answered other test prompts so far: its epochs could not be compared."""
    answered = eval_path(run_dir, 0)
    if not answered.exists() or not test_prompts:
        return
    if [row["messages"] for row in read_evaluation(answered)] != [list(p.prompt.messages) for p in test_prompts]:
        raise ValueError(f"evaluation.prompts: differ from those that the run has answered in {answered}")


def check_environment(config: Config) -> None:
    """Raise ValueError for a device, backend, package or folder that the configuration asks for and is not there."""
    device = resolve_device(config.model)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if config.engine.kernel_backend == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(f"engine.kernel_backend='triton': needs a CUDA device, and the device is {device.type}")
    check_backend(config.model.attention, device, resolve_dtype(config.model, device))
    if config.model.fused_layers:
        check_fused_layers(device)
    if config.policy.lora.rank:
        check_lora()
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("logging.wandb=True: the package wandb is not installed")
    if config.sampling.backend == "replay" and not Path(config.sampling.replay_path).expanduser().is_dir():
        raise ValueError(f"sampling.replay_path={config.sampling.replay_path!r}: no such folder")
    if config.sampling.backend == "replay" and not sample_files_of(Path(config.sampling.replay_path).expanduser()):
        raise ValueError(f"sampling.replay_path={config.sampling.replay_path!r}: no samples/epoch_NNNN.jsonl in there")
    if config.sampling.backend == "server":
        check_server(config.sampling.server)
    if config.sampling.backend == "lmdeploy":
        check_lmdeploy(config.sampling)


def resolve_model_path(key: str, name: str) -> str:
    """A model's folder, or the name itself when it can only be a hub id.

    ``smollm2-135m-instruct`` stands for the folder that ``python -m inverseq.small_model`` writes. Raises ValueError,
    naming the option ``key``, for a folder without a model or with damaged weights and for a path that is not there.
    """
    if name == MODEL_NAME and not Path(name).exists():
        folder = small_model_path()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{key}={name!r}: is not in {folder} yet; fetch it with `python -m inverseq.small_model`")
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{key}={name!r}: the folder holds no model (no config.json)")
        if not any(path.glob("*.safetensors")):
            raise ValueError(f"{key}={name!r}: the folder holds no .safetensors weights; other formats are not loaded")
        for file in path.glob("*.safetensors"):
            try:
                safe_open(file, "pt").keys()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{key}={name!r}: {file.name} is damaged or cut off: {error}") from error
        return str(path)
    if path.exists():
        raise ValueError(f"{key}={name!r}: is a file; expected a model's folder or a hub id")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"{key}={name!r}: no such folder")
    return name


def load_model_config(key: str, path: str, config: ModelConfig) -> PretrainedConfig:
    """The model's configuration, without weights."""
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        where = "" if Path(path).is_dir() else "no such folder, and as a hub id "
        raise ValueError(
            f"{key}={path!r}: {where}the model's configuration cannot be loaded: {first_line(error)}"
        ) from error
    brings_code = "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING and not brings_code:
        raise ValueError(f"{key}={path!r}: is a model of kind {found.model_type!r}; expected a causal language model")
    check_architecture(f"{key}={path!r}", found, trust_remote_code=config.trust_remote_code)
    return found


def load_tokenizer(key: str, path: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a damaged tokenizer.json fails in any way, with KeyError for one
        raise ValueError(f"{key}={path!r}: the tokenizer cannot be loaded: {first_line(error)}") from error


def count_valid_vocab(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, path: str) -> int:
    """One more than the tokenizer's largest id that the model has a row for.

    A model may have more rows than the tokenizer has ids (padding). Ids without a row are an error, unless they are
    tokens added to the tokenizer (a padding token, for example), which no prompt uses.
    """
    num_rows = model_config.get_text_config().vocab_size
    added = tokenizer.get_added_vocab()
    ids = {token: index for token, index in tokenizer.get_vocab().items() if index < num_rows or token not in added}
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= num_rows:
        raise ValueError(
            f"model.path={path!r}: the tokenizer's id {largest} ({token!r}) has no row in the model's vocabulary "
            f"of {num_rows}"
        )
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id > largest:
        raise ValueError(
            f"model.path={path!r}: the EOS id {tokenizer.eos_token_id} has no row in the model's vocabulary"
        )
    return largest + 1


def check_same_vocabulary(
    path: str, tokenizer: PreTrainedTokenizerBase, plain_path: str, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError naming both models and some tokens when the contrast's models read other ids."""
    ours, theirs = tokenizer.get_vocab(), plain_tokenizer.get_vocab()
    if ours == theirs:
        return
    differing = sorted((token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)), key=repr)
    examples = ", ".join(f"{token!r} is {ours.get(token)} and {theirs.get(token)}" for token in differing[:3])
    raise ValueError(
        f"contrast.plain_model={plain_path!r} and model.path={path!r} have different vocabularies: "
        f"{len(differing)} of {len(ours)} and {len(theirs)} tokens differ, for example {examples}"
    )


def check_same_logits(path: str, config: PretrainedConfig, plain_path: str, plain_config: PretrainedConfig) -> None:
    """Raise ValueError when the heads of the contrast's models have other sizes or shape their logits differently."""
    for name in ("vocab_size", "final_logit_softcapping", "logits_scaling", "logit_scale"):
        ours, theirs = (getattr(each.get_text_config(), name, None) for each in (config, plain_config))
        if ours != theirs:
            raise ValueError(
                f"contrast.plain_model={plain_path!r} and model.path={path!r} cannot be contrasted: "
                f"their {name} is {theirs} and {ours}"
            )


def load_stream(config: Config, renderer: ChatRenderer) -> tuple[PromptStream, ReadReport]:
    """The prompts that training draws from, rendered, and what became of the source's rows."""
    prompts, read_report = load_prompts(config.prompts.path)
    stream = PromptStream(
        prompts,
        renderer,
        seed=config.seed,
        shuffle=config.prompts.shuffle,
        max_prompt_tokens=config.prompts.max_prompt_tokens,
        held_out=config.prompts.held_out,
    )
    return stream, read_report


def load_test_prompts(
    config: Config, renderer: ChatRenderer, held_out: Sequence[RenderedPrompt]
) -> Sequence[RenderedPrompt]:
    """The prompts that evaluation answers: those of ``evaluation.prompts``, else the held-out ones; none when off."""
    if not config.evaluation.every:
        return ()
    test_prompts = held_out
    if config.evaluation.prompts:
        prompts, report = load_prompts(config.evaluation.prompts)
        rendered = renderer.render_all(prompts)
        limit = config.prompts.max_prompt_tokens
        test_prompts = [item for item in rendered if len(item.policy_ids) <= limit]
        dropped = len(rendered) - len(test_prompts)
        logger.info("test prompts: %s; dropped %d over %d tokens", report, dropped, limit)
    if not test_prompts:
        raise ValueError(
            f"evaluation.every={config.evaluation.every}: there is no test prompt to answer; expected a file in "
            f"evaluation.prompts, or prompts.held_out over 0"
        )
    count = config.evaluation.num_prompts or len(test_prompts)
    if not 0 < count <= len(test_prompts):
        raise ValueError(
            f"evaluation.num_prompts={config.evaluation.num_prompts}: there are {len(test_prompts)} test prompts "
            f"(evaluation.prompts={config.evaluation.prompts!r})"
        )
    return test_prompts[:count]


def view_lengths_of(item: RenderedPrompt) -> list[int]:
    """Tokens of each view of a prompt, without a response."""
    return [len(prefix) + len(item.prompt_ids) for prefix in item.prefix_ids]


def read_tokens(config: Config) -> int:
    """Tokens of the longest response that a model reads: its last one is only predicted."""
    return config.sampling.max_new_tokens - 1


def check_lengths(config: Config, items: Sequence[RenderedPrompt]) -> None:
    """Raise ValueError when the longest sample that can arise exceeds a packing budget."""
    response = read_tokens(config)
    plain = max(len(item.policy_ids) for item in items)
    if plain + response > config.packing.train_tokens:
        raise ValueError(
            f"packing.train_tokens={config.packing.train_tokens}: expected at least {plain + response}, for the "
            f"longest prompt of {plain} tokens with sampling.max_new_tokens={config.sampling.max_new_tokens}"
        )
    views = [[length + response for length in view_lengths_of(item)] for item in items]
    together = config.contrast.scores_views_together
    needed = max(sum(lengths) if together else max(lengths) for lengths in views)
    if needed > config.packing.score_tokens:
        raise ValueError(
            f"packing.score_tokens={config.packing.score_tokens}: expected at least {needed}, for "
            f"{'all views' if together else 'the longest view'} of the longest prompt "
            f"with sampling.max_new_tokens={config.sampling.max_new_tokens}"
        )


def check_positions(config: Config, items: Sequence[RenderedPrompt], path: str, model_config: PretrainedConfig) -> None:
    """Raise ValueError when the longest view with its response exceeds the positions that a model knows."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    longest = max(max(view_lengths_of(item)) for item in items)
    needed = longest + read_tokens(config)
    if limit is not None and needed > limit:
        raise ValueError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens}: the longest view of {longest} tokens and a "
            f"response need {needed} positions, {path} has {limit}; lower it or prompts.max_prompt_tokens"
        )
