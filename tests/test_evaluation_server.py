"""A real server with a real, tiny model is the judge, end to end: answers, verdicts, ratings, categories.

Its weights are set so that it ends every question with [[A]]: an opinion that is worthless, and known.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq.evaluation.cli import main
from inverseq.evaluation.pairwise import read_verdicts
from inverseq.sampling_lmdeploy_server import held_port
from tests.tiny import make_tiny_model

START_S = 600


def make_judge(path):
    """A model that prefers what is shown first: "[[A]]" follows the template's last newline, and the end follows it."""
    make_tiny_model(path, tied=False, max_positions=4096)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    tokenizer.add_tokens(["[[A]]"])
    model.resize_token_embeddings(len(tokenizer))
    newline, verdict = tokenizer("\n").input_ids[-1], tokenizer("[[A]]").input_ids[0]
    with torch.no_grad():
        for layer in model.model.layers:  # a token's successor depends on the token alone
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embed, head = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, :2] = 0
        for column, token, successor in ((0, newline, verdict), (1, verdict, tokenizer.eos_token_id)):
            embed[token] = torch.nn.functional.one_hot(torch.tensor(column), embed.shape[1]).float()
            head[:, column] = 0
            head[successor, column] = 10
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(URL, name of the model) of ``transformers serve`` on loopback."""
    folder = tmp_path_factory.mktemp("judge")
    model = make_judge(folder / "model")
    holder = held_port()
    port = holder.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        process.terminate()
        process.wait()
        holder.close()


def test_two_models_are_answered_for_judged_rated_and_split_by_category(server, tmp_path, capsys):
    url, name = server
    questions = tmp_path / "questions.json"
    categories = ["animal_abuse", "self_harm", "privacy_violation"]
    rows = [{"prompt": f"What about {c}?", "category": c, "category_id": i} for i, c in enumerate(categories)]
    questions.write_text(json.dumps(rows))
    answers = []
    for seed in (0, 1):
        make_tiny_model(tmp_path / f"model{seed}", seed=seed)
        answers.append(str(tmp_path / f"answers{seed}.jsonl"))
        words = ["--model", str(tmp_path / f"model{seed}"), "--prompts", str(questions), "--out", answers[-1]]
        assert main(["generate", *words, "sampling.max_new_tokens=8"]) == 0
    out = tmp_path / "judged"
    options = ["--judge", name, "--base-url", url, "--yes", "--concurrency", "2", "--request", '{"max_tokens": 8}']
    capsys.readouterr()
    assert main(["judge", "--a", answers[0], "--b", answers[1], "--out", str(out), *options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_questions"] == summary["num_requests"] == 6 and summary["num_unreadable"] == 0
    # The judge prefers what is shown first, and nothing of that is left.
    assert summary["first_position_rate"] == summary["flip_rate"]["value"] == summary["tie"]["value"] == 1
    verdicts = read_verdicts([out / "verdicts.jsonl"])
    assert {verdict.raw for verdict in verdicts} == {"[[A]]"} and {verdict.judge for verdict in verdicts} == {name}

    assert main(["elo", str(out / "verdicts.jsonl"), "--json"]) == 0
    ratings = json.loads(capsys.readouterr().out)["ratings"]
    assert [row["bradley_terry"] for row in ratings] == pytest.approx([1000, 1000])
    assert main(["categories", str(out / "verdicts.jsonl"), "--prompts", str(questions), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [row["category"] for row in found] == ["animal_abuse", "privacy_violation", "self_harm"]
    assert all(row["win_rate"]["value"] == 0.5 for row in found)


def test_answers_can_come_from_a_server_that_has_the_models_weights(server, tmp_path):
    url, name = server
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": "Hello?"}) + "\n")
    settings = {"backend": "server", "server.url": url, "server.model": name, "server.static": "true"}
    settings |= {"server.prompts": "text", "server.dialect": "transformers", "max_new_tokens": "4"}
    words = [f"sampling.{key}={value}" for key, value in settings.items()]
    assert main(["generate", "--model", name, "--prompts", str(prompts), "--out", str(out), *words]) == 0
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["response"] == "[[A]]" and row["finish_reason"] == "stop"
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "answers.jsonl", "answers.settings.json"}


def test_a_judge_whose_answers_are_cut_off_has_given_no_verdict(server, tmp_path, capsys):
    url, name = server
    files = []
    for model in ("new", "old"):
        row = {"id": "1", "messages": [{"role": "user", "content": "Hello?"}], "response": f"{model} says hello"}
        files.append(tmp_path / f"{model}.jsonl")
        files[-1].write_text(json.dumps({**row, "model": model, "finish_reason": "stop"}) + "\n")
    options = ["--judge", name, "--base-url", url, "--yes", "--request", '{"max_tokens": 1}']
    assert main(["judge", "--a", str(files[0]), "--b", str(files[1]), "--out", str(tmp_path / "out"), *options]) == 1
    assert "none of 2 answers of the judge holds a readable verdict" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["num_cut_off"] == 2


def test_a_model_that_the_server_does_not_have_is_an_error(server, tmp_path, capsys):
    url, name = server
    for model in ("new", "old"):
        row = {"id": "1", "messages": [{"role": "user", "content": "Hello?"}], "response": f"{model}", "model": model}
        (tmp_path / f"{model}.jsonl").write_text(json.dumps({**row, "finish_reason": "stop"}) + "\n")
    words = ["--a", str(tmp_path / "new.jsonl"), "--b", str(tmp_path / "old.jsonl"), "--base-url", url, "--yes"]
    assert main(["judge", *words, "--judge", "no-such-model", "--retries", "0"]) == 1
    assert "2 of 2 questions have no answer" in capsys.readouterr().err
