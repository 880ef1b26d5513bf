"""The configuration: one tree of frozen dataclasses, validated when built.

Values come from a YAML recipe and dotted ``section.key=value`` overrides; see ``inverseq.config_loading``.
The help text of every option is its ``metadata["help"]``.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, field, fields, is_dataclass

__all__ = [
    "CheckpointConfig",
    "Config",
    "ContrastConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LmdeployConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "PackingConfig",
    "PolicyConfig",
    "PromptsConfig",
    "SamplingConfig",
    "ServerConfig",
    "iter_options",
]

MAX_ALPHA = 1e20  # what the operations take, which are not imported here: --help shall not load torch


def option(default, help: str):
    """A configuration field with its help text."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, key: str, value, expectation: str) -> None:
    """Raise ValueError naming the dotted key, its value and what was expected."""
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {expectation}")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, key, value, "one of " + ", ".join(choices))


@dataclass(frozen=True)
class ModelConfig:
    path: str = option(
        "", "initial policy: a folder, a hub id, or smollm2-135m-instruct (made by `python -m inverseq.small_model`)"
    )
    dtype: str = option("auto", "dtype of weights: auto (bfloat16 on CUDA, else float32), float32, bfloat16")
    device: str = option("auto", "auto (CUDA when there is one), cpu, cuda")
    chat_template: str = option("", "file or shipped name (vicuna, zephyr) replacing the tokenizer's template")
    attention: str = option(
        "auto", "packed attention: flash_attn, varlen, flex, sdpa; auto is sdpa on a CPU, on CUDA the first that serves"
    )
    gradient_checkpointing: str | bool = option(
        "auto", "recompute activations in the backward pass: true, false; auto when the memory estimate asks for it"
    )
    fused_layers: bool = option(False, "fused RMSNorm, rotary embedding and MLP of liger-kernel, on CUDA")
    trust_remote_code: bool = option(False, "run model code from the model's repository")

    def __post_init__(self):
        one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        one_of("model.device", self.device, ("auto", "cpu", "cuda"))
        one_of("model.gradient_checkpointing", str(self.gradient_checkpointing).lower(), ("auto", "true", "false"))
        one_of("model.attention", self.attention, ("auto", "flash_attn", "varlen", "flex", "sdpa"))


@dataclass(frozen=True)
class LoraConfig:
    rank: int = option(0, "rank of LoRA adapters, which alone are trained then; 0 trains all weights")
    alpha: float = option(32.0, "LoRA's alpha: adapters are scaled by alpha / rank")
    target_modules: str = option("all-linear", "modules that get adapters: all-linear, or names such as q_proj,v_proj")
    rank_stabilized: bool = option(False, "scale adapters by alpha / √rank instead")

    def __post_init__(self):
        require(self.rank >= 0, "policy.lora.rank", self.rank, "0 or more")
        require(0 < self.alpha < math.inf, "policy.lora.alpha", self.alpha, "a positive number")
        require(bool(self.target_modules.strip()), "policy.lora.target_modules", self.target_modules, "module names")


