"""A completions server as the sampling engine: what is asked, what is accepted, and that the weights are fresh."""

import json
import logging
import sys
import threading
import time

import numpy as np
import pytest
import torch
from openai.types import Completion
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from inverseq.config import ServerConfig
from inverseq.freshness import StaleWeightsError
from inverseq.sampling import sample_responses
from inverseq.sampling_server_client import check_server, pause_s
from inverseq.sampling_server_protocol import BadAnswer, CompletionsProtocol, UnfitServer
from inverseq.sampling_server_weights import says_failure
from tests.fault_proxy import Fault, FaultProxy
from tests.server_sampler import Trainer, make_prompts
from tests.serving import nobodys_root, shared_server
from tests.tiny_words import EOS, NUM_WORDS, make_word_model, make_word_tokenizer, word_ids

OTHER_STOP = 1


def protocol(dialect="vllm", prompts="ids", *, tokenizer=None, stop_ids=(EOS,)):
    config = ServerConfig(url="http://server/v1", model="m", dialect=dialect, prompts=prompts)
    tokenizer = tokenizer or make_word_tokenizer()
    return CompletionsProtocol(config, tokenizer, stop_ids=stop_ids, num_valid_vocab=NUM_WORDS)


def completion(*, text="", finish_reason="stop", count=None, **fields):
    """A completion as the openai client returns it, with the fields that servers add."""
    usage = None if count is None else {"completion_tokens": count, "prompt_tokens": 1, "total_tokens": count + 1}
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None, **fields}
    content = {"id": "1", "created": 1, "model": "m", "object": "text_completion", "choices": [choice], "usage": usage}
    return Completion.construct(**json.loads(json.dumps(content)))


@pytest.fixture
def proxy():
    with FaultProxy(shared_server().root) as running:
        yield running


def test_a_request_asks_for_the_policys_own_distribution():
    prompt = make_prompts(1, ids=word_ids(1, 2, 3))[0]
    for dialect in ("openai", "vllm", "sglang", "transformers"):
        request = protocol(dialect).request(protocol().prompt_of(prompt), 7, seed=11)
        assert request["prompt"] == word_ids(1, 2, 3)
        expected = {"max_tokens": 7, "temperature": 1.0, "top_p": 1.0, "seed": 11}
        expected |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        assert expected.items() <= request.items()
        extra = request.get("extra_body", {})
        if dialect == "openai":
            assert not extra
        elif dialect == "transformers":
            settings = json.loads(extra["generation_config"])
            assert settings["do_sample"] and (settings["temperature"], settings["top_p"], settings["top_k"]) == (
                1,
                1,
                0,
            )
        else:
            assert (extra["top_k"], extra["min_p"], extra["repetition_penalty"]) == (-1, 0.0, 1.0)
            assert extra["return_token_ids"] and extra["stop_token_ids"] == [EOS]


def test_a_text_prompt_is_one_that_tokenises_to_the_prompts_ids():
    prompt = make_prompts(1, ids=word_ids(1, 2, 3))[0]
    assert protocol("transformers", "text").prompt_of(prompt) == "w1 w2 w3"
    broken = make_prompts(1, ids=[*word_ids(1), 1, 1])[0]
    tokenizer = make_word_tokenizer()
    tokenizer.backend_tokenizer.add_tokens(["other other"])
    with pytest.raises(UnfitServer, match="no text tokenises to prompt 'p0'"):
        protocol("transformers", "text", tokenizer=tokenizer).prompt_of(broken)


@pytest.mark.parametrize(
    ("answer", "ids", "reason"),
    [
        (completion(token_ids=[5, 6, EOS], stop_reason=None), [5, 6, EOS], "stop"),
        (completion(token_ids=[5, 6]), [5, 6, EOS], "stop"),  # the stop token is left out by this server
        (completion(token_ids=[5, 6], stop_reason=OTHER_STOP), [5, 6, OTHER_STOP], "stop"),
        (completion(token_ids=[5, 6], matched_stop=OTHER_STOP), [5, 6, OTHER_STOP], "stop"),
        (completion(token_ids=[]), [EOS], "stop"),
        (completion(token_ids=[5, 6, 7, 8], finish_reason="length"), [5, 6, 7, 8], "length"),
        (completion(token_ids=[5, 6, 7, EOS], finish_reason="length"), [5, 6, 7, EOS], "stop"),
        (completion(text="w0 w1", count=3), [5, 6, EOS], "stop"),
        (completion(text="", count=1), [EOS], "stop"),
        (completion(text="w0 w1 w2 w3", count=4, finish_reason="length"), [5, 6, 7, 8], "length"),
    ],
)
def test_an_answers_tokens_end_with_the_stop_token_that_ended_it(answer, ids, reason):
    read = protocol(stop_ids=(EOS, OTHER_STOP)).read(answer, 4)
    assert read.token_ids.tolist() == ids and read.token_ids.dtype == np.int32
    assert read.finish_reason == reason


