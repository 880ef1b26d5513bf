"""Configuration: recipes, files and overrides become one validated tree, and every mistake is one clear ValueError."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inverseq_kernels import checks

from inverseq import config as config_module
from inverseq.config import Config, iter_options
from inverseq.config_hints import OTHER_TRAINERS
from inverseq.config_loading import config_differences, load_config, recipe_names, recipe_path, to_yaml

RECIPES = ["demo", "vicuna-13b", "vicuna-7b", "zephyr-7b-beta", "zephyr-7b-sft"]
MINIMAL = "model: {path: m}\nrun_dir: runs/x\n"


def write(tmp_path, text, name="config.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def error_of(recipe_or_file, *overrides):
    with pytest.raises(ValueError) as caught:
        load_config(recipe_or_file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_recipe_of_the_documents_is_shipped_and_loads():
    assert recipe_names() == RECIPES
    for name in RECIPES:
        assert isinstance(load_config(name), Config)


@pytest.mark.parametrize("name", RECIPES)
def test_each_value_of_a_recipe_says_whether_it_is_the_papers_or_ours(name):
    values = 0
    for number, line in enumerate(recipe_path(name).read_text().splitlines(), 1):
        if not re.match(r"\s*[a-z_]+:", line) or re.fullmatch(r"[a-z_]+:", line):
            continue  # a comment of its own, or a section's name
        values += 1
        assert re.search(r"  # (paper|ours)\b", line), f"{name}.yaml:{number}: no `paper` or `ours`: {line}"
    assert values >= 15


def test_recipes_hold_the_settings_of_the_paper():
    rows = {
        "vicuna-7b": ("lmsys/vicuna-7b-v1.5", "principle", "", 1.4),
        "vicuna-13b": ("lmsys/vicuna-13b-v1.5", "principle", "", 1.5),
        "zephyr-7b-sft": ("HuggingFaceH4/mistral-7b-sft-beta", "principle", "", 1.2),
        "zephyr-7b-beta": ("HuggingFaceH4/zephyr-7b-beta", "model", "HuggingFaceH4/mistral-7b-sft-beta", 1.4),
    }
    for name, expected in rows.items():
        config = load_config(name)
        contrast = config.contrast
        assert (config.model.path, contrast.kind, contrast.plain_model, contrast.alpha) == expected
        assert (config.epochs, config.sampling.samples_per_epoch, config.sampling.max_new_tokens) == (15, 500, 1024)
        assert (config.sampling.batch_size, config.optim.lr, config.optim.samples_per_step) == (64, 1e-6, 16)
        assert config.prompts.path == "hf:Anthropic/hh-rlhf:train"
    assert load_config("vicuna-7b").contrast.plain_system is None  # Vicuna keeps its stock system text
    assert load_config("demo").contrast.plain_system == ""  # SmolLM2's template would insert its own


def test_overrides_replace_values_and_nothing_else():
    config = load_config("demo", ["contrast.alpha=1.2", "sampling.max_new_tokens=64", "epochs=7"])
    plain = load_config("demo")
    assert (config.contrast.alpha, config.sampling.max_new_tokens, config.epochs) == (1.2, 64, 7)
    expected = dataclasses.replace(
        plain,
        contrast=dataclasses.replace(plain.contrast, alpha=1.2),
        sampling=dataclasses.replace(plain.sampling, max_new_tokens=64),
        epochs=7,
    )
    assert config == expected


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-6", "lr", 1e-6),  # text in YAML 1.1
        ("optim.lr=1", "lr", 1.0),
        ("optim.samples_per_step=010", "samples_per_step", 10),  # not octal
        ("optim.betas=[0.5, 1e-1]", "betas", (0.5, 0.1)),
        ("optim.betas=[0,0]", "betas", (0.0, 0.0)),
    ],
)
def test_numbers_are_read_as_written(override, key, value):
    found = getattr(load_config("demo", [override]).optim, key)
    assert found == value and type(found) is type(value)


def test_a_section_inside_another_is_read_overridden_and_written(tmp_path):
    path = write(tmp_path, MINIMAL + "sampling:\n  server: {url: 'http://a/v1', retries: 2}\n")
    config = load_config(path, ["sampling.server.retries=3"])
    assert (config.sampling.server.url, config.sampling.server.retries) == ("http://a/v1", 3)
    assert load_config(write(tmp_path, to_yaml(config), "again.yaml")) == config
    assert load_config(write(tmp_path, MINIMAL + "sampling:\n  server:\n")) == load_config(write(tmp_path, MINIMAL))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ('""', ""),
        ("null", None),
        ("Be: kind #1", "Be: kind #1"),
        ("a=b", "a=b"),
        ("5", "5"),
        ("true", "true"),
        ("[1", "[1"),
        ("'quoted'", "quoted"),
        ("α, 回答", "α, 回答"),
        ("two\nlines: 1", "two\nlines: 1"),
        ("it's 'fine'", "it's 'fine'"),
    ],
)
def test_text_is_taken_as_given_and_null_is_none(text, value):
    assert load_config("demo", [f"contrast.plain_system={text}"]).contrast.plain_system == value


def test_one_value_may_refer_to_another(monkeypatch):
    monkeypatch.setenv("INVERSEQ_TEST_NAME", "n")
    config = load_config("demo", ["run_dir=runs/a-${contrast.alpha}-${oc.env:INVERSEQ_TEST_NAME}"])
    assert config.run_dir == "runs/a-1.4-n"
    assert "run_dir" in error_of("demo", "run_dir=${contrast.alfa}")
    assert "run_dir" in error_of("demo", "run_dir=${")


SERVER = {"sampling.backend": "server", "sampling.server.url": "http://h/v1", "sampling.server.model": "m"}


@pytest.mark.parametrize(
    ("key", "value", "expectation"),
    [
        ("model", "", "the model's name on the server"),
        ("url", "host:8000", "http://"),
        ("static", "false", "exactly one of sampling.server.refresh_command, refresh_url and static=true"),
        ("refresh_url", "http://h/load", "exactly one of"),
        ("refresh_body", "[1]", "a JSON object"),
        ("refresh_body", "{step", "a JSON object"),
        ("refresh_command", "load 'x", "No closing quotation"),
    ],
)
def test_a_server_is_described_whole(key, value, expectation):
    settings = SERVER | {"sampling.server.static": "true"}
    if key == "refresh_command":
        settings["sampling.server.static"] = "false"
    load_config("demo", [f"{name}={text}" for name, text in (SERVER | {"sampling.server.static": "true"}).items()])
    settings[f"sampling.server.{key}"] = value
    message = error_of("demo", *(f"{name}={text}" for name, text in settings.items()))
    assert expectation in message and f"sampling.server.{'refresh_command' if key == 'static' else ''}" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("contrast.alfa=1", ("unknown key contrast.alfa", "did you mean contrast.alpha?")),
        ("contrst.alpha=1", ("unknown key contrst.alpha", "did you mean contrast.alpha?")),
        ("alpha=1", ("unknown key alpha", "did you mean contrast.alpha?")),
        ("lr=1", ("unknown key lr", "did you mean optim.lr?")),
        ("contrast.alpha.x=1", ("unknown key contrast.alpha.x", "did you mean contrast.alpha?")),
        ("zzz=1", ("unknown key zzz",)),
        ("foo", ("'foo'", "expected section.key=value")),
        ("=3", ("'=3'", "expected section.key=value")),
        ("contrast=1", ("contrast is a section",)),
        ("sampling.server=1", ("sampling.server is a section", "for example sampling.server.url")),
        ("sampling.server.ulr=x", ("unknown key sampling.server.ulr", "did you mean sampling.server.url?")),
        ("sampling.server.retries=-1", ("sampling.server.retries=-1", "expected 0 or more")),
        ("sampling.server.wait_s=0", ("sampling.server.wait_s=0.0", "expected a positive number of seconds")),
        ("sampling.max_logprob_gap=-1", ("sampling.max_logprob_gap=-1.0", "expected 0 or more nats")),
        ("sampling.backend=server", ("sampling.server.url=''", "expected http://")),
        ("epochs=many", ("epochs='many'", "expected an integer")),
        ("epochs=1.5", ("epochs='1.5'", "expected an integer")),
        ("epochs=0", ("epochs=0", "expected 1 or more")),
        ("epochs=", ("epochs=''", "expected an integer")),
        ("optim.lr=fast", ("optim.lr='fast'", "expected a number")),
        ("optim.lr=-1e-6", ("optim.lr=-1e-06", "expected a positive number")),
        ("optim.lr=nan", ("optim.lr=nan", "expected a positive number")),
        ("optim.betas=0.9", ("optim.betas=0.9", "expected a list of two numbers")),
        ("optim.betas=[0.9,x]", ("optim.betas='x'", "expected a number")),
        ("optim.weight_decay=inf", ("optim.weight_decay=inf", "expected")),
        ("contrast.alpha=nan", ("contrast.alpha=nan", "expected a finite number")),
        ("contrast.alpha=1e300", ("contrast.alpha=1e+300", "expected a finite number up to ±1e+20")),
        ("contrast.alpha=-inf", ("contrast.alpha=-inf", "expected a finite number")),
        ("contrast.kind=modle", ("contrast.kind='modle'", "one of principle, model")),
        ("contrast.kl_to_initial=true", ("contrast.kl_to_initial=True", "false with contrast.kind=principle")),
        ("logging.wandb=1", ("logging.wandb=1", "expected true or false")),
        ("logging.wandb=maybe", ("logging.wandb='maybe'", "expected true or false")),
        ("run_dir=null", ("run_dir=None", "expected text")),
        ("run_dir=", ("run_dir=''", "a folder for the run")),
    ],
)
def test_a_bad_override_names_key_value_and_expectation(override, parts):
    message = error_of("demo", override)
    for part in parts:
        assert part in message


def test_the_initial_model_cannot_be_both_kept_and_replaced():
    words = ("contrast.kl_to_initial=true", "contrast.refresh_every=2")
    assert "contrast.kl_to_initial=True: expected false with contrast.refresh" in error_of("zephyr-7b-beta", *words)


def test_an_unknown_key_without_a_near_one_suggests_nothing():
    assert "did you mean" not in error_of("demo", "qqqq.zzzz=1")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("learning_rate=1e-5", "did you mean optim.lr?"),
        ("optim.learning_rate=1e-5", "did you mean optim.lr?"),
        ("num_generations=4", "did you mean sampling.samples_per_prompt?"),
        ("actor_rollout_ref.rollout.n=4", "did you mean sampling.samples_per_prompt?"),
        ("sampling.temperature=0.7", "unknown key sampling.temperature: responses are drawn untempered"),
        ("sampling.top_p=0.9", "unknown key sampling.top_p: responses are drawn untempered"),
        ("beta=0.1", "unknown key beta: the loss has no KL term"),
        ("gradient_accumulation_steps=2", "optim.samples_per_step is the batch of a step"),
        ("optim.beta=[0.9,0.95]", "did you mean optim.betas?"),
    ],
)
def test_the_words_of_other_trainers_are_translated(override, hint, tmp_path):
    assert hint in error_of("demo", override)
    key, _, value = override.partition("=")
    *sections, leaf = key.split(".")
    if sections in ([], ["optim"], ["sampling"]):
        file = tmp_path / "config.yaml"
        file.write_text(f"{sections[0]}: {{{leaf}: {value}}}\n" if sections else f"{leaf}: {value}\n")
        assert hint in error_of(str(file))


def test_every_key_that_a_translation_names_exists_and_no_key_is_translated():
    keys = {key for key, *_ in iter_options()}
    assert not {*OTHER_TRAINERS} & {key.rpartition(".")[2] for key in keys}
    for word, translated in OTHER_TRAINERS.items():
        assert {*re.findall(r"[a-z_]+\.[a-z_.]*[a-z_]", translated)} <= keys, word
        assert " " in translated or translated in keys, word


def test_a_key_that_shares_only_its_section_is_not_suggested():
    assert "did you mean" not in error_of("demo", "sampling.server.qqqq=1")


def test_an_override_given_twice_is_an_error():
    assert "epochs is given twice" in error_of("demo", "epochs=1", "seed=1", "epochs=1")


def test_a_file_takes_defaults_for_what_it_leaves_out(tmp_path):
    config = load_config(write(tmp_path, MINIMAL + "optim: {lr: 1e-6}\ncontrast:\n"))
    assert config.model.path == "m" and config.optim.lr == 1e-6
    defaults = {key: default for key, _, default, _ in iter_options()}
    assert config.optim.samples_per_step == defaults["optim.samples_per_step"]
    assert config.contrast.alpha == defaults["contrast.alpha"]


def test_a_replayed_run_cannot_answer_test_prompts():
    replayed = ["sampling.backend=replay", "sampling.replay_path=runs/earlier"]
    assert load_config("demo", replayed).sampling.replay_path == "runs/earlier"
    with pytest.raises(ValueError, match="evaluation.every=2: expected 0 with a replayed run"):
        load_config("demo", [*replayed, "evaluation.every=2"])


def test_a_file_path_is_preferred_to_nothing_but_a_recipe_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, MINIMAL, "own")
    assert load_config("own").model.path == "m"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("holds no configuration",)),
        (b"# only a comment\n", ("holds no configuration",)),
        (b"- a\n- b\n", ("holds a list",)),
        (b"hello world\n", ("holds a single value",)),
        (b"model: [1\n", (":2", "is not YAML")),
        (b"epochs: 1\nepochs: 2\n", ("config.yaml:2", "duplicate key")),
        (b"a: 1\n---\nb: 2\n", ("is not YAML",)),
        (b"\xff\xfe\x00m", ("is not UTF-8 text",)),
        (b"model: \x01\n", ("is not YAML",)),
        (b"epochs: !!python/object/apply:os.system ['true']\n", ("is not YAML",)),
        (b"\n\nmodle: {path: m}\n", ("config.yaml:3", "unknown key modle", "did you mean model?")),
        (b"model:\n  path: m\n  pth: x\n", ("config.yaml:3", "unknown key model.pth", "did you mean model.path?")),
        (b"contrast.alpha: 1\n", ("config.yaml:1", "write contrast.alpha as key alpha of section contrast")),
        (b"contrast: 5\n", ("config.yaml:1", "contrast is a section")),
        (b"sampling:\n  server: 5\n", ("config.yaml:2", "sampling.server is a section")),
        (b"sampling:\n  server:\n    ulr: x\n", ("config.yaml:3", "unknown key sampling.server.ulr")),
        (b"sampling:\n  server.url: x\n", ("config.yaml:2", "write sampling.server.url as key url of section")),
        (b"contrast: [alpha]\n", ("config.yaml:1", "contrast is a section")),
        (b"epochs: {a: 1}\n", ("epochs={'a': 1}", "expected an integer")),
        (b"epochs: true\n", ("epochs=True", "expected an integer")),
        (b"run_dir: 2026\n", ("run_dir=2026", "expected text")),
        (b"run_dir: ???\n", ("run_dir",)),
        (b"run_dir: runs/x\n", ("model.path=''", "a model directory or hub id")),
        (b"contrast: {alpha: .inf}\n", ("contrast.alpha=inf", "finite")),
        (b"contrast: {alpha: nan}\n", ("contrast.alpha=nan", "finite")),
    ],
)
def test_a_bad_file_names_what_is_wrong_and_where(tmp_path, content, parts):
    message = error_of(write(tmp_path, content))
    for part in parts:
        assert part in message


def test_a_missing_file_a_directory_and_an_unknown_recipe_are_told_apart(tmp_path):
    assert "no such file" in error_of(tmp_path / "none.yaml")
    assert "is a directory" in error_of(tmp_path)
    message = error_of("zephir-7b-beta")
    assert "no such recipe" in message and "did you mean zephyr-7b-beta?" in message and "demo" in message


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_configuration_loads_as_the_same_one(name, tmp_path):
    config = load_config(name, ["optim.lr=3e-7", "seed=12"])
    assert load_config(write(tmp_path, to_yaml(config))) == config


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
TRICKY = st.text(st.sampled_from(list("\\${}'\": #-\n\t[]%&*!|>?@`~0e1.")), max_size=12)


@given(
    text=TEXT
    | TRICKY
    | st.sampled_from(["null", "~", "true", "1e-6", "1_0", "${a}", "\\${a}", " ", "=", "<<", "2026-01-01"])
)
def test_any_text_survives_saving_and_loading(text, tmp_path_factory):
    config = dataclasses.replace(
        load_config("demo"), run_dir=f"r{text}", model=dataclasses.replace(load_config("demo").model, path=text or "m")
    )
    path = tmp_path_factory.getbasetemp() / "roundtrip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_differences_name_the_options_that_change_a_run():
    ours, theirs = load_config("demo", ["contrast.alpha=1.3", "run_dir=elsewhere"]), load_config("demo")
    assert config_differences(ours, ours) == []
    assert config_differences(ours, theirs, ignore=["run_dir"]) == ["contrast.alpha: 1.3 here, 1.4 there"]
    assert len(config_differences(ours, theirs)) == 2


def test_every_option_has_a_type_the_loader_reads_and_a_help_text():
    for key, annotation, default, help_text in iter_options():
        text = ("str", "str | None", "str | int", "str | bool")
        assert annotation in (*text, "bool", "int", "float", "tuple[float, float]"), key
        assert len(help_text) > 8 and not help_text.endswith("."), key
        assert default is not dataclasses.MISSING, key


def test_a_choice_of_words_may_be_written_as_yaml_reads_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\nrun_dir: r\nengine: {zero_stage: 3}\n")
    config = load_config(file)
    assert config.engine.zero_stage == "3" == load_config(file, ["engine.zero_stage=3"]).engine.zero_stage
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    with pytest.raises(ValueError, match="engine.zero_stage='4': expected one of auto, 0, 1, 2, 3"):
        load_config(file, ["engine.zero_stage=4"])


def test_the_largest_alpha_is_that_of_the_operations():
    assert config_module.MAX_ALPHA == checks.MAX_ALPHA
