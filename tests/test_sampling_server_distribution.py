"""What a real completions server samples is the trainer's distribution, whatever its model's generation_config says."""

import json
import logging
from collections import Counter

import numpy as np
import torch

from inverseq.sampling import sample_responses
from tests.server_sampler import Trainer, make_prompts
from tests.serving import shared_server
from tests.tiny_words import EOS, NUM_WORDS, word_ids


@torch.no_grad()
def response_probabilities(model, ids):
    """Exact probability of every response of at most two tokens."""
    model.set_attn_implementation("eager")
    logits = model(torch.tensor([[*ids, word] for word in range(NUM_WORDS)])).logits.double()
    first, second = logits[0, -2].softmax(-1).tolist(), logits[:, -1].softmax(-1).tolist()
    pairs = {(i, j): first[i] * second[i][j] for i in range(NUM_WORDS) if i != EOS for j in range(NUM_WORDS)}
    return pairs | {(EOS,): first[EOS]}


def p_value(responses, probabilities):
    """Pearson's test; cells that expect fewer than 5 are one cell."""
    counts, cells, rest = Counter(map(tuple, responses)), [], np.zeros(2)
    for outcome, probability in probabilities.items():
        cell = np.array([counts[outcome], len(responses) * probability])
        if cell[1] < 5:
            rest += cell
        else:
            cells.append(cell)
    observed, expected = np.array([*cells, rest]).T
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(len(cells) / 2), torch.tensor(float(statistic) / 2)).item()


def test_sampled_tokens_follow_the_trainers_distribution(tmp_path, caplog):
    """Against the real server; its model's generation_config asks for a temperature and a repetition penalty."""
    trainer = Trainer(tmp_path, shared_server().root, max_new_tokens=2, concurrency=8)
    trainer.sync(0)
    prompts = make_prompts(700, ids=word_ids(3, 7, 4))
    with caplog.at_level(logging.WARNING):
        responses = [s.response.token_ids.tolist() for s in sample_responses(trainer.sampler, prompts, seed=1)]
    assert "asked for again" not in caplog.text  # nothing was drawn again: the distribution is not conditioned
    probabilities = response_probabilities(trainer.model, word_ids(3, 7, 4))
    assert p_value(responses, probabilities) > 0.01
    tempered = {outcome: probability**1.5 for outcome, probability in probabilities.items()}
    scale = sum(tempered.values())
    assert p_value(responses, {outcome: value / scale for outcome, value in tempered.items()}) < 1e-4


HOSTILE = {
    "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_p": 0.2, "typical_p": 0.5, "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05, "min_new_tokens": 2, "suppress_tokens": [5, 6], "begin_suppress_tokens": [8, 9],
}  # fmt: skip


def test_a_static_models_generation_config_tempers_nothing(tmp_path):
    """The server fills what a request leaves open from the folder that it serves, which here is not the run's."""
    initial = str(tmp_path / "initial")
    trainer = Trainer(tmp_path, shared_server().root, model=initial, static=True, refresh_url="", max_new_tokens=2)
    settings = tmp_path / "initial" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | HOSTILE))
    assert trainer.sync(0)["probe_greedy_gap"] < 1e-6
    samples = sample_responses(trainer.sampler, make_prompts(200, ids=word_ids(3, 7, 4)), seed=1)
    probabilities = response_probabilities(trainer.model, word_ids(3, 7, 4))
    assert p_value([s.response.token_ids.tolist() for s in samples], probabilities) > 0.01