def test_an_answer_that_ends_with_the_last_token_asked_for_counts_as_ended():
    answer = completion(text="w0 w1 w2", count=4, finish_reason="length")  # transformers serve says length
    assert protocol("transformers").read(answer, 4).token_ids.tolist() == [5, 6, 7, EOS]
    with pytest.raises(BadAnswer, match="3 tokens, the server counted 4"):
        protocol("openai").read(answer, 4)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completion(token_ids=[5], finish_reason="error"), "finish reason 'error'"),
        (completion(token_ids=[5], finish_reason="abort"), "finish reason 'abort'"),
        (completion(token_ids=[5, 6, 7, 8, 9], finish_reason="length"), "5 tokens, more than the 4"),
        (completion(token_ids=[5, EOS, 6, 7], finish_reason="length"), "a stop token is number 2 of 4"),
        (completion(token_ids=[5, EOS, EOS]), "a stop token is number 2 of 3"),
        (completion(token_ids=[5, NUM_WORDS, EOS]), "outside the vocabulary of 20"),
        (completion(token_ids=[5, -1, EOS]), "outside the vocabulary"),
        (completion(token_ids=[5], stop_reason="\n\n"), "stopped at the text"),
        (completion(text="w0  w1", count=3), "does not tokenise to ids of that text"),
        (completion(text="w0 \ufffd", count=3), "does not tokenise to ids of that text"),
        (completion(text="w0 w1", count=5), "tokenises to 2 tokens, the server counted 5"),
        (completion(text="w0 w1", count=2), "tokenises to 2 tokens, the server counted 2"),
        (completion(text="w0 w1", count=4, finish_reason="length"), "tokenises to 2 tokens, the server counted 4"),
        (completion(text="w0 <eos> w1", count=4), "does not tokenise to ids of that text"),
    ],
)
def test_an_answer_that_must_not_be_trained_on_is_refused(answer, message):
    with pytest.raises(BadAnswer, match=message):
        protocol().read(answer, 4)


def test_an_answer_that_was_cut_off_is_not_drawn_again():
    for answer in (
        completion(token_ids=[5, 6], finish_reason="length"),
        completion(text="w0 w1", count=2, finish_reason="length"),
    ):
        with pytest.raises(UnfitServer, match="cut off after 2 of 4 tokens"):
            protocol().read(answer, 4)


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_the_stop_token_of_id_0_is_not_taken_for_another(field):
    reader = protocol(stop_ids=(0, OTHER_STOP))
    reader.tokenizer.eos_token = "other"
    assert reader.read(completion(token_ids=[5, 6], **{field: 0}), 4).token_ids.tolist() == [5, 6, 0]


def test_a_text_without_a_count_of_its_tokens_is_refused():
    with pytest.raises(UnfitServer, match="neither token ids nor their number"):
        protocol().read(completion(text="w0 w1"), 4)


def test_a_server_may_leave_the_stop_token_out_of_its_count_if_its_dialect_is_unknown():
    answer = completion(text="w0 w1", count=2)
    assert protocol("openai").read(answer, 4).token_ids.tolist() == [5, 6, EOS]


