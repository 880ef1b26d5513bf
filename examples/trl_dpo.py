"""DPO with TRL on the fused log-probabilities.

python examples/trl_dpo.py MODEL [max_steps]
accelerate launch --use_deepspeed --zero_stage 3 --num_processes 2 examples/trl_dpo.py MODEL [max_steps]
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from inverseq.integrations.trl import use_linear_logprob

PAIRS = [
    {"prompt": "Is the earth round? ", "chosen": "Yes, almost a sphere.", "rejected": "I do not answer that."},
    {"prompt": "Name a prime number. ", "chosen": "Seven is a prime number.", "rejected": "Nine is a prime number."},
]


def main(model_path: str, max_steps: int = 4) -> float:
    use_linear_logprob()  # the one line
    on_gpu = torch.cuda.is_available()
    arguments = DPOConfig(
        output_dir="runs/trl-dpo", max_steps=max_steps, report_to=[], save_strategy="no", logging_steps=1,
        bf16=on_gpu, use_cpu=not on_gpu,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(model_path),
        train_dataset=Dataset.from_list(PAIRS * 8),
    )
    return trainer.train().training_loss


if __name__ == "__main__":
    print(f"training loss {main(sys.argv[1], *map(int, sys.argv[2:])):.4f}")
