"""Token credit: its numbers, its spans of text, its pages and its command line."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from inverseq.config_loading import load_config
from inverseq.evaluation.credit import Span, TokenCredit, credit_of, spans_of
from inverseq.evaluation.credit_cli import main, show
from inverseq.evaluation.heatmap import MAX_SPANS, credit_html, credit_text, strongest_spans
from inverseq.evaluation.page import escape, visible
from inverseq.model import load_model
from inverseq.sample_files import read_samples, samples_path
from tests.hostile import HOSTILE, text_of
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tests.tiny_run import make_tiny_run
from tests.tiny_samples import superior_logprobs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("credit"))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def given_credit(tokenizer, text, values=None):
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    values = np.random.default_rng(0).normal(size=len(ids)) if values is None else values
    return TokenCredit("given", ({"role": "user", "content": "why?"},), spans_of(tokenizer, ids), values, "stop")


def run_main(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_credit_sums_to_the_sequence_log_ratio_of_full_logits(run_dir, tokenizer, beta):
    config = load_config(run_dir / "config.yaml")
    scored = read_samples(samples_path(run_dir, 1))
    model = load_model(config.model.path, config.model)
    targets, plain = superior_logprobs(model, model, scored.samples, config.contrast.alpha)
    for index in range(len(scored.samples)):
        rows = slice(scored.offsets[index], scored.offsets[index + 1])
        credit = credit_of(scored, index, tokenizer, beta=beta)
        exact = scored.targets[rows].double() - scored.plain_logprobs[rows].double()
        assert credit.total == pytest.approx(beta * exact.sum().item(), abs=1e-6)
        assert credit.value[-1] == pytest.approx(credit.total, abs=1e-9)
        full = beta * (targets[rows] - plain[rows]).numpy()
        np.testing.assert_allclose(credit.credit, full, atol=2e-4)
        assert sum(credit.span_credit(span) for span in credit.spans) == pytest.approx(credit.total, abs=1e-9)


def test_a_token_without_probability_in_either_distribution_has_credit_zero(run_dir, tokenizer):
    scored = read_samples(samples_path(run_dir, 1))
    scored.targets[0] = scored.plain_logprobs[0] = -np.inf
    assert credit_of(scored, 0, tokenizer).credit[0] == 0.0


@pytest.mark.parametrize("text", [HOSTILE, "🙂" * 30, "plain words", "naïve façade — ﷽"])
def test_spans_decode_to_the_text_and_hold_every_token_once(tokenizer, text):
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], dtype=np.int32)
    spans = spans_of(tokenizer, ids)
    assert "".join(span.text for span in spans) == text + tokenizer.eos_token
    assert [span.start for span in spans] == [0, *(span.stop for span in spans)][: len(spans)]
    assert spans[-1].stop == len(ids)
    assert not any("\ufffd" in span.text for span in spans)


def test_spans_of_bytes_that_are_no_text_end(tokenizer):
    byte_ids = tokenizer.convert_tokens_to_ids(["ÿ"] * 40)  # byte 0xff, never part of UTF-8
    spans = spans_of(tokenizer, np.array(byte_ids, dtype=np.int32))
    assert spans[-1].stop == 40
    assert spans_of(tokenizer, np.array([], dtype=np.int32)) == ()


def test_hostile_text_becomes_inert_html(tokenizer):
    page = credit_html(given_credit(tokenizer, HOSTILE))
    assert "<script" not in page and "\u202e" not in page and "\x00" not in page
    assert visible("\u202e") == "⟨U+202E⟩" and visible("\u061c\u00ad") == "⟨U+061C⟩⟨U+00AD⟩"
    assert visible("na\u200dme \ufe0f") == "na\u200dme \ufe0f" and escape('"><b>') == "&quot;&gt;&lt;b&gt;"
    assert text_of(page) == visible(HOSTILE).replace("\n", "↵\n")


def test_colours_tell_gain_from_loss_and_follow_the_size(tokenizer):
    credit = given_credit(tokenizer, "the of and to", np.array([2.0, -2.0, 0.1, 0.0]))
    page = credit_html(credit)
    gain, loss = "rgba(33,102,172,", "rgba(178,24,43,"
    assert page.index(gain + "1.00") < page.index(loss + "1.00") < page.index(gain + "0.05")
    assert "rgb(33,102,172)" in str(credit_text(credit).spans[0].style)
    assert [value for _, value in strongest_spans(credit, 2)] == [2.0, -2.0]


def test_a_response_of_100_000_tokens_is_cut_and_counted(tokenizer):
    values = np.full(100_000, 0.5)
    spans = spans_of(tokenizer, np.array(tokenizer.convert_tokens_to_ids(["a", "b"]) * 50_000, dtype=np.int32))
    page = credit_html(TokenCredit("long", (), spans, values, "length"))
    assert page.count("<span") == MAX_SPANS
    assert f"{100_000 - MAX_SPANS:,} more tokens are not shown; their credit is +48000.000" in page


def test_the_command_shows_a_run_and_writes_page_and_csv(run_dir, tmp_path, capsys):
    status, out, _ = run_main(capsys, run_dir, "--epoch", 1, "--index", 2, "--index", 0, "--json")
    assert status == 0
    shown = json.loads(out)
    scored = read_samples(samples_path(run_dir, 1))
    assert [item["id"] for item in shown] == [scored.samples[i].rendered.prompt.id for i in (2, 0)]
    rows = slice(scored.offsets[2], scored.offsets[3])
    expected = (scored.targets[rows].double() - scored.plain_logprobs[rows].double()).tolist()
    assert shown[0]["credit"] == expected
    assert shown[0]["value"][-1] == pytest.approx(shown[0]["total"])

    page = tmp_path / "credit.html"
    status, out, _ = run_main(capsys, run_dir, "--html", page)
    assert status == 0 and "nats in all" in out
    assert "default-src 'none'" in page.read_text() and "http://" not in page.read_text().replace(
        "http://www.w3.org", ""
    )
    with page.with_suffix(".csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    newest = read_samples(samples_path(run_dir, 2))
    first = newest.targets[: newest.offsets[1]].double() - newest.plain_logprobs[: newest.offsets[1]].double()
    assert [float(row["credit"]) for row in table] == first.tolist()


def test_the_command_scores_given_texts_and_changes_sides_with_the_models(tmp_path, capsys):
    first, second = (make_tiny_model(tmp_path / str(seed), seed=seed, scale=0.2) for seed in (1, 2))
    words = ("--prompt", "what is true?", "--response", "the fact", "--alpha", 1.0, "--json")
    _, forward, _ = run_main(capsys, "--model", first, "--plain-model", second, *words)
    _, backward, _ = run_main(capsys, "--model", second, "--plain-model", first, *words)
    forward, backward = json.loads(forward)[0], json.loads(backward)[0]
    assert forward["tokens"][-1] == "<|im_end|>" and "".join(forward["tokens"][:-1]) == "the fact"
    np.testing.assert_allclose(forward["credit"], -np.array(backward["credit"]), atol=1e-4)
    _, principle, _ = run_main(capsys, "--model", first, *words)
    assert any(abs(value) > 1e-3 for value in json.loads(principle)[0]["credit"])


def test_brackets_in_tokens_and_ids_are_no_markup_of_the_terminal():
    spans = (Span(0, 1, "[/INST]"), Span(1, 2, "[red]"))
    credit = TokenCredit("[/id]", ({"role": "user", "content": "[/b]"},), spans, np.array([1.0, -1.0]), "stop")
    console = Console(width=100, file=io.StringIO())
    show(console, credit)
    shown = console.file.getvalue()
    assert all(shown.count(text) == count for text, count in (("[/id]", 1), ("[/b]", 1), ("[/INST]", 2), ("[red]", 2)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "holds no run"),
        (["RUN", "--epoch", "9"], "does not exist"),
        (["RUN", "--epoch", "0"], "--epoch 0: "),
        (["RUN", "--index", "99"], "--index 99: expected 0 … 5"),
        (["RUN", "--prompt", "x"], "--prompt: expected nothing beside a run"),
        ([], "expected a run directory, or --model"),
        (["--model", "/nowhere", "--prompt", "x"], "--prompt and --response"),
        (["--model", "/nowhere", "--prompt", "x", "--response", "y"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(run_dir, capsys, words, message):
    status, out, error = run_main(capsys, *(run_dir if word == "RUN" else word for word in words))
    assert status == 2 and out == ""
    assert message in error and error.count("\n") == 1
