"""Other trainers with the fused operations underneath. Each file is one adapter and imports its package lazily.

    causal_lm.py    a module that maps token ids to per-token log-probabilities: DDP, FSDP2, DeepSpeed, autocast
    hf_trainer.py   a ``compute_loss_func`` for ``transformers.Trainer``
    trl.py          DPO, GRPO, SFT and the other trainers of TRL
    versions.py     the versions of other packages that were tested

They import ``inverseq_kernels`` and nothing else of this project.
"""

__all__ = []
