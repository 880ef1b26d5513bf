"""Exact, memory-bounded operations on a language-model head, for RLHF losses.

Four operations read the final hidden states and the head's weight and never keep the [A, V] logits:
the contrastive target (one alpha or a sweep), the log-probability of given tokens, and the squared
log-ratio loss. The package imports torch, triton (where installed) and the standard library only, and
works as a copied folder.
"""

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.contrastive import contrastive_logprob, contrastive_logprob_sweep
from inverseq_kernels.logprob import linear_logprob
from inverseq_kernels.squared_log_ratio import squared_log_ratio_loss

__version__ = "0.1.0"

__all__ = [
    "IGNORE_INDEX",
    "contrastive_logprob",
    "contrastive_logprob_sweep",
    "linear_logprob",
    "squared_log_ratio_loss",
]