def test_text_answers_are_refused_where_two_words_have_one_text():
    vocabulary = {"<eos>": 0, "▁a": 1, "a": 2, "▁b": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    config = ServerConfig(url="http://server/v1", model="m")
    reader = CompletionsProtocol(config, wrapped, stop_ids=(0,), num_valid_vocab=4)
    with pytest.raises(UnfitServer, match="words 1 and 2 both decode to 'a'"):
        reader.read(completion(text="a", count=2), 4)
    assert reader.read(completion(token_ids=[2, 0]), 4).token_ids.tolist() == [2, 0]


def test_each_prompt_gets_its_own_answer_and_the_longest_goes_first(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root, concurrency=1)
    trainer.model.get_output_embeddings().weight.data.mul_(1e3)  # so peaked that sampling is greedy decoding
    trainer.sync(3)
    prompts = make_prompts(8)
    samples = sample_responses(trainer.sampler, prompts, seed=2)
    assert [sample.rendered for sample in samples] == prompts
    trainer.model.set_attn_implementation("eager")
    for sample in samples:
        ids = sample.rendered.policy_ids.tolist()
        for token in sample.response.token_ids.tolist():
            assert token == trainer.model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)
        ended = sample.response.token_ids[-1] == EOS
        assert sample.response.finish_reason == ("stop" if ended else "length") and (ended or sample.num_actions == 6)
        recorded = sample.response
        assert (recorded.engine, recorded.seed, recorded.weights_step) == ("server", 2, 3)
        assert recorded.engine_version.startswith("transformers")
    asked = proxy.requests[1:]  # the first was the probe
    lengths = [len(request["prompt"].split()) for request in asked]
    assert lengths == sorted((len(prompt.policy_ids) for prompt in prompts), reverse=True)
    assert len({request["seed"] for request in asked}) == len(prompts)


def test_no_more_requests_are_in_flight_than_allowed(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root, concurrency=3)
    trainer.sync(0)
    proxy.delay_s = 0.05
    sample_responses(trainer.sampler, make_prompts(12), seed=0)
    assert proxy.most_in_flight == 3


def test_a_sync_makes_the_server_answer_with_the_trainers_weights(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root)
    assert trainer.sync(0)["probe_greedy_gap"] < 1e-6
    trainer.change_weights()
    row = trainer.sync(4)
    assert row["probe_greedy_gap"] < 1e-6 and row["weights_lag_steps"] == 0 and row["sync_duration_s"] > 0
    assert proxy.num_refreshes == 2
    trainer.sync(4)  # the same weights: nothing to load, but looked at again
    assert proxy.num_refreshes == 2 and len(proxy.requests) == 3


def test_a_server_that_keeps_old_weights_stops_the_run(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root, model=str(tmp_path / "initial"))
    trainer.sync(0)
    trainer.change_weights()
    with pytest.raises(StaleWeightsError, match=r"server does not answer with the weights of step 4.*not refreshed"):
        trainer.sync(4)


def test_static_weights_are_declared_and_their_age_is_logged(tmp_path, proxy, caplog):
    trainer = Trainer(tmp_path, proxy.root, model=str(tmp_path / "initial"), static=True, refresh_url="")
    trainer.sync(0)
    trainer.change_weights()
    with caplog.at_level(logging.WARNING):
        row = trainer.sync(4)
    assert row["weights_lag_steps"] == 4 and row["probe_greedy_gap"] > 0.1
    assert "off-policy" in caplog.text
    sample = sample_responses(trainer.sampler, make_prompts(1), seed=0)[0]
    assert sample.response.weights_step == 0 and proxy.num_refreshes == 0


def test_a_command_may_refresh_the_server(tmp_path, proxy):
    note = tmp_path / "note"
    code = f"import sys, urllib.request as u; u.urlopen(u.Request('{proxy.root}/reset', method='POST')); "
    code += f"open('{note}', 'w').write(' '.join(sys.argv[1:]))"
    command = f'{sys.executable} -c "{code}" {{model_dir}} {{step}}'
    folder = tmp_path / "with a space"
    trainer = Trainer(tmp_path, proxy.root, refresh_url="", refresh_command=command, weights_dir=str(folder))
    assert trainer.sync(9)["probe_greedy_gap"] < 1e-6
    assert note.read_text() == f"{folder} 9"
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["do_sample"] and settings.get("temperature", 1.0) == 1.0 and "repetition_penalty" not in settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_command": "false", "refresh_url": ""}, "refresh_command='false': ended with status 1"),
        ({"refresh_command": "no-such-program x", "refresh_url": ""}, "cannot be run"),
        ({"refresh_command": "sleep 30", "refresh_url": "", "wait_s": 0.3}, "still running after"),
        ({"refresh_url": f"{nobodys_root()}/load"}, "refresh_url='http.*refused"),
    ],
)
def test_weights_that_cannot_be_refreshed_stop_the_run(tmp_path, options, message):
    with pytest.raises(RuntimeError, match=message):
        Trainer(tmp_path, "http://127.0.0.1:1", **options).sync(1)


