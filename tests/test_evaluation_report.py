"""The report: what stands in it, that hostile text stays text, and that a browser renders it."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from inverseq.evaluation.plots import draw_curves, save_plot
from inverseq.evaluation.report import main, report
from inverseq.sample_files import read_samples, samples_path, write_samples
from tests.hostile import HOSTILE, text_of
from tests.tiny import make_tiny_tokenizer
from tests.tiny_run import make_tiny_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REWARDS = [
    {"series": name, "epoch": e, "increment": e / 2, "increment_low": e - 1, "increment_high": e + 1}
    for name in ("run", "ppo $x_{$ <b>") for e in (0.0, 1.0, 2.0)
]  # fmt: skip


LOOK = """
document.addEventListener("DOMContentLoaded", () => {
  const headings = [...document.querySelectorAll("h2")].filter(h => h.parentElement === document.body);
  document.title = JSON.stringify({
    tops: headings.map(h => [h.textContent, h.getBoundingClientRect().top]),
    wide: document.documentElement.scrollWidth,
    screen: innerWidth,
    open: [...document.querySelectorAll("details")].every(d => d.parentElement === document.body),
  });
});
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose newest samples answer with hostile text, one of them with 100,000 tokens."""
    path = make_tiny_run(tmp_path_factory.mktemp("report"))
    tokenizer = make_tiny_tokenizer()
    scored = read_samples(samples_path(path, 2))
    texts = [HOSTILE, "</div></details></body>" * 3, "🙂" * 50, "عربي \u202e עברית"]
    texts += ["'\"><img src=x onerror=alert(1)>", "a b " * 50_000]
    samples, targets, plain, rng = [], [], [], np.random.default_rng(0)
    for sample, text in zip(scored.samples, texts, strict=True):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        prompt = type(sample.rendered.prompt)(f"<i>{text[:20]}", ({"role": "user", "content": text[:300_000]},))
        rendered = type(sample.rendered)(prompt, sample.rendered.prefix_ids, sample.rendered.prompt_ids)
        response = type(sample.response)(ids, "length", 0, "tiny", "0", 0)
        samples.append(type(sample)(rendered, response))
        targets.append(rng.normal(-2, 1, len(ids)))
        plain.append(rng.normal(-2, 1, len(ids)))
    import torch

    offsets = np.cumsum([0, *map(len, targets)])
    assert offsets[-1] - offsets[-2] >= 100_000
    scored = type(scored)(
        samples, torch.tensor(np.concatenate(targets)).float(), torch.tensor(np.concatenate(plain)).float(), offsets
    )
    write_samples(samples_path(path, 2), scored, tokenizer)
    save_plot(path / "evaluation" / "rewards.png", REWARDS, draw_curves("epoch", "increment"))
    save_plot(path / "evaluation" / "a-vs-b" / "other_plot.png", REWARDS, draw_curves("epoch", "increment"))
    return path


@pytest.fixture(scope="module")
def page(run_dir):
    return report(run_dir)


def test_the_page_has_every_part_and_its_numbers(run_dir, page):
    text = text_of(page.read_text())
    for heading in ("Epochs", "Curves", "Time", "Samples and their credit", "Evaluation", "Configuration"):
        assert heading in text
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['held_out/mean_squared_log_ratio']:.4g}" in text
    assert "samples_per_step: 4" in text and "Reward model" in text and "other plot: a-vs-b" in text
    assert "ppo $x_{$ <b>" in text
    assert page.read_text().count("<svg") >= 6
    assert "ended by themselves (EOS)" in text and "held-out score" in text and "cut at the length limit" in text
    for word in ("eos_rate", "truncation_rate", "held_out\n"):
        assert word not in text  # keys of metrics.jsonl, which say nothing to a reader


def test_the_page_asks_no_network_and_runs_no_script(page):
    html = page.read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"<(script|iframe|link|object|embed)\b", html, re.IGNORECASE)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'<img[^>]* src="([^"]*)', html))
    html = re.sub('base64,[^"]*', "", html)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", html.replace("http://www.w3.org", ""))
    assert not re.search(r"<[^>]*\son\w+\s*=", html)
    assert "\u202e" not in html and "onerror=alert(1)" in text_of(html)
    assert page.stat().st_size < 8_000_000


def test_the_longest_response_is_cut_and_says_so(page):
    assert re.search(r"more tokens are not shown; their credit is [+-]\d+\.\d{3}", text_of(page.read_text()))


def test_a_browser_renders_the_page_on_a_phone_and_on_paper(page, tmp_path):
    """Hostile text closes no element: sections stand in their order below each other, none wider than the screen."""
    if CHROMIUM is None:
        pytest.skip("no chromium")
    probe = tmp_path / "probe.html"
    html = page.read_text()
    script = f"<script>{LOOK}</script>"
    html = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</head>", f"{script}</head>")
    probe.write_text(html)
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    browser.append(f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run([*browser, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=600)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    seen = json.loads(text_of(title))
    headings = [name for name, _ in seen["tops"]]
    expected = ["Epochs", "Curves", "Time", "Samples and their credit", "Evaluation", "Configuration"]
    assert headings == expected and seen["open"]
    assert [top for _, top in seen["tops"]] == sorted(top for _, top in seen["tops"])
    assert seen["wide"] <= seen["screen"]
    paper = tmp_path / "report.pdf"
    subprocess.run([*browser, f"--print-to-pdf={paper}", page.as_uri()], capture_output=True, timeout=600, check=True)
    assert paper.read_bytes()[:5] == b"%PDF-"


def test_a_run_that_has_just_begun_has_a_page_too(run_dir, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(run_dir / "config.yaml", young)
    text = text_of(report(young).read_text())
    assert "No epoch yet" in text and "No samples are shown" in text and "No results" in text
    (young / "evaluation" / "rewards").mkdir(parents=True)  # as an interrupted inverseq-eval leaves it
    assert "No results" in text_of(report(young).read_text())


def test_bad_input_is_one_line(run_dir, tmp_path, capsys):
    broken = tmp_path / "empty"
    broken.mkdir()
    for words, message in (
        (["/nowhere"], "holds no run"),
        ([str(run_dir), "--samples", "-1"], "--samples -1"),
        (
            [str(run_dir), "--out", str(tmp_path / "x.html"), "--results", str(broken)],
            "holds no result of inverseq-eval",
        ),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.html").exists()
