import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inverseq import atomic
from inverseq.atomic import atomic_directory, read_jsonl
from inverseq.records import Prompt, RenderedPrompt, Response, Sample, ScoredSamples
from inverseq.sample_files import (
    eval_path,
    held_out_path,
    read_evaluation,
    read_samples,
    samples_path,
    write_evaluation,
    write_samples,
)
from tests.tiny import make_tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HOSTILE_TEXTS = ['a "quote"\n\\ and\u2028line\x00', "العربية 🙂\ud83d", "", "<script>", "\r\n\ttext"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def make_samples(lengths=(3, 1, 0, 5), views=2) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for index, length in enumerate(lengths):
        text = HOSTILE_TEXTS[index % len(HOSTILE_TEXTS)]
        messages = ({"role": "user", "content": text}, {"role": "assistant", "content": "x"}) * index
        prompt = Prompt(
            id=f"p{index}",
            messages=(*messages, {"role": "user", "content": text}),
            category=text if index % 2 else None,
        )
        prefixes = tuple(rng.integers(0, 2**31 - 1, size, dtype=np.int32) for size in (4, 2, 0)[:views])
        rendered = RenderedPrompt(prompt, prefixes, rng.integers(0, 512, 6, dtype=np.int32))
        response = Response(
            token_ids=rng.integers(0, 512, length, dtype=np.int32),
            finish_reason=("stop", "length")[index % 2],
            seed=2**62 + index,
            engine="transformers",
            engine_version="5.23.0",
            weights_step=index,
        )
        samples.append(Sample(rendered, response))
    return samples


def score(samples, seed=0) -> ScoredSamples:
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)], dtype=np.int64)
    generator = torch.Generator().manual_seed(seed)
    targets, plain = -torch.rand(2, int(offsets[-1]), generator=generator) * 30
    return ScoredSamples(samples, targets, plain, offsets)


def assert_same_samples(got, expected):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.rendered.prompt == theirs.rendered.prompt
        assert len(ours.rendered.prefix_ids) == len(theirs.rendered.prefix_ids)
        ids = [
            (ours.rendered.prompt_ids, theirs.rendered.prompt_ids),
            (ours.response.token_ids, theirs.response.token_ids),
            *zip(ours.rendered.prefix_ids, theirs.rendered.prefix_ids, strict=True),
        ]
        for a, b in ids:
            assert a.dtype == b.dtype == np.int32 and a.ndim == 1
            np.testing.assert_array_equal(a, b)
        for field in ("finish_reason", "seed", "engine", "engine_version", "weights_step"):
            assert getattr(ours.response, field) == getattr(theirs.response, field), field


@pytest.mark.parametrize("views", [1, 2, 3])
def test_samples_come_back_as_they_were_written(tmp_path, tokenizer, views):
    scored = score(make_samples(views=views))
    path = samples_path(tmp_path, 12)
    assert path == tmp_path / "samples" / "epoch_0012.jsonl"
    write_samples(path, scored, tokenizer)
    back = read_samples(path)
    assert_same_samples(back.samples, scored.samples)
    np.testing.assert_array_equal(back.offsets, scored.offsets)
    assert back.offsets.dtype == np.int64
    assert torch.equal(back.targets, scored.targets) and back.targets.dtype == torch.float32
    assert torch.equal(back.plain_logprobs, scored.plain_logprobs)
    assert not torch.equal(back.targets, back.plain_logprobs)
    assert back.initial_logprobs is None


def test_log_probs_of_the_initial_model_are_kept_where_they_were_scored(tmp_path, tokenizer):
    scored = score(make_samples())
    scored = replace(scored, initial_logprobs=scored.plain_logprobs + 0.5)
    path = samples_path(tmp_path, 1)
    write_samples(path, scored, tokenizer)
    assert torch.equal(read_samples(path).initial_logprobs, scored.initial_logprobs)
    spoil(path, 2, initial_logprobs=None)
    with pytest.raises(ValueError, match=r"line 2: .*initial_logprobs"):
        read_samples(path)


def test_held_out_samples_must_answer_the_prompts_of_the_run(tmp_path, tokenizer):
    samples = make_samples()
    path = held_out_path(tmp_path)
    write_samples(path, score(samples), tokenizer)
    prompts = [sample.rendered for sample in samples]
    assert_same_samples(read_samples(path, prompts).samples, samples)
    with pytest.raises(ValueError, match=r"held_out\.jsonl, line 1: answers prompt 'p0', expected 'p3'"):
        read_samples(path, prompts[::-1])
    longer = replace(prompts[1], prompt_ids=np.append(prompts[1].prompt_ids, np.int32(7)))
    with pytest.raises(ValueError, match=r"line 2: answers prompt 'p1'"):
        read_samples(path, [prompts[0], longer, *prompts[2:]])
    for wrong in (prompts[:-1], [*prompts, prompts[0]]):
        with pytest.raises(ValueError, match=f"4 samples; expected {len(wrong)}"):
            read_samples(path, wrong)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_every_float32_survives_the_file_bit_for_bit(tmp_path_factory, tokenizer, values):
    path = tmp_path_factory.mktemp("floats") / "samples.jsonl"
    sample = make_samples(lengths=(len(values),))
    values = torch.tensor(values, dtype=torch.float32)
    scored = ScoredSamples(sample, values, values.flip(0), np.array([0, len(values)], dtype=np.int64))
    write_samples(path, scored, tokenizer)
    back = read_samples(path)
    for got, expected in ((back.targets, values), (back.plain_logprobs, values.flip(0))):
        assert torch.equal(got.isnan(), expected.isnan())
        real = ~expected.isnan()
        assert torch.equal(got.view(torch.int32)[real], expected.view(torch.int32)[real])  # -0.0 and subnormals too


