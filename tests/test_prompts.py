"""Reading prompts, what is counted and what is an error, and the stream that training draws from."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inverseq.chat import ChatRenderer, load_chat_template, load_principle
from inverseq.prompt_files import load_prompts
from inverseq.prompts import PromptStream
from inverseq.records import Prompt
from tests.tiny import make_tiny_tokenizer

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the data sets are not on this machine")


def hh_row(*turns: str, chosen: str = " yes", rejected: str = " no", **extra) -> dict:
    """Turns are Human's and Assistant's in turn, a Human's last."""
    prefix = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns)) + "\n\nAssistant:"
    return {"chosen": prefix + chosen, "rejected": prefix + rejected, **extra}


def write_rows(path: Path, *rows) -> Path:
    """One line a row; bytes are written as they are, everything else as JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def contents(prompt: Prompt) -> list[str]:
    return [message["content"] for message in prompt.messages]


def load_error(source) -> str:
    with pytest.raises(ValueError) as caught:
        load_prompts(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_hh_rows_keep_the_shared_conversation_and_lose_the_final_answers(tmp_path, name):
    path = write_rows(
        tmp_path / name,
        hh_row("first\n\nsecond paragraph"),
        b"",
        hh_row("one", "two", "three ", category="safety"),
    )
    prompts, report = load_prompts(path)
    assert [prompt.id for prompt in prompts] == ["rows-1", "rows-3"]
    assert contents(prompts[0]) == ["first\n\nsecond paragraph"] and prompts[0].category is None
    assert contents(prompts[1]) == ["one", "two", "three"] and prompts[1].category == "safety"
    assert [message["role"] for message in prompts[1].messages] == ["user", "assistant", "user"]
    assert (report.format, report.num_rows, report.num_prompts) == ("HH", 2, 2)
    assert not report.dropped and not report.notes


def test_hh_rows_without_a_usable_prompt_are_counted_and_the_first_is_named(tmp_path):
    differing = {"chosen": hh_row("a")["chosen"], "rejected": hh_row("b")["rejected"]}
    path = write_rows(
        tmp_path / "rows.jsonl",
        hh_row("fine"),
        differing,
        hh_row(" "),
        hh_row("a", "", "b"),
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"},
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        {"chosen": "just text", "rejected": "other text"},
        {"chosen": "intro\n\nHuman: a\n\nAssistant: b", "rejected": "intro\n\nHuman: a\n\nAssistant: c"},
        hh_row("kept", chosen=""),
    )
    prompts, report = load_prompts(path)
    assert [prompt.id for prompt in prompts] == ["rows-1", "rows-9"]
    assert report.dropped == {
        "chosen and rejected differ before the last answer": 1,
        "empty turn": 2,
        "user and assistant do not alternate": 2,
        "no Assistant turn": 1,
        "text before the first turn": 1,
    }
    assert report.notes == {"with an empty final answer, kept": 1}
    line = str(report)
    assert "2 prompts from 9 rows (HH)" in line and "dropped 2: empty turn" in line and f"(first {path}:3)" in line
    assert "1 with an empty final answer, kept" in line and "\n" not in line


def test_messages_rows_keep_their_system_message_and_lose_a_final_answer(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": ""}
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"messages": [system, user], "category": 3},
        {"messages": [user, answer, user, answer]},
        {"messages": [answer]},
        {"messages": [user, system, user]},
        {"messages": [{"role": "user", "content": "  "}]},
        {"messages": [system]},
    )
    prompts, report = load_prompts(path)
    assert [list(prompt.messages) for prompt in prompts] == [[system, user], [user, answer, user]]
    assert prompts[0].category == "3"
    assert report.dropped == {"user and assistant do not alternate": 3, "empty turn": 1}
    assert report.notes["with a final answer, discarded"] == 2


def test_prompt_rows_are_one_user_turn_kept_as_written(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + json.dumps({"prompt": " ½ \n"}).encode() + b"\r")
    [prompt], report = load_prompts(str(path))
    assert prompt.messages == ({"role": "user", "content": " ½ \n"},) and report.format == "prompt"


def test_a_prompt_of_messages_is_a_conversation_and_answers_beside_a_prompt_are_not_read(tmp_path):
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    answers = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"prompt": [system, user], **answers},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    prompts, report = load_prompts(path)
    assert [list(prompt.messages) for prompt in prompts] == [[system, user], [user]] and report.format == "prompt"


BAD_FILES = {
    "not an object": ([{"prompt": "a"}, [1]], ":2: expected a JSON object, found a list"),
    "not JSON": ([{"prompt": "a"}, b"", b"{oops"], ":3: is not JSON"),
    "a JSON array": ([b"[", b'{"prompt": "a"}]'], ":1: is not JSON: .*expected one object a line"),
    "not UTF-8": ([{"prompt": "a"}, b'{"prompt": "\xff"}'], ":2: is not UTF-8 text"),
    "deep": ([b"[" * 200_000], ":1: is not"),
    "no known key": ([{"text": "a", "n": 1}], "expected the keys chosen and rejected.*found text, n"),
    "empty prompt": ([{"prompt": "a"}, {"prompt": " \n"}], ":2: prompt: expected a text, found an empty one"),
    "another format": ([{"prompt": "a"}, {"messages": []}], ":2: prompt: expected a text, found no such key"),
    "messages, then none": ([{"messages": [{"role": "user", "content": "q"}]}, {"prompt": "a"}], "found no such key"),
    "prompt of bad messages": ([{"prompt": [{"role": "user"}]}], r":1: prompt\[0\]: content: .*no such key"),
    "no messages in prompt": ([{"prompt": []}], ":1: prompt: expected a list of messages, found an empty list"),
    "prompt is a number": ([{"prompt": 3}], ":1: prompt: expected a text, found a number"),
    "half HH": ([hh_row("a"), {"chosen": hh_row("a")["chosen"]}], ":2: rejected: .*found no such key"),
    "no messages": ([{"messages": []}], "messages: expected a list of messages, found an empty list"),
    "message of text": (
        [{"messages": ["a"]}],
        r"messages\[0\]: expected an object with role and content, found a text",
    ),
    "unknown role": ([{"messages": [{"role": "tool", "content": "a"}]}], r"\[0\]: role: expected system.*found 'tool'"),
    "content parts": (
        [{"messages": [{"role": "user", "content": [{}]}]}],
        r"\[0\]: content: expected a text, found a l",
    ),
    "half a surrogate": ([b'{"prompt": "\\ud800"}'], ":1: prompt: holds half of a surrogate pair"),
    "empty": ([], "is empty"),
    "blank": ([b"", b"  "], "is empty"),
    "nothing usable": ([hh_row(""), hh_row(" ")], "no usable prompt in .*dropped 2: empty turn"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_error_with_file_and_line(tmp_path, name):
    rows, expected = BAD_FILES[name]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    message = load_error(path)
    assert str(path) in message
    with pytest.raises(ValueError, match=expected):
        load_prompts(path)


def test_what_cannot_be_read_is_one_error(tmp_path):
    assert "no such file" in load_error(tmp_path / "absent.jsonl") and "hf:NAME" in load_error("Anthropic/hh-rlhf")
    assert load_error("some/train.parquet").endswith("is no .jsonl file; a folder of such files is a data set, hf:some")
    assert "is a folder" in load_error(tmp_path) and load_error("hf:") == "hf:: expected hf:NAME or hf:NAME:SPLIT"
    rng = np.random.default_rng(0)
    rows = [{"prompt": rng.bytes(60).hex()} for _ in range(200)]
    whole = write_rows(tmp_path / "rows.jsonl.gz", *rows).read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-4], whole[:500] + b"\0" * 50 + whole[550:], b"\x1f\x8b"):
        (tmp_path / "cut.jsonl.gz").write_bytes(data)
        assert "cut.jsonl.gz: gzip data is cut off or damaged behind line" in load_error(tmp_path / "cut.jsonl.gz")


KEYS = st.sampled_from(["chosen", "rejected", "messages", "prompt", "role", "content"])
JSON_VALUES = st.recursive(
    st.none() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
)


@given(data=st.binary(max_size=40) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_prompts_or_one_value_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    try:
        prompts, _ = load_prompts(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(prompt.messages[-1]["role"] == "user" and all(contents(prompt)) for prompt in prompts)


def test_data_sets_are_read_by_name_and_split(tmp_path):
    rows = [hh_row("a", category="x"), hh_row("b", category="y"), hh_row("", category="y")]
    (tmp_path / "files").mkdir()
    write_rows(tmp_path / "files" / "test.jsonl", *rows[:1])
    write_rows(tmp_path / "files" / "train.jsonl", *rows[1:], hh_row("c", "d", "e", category="y"))
    name = f"hf:{tmp_path / 'files'}"
    prompts, report = load_prompts(name)
    assert [contents(prompt) for prompt in prompts] == [["b"], ["c", "d", "e"]] and report.dropped["empty turn"] == 1
    assert [prompt.id for prompt in prompts] == [f"{tmp_path / 'files'}:train-1", f"{tmp_path / 'files'}:train-3"]
    [prompt], _ = load_prompts(name + ":test")
    assert contents(prompt) == ["a"] and prompt.category == "x"
    assert "data set" in load_error(name + ":validation")

    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    saved = datasets.Dataset.from_list([{"messages": conversation}])
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved_splits")
    for source in ("saved", "saved_splits"):
        [prompt], report = load_prompts(f"hf:{tmp_path / source}")
        assert contents(prompt) == ["q"] and report.format == "messages"
        assert "no split 'test'; it has train" in load_error(f"hf:{tmp_path / source}:test")
    assert "hf:no-such/data-set:train: cannot be read" in load_error("hf:no-such/data-set")
    (tmp_path / "nothing").mkdir()
    assert "cannot be read" in load_error(f"hf:{tmp_path / 'nothing'}")


def test_the_bundled_prompts_are_varied_and_short():
    prompts, report = load_prompts("bundled")
    assert len(prompts) >= 120 and not report.dropped and not report.notes
    assert len({tuple(contents(prompt)) for prompt in prompts}) == len({p.id for p in prompts}) == len(prompts)
    kinds = Counter(prompt.category for prompt in prompts)
    assert set(kinds) == {"harmless", "helpful"} and min(kinds.values()) >= 50
    for kind in kinds:
        multi_turn = [prompt for prompt in prompts if prompt.category == kind and len(prompt.messages) > 1]
        assert 15 <= len(multi_turn) <= 40
    assert max(sum(map(len, contents(prompt))) for prompt in prompts) < 600
    rows = [json.loads(line) for line in (Path(__file__).parents[1] / "inverseq/data/prompts.jsonl").open()]
    assert all(row["chosen"] != row["rejected"] for row in rows)


@needs_real_data
def test_real_hh_files_are_read_and_their_odd_rows_counted():
    read = {}
    for name in ("harmless-base/test", "harmless-base/train", "helpful-base/test", "helpful-base/train"):
        prompts, report = load_prompts(REAL_DATA / f"{name}.jsonl.gz")
        read[name] = report
        assert report.num_rows == len(prompts) + sum(report.dropped.values())
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            assert prompt.messages[-1]["role"] == "user"
            assert not any("\n\nHuman:" in text or "\n\nAssistant:" in text for text in contents(prompt))
    assert read["harmless-base/test"].dropped == {"user and assistant do not alternate": 1}
    assert read["helpful-base/train"].dropped == {"chosen and rejected differ before the last answer": 2}
    assert read["helpful-base/train"].notes == {"with an empty final answer, kept": 1}


# The stream


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(make_tiny_tokenizer(), principle_text="be safe", plain_system="")


def make_prompts(count: int, *, word: str = "word") -> list[Prompt]:
    return [Prompt(f"p{index}", ({"role": "user", "content": f"{word} {index}"},)) for index in range(count)]


def ids(rendered) -> list[str]:
    return [item.prompt.id for item in rendered]


@given(count=st.integers(2, 12), held_out=st.integers(0, 11), seed=st.integers(0, 2**31 - 1), draws=st.lists(
    st.integers(0, 30), min_size=1, max_size=6))  # fmt: skip
def test_a_pass_yields_every_training_prompt_once_and_never_a_held_out_one(renderer, count, held_out, seed, draws):
    held_out %= count
    stream = PromptStream(make_prompts(count), renderer, seed=seed, held_out=held_out)
    drawn = [item for number in draws for item in stream.next(number)]
    assert len(drawn) == sum(draws)
    per_pass = count - held_out
    training = set(ids(make_rendered(renderer, count))) - set(ids(stream.held_out))
    assert len(training) == per_pass and len(stream.held_out) == held_out
    for start in range(0, len(drawn), per_pass):
        one_pass = [name.partition("#")[0] for name in ids(drawn[start : start + per_pass])]
        assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= training


def make_rendered(renderer, count):
    return renderer.render_all(make_prompts(count))


def test_orders_depend_on_seed_and_pass_and_repeat(renderer):
    def passes(seed, **options):
        stream = PromptStream(make_prompts(20), renderer, seed=seed, **options)
        return [ids(stream.next(20 - len(stream.held_out))) for _ in range(3)], ids(stream.held_out)

    orders, held_out = passes(1, held_out=4)
    assert len({tuple(order) for order in orders}) == 3
    assert passes(1, held_out=4) == (orders, held_out)
    assert passes(2)[0] != passes(1)[0] and passes(2, held_out=4)[1] != held_out
    assert passes(1, held_out=2)[1] == held_out[:2], "fewer held-out prompts are the first of more"
    unshuffled, _ = passes(1, shuffle=False)
    assert unshuffled == [[f"p{index}" for index in range(20)]] * 3


@given(before=st.integers(0, 40), after=st.integers(1, 40))
def test_a_stream_goes_on_from_its_state_exactly(renderer, before, after):
    def make():
        return PromptStream(make_prompts(9), renderer, seed=3, held_out=2)

    stream, resumed = make(), make()
    stream.next(before)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed.next(5)
    resumed.load_state_dict(state)
    assert ids(resumed.next(after)) == ids(stream.next(after))
    assert resumed.state_dict() == stream.state_dict()


def test_a_state_of_other_prompts_or_settings_is_refused(renderer):
    def make(prompts, with_renderer=renderer, **options):
        return PromptStream(prompts, with_renderer, **{"seed": 0, "held_out": 1} | options)

    state = make(make_prompts(6)).state_dict()
    make(make_prompts(6)).load_state_dict(state)
    other_principle = ChatRenderer(make_tiny_tokenizer(), principle_text="be kind", plain_system="")
    renamed = [Prompt("q" + prompt.id, prompt.messages) for prompt in make_prompts(6)]
    for other in (
        make(make_prompts(7)),
        make(make_prompts(6, word="other")),
        make(make_prompts(6)[::-1]),
        make(renamed),
        make(make_prompts(6), other_principle),
        make(make_prompts(6), seed=1),
        make(make_prompts(6), shuffle=False),
        make(make_prompts(6), held_out=2),
    ):
        with pytest.raises(ValueError, match="belongs to other prompts"):
            other.load_state_dict(state)


def test_prompts_over_the_limit_are_dropped_and_counted_never_cut(renderer):
    prompts = make_prompts(5) + [Prompt("long", ({"role": "user", "content": "word " * 40},))]
    hostile = Prompt("hostile", ({"role": "user", "content": "a <|im_end|>"},))
    lengths = {item.prompt.id: len(item.policy_ids) for item in renderer.render_all([*prompts, hostile])}
    stream = PromptStream([*prompts, hostile], renderer, seed=0, max_prompt_tokens=lengths["hostile"], held_out=2)
    kept = [*stream.held_out, *stream.next(4)]
    assert sorted(ids(kept)) == ["hostile", "p0", "p1", "p2", "p3", "p4"]
    assert all(len(item.policy_ids) == lengths[item.prompt.id] for item in kept)
    report = stream.report
    assert (report.num_prompts, report.num_training, report.num_held_out, report.num_too_long) == (7, 4, 2, 1)
    assert report.num_control_text == 1 and report.longest_tokens == lengths["hostile"]
    assert "7 prompts: 4 to train on, 2 held out, 1 dropped over" in str(report) and "\n" not in str(report)
    assert PromptStream(prompts, renderer, seed=0, max_prompt_tokens=lengths["long"]).report.num_too_long == 0
    assert PromptStream(prompts, renderer, seed=0, max_prompt_tokens=lengths["long"] - 1).report.num_too_long == 1


def test_nothing_left_to_train_on_is_an_error(renderer):
    for options in ({"held_out": 5}, {"held_out": 6}, {"max_prompt_tokens": 3}):
        with pytest.raises(ValueError, match=r"prompts\.held_out=\d: expected fewer than the \d prompts"):
            PromptStream(make_prompts(5), renderer, seed=0, **options)


@needs_real_data
@pytest.mark.parametrize("template", ["", "vicuna", "zephyr"])
def test_real_conversations_render_with_every_template(template):
    prompts, _ = load_prompts(REAL_DATA / "harmless-base" / "test.jsonl.gz")
    renderer = ChatRenderer(
        make_tiny_tokenizer(),
        principle_text=load_principle("default"),
        plain_system=None if template == "vicuna" else "",
        chat_template=load_chat_template(template),
    )
    stream = PromptStream(prompts, renderer, seed=0, max_prompt_tokens=1200, held_out=8)
    assert stream.report.num_training + stream.report.num_too_long + 8 == len(prompts)
    for item in stream.next(20):
        better, plain = (np.concatenate([prefix, item.prompt_ids]) for prefix in item.prefix_ids)
        assert len(better) > len(plain) and item.prompt.messages[0]["content"] in renderer.tokenizer.decode(plain)


def test_a_prompt_equal_to_a_held_out_one_is_not_trained_on(renderer):
    prompts = make_prompts(6)
    stream = PromptStream([*prompts, *prompts[:3]], renderer, seed=0, held_out=4)
    held_out = {item.policy_ids.tobytes() for item in stream.held_out}
    assert not held_out & {item.policy_ids.tobytes() for item in stream.training}
    assert stream.report.num_equal_to_held_out == 9 - 4 - len(stream.training) > 0
    with pytest.raises(ValueError, match="every other prompt is equal to a held-out one"):
        PromptStream([prompts[0]] * 3, renderer, seed=0, held_out=1)
