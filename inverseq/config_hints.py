"""What to write instead of a key that is none: the nearest key, or the one that stands for another trainer's word."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = ["OTHER_TRAINERS", "describe_unknown", "did_you_mean"]

SURE, LIKELY = 0.85, 0.6  # similarity of a misspelt key; of one that is worth a guess

UNTEMPERED = "responses are drawn untempered from the whole distribution, which the method needs"
NO_KL = "the loss has no KL term; contrast.alpha sets how far the targets are from the plain model"
PACKS = "micro-batches are packs of packing.train_tokens tokens, optim.samples_per_step is the batch of a step"
EVERY_EPOCH = "a checkpoint is written behind every epoch, checkpoint.keep_last are kept"
# Words of TRL, transformers, verl and OpenRLHF -> our key, or why there is none.
OTHER_TRAINERS = {
    **dict.fromkeys(("learning_rate", "actor_learning_rate"), "optim.lr"),
    **dict.fromkeys(("num_train_epochs", "total_epochs", "max_epochs", "num_episodes", "num_epochs"), "epochs"),
    **dict.fromkeys(("output_dir", "save_path", "ckpt_path", "default_local_dir"), "run_dir"),
    **dict.fromkeys(("model_name_or_path", "pretrain", "actor_model"), "model.path"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "param_dtype"), "model.dtype"),
    **dict.fromkeys(("attn_implementation", "flash_attn", "use_flash_attention"), "model.attention"),
    **dict.fromkeys(("use_liger_kernel", "use_liger"), "model.fused_layers"),
    **dict.fromkeys(("lora_r", "lora_rank", "use_peft"), "policy.lora.rank"),
    "lora_alpha": "policy.lora.alpha",
    "lora_target_modules": "policy.lora.target_modules",
    **dict.fromkeys(("system_prompt", "constitution"), "contrast.principle"),
    **dict.fromkeys(("dataset", "dataset_name", "prompt_data", "train_files", "train_file"), "prompts.path"),
    **dict.fromkeys(("max_prompt_length", "prompt_max_len", "max_prompt_len"), "prompts.max_prompt_tokens"),
    **dict.fromkeys(
        ("max_completion_length", "max_response_length", "response_length", "generate_max_len"),
        "sampling.max_new_tokens",
    ),
    **dict.fromkeys(("num_generations", "n_samples_per_prompt", "n"), "sampling.samples_per_prompt"),
    **dict.fromkeys(("rollout_batch_size", "generation_batch_size"), "sampling.samples_per_epoch"),
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_server_base_url"), "sampling.backend"),
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), UNTEMPERED),
    **dict.fromkeys(("beta", "kl_coef", "kl_loss_coef", "init_kl_coef"), NO_KL),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_train_batch_size", "micro_batch_size", "ppo_micro_batch_size_per_gpu"),
        PACKS,
    ),
    **dict.fromkeys(("gradient_accumulation_steps", "train_batch_size", "ppo_mini_batch_size"), PACKS),
    **dict.fromkeys(("save_steps", "save_strategy", "save_freq"), EVERY_EPOCH),
    **dict.fromkeys(("save_total_limit", "max_ckpt_num"), "checkpoint.keep_last"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "optim.schedule"),
    **dict.fromkeys(("warmup_ratio", "lr_warmup_steps"), "optim.warmup_steps"),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clipping", "max_norm"), "optim.max_grad_norm"),
    **dict.fromkeys(("eval_steps", "eval_strategy", "test_freq"), "evaluation.every"),
    **dict.fromkeys(("report_to", "use_tensorboard", "logger"), "logging.tensorboard"),
    **dict.fromkeys(("use_wandb", "wandb_project"), "logging.wandb"),
    **dict.fromkeys(("deepspeed", "zero"), "engine.zero_stage"),
}


def describe_unknown(key: str, known: Sequence[str]) -> str:
    """What to append to "unknown key …": the key that was misspelt, another trainer's word translated, or nothing."""
    leaf = leaf_of(key)
    if leaf in OTHER_TRAINERS and not difflib.get_close_matches(key, known, n=1, cutoff=SURE):
        translated = OTHER_TRAINERS[leaf]
        return f"; did you mean {translated}?" if translated in known else f": {translated}"
    return did_you_mean(key, known)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``; did you mean …?`` for the nearest known word, or nothing when none is near.

    A common section alone does not make two keys alike: their last words must be so too.
    """
    same_leaf = [key for key in known if leaf_of(key) == leaf_of(word)]
    same_leaf.sort(key=lambda key: key.count("."))  # alpha is contrast.alpha rather than policy.lora.alpha
    by_leaf = {leaf_of(key): key for key in known}
    near_leaf = [by_leaf[leaf] for leaf in difflib.get_close_matches(leaf_of(word), by_leaf, n=1)]
    close = difflib.get_close_matches(word, known, n=3, cutoff=LIKELY)
    near = [key for key in close if has_like_leaf(key, word) or word.startswith(f"{key}.")]
    found = near[:1] or same_leaf or near_leaf
    return f"; did you mean {found[0]}?" if found else ""


def has_like_leaf(key: str, word: str) -> bool:
    return difflib.SequenceMatcher(None, leaf_of(key), leaf_of(word)).ratio() >= LIKELY


def leaf_of(key: str) -> str:
    return key.rpartition(".")[2]