@dataclass(frozen=True)
class PolicyConfig:
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ContrastConfig:
    kind: str = option("principle", "principle (same weights, two views) or model (same view, two sets of weights)")
    alpha: float = option(1.4, "α of log π̂ ∝ α log π_w + (1 − α) log π_l; up to 1e20, any sign")
    principle: str = option("default", "principle π_w reads: a shipped name, a text file, or nothing (kind=model)")
    plain_system: str | None = option(
        "", "system text of the plain view; empty is an explicit empty system message, null keeps the template's own"
    )
    plain_model: str = option("", "π_l of the model contrast (an SFT model); π_w is the initial policy")
    refresh_every: int = option(0, "epochs after which the policy takes the place of μ, again and again; 0 is never")
    kl_to_initial: bool = option(False, "kind=model: report how far the policy is from what it was at first, too")

    def __post_init__(self):
        require(self.refresh_every >= 0, "contrast.refresh_every", self.refresh_every, "0 or more")
        if self.kl_to_initial:
            key = "contrast.kl_to_initial"
            require(self.kind == "model", key, True, "false with contrast.kind=principle: there it is kl_to_plain")
            require(not self.refresh_every, key, True, "false with contrast.refresh_every: the initial model goes")
        one_of("contrast.kind", self.kind, ("principle", "model"))
        require(abs(self.alpha) <= MAX_ALPHA, "contrast.alpha", self.alpha, f"a finite number up to ±{MAX_ALPHA:g}")
        if self.kind == "model":
            require(bool(self.plain_model), "contrast.plain_model", self.plain_model, "a model for contrast.kind=model")
        else:
            key, kind = "contrast.plain_model", "with contrast.kind=principle"
            require(not self.plain_model, key, self.plain_model, f"nothing {kind}")
            require(bool(self.principle), "contrast.principle", self.principle, f"a principle {kind}")

    @property
    def scores_views_together(self) -> bool:
        """Whether the better model reads all views of a sample in one pack, rather than only its own view."""
        return self.kind == "principle" or self.kl_to_initial


@dataclass(frozen=True)
class PromptsConfig:
    path: str = option("bundled", "bundled, a .jsonl/.jsonl.gz file (HH, prompt or messages rows), or hf:NAME[:SPLIT]")
    max_prompt_tokens: int = option(1024, "longer prompts (plain view) are dropped and counted, never cut")
    held_out: int = option(32, "prompts set aside for the held-out squared log-ratio")
    shuffle: bool = option(True, "seeded shuffle of the prompts, a new order each pass")

    def __post_init__(self):
        require(bool(self.path), "prompts.path", self.path, "bundled, a file or hf:NAME")
        require(self.max_prompt_tokens > 0, "prompts.max_prompt_tokens", self.max_prompt_tokens, "a positive number")
        require(self.held_out >= 0, "prompts.held_out", self.held_out, "0 or more")


@dataclass(frozen=True)
class ServerConfig:
    url: str = option("", "backend=server: base URL of an OpenAI-compatible server, for example http://host:8000/v1")
    model: str = option("", "name under which the server serves the policy; {model_dir} is the folder of its weights")
    dialect: str = option("openai", "whose fields beyond OpenAI's the server takes: openai, vllm, sglang, transformers")
    prompts: str = option("ids", "how prompts are sent: ids (vLLM, SGLang) or text (servers that take nothing else)")
    concurrency: int = option(64, "requests in flight, for each rank")
    timeout_s: float = option(600.0, "seconds until a request without an answer is given up and sent again")
    retries: int = option(5, "how often one prompt is sent again before the run stops")
    wait_s: float = option(300.0, "seconds that a lost or restarting server is waited for")
    weights_dir: str = option("", "folder that new weights are written to, seen by the server; empty is RUN/weights")
    refresh_command: str = option("", "command that makes the server load {model_dir}, the weights of step {step}")
    refresh_url: str = option("", "URL that is sent refresh_body (POST) to make the server load new weights")
    refresh_body: str = option("", "JSON sent to refresh_url; {model_dir} and {step} are replaced; empty sends none")
    static: bool = option(False, "never refresh the server's weights: off-policy samples, logged as such")

    def __post_init__(self):
        one_of("sampling.server.dialect", self.dialect, ("openai", "vllm", "sglang", "transformers"))
        one_of("sampling.server.prompts", self.prompts, ("ids", "text"))
        require(self.concurrency > 0, "sampling.server.concurrency", self.concurrency, "a positive number")
        require(self.retries >= 0, "sampling.server.retries", self.retries, "0 or more")
        for key in ("timeout_s", "wait_s"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"sampling.server.{key}", value, "a positive number of seconds")

    def check_complete(self) -> None:
        """Raise ValueError for what ``sampling.backend=server`` needs and is not there."""
        is_url = self.url.startswith(("http://", "https://"))
        require(is_url, "sampling.server.url", self.url, "http://… or https://… with sampling.backend=server")
        require(bool(self.model), "sampling.server.model", self.model, "the model's name on the server")
        ways = [bool(self.refresh_command), bool(self.refresh_url), self.static]
        require(
            sum(ways) == 1, "sampling.server.refresh_command", self.refresh_command,
            "exactly one of sampling.server.refresh_command, refresh_url and static=true",
        )  # fmt: skip
        if self.refresh_body:
            try:
                is_object = isinstance(json.loads(self.refresh_body.replace("{step}", "0")), dict)
            except ValueError:
                is_object = False
            require(is_object, "sampling.server.refresh_body", self.refresh_body, "a JSON object")
        try:
            shlex.split(self.refresh_command)
        except ValueError as error:
            raise ValueError(f"sampling.server.refresh_command={self.refresh_command!r}: {error}") from None
        is_url = self.refresh_url.startswith(("http://", "https://")) or not self.refresh_url
        require(is_url, "sampling.server.refresh_url", self.refresh_url, "http://… or https://…")