def test_every_line_is_strict_json_with_the_documented_fields(tmp_path, tokenizer):
    scored = score(make_samples())
    scored.targets[0] = -math.inf
    scored.targets[1] = math.nan
    path = samples_path(tmp_path, 1)
    write_samples(path, scored, tokenizer)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b"" and len(lines) == 4
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows[0]["targets"][:2] == ["-inf", "nan"]
    assert set(rows[0]) == {
        "prompt_id", "category", "messages", "prefix_ids", "prompt_ids", "response_ids", "response", "finish_reason",
        "seed", "engine", "engine_version", "weights_step", "targets", "plain_logprobs",
    }  # fmt: skip
    assert rows[3]["response"] == tokenizer.decode(rows[3]["response_ids"], skip_special_tokens=True) != ""
    assert read_samples(path).targets[0] == -math.inf


def spoil(path, line, **changes):
    rows = [row for _, row in read_jsonl(path)]
    for key, value in changes.items():
        if value is None:
            del rows[line - 1][key]
        else:
            rows[line - 1][key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "changes",
    [
        {"response_ids": None},
        {"prompt_ids": [1, -1]},
        {"prompt_ids": [1, 2.0]},
        {"prefix_ids": []},
        {"prefix_ids": [1, 2]},
        {"messages": [{"role": "user"}]},
        {"finish_reason": "error"},
        {"seed": "1"},
        {"targets": [-1.0]},
        {"targets": [-1.0, "x", -1.0]},
        {"plain_logprobs": None},
    ],
    ids=str,
)
def test_a_spoilt_row_is_an_error_with_file_line_and_field(tmp_path, tokenizer, changes):
    path = samples_path(tmp_path, 1)
    write_samples(path, score(make_samples(lengths=(3, 3, 3))), tokenizer)
    spoil(path, 2, **changes)
    with pytest.raises(ValueError) as raised:
        read_samples(path)
    assert f"{path}, line 2" in str(raised.value) and next(iter(changes)) in str(raised.value)


def test_a_cut_file_an_empty_file_and_a_missing_file_are_errors_that_name_the_file(tmp_path, tokenizer):
    path = samples_path(tmp_path, 1)
    write_samples(path, score(make_samples()), tokenizer)
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(ValueError, match=r"epoch_0001\.jsonl, line 4: not JSON"):
        read_samples(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"epoch_0001\.jsonl: no samples"):
        read_samples(path)
    with pytest.raises(ValueError, match=r"epoch_0002\.jsonl: no such file"):
        read_samples(samples_path(tmp_path, 2))


def test_eval_rows_hold_what_a_judge_reads_and_category_only_where_there_is_one(tmp_path, tokenizer):
    samples = make_samples()
    path = eval_path(tmp_path, 0)
    write_evaluation(path, samples, tokenizer, model="tiny")
    rows = read_evaluation(path)
    assert path == tmp_path / "eval" / "epoch_0000.jsonl"
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    assert rows[3] == {
        "id": "p3",
        "messages": list(samples[3].rendered.prompt.messages),
        "response": tokenizer.decode(samples[3].response.token_ids, skip_special_tokens=True),
        "model": "tiny",
        "finish_reason": "length",
        "category": samples[3].rendered.prompt.category,
    }
    assert "category" not in rows[0]
    spoil(path, 3, response=None)
    with pytest.raises(ValueError, match=r"epoch_0000\.jsonl, line 3: no field 'response'"):
        read_evaluation(path)


def test_an_error_while_rows_are_made_leaves_the_older_file_and_no_litter(tmp_path, tokenizer):
    path = samples_path(tmp_path, 1)
    write_samples(path, score(make_samples()), tokenizer)
    before = path.read_bytes()

    spoilt = score(make_samples())
    spoilt.samples[3].rendered.prompt.messages[0]["content"] = b"bytes are not JSON"
    with pytest.raises(TypeError):
        write_samples(path, spoilt, tokenizer)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


FULL_DISK = """
import resource, signal, sys
from tests.test_sample_files import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
write_samples(sys.argv[1], score(make_samples(lengths=(2000,))), make_tiny_tokenizer())
"""


def test_a_full_disk_is_one_error_naming_the_file_and_the_older_file_stays(tmp_path, tokenizer):
    path = samples_path(tmp_path, 1)
    write_samples(path, score(make_samples()), tokenizer)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError") and "File too large" in last and last.endswith(f"'{path}'"), last
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # as where the C library has no renameat2
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **kwargs: object())
    path = tmp_path / "export"
    with atomic_directory(path) as folder:
        (folder / "old").write_text("old")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_directory(path) as folder:
        (folder / "new").write_text("new")
        raise KeyError
    assert [p.name for p in path.iterdir()] == ["old"]
    (tmp_path / ".export.tmp").mkdir()  # what a killed process leaves
    (tmp_path / ".export.tmp" / "litter").write_text("")
    with atomic_directory(path) as folder:
        (folder / "new").write_text("new")
        assert (path / "old").exists()
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
