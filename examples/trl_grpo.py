"""GRPO with TRL on the fused log-probabilities; the reward prefers short answers.

python examples/trl_grpo.py MODEL [max_steps]
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from inverseq.integrations.trl import use_linear_logprob

PROMPTS = [{"prompt": "Is the earth round?"}, {"prompt": "Name a prime number."}]


def brevity(completions: list[str], **_) -> list[float]:
    return [-float(len(text)) for text in completions]


def main(model_path: str, max_steps: int = 2) -> float:
    use_linear_logprob()  # the one line
    on_gpu = torch.cuda.is_available()
    arguments = GRPOConfig(
        output_dir="runs/trl-grpo", max_steps=max_steps, report_to=[], save_strategy="no", logging_steps=1,
        bf16=on_gpu, use_cpu=not on_gpu,
        per_device_train_batch_size=4, num_generations=4, max_completion_length=16,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(model_path),
        reward_funcs=brevity,
        train_dataset=Dataset.from_list(PROMPTS * 8),
    )
    return trainer.train().training_loss


if __name__ == "__main__":
    print(f"training loss {main(sys.argv[1], *map(int, sys.argv[2:])):.4f}")
