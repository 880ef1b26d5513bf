"""The epoch benchmark: its baseline and every rung train on our loss; forced lengths, work, rows, table and picture."""

import copy
import gzip
import json
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from inverseq.engine import TorchEngine
from inverseq.memory import model_size
from inverseq.model import FrozenPair, frozen_copy
from inverseq.policy import Policy
from tests.tiny_samples import superior_logprobs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import baseline_paper  # noqa: E402
import epoch_time  # noqa: E402
import epoch_time_inputs as inputs  # noqa: E402
import epoch_time_phases as phases  # noqa: E402
import epoch_time_report as report  # noqa: E402
import epoch_time_variants as variants  # noqa: E402
from epoch_time_variants import LADDER, SCORERS, TRAINERS, Bench  # noqa: E402

PAIRS = [(rung.scorer, rung.trainer) for rung in LADDER]


@pytest.fixture(scope="module")
def bench():
    """A tiny model whose loss is far from zero; five samples in steps of three: pairs, and one sample alone."""
    model = inputs.build_random_model(inputs.PRESETS["tiny"].config(), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    samples = inputs.make_samples(5, vocab=512)
    config = inputs.benchmark_config("cpu", samples)
    config = replace(config, optim=replace(config.optim, samples_per_step=3))
    frozen = frozen_copy(model)
    engine = TorchEngine(Policy(model, 512, config.engine), config.optim, 10)
    return Bench(config, model, FrozenPair(frozen, frozen), samples, 512, engine)


@pytest.fixture(scope="module")
def ours(bench):
    scored = variants.score(bench, SCORERS["ours"])
    trainer = TRAINERS["ours"]
    return scored, variants.train(bench, trainer, trainer.steps(bench, scored))


def test_the_baselines_targets_are_the_mathematics(bench):
    model = copy.deepcopy(bench.frozen.plain).double()
    targets, plain = superior_logprobs(model, model, bench.samples, bench.config.contrast.alpha)
    scored = variants.score(bench, SCORERS["baseline"])
    torch.testing.assert_close(scored.targets.double(), targets, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.plain_logprobs.double(), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.switched_on.split(":")[0])
def test_every_rung_has_our_targets_loss_and_gradient(bench, ours, rung):
    before = [parameter.detach().clone() for parameter in bench.policy.parameters()]
    our_scored, our_metrics = ours
    scored, trainer = variants.score(bench, SCORERS[rung.scorer]), TRAINERS[rung.trainer]
    torch.testing.assert_close(scored.targets, our_scored.targets, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.plain_logprobs, our_scored.plain_logprobs, atol=1e-4, rtol=0)
    steps = trainer.steps(bench, scored)
    metrics = variants.train(bench, trainer, steps)
    assert [metric.loss for metric in metrics] == pytest.approx([metric.loss for metric in our_metrics], rel=1e-3)
    norms = [metric.grad_norm for metric in metrics]
    assert norms == pytest.approx([metric.grad_norm for metric in our_metrics], rel=1e-3)
    assert variants.train_without_update(bench, trainer, steps) == pytest.approx([m.loss for m in metrics], rel=1e-4)
    assert min(metric.loss for metric in metrics) > 0.01  # else any loss would agree
    for parameter, old in zip(bench.policy.parameters(), before, strict=True):  # the next variant trains the same model
        torch.testing.assert_close(parameter.detach(), old, atol=1e-8, rtol=1e-6)


def calls_of(bench, model, trainer=None, scorer=None):
    """(forwards of the first layer, tokens in them, rows that went through the head) of one variant."""
    seen = []

    def count(layer):
        return lambda module, arguments: seen.append((layer, arguments[0].shape[:-1].numel()))

    hooks = [
        model.get_decoder().layers[0].mlp.register_forward_pre_hook(count("layer")),
        model.get_output_embeddings().register_forward_pre_hook(count("head")),
    ]
    if scorer:
        variants.score(bench, SCORERS[scorer])
    else:
        steps = TRAINERS[trainer].steps(bench, variants.score(bench, SCORERS["ours"]))
        seen.clear()
        variants.train(bench, TRAINERS[trainer], steps)
    for hook in hooks:
        hook.remove()
    tokens = [rows for layer, rows in seen if layer == "layer"]
    return len(tokens), sum(tokens), sum(rows for layer, rows in seen if layer == "head")


def test_rungs_switch_what_they_say(bench):
    lengths = [len(s.rendered.policy_ids) + s.num_actions - 1 for s in bench.samples]
    real, count = sum(lengths), len(lengths)
    padded, padded_steps = (
        sum(len(pair) * max(pair) for pair in (lengths[:2], lengths[2:split], lengths[split:])) for split in (4, 3)
    )
    assert real < padded != padded_steps > real  # a pair of training does not cross optimizer steps
    extra = (inputs.PRINCIPLE_TOKENS - inputs.PLAIN_TOKENS) * count
    shared = inputs.PRINCIPLE_TOKENS * (count - 1)
    views = 2 * real + extra
    packing = replace(bench.config.packing, score_tokens=10**4, share_prefix="auto")
    bench = replace(bench, config=replace(bench.config, packing=packing))
    frozen, policy = bench.frozen.plain, bench.policy
    padded_views = 2 * padded + extra
    assert calls_of(bench, frozen, scorer="baseline") == (6, padded_views, padded_views)  # three pairs, two forwards
    assert calls_of(bench, frozen, scorer="packed pairs") == (6, views, views)
    assert calls_of(bench, frozen, scorer="response rows") == (6, views, 0)
    assert calls_of(bench, frozen, scorer="fused") == (6, views, 0)
    assert calls_of(bench, frozen, scorer="token budget") == (2, views, 0)
    assert calls_of(bench, frozen, scorer="one pass") == (1, views, 0)
    assert calls_of(bench, frozen, scorer="ours") == (1, views - shared, 0)
    assert calls_of(bench, policy, trainer="baseline") == (6, 2 * padded_steps, padded_steps)  # layers twice
    assert calls_of(bench, policy, trainer="packed pairs") == (6, 2 * real, real)
    assert calls_of(bench, policy, trainer="kept activations") == (3, real, real)
    assert calls_of(bench, policy, trainer="response rows") == (3, real, 0)
    assert calls_of(bench, policy, trainer="fused") == (3, real, 0)
    assert calls_of(bench, policy, trainer="ours") == (2, real, 0)  # a pack a step
    assert policy.config._attn_implementation == frozen.config._attn_implementation == variants.ATTENTION_NAME


def test_where_nothing_is_shared_both_views_in_one_forward_are_ours():
    assert variants.ladder(True) == LADDER
    rungs = variants.ladder(False)
    assert len(rungs) == len(LADDER) - 1 and "one pass" not in {rung.scorer for rung in rungs}
    assert (rungs[-1].scorer, rungs[-1].trainer) == ("ours", "ours")


def test_a_padded_batch_is_as_long_as_the_longer_of_its_two(bench):
    pair = bench.samples[:2]
    batch = baseline_paper.pad_samples(pair, view=0)
    lengths = [len(s.rendered.prefix_ids[0]) + len(s.rendered.prompt_ids) + s.num_actions - 1 for s in pair]
    assert batch.input_ids.shape == (2, max(lengths)) and batch.num_real_tokens == sum(lengths)
    last = pair[1].num_actions
    predicted = batch.input_ids[1, batch.position[-last:][:-1] + 1]
    assert predicted.tolist() == batch.token_ids[-last:-1].tolist() == pair[1].response.token_ids[:-1].tolist()


def test_lengths_follow_the_table_and_few_samples_are_as_mixed_as_many():
    prompts, responses = inputs.hh_lengths(1000, seed=3)
    for lengths, table in ((prompts, inputs.HH_PROMPT_TOKENS), (responses, inputs.HH_RESPONSE_TOKENS)):
        quartiles = [table[inputs.HH_PERCENTILES.index(q)] for q in (25, 50, 75)]
        assert np.percentile(lengths, (25, 50, 75)) == pytest.approx(quartiles, abs=1)
        assert table[0] <= lengths.min() and table[-2] < lengths.max() <= table[-1]
        assert list(lengths) != sorted(lengths)
    few = [inputs.hh_lengths(8, seed=seed)[0] for seed in range(3)]
    assert {tuple(sorted(lengths)) for lengths in few} == {tuple(sorted(few[0]))}
    assert few[0].mean() == pytest.approx(prompts.mean(), rel=0.15)
    scaled = inputs.hh_lengths(1000, seed=3, response_scale=4.0)
    assert (scaled[0] == prompts).all() and scaled[1].max() == 1024
    assert np.median(scaled[1]) == pytest.approx(4 * np.median(responses), rel=0.05)


def test_the_table_is_the_data(tmp_path):
    data = ROOT.parent / "shared" / "data" / "hh-rlhf"
    from inverseq.small_model import small_model_path

    if not data.exists() or not small_model_path().exists():
        pytest.skip("needs the HH rows and the small model's tokenizer")
    from transformers import AutoTokenizer

    from inverseq.chat import ChatRenderer, load_principle
    from inverseq.prompt_files import load_prompts

    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    renderer = ChatRenderer(tokenizer, principle_text=load_principle("default"), plain_system="")
    rendered = renderer.render_all(load_prompts(data / "harmless-base" / "test.jsonl.gz")[0])
    prompts = [len(item.prompt_ids) for item in rendered]
    assert np.percentile(prompts, inputs.HH_PERCENTILES, method="nearest").tolist() == list(inputs.HH_PROMPT_TOKENS)
    prefixes = {tuple(map(len, item.prefix_ids)) for item in rendered}
    assert prefixes == {(inputs.PRINCIPLE_TOKENS, inputs.PLAIN_TOKENS)}
    answers = []
    for file in sorted(data.glob("*/*.jsonl.gz")):
        for row in map(json.loads, gzip.open(file)):
            texts = (row[key].rpartition("\n\nAssistant:")[2].strip() for key in ("chosen", "rejected"))
            answers += [text for text in texts if text]
    lengths = [len(ids) + 1 for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]
    assert len(lengths) == 4799
    assert np.percentile(lengths, inputs.HH_PERCENTILES, method="nearest").tolist() == list(inputs.HH_RESPONSE_TOKENS)


def test_presets_have_the_published_number_of_parameters():
    published = {
        "smollm2-135m": 134_515_008, "llama-1b": 1_235_814_400, "llama-3b": 3_212_749_824,
        "vicuna-7b": 6_738_415_616, "vicuna-13b": 13_015_864_320, "zephyr-7b": 7_241_732_096,
    }  # fmt: skip
    sizes = {name: model_size(inputs.PRESETS[name].config()).num_parameters for name in published}
    assert sizes == published
    assert inputs.PRESETS["zephyr-7b"].config().sliding_window == 4096


@pytest.mark.parametrize(
    ("gib", "expected"), [(400, "vicuna-13b"), (80, "llama-3b"), (40, "llama-1b"), (6, "smollm2-135m")]
)
def test_without_a_model_the_largest_preset_that_fits_is_taken(gib, expected):
    assert inputs.largest_preset("cuda", 16, memory_bytes=gib * 2**30) == expected
    assert inputs.largest_preset("cpu", 16, memory_bytes=gib * 2**30) == "smollm2-135m"


def test_a_run_without_optimizer_is_estimated_without_it(bench):
    config = inputs.PRESETS["vicuna-7b"].config()
    whole, without = (
        inputs.estimated_bytes(config, bench.samples, "cuda", recompute=True, has_optimizer=has)
        for has in (True, False)
    )
    # Masters and moments, and gradients that stay in the weights' 16 bits.
    assert whole - without == 14 * model_size(config).num_parameters


@pytest.mark.parametrize(("has_optimizer", "recomputes"), [(True, True), (False, False)])
def test_forward_and_backward_of_7b_keep_their_activations_in_80_gb(bench, monkeypatch, has_optimizer, recomputes):
    monkeypatch.setattr(epoch_time, "available_bytes", lambda device_type: int(79.6 * 2**30))
    config, samples = inputs.PRESETS["vicuna-7b"].config(), inputs.make_samples(500, vocab=32_000)
    found = epoch_time.needs_recomputation(config, samples, torch.device("cuda"), has_optimizer=has_optimizer)
    assert found is recomputes


def test_work_is_counted_by_the_formula(bench):
    work = report.epoch_work(bench.policy, bench.samples)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64  # projections of 4 heads on 2, MLP, two norms
    backbone = 2 * layer + 64
    policy = [len(s.rendered.policy_ids) + s.num_actions - 1 for s in bench.samples]
    views = policy + [length - inputs.PLAIN_TOKENS + inputs.PRINCIPLE_TOKENS for length in policy]
    actions = sum(sample.num_actions for sample in bench.samples)
    head, squares = 512 * 64 * actions, (sum(n * n for n in policy), sum(n * n for n in views))
    assert work.train_flops == 6 * backbone * sum(policy) + 6 * head + 6 * 2 * 64 * squares[0]
    assert work.score_flops == 2 * backbone * sum(views) + 4 * head + 2 * 2 * 64 * squares[1]
    assert (work.policy_tokens, work.view_tokens, work.num_actions) == (sum(policy), sum(views), actions)


def test_mfu_needs_a_chip_of_the_table():
    assert report.chip_of("NVIDIA H100 80GB HBM3").flops_per_second == 989.4e12
    assert report.chip_of("NVIDIA A800-SXM4-80GB").nvlink_bytes_per_second == 400e9
    assert report.chip_of("NVIDIA H200").memory_bytes_per_second == 4.8e12
    others = ("H100 PCIe", "GH200 480GB", "H100 80GB HBM3 MIG 3g.40gb", "A100-PCIE-40GB", "H100 NVL", "AMD EPYC")
    assert not any(report.chip_of(f"NVIDIA {name}") for name in others)
    found = phases.Measurements(phases={("train", "ours"): phases.Measured(wall_s=[2.0, 4.0, 3.0], cpu_s=[1.0] * 3)})
    work = report.Work(600, 0, 0, train_flops=989.4e12, score_flops=0.0)
    [row] = report.make_rows(found, work, chip=report.CHIPS["H100"], facts={"measured": True}, ladder=[])
    assert row["mfu"] == pytest.approx(1 / 3) and row["tokens_per_second"] == pytest.approx(200)
    assert (row["ms"], row["reps"], row["peak_bytes"]) == (3000, 3, None)


def test_forced_responses_have_their_samples_lengths(bench):
    assert phases.sample_forced(bench) == [sample.num_actions for sample in bench.samples]
    assert bench.policy.config._attn_implementation == variants.ATTENTION_NAME


def test_a_side_that_runs_out_of_memory_is_a_result(bench, ours, monkeypatch):
    def fail(bench):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setitem(SCORERS, "baseline", replace(SCORERS["baseline"], run=fail))
    rungs = PAIRS[:2] + PAIRS[-2:]
    found, told = phases.Measurements(), []
    phases.measure_epoch(bench, ["score", "train"], found=found, reps=1, rungs=rungs, progress=told.append)
    assert [text.split(": ")[1] for text in told[::4]] == ["score, baseline", "train, baseline"]
    assert found.phases["score", "baseline"].failure == "out of memory: no room"
    assert found.phases["train", "ours"].wall_s and found.phases["train", "baseline"].wall_s
    first, last = (ours[1][index].loss for index in (0, -1))
    assert found.losses["ours"] == pytest.approx(first, rel=1e-3) != last  # of the first step
    work = report.epoch_work(bench.policy, bench.samples)
    rows = report.make_rows(
        found, work, chip=None, facts={"measured": True}, ladder=[(r.switched_on, r.scorer, r.trainer) for r in LADDER]
    )
    assert report.summary(rows)["speed_up"] is None
    assert "paper-like baseline" not in {row.get("switched_on") for row in rows}
    assert "score, baseline: out of memory: no room" in report.table(rows, "title")


ROW_FIELDS = {"op", "device", "measured", "command", "commit", "versions", "date", "shapes", "dtype"}
PHASE_FIELDS = {"reps", "ms", "ms_p20", "ms_p80", "peak_bytes", "error", "tokens_per_second", "mfu", "pad_waste"}


def test_a_run_writes_rows_table_and_picture(tmp_path, capsys):
    out = tmp_path / "out"
    assert epoch_time.main(["--model", "tiny", "--samples", "3", "--out", str(out), "--profile"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((out / "epoch_time.json").read_text())
    assert all(ROW_FIELDS <= row.keys() and row["measured"] is True for row in rows)
    assert not any(isinstance(value, dict | list) for row in rows for value in row.values())
    measured = {(row["phase"], row["variant"]): row for row in rows if row["op"] == "epoch_time"}
    assert {phase for phase, variant in measured if variant == "ours"} == set(phases.DEFAULT_PHASES)
    assert {phase for phase, variant in measured if variant == "baseline"} == {"pack", "score", "train"}
    assert all(PHASE_FIELDS <= row.keys() and row["reps"] == 1 and row["ms"] > 0 for row in measured.values())
    assert all(row["mfu"] is None for row in measured.values())
    assert measured["train", "baseline"]["pad_waste"] > 0 == measured["train", "ours"]["pad_waste"]
    assert measured["train", "baseline"]["error"] < 1e-3
    rungs = [row for row in rows if row["op"] == "epoch_time split"]
    assert [row["switched_on"] for row in rungs] == [rung.switched_on for rung in LADDER]
    speed_up = rungs[0]["total_s"] / rungs[-1]["total_s"]
    assert prod(row["factor"] for row in rungs[1:]) == pytest.approx(speed_up)
    assert f"{speed_up:.2f}x by wall clock" in printed
    assert epoch_time.CPU_NOTE in printed and epoch_time.CPU_NOTE in (out / "epoch_time.txt").read_text()
    assert (out / "epoch_time.png").stat().st_size > 10_000
    assert "mm" in (out / "epoch_time_profile_ours.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "epoch_time.json", "epoch_time.png", "epoch_time.txt", "epoch_time_profile_baseline.txt",
        "epoch_time_profile_ours.txt",
    ]  # fmt: skip


def test_phases_restrict_and_need_no_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_time, "TorchEngine", None)  # would fail if an engine were made
    arguments = ["--model", "tiny", "--samples", "3", "--phases", "score,forward_backward", "--no-split"]
    assert epoch_time.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "epoch_time.json").read_text())
    found = {(row["phase"], row["variant"]) for row in rows}
    assert found == {(p, side) for p in ("score", "pack", "forward_backward") for side in ("baseline", "ours")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phases", "score,trian"], "--phases='trian': expected some of sample, pack"),
        (["--samples", "-1"], "--samples=-1: expected a positive number"),
        (
            ["--model", "llama-2b"],
            "--model='llama-2b': expected a folder with config.json or one of tiny, smollm2-135m",
        ),
        (["--response-scale", "0"], "--response-scale=0.0: expected a positive number"),
        (["--project", "8xA800"], "--rows is epoch_time.json of a run on one GPU"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        epoch_time.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(phases, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(phases, "measure_training", interrupted)
    with pytest.raises(KeyboardInterrupt):
        epoch_time.main(["--model", "tiny", "--samples", "2", "--phases", "score,train", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "epoch_time.json").read_text())
    assert [row["variant"] for row in rows if row["phase"] == "score"] == list(SCORERS)