@dataclass(frozen=True)
class LmdeployConfig:
    form: str = option("server", "server (lmdeploy serve api_server, started by the run) or pipeline (in this process)")
    python: str = option("", "form=server: Python of the environment that LMDeploy is installed in; empty is this one")
    engine: str = option("auto", "turbomind, pytorch; auto is TurboMind where it supports the architecture")
    weights: str = option("reload", "reload from a saved export, or update in memory (engine=pytorch; needs ray)")
    cache_fraction: float = option(0.8, "share of the GPU memory that is free when the engine starts, for its cache")
    timeout_s: float = option(600.0, "seconds until a response counts as lost; form=server has no seeds: the run ends")
    start_s: float = option(900.0, "seconds that the engine may take to start")
    retries: int = option(2, "how often a response is asked for again, or a lost engine started again")
    weights_dir: str = option("", "folder that new weights are written to; empty is RUN/weights")

    def __post_init__(self):
        one_of("sampling.lmdeploy.form", self.form, ("server", "pipeline"))
        one_of("sampling.lmdeploy.engine", self.engine, ("auto", "turbomind", "pytorch"))
        one_of("sampling.lmdeploy.weights", self.weights, ("reload", "update"))
        key = "sampling.lmdeploy.python"
        require(not self.python or self.form == "server", key, self.python, "nothing with form=pipeline")
        key = "sampling.lmdeploy.weights"
        is_able = self.weights != "update" or self.engine == "pytorch"
        require(is_able, key, self.weights, "reload unless sampling.lmdeploy.engine=pytorch")
        fraction = self.cache_fraction
        require(0 < fraction < 1, "sampling.lmdeploy.cache_fraction", fraction, "a share between 0 and 1")
        require(self.retries >= 0, "sampling.lmdeploy.retries", self.retries, "0 or more")
        for key in ("timeout_s", "start_s"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"sampling.lmdeploy.{key}", value, "a positive number of seconds")