def test_a_server_that_is_not_there_or_does_not_know_the_model_is_named_before_models_load(tmp_path, monkeypatch):
    nowhere = f"{nobodys_root()}/v1"
    with pytest.raises(ValueError, match=rf"sampling.server.url='{nowhere}': cannot be reached"):
        check_server(ServerConfig(url=nowhere, model="m"))
    known = make_word_model(tmp_path / "known")
    url = f"{shared_server().root}/v1"
    check_server(ServerConfig(url=url, model=str(known), prompts="text"))
    check_server(ServerConfig(url=url, model="{model_dir}", prompts="text"))
    with pytest.raises(ValueError, match="sampling.server.prompts=text"):
        check_server(ServerConfig(url=url, model=str(known), prompts="ids"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package openai; pip install 'inverseq\[server\]'"):
        check_server(ServerConfig(url=url, model="m"))


def test_a_model_that_is_not_served_is_one_clear_error(proxy):
    proxy.plan = {0: Fault(status=404)}
    with pytest.raises(ValueError, match="sampling.server.model='nobody'.*status 404"):
        check_server(ServerConfig(url=f"{proxy.root}/v1", model="nobody", prompts="text"))


def test_a_refresh_by_url_sends_what_the_template_says(tmp_path, proxy):
    body = '{"model_path": "{model_dir}", "version": {step}}'
    trainer = Trainer(tmp_path, proxy.root, refresh_body=body, weights_dir=str(tmp_path / 'a "b"'))
    trainer.sync(2)
    assert proxy.refresh_bodies == [{"model_path": str(tmp_path / 'a "b"'), "version": 2}]


def test_a_refresh_that_says_it_failed_is_an_error():
    assert says_failure('{"success": false, "message": "no such path"}')
    assert not any(map(says_failure, ('{"success": true}', '{"status": "ok"}', "", "[false]", "reloaded")))


def test_only_the_main_process_refreshes_the_server(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root)
    trainer.sampler.is_main = False
    trainer.sampler.sync(trainer.model, 3)
    assert proxy.num_refreshes == 0 and not (tmp_path / "weights").exists() and trainer.sampler.weights_step == 3


def test_pauses_double_and_follow_retry_after():
    error = BadAnswer("x")
    assert all(0.25 * 2**n <= pause_s(n, error) <= 0.5 * 2**n for n in range(5))
    error.retry_after = "3"
    assert pause_s(0, error) == 3.0
    error.retry_after = "nan"
    assert pause_s(0, error) == 0.0
    error.retry_after = "Wed, 21 Oct 2026 07:28:00 GMT"
    assert pause_s(0, error) <= 0.5


def test_a_run_without_a_folder_for_the_weights_is_refused(tmp_path):
    trainer = Trainer(tmp_path, "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="sampling.server.weights_dir=''"):
        type(trainer.sampler)(trainer.sampler_config, trainer.tokenizer, stop_ids=(EOS,), num_valid_vocab=NUM_WORDS)


def test_closing_the_iterator_ends_its_thread_and_its_requests(tmp_path, proxy):
    trainer = Trainer(tmp_path, proxy.root, concurrency=2)
    trainer.sync(0)
    proxy.plan = {n: Fault(silence_s=300) for n in range(2, 20)}
    finished = trainer.sampler.generate(make_prompts(6), seed=0)
    next(finished)
    started = time.monotonic()
    finished.close()
    assert time.monotonic() - started < 100
    assert not [t for t in threading.enumerate() if t.name == "inverseq-server-requests"]


class TwoRanks:
    """What a sync needs of the ranks of a run, for two threads."""

    def __init__(self):
        self.meeting = threading.Barrier(2)

    def barrier(self):
        self.meeting.wait(timeout=600)


def test_ranks_that_share_a_server_wait_until_it_has_the_weights(tmp_path, proxy):
    main, other = (Trainer(tmp_path, proxy.root, weights_dir=str(tmp_path / "shared")) for _ in range(2))
    other.sampler.is_main = False
    main.sync(0)
    other.freshness.sync(other.sampler, other.model, 0)
    for trainer in (main, other):
        trainer.change_weights()
    proxy.on_refresh = lambda: time.sleep(1.0)
    ranks, errors = TwoRanks(), []

    def sync(trainer):
        try:
            trainer.freshness.sync(trainer.sampler, trainer.model, 4, ranks)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=sync, args=(trainer,)) for trainer in (main, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and proxy.num_refreshes == 2
    assert max(trainer.freshness.row["probe_greedy_gap"] for trainer in (main, other)) < 1e-6
