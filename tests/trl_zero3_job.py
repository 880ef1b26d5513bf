"""One step of each of TRL's trainers under ZeRO-3, stock and on ``linear_logprob``, one after the other: starting the
processes is what costs.

``accelerate launch --use_deepspeed --zero_stage 3 --num_processes 2 -m tests.trl_zero3_job OUT CASES`` with CASES a
JSON list of {"kind", "model", "reference", "dtype", "fused"}. Rank 0 writes to OUT, which ``torch.load`` reads, what
``train`` finds of each. The last thing run is the example, which takes as long as another case.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import trl
import trl.trainer.utils
from accelerate.state import AcceleratorState
from datasets import Dataset
from deepspeed.utils import safe_get_full_fp32_param
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.logging import disable_progress_bar

from inverseq.integrations import trl as adapter

EXAMPLE = Path(__file__).parent.parent / "examples" / "trl_dpo.py"
WORDS = ("what is true", "help me find water", "explain number one", "how do they make oil")
LEARNING_RATE = 0.5


def make_trainer(case: dict, folder: Path) -> Trainer:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1,
        "optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "bf16": case["dtype"] == "bfloat16", "use_cpu": True, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    rows = [{"prompt": words} for words in WORDS]
    if case["kind"] == "sft":
        make, args = trl.SFTTrainer, trl.SFTConfig(max_length=64, **settings)
        rows = [row | {"completion": f" {row['prompt']} and more"} for row in rows]
    elif case["kind"] == "dpo":
        make, args = trl.DPOTrainer, trl.DPOConfig(max_length=64, **settings)
        rows = [row | {"chosen": " the fact is kind", "rejected": f" no {row['prompt']}"} for row in rows]
    else:
        make = trl.GRPOTrainer
        args = trl.GRPOConfig(num_generations=2, max_completion_length=8, temperature=0.7, beta=0.1, **settings)
    keywords = {}  # models after the arguments, whose DeepSpeed plugin makes from_pretrained partition them
    if case["kind"] == "dpo":
        keywords["ref_model"] = AutoModelForCausalLM.from_pretrained(case["reference"], dtype=torch.float32)
    if case["kind"] == "grpo":
        keywords["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    return make(
        model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        **keywords,
    )


@contextlib.contextmanager
def gathered_heads() -> Iterator[list[StorageWeakRef]]:
    """The memory of every weight and bias that TRL's context has gathered, in forward and backward passes."""
    seen, real = [], trl.trainer.utils.maybe_gather_lm_head_ctx

    @contextlib.contextmanager
    def watched(*weights):
        with real(*weights):
            seen.extend(StorageWeakRef(weight.untyped_storage()) for weight in weights if weight is not None)
            yield

    trl.trainer.utils.maybe_gather_lm_head_ctx = watched
    try:
        yield seen
    finally:
        trl.trainer.utils.maybe_gather_lm_head_ctx = real


def train(case: dict, folder: Path) -> dict:
    """What a step logs and how far it moves each weight; no rank may hold a whole head between two passes."""
    undo = adapter.use_linear_logprob(workspace_bytes=2**20) if case["fused"] else (lambda: None)
    trainer = make_trainer(case, folder)
    real, weights, before, num_read = trainer.compute_loss, dict(trainer.model.named_parameters()), {}, []

    def compute_loss(*arguments, **options):
        before.update((name, safe_get_full_fp32_param(weight).clone()) for name, weight in weights.items())
        loss = real(*arguments, **options)
        num_read.append(len(heads))
        assert heads and all(head.expired() for head in heads), "a whole head waits for the backward pass"
        return loss

    trainer.compute_loss = compute_loss
    with gathered_heads() as heads:
        trainer.train()
    assert len(heads) > num_read[-1] and all(head.expired() for head in heads), "a whole head stays"
    assert not trainer.model.get_output_embeddings().weight.numel()
    undo()
    AcceleratorState._reset_state()
    after = {name: safe_get_full_fp32_param(weight) for name, weight in weights.items()}
    moved = {name: (after[name] - before[name]) / LEARNING_RATE for name in weights}
    return {"logged": trainer.state.log_history[0], "moved": moved}


def main(out: Path, cases: list[dict]) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    found = [train(case, out.parent / "run") for case in cases]
    loss = runpy.run_path(str(EXAMPLE))["main"](cases[0]["model"], 1)
    assert is_deepspeed_zero3_enabled()
    if torch.distributed.get_rank() == 0:
        torch.save({"cases": found, "example": loss}, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
