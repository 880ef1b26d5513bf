"""What LMDeploy is asked, which answers pass, and how weights and variables reach it: everything without a process."""

import base64
import pickle
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from inverseq.sampling_lmdeploy_client import (
    Answer,
    BadAnswer,
    EngineLost,
    Request,
    RequestRefused,
    check_answer,
    requests_of,
)
from inverseq.sampling_lmdeploy_server import held_port, server_environment
from inverseq.sampling_lmdeploy_weights import layers_of, serialized
from tests.test_sampling import make_model, responses_of
from tests.test_sampling_lmdeploy import STOP, VOCAB, policy, prompts, recorded, sample

REQUEST = Request(0, [5, 6], 3, (STOP,), 1)


@pytest.mark.parametrize(
    ("ids", "reason", "result"),
    [
        ([7, STOP], "stop", "stop"),
        ([7, 8, 9], "length", "length"),
        ([7, 8, STOP], "length", "stop"),
        ([7], "stop", "without the stop token"),
        ([], "stop", "0 tokens"),
        ([7, 8, 9, 10], "length", "4 tokens"),
        ([STOP, 7, STOP], "stop", r"stop tokens at \[0, 2\]"),
        ([7, VOCAB, STOP], "stop", f"token id {VOCAB} is not among"),
        ([-1, STOP], "stop", "token id -1"),
        ([7, STOP], "error", "finish reason 'error'"),
        ([7, STOP], None, "finish reason None"),
    ],
)
def test_which_answers_may_be_trained_on(ids, reason, result):
    if result in ("stop", "length"):
        token_ids, found = check_answer(Answer(ids, reason), REQUEST, VOCAB)
        assert (token_ids.tolist(), found) == (ids, result)
    else:
        with pytest.raises(BadAnswer, match=result):
            check_answer(Answer(ids, reason), REQUEST, VOCAB)


def test_an_answer_that_was_cut_off_is_not_asked_for_again():
    with pytest.raises(RequestRefused, match="cut off after 2 of 3 tokens"):
        check_answer(Answer([7, 8], "length"), REQUEST, VOCAB)


def test_a_prompts_seed_does_not_depend_on_its_place():
    requests = {request.index: request for request in requests_of(prompts(), 4, 8, (STOP,))}
    reverse = {6 - request.index: request for request in requests_of(prompts()[::-1], 4, 8, (STOP,))}
    seeds = [requests[i].seed for i in range(7)]
    assert seeds == [reverse[i].seed for i in range(7)] and len(set(seeds)) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds != [request.seed for request in requests_of(prompts(), 5, 8, (STOP,))]


@pytest.mark.parametrize(
    ("first", "num_seeds"),
    [
        (Answer([7], "stop"), 2),
        (Answer([7, VOCAB, STOP], "stop"), 2),
        (Answer([7], "error"), 1),
        (BadAnswer("status 500"), 1),
        (EngineLost("no answer within 600 s"), 1),
    ],
    ids=str,
)
def test_only_a_response_that_was_seen_is_drawn_with_another_seed(tmp_path, monkeypatch, first, num_seeds):
    """What failed or was late keeps its seed: with another, long responses would give way to short ones."""
    sampler = recorded([], tmp_path, monkeypatch)
    sampler.sync(policy(0), 0)
    sampler.engine.first = first
    assert responses_of(sample(sampler, 3)) == [[7, STOP]] * 3
    seeds = {}
    for request in sampler.engine.requests:
        seeds.setdefault(request.index, []).append(request.seed)
    assert all(len(pair) == 2 and len(set(pair)) == num_seeds for pair in seeds.values()) and len(seeds) == 3


def test_layers_go_whole_and_a_tied_head_once():
    model = make_model()
    layers = list(layers_of(model))
    names = [list(layer) for layer in layers]
    assert [len(group) for group in names] == [9, 9, 3]
    assert all(name.startswith(f"model.layers.{i}.") for i in range(2) for name in names[i])
    assert sorted(sum(names, [])) == sorted(dict(model.named_parameters()))
    decoded = pickle.loads(base64.b64decode(serialized(layers[0])))
    assert [name for name, _ in decoded] == names[0]
    function, arguments = decoded[0][1]
    assert torch.equal(function(*arguments), layers[0][names[0][0]])


def test_a_server_inherits_nothing_of_the_launcher(monkeypatch):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "y"}
    variables |= {"PYTHONPATH": "z", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "4,6"}
    assert server_environment(variables) == {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "4,6"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert server_environment(variables)["CUDA_VISIBLE_DEVICES"] == "6"
    assert server_environment({})["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_held_port_is_nobody_elses_and_a_server_can_listen_there():
    with held_port() as holder:
        address = holder.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with HTTPServer(address, BaseHTTPRequestHandler):
            socket.create_connection(address).close()