@dataclass(frozen=True)
class SamplingConfig:
    backend: str = option(
        "transformers",
        "transformers (continuous batching on the policy's weights), lmdeploy, server (OpenAI-compatible), replay",
    )
    max_new_tokens: int = option(1024, "longest response; longer ones are cut and count as truncated")
    samples_per_epoch: int = option(500, "responses drawn in an epoch")
    samples_per_prompt: int = option(1, "responses to each prompt, every one a sample; divides samples_per_epoch")
    per_prompt_seeds: bool = option(
        False, "backend=transformers: responses do not depend on batch, order and number of processes"
    )
    batch_size: int = option(64, "sequences decoded together")
    replay_path: str = option("", "backend=replay: folder of samples/epoch_NNNN.jsonl of an earlier run")
    max_logprob_gap: float = option(
        0.1, "stop when engine and trainer disagree on a probe prompt by more nats a token in the mean; 0 never stops"
    )
    overlap: bool = option(False, "score finished samples while others are still being generated")
    ahead: bool = option(
        False, "backend=server: draw the next epoch's samples while this one trains, from weights one epoch old"
    )
    server: ServerConfig = field(default_factory=ServerConfig)
    lmdeploy: LmdeployConfig = field(default_factory=LmdeployConfig)

    def __post_init__(self):
        one_of("sampling.backend", self.backend, ("transformers", "server", "lmdeploy", "replay"))
        gap = self.max_logprob_gap
        require(0 <= gap < math.inf, "sampling.max_logprob_gap", gap, "0 or more nats")
        is_apart = self.backend == "server"
        require(is_apart or not self.ahead, "sampling.ahead", self.ahead, "false unless sampling.backend=server")
        if self.backend == "server":
            self.server.check_complete()
        for key in ("max_new_tokens", "samples_per_epoch", "samples_per_prompt", "batch_size"):
            require(getattr(self, key) > 0, f"sampling.{key}", getattr(self, key), "a positive number")
        divides = self.samples_per_epoch % self.samples_per_prompt == 0
        key = "sampling.samples_per_prompt"
        require(divides, key, self.samples_per_prompt, f"a divisor of samples_per_epoch={self.samples_per_epoch}")
        key, is_able = "sampling.per_prompt_seeds", not self.per_prompt_seeds or self.backend == "transformers"
        require(is_able, key, self.per_prompt_seeds, "false with another backend than transformers")
        require(
            bool(self.replay_path) == (self.backend == "replay"),
            "sampling.replay_path", self.replay_path, "a folder with backend=replay, nothing otherwise",
        )  # fmt: skip


@dataclass(frozen=True)
class PackingConfig:
    train_tokens: int = option(4096, "token budget of a training pack (micro-batch)")
    score_tokens: int = option(16384, "token budget of a scoring pack")
    share_prefix: str | bool = option(
        "auto", "score a principle that all samples share once per pack: true, false; auto where it has measured faster"
    )

    def __post_init__(self):
        for key in ("train_tokens", "score_tokens"):
            require(0 < getattr(self, key) <= 2**24, f"packing.{key}", getattr(self, key), "1 … 2²⁴")
        one_of("packing.share_prefix", str(self.share_prefix).lower(), ("auto", "true", "false"))

    def shares_prefix(self, device_type: str, num_views: int) -> bool:
        """Whether scoring packs emit a shared prefix once. ``auto``: for a principle, on CPUs; CUDA is not measured."""
        if str(self.share_prefix).lower() == "auto":
            return device_type == "cpu" and num_views > 1
        return str(self.share_prefix).lower() == "true"


@dataclass(frozen=True)
class OptimConfig:
    lr: float = option(1e-6, "peak learning rate")
    samples_per_step: int = option(16, "samples of one optimizer step over all ranks; the last step may be short")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's betas")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    warmup_steps: int = option(0, "steps of linear warm-up")
    schedule: str = option("constant", "constant, linear or cosine decay after the warm-up")
    max_grad_norm: float = option(1.0, "clip the global gradient norm; 0 is no clipping")
    loss_reduction: str = option("token_mean", "token_mean, sum (the paper's Algorithm 1) or sequence_mean")

    def __post_init__(self):
        require(0 < self.lr <= 10, "optim.lr", self.lr, "a positive number, at most 10")
        require(self.samples_per_step > 0, "optim.samples_per_step", self.samples_per_step, "a positive number")
        for beta in self.betas:
            require(0 <= beta < 1, "optim.betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.eps < math.inf, "optim.eps", self.eps, "a positive number")
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        one_of("optim.schedule", self.schedule, ("constant", "linear", "cosine"))
        require(0 <= self.max_grad_norm < math.inf, "optim.max_grad_norm", self.max_grad_norm, "0 or more")
        one_of("optim.loss_reduction", self.loss_reduction, ("token_mean", "sum", "sequence_mean"))


@dataclass(frozen=True)
class EngineConfig:
    kernel_backend: str = option("auto", "backend of the fused operations: auto, torch or triton")
    workspace_mib: int = option(0, "temporary memory of the fused operations in MiB; 0 is their default")
    kind: str = option("auto", "auto (deepspeed with several processes or offload, else torch), torch, deepspeed")
    zero_stage: str | int = option("auto", "ZeRO stage of the policy: 0, 1, 2, 3; auto is the lowest that fits")
    offload_optimizer: str = option("auto", "optimizer state in host memory: none, cpu; auto when it does not fit")
    offload_parameters: str = option("auto", "weights in host memory (ZeRO-3): none, cpu; auto when they do not fit")
    frozen: str = option("auto", "frozen models: replicated, sharded (ZeRO-3), host; auto is the first that fits")

    def __post_init__(self):
        one_of("engine.kernel_backend", self.kernel_backend, ("auto", "torch", "triton"))
        one_of("engine.kind", self.kind, ("auto", "torch", "deepspeed"))
        one_of("engine.zero_stage", self.zero_stage, ("auto", "0", "1", "2", "3"))
        one_of("engine.offload_optimizer", self.offload_optimizer, ("auto", "none", "cpu"))
        one_of("engine.offload_parameters", self.offload_parameters, ("auto", "none", "cpu"))
        one_of("engine.frozen", self.frozen, ("auto", "replicated", "sharded", "host"))
        require(self.workspace_mib >= 0, "engine.workspace_mib", self.workspace_mib, "0 or more")

    def kernel_options(self) -> dict[str, str | int | None]:
        """The keywords that the fused operations take from the configuration."""
        return {
            "backend": None if self.kernel_backend == "auto" else self.kernel_backend,
            "workspace_bytes": self.workspace_mib * 2**20 or None,
        }


@dataclass(frozen=True)
class CheckpointConfig:
    keep_last: int = option(2, "complete checkpoints kept")

    def __post_init__(self):
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "1 or more")


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = option(0, "answer the test prompts at epoch 0 and every so many epochs; 0 is never")
    prompts: str = option("", "test prompts (as prompts.path); empty takes the held-out prompts")
    num_prompts: int = option(0, "how many of them; 0 is all")

    def __post_init__(self):
        require(self.every >= 0, "evaluation.every", self.every, "0 or more")
        require(self.num_prompts >= 0, "evaluation.num_prompts", self.num_prompts, "0 or more")


@dataclass(frozen=True)
class LoggingConfig:
    tensorboard: bool = option(True, "write RUN/tensorboard")
    wandb: bool = option(False, "also log to Weights & Biases (the wandb package must be installed)")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    epochs: int = option(15, "rounds of sampling and training; one draws sampling.samples_per_epoch responses")
    seed: int = option(0, "seed of every random choice")
    run_dir: str = option("", "folder of the run")

    def __post_init__(self):
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(0 <= self.seed < 2**31, "seed", self.seed, "0 … 2³¹ − 1")
        if self.sampling.backend == "replay":
            require(not self.sampling.overlap, "sampling.overlap", True, "false with a replayed run")
            require(not self.evaluation.every, "evaluation.every", self.evaluation.every, "0 with a replayed run")
        if self.policy.lora.rank:
            reason = "with policy.lora: one copy of the weights is"
            alternating = f"false {reason} policy with its adapters on or μ with them off, not both at a time"
            require(not self.sampling.overlap, "sampling.overlap", True, alternating)
            refresh = self.contrast.refresh_every
            require(not refresh, "contrast.refresh_every", refresh, f"0 {reason} the policy's base and μ")
        require(bool(self.model.path), "model.path", self.model.path, "a model directory or hub id")
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder for the run")


def iter_options(section=Config, prefix: str = ""):
    """Yield (dotted key, type, default, help) of every option, in the order of the configuration."""
    for item in fields(section):
        nested = item.default_factory if callable(item.default_factory) else None
        if nested is not None and is_dataclass(nested):
            yield from iter_options(nested, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.type, item.default, item.metadata["help"]
