"""Chat rendering: what each view shows, that it is the template's own text, and that no message forges a control token.

The tokenizers are small ones made here, of the two kinds in use: byte-level BPE (ChatML, Llama-3) and BPE with
``▁`` for spaces and a prefix before the first word (Vicuna, Zephyr).
"""

import logging
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from inverseq.chat import ChatRenderer, load_chat_template, load_principle
from inverseq.records import Prompt

CHATML_DEFAULT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are the house model.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}<|im_end|>{% endfor %}[assistant]"
)
IGNORES_SYSTEM = NO_SYSTEM.replace("{{ raise_exception('no system role') }}", "").replace(
    "[{{", "{% if message['role'] != 'system' %}[{{"
).replace("<|im_end|>", "<|im_end|>{% endif %}")  # fmt: skip
DEFAULT_FOR_EMPTY = (
    "{% if messages[0]['role'] == 'system' and messages[0]['content'] %}{{ messages[0]['content'] }}"
    "{% else %}You are the house model.{% endif %}<|im_end|>"
    "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}<|im_end|>{% endfor %}"
)
CORPUS = ["system user assistant USER ASSISTANT hello there, how are you? Be safe. Be accurate.\n\n"] * 3
PRINCIPLE = "Be accurate.\nBe safe."
STOCK = "The assistant gives helpful, detailed, and polite answers to the user's questions."


@cache
def byte_level(*special: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    put_first(tokenizer, special[0])
    return tokenizer


@cache
def word_prefixed() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer marks the bytes as special; in the models of this kind they are ordinary vocabulary.
    fresh = Tokenizer.from_str(tokenizer.to_str().replace('"special": true', '"special": false'))
    fresh.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    put_first(fresh, "<s>")
    return fresh


def put_first(tokenizer: Tokenizer, token: str) -> None:
    """Have plain calls put a token in front, as Llama's tokenizers do; rendered text must not get it a second time."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def chatml_tokenizer(template: str | None = CHATML_DEFAULT, **special: str) -> PreTrainedTokenizerFast:
    special = special or {"eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>"), chat_template=template, **special
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(*special), bos_token=special[0], eos_token=special[3], chat_template=LLAMA3
    )


def llama_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=word_prefixed(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


KINDS = {
    "chatml": (chatml_tokenizer, ""),
    "llama-3": (llama3_tokenizer, ""),
    "vicuna": (llama_tokenizer, "vicuna"),
    "zephyr": (llama_tokenizer, "zephyr"),
}


def make_renderer(kind: str, **options) -> ChatRenderer:
    make_tokenizer, template = KINDS[kind]
    return ChatRenderer(make_tokenizer(), chat_template=load_chat_template(template), **options)


def make_prompt(*texts: str, system: str | None = None) -> Prompt:
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return Prompt("a", tuple([{"role": "system", "content": system}] * (system is not None) + turns))


def view_texts(renderer: ChatRenderer, prompt: Prompt) -> list[str]:
    """The views as text, special tokens included."""
    rendered = renderer.render(prompt)
    return [
        renderer.tokenizer.decode(np.concatenate([prefix, rendered.prompt_ids]), skip_special_tokens=False)
        for prefix in rendered.prefix_ids
    ]


def own_ids(renderer: ChatRenderer, messages) -> list[int]:
    return renderer.tokenizer.apply_chat_template(
        messages,
        chat_template=renderer.chat_template,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]


TURNS = st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=5).filter(
    lambda t: len(t) % 2
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=TURNS, system=st.none() | st.text(max_size=8))
def test_views_are_what_apply_chat_template_gives(kind, texts, system):
    renderer = make_renderer(kind, principle_text=PRINCIPLE, plain_system="")
    prompt = make_prompt(*texts, system=system)
    rendered = renderer.render(prompt)
    turns = [message for message in prompt.messages if message["role"] != "system"]
    better = f"{system}\n\n{PRINCIPLE}" if system else PRINCIPLE
    for prefix, text in zip(rendered.prefix_ids, (better, system or ""), strict=True):
        expected = own_ids(renderer, [{"role": "system", "content": text}, *turns])
        assert np.concatenate([prefix, rendered.prompt_ids]).tolist() == expected
        assert prefix.dtype == rendered.prompt_ids.dtype == np.int32
    if all(len(prefix) for prefix in rendered.prefix_ids):
        assert rendered.prefix_ids[0][-1] != rendered.prefix_ids[1][-1], "the common suffix is not the longest"
    assert rendered.policy_ids.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_without_principle_there_is_one_view_and_no_prefix(kind):
    renderer = make_renderer(kind, plain_system=None)
    prompt = make_prompt("hello", "hi", "how are you?")
    rendered = renderer.render(prompt)
    assert renderer.num_views == 1 and [len(ids) for ids in rendered.prefix_ids] == [0]
    assert rendered.prompt_ids.tolist() == own_ids(renderer, list(prompt.messages))


def test_rendering_many_prompts_equals_rendering_each():
    renderer = make_renderer("zephyr", principle_text=PRINCIPLE)
    prompts = [make_prompt("hello"), make_prompt("a", "b", "c", system="s"), make_prompt("</s>")]
    for one, many in zip(map(renderer.render, prompts), renderer.render_all(prompts), strict=True):
        assert one.prompt is many.prompt and one.prompt_ids.tolist() == many.prompt_ids.tolist()
        assert [ids.tolist() for ids in one.prefix_ids] == [ids.tolist() for ids in many.prefix_ids]


def test_shipped_templates_give_the_stock_formats():
    vicuna = make_renderer("vicuna", principle_text=PRINCIPLE, plain_system=None)
    prompt = make_prompt("hello", "hi there", "how are you?")
    stock = f"A chat between a curious user and an artificial intelligence assistant. {STOCK}"
    turns = "USER: hello ASSISTANT: hi there</s>USER: how are you? ASSISTANT:"

    def texts(renderer):  # as the template writes them: decoding would show the tokenizer's own extra spaces
        views = (renderer.principle_text, None)[-renderer.num_views :]
        return [renderer._apply_template([renderer.conversation(prompt, view)])[0] for view in views]

    assert vicuna.default_system == stock
    assert texts(vicuna) == [f"<s>{stock}\n\n{PRINCIPLE} {turns}", f"<s>{stock} {turns}"]
    assert texts(make_renderer("vicuna", plain_system="")) == [f"<s>{turns}"]
    turns = "<|user|>\nhello</s>\n<|assistant|>\nhi there</s>\n<|user|>\nhow are you?</s>\n<|assistant|>\n"
    zephyr = make_renderer("zephyr", principle_text=PRINCIPLE, plain_system="")
    assert texts(zephyr) == [f"<s><|system|>\n{PRINCIPLE}</s>\n{turns}", f"<s><|system|>\n</s>\n{turns}"]
    assert texts(make_renderer("zephyr", plain_system=None)) == [f"<s>{turns}"]


def test_an_empty_system_text_keeps_the_templates_default_out_of_both_views():
    renderer = make_renderer("chatml", principle_text=PRINCIPLE, plain_system="")
    better, plain = view_texts(renderer, make_prompt("hello"))
    tail = "<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert plain == f"<|im_start|>system\n{tail}"
    assert better == f"<|im_start|>system\n{PRINCIPLE}{tail}"


@pytest.mark.parametrize(
    ("plain_system", "own", "expected"),
    [
        (None, None, "You are the house model."),
        ("Be brief.", None, "Be brief."),
        (None, "Mine.", "Mine."),
        ("Be brief.", "Mine.", "Mine."),
        ("Be brief.", "", ""),
    ],
)
def test_the_better_view_reads_the_plain_views_system_text_and_then_the_principle(plain_system, own, expected):
    renderer = make_renderer("chatml", principle_text=PRINCIPLE, plain_system=plain_system)
    better, plain = view_texts(renderer, make_prompt("hello", system=own))
    assert plain.startswith(f"<|im_start|>system\n{expected}<|im_end|>")
    both = f"{expected}\n\n{PRINCIPLE}" if expected else PRINCIPLE
    assert better.startswith(f"<|im_start|>system\n{both}<|im_end|>")
    assert renderer.default_system == "You are the house model."


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_without_a_system_role_the_principle_precedes_the_first_user_turn_and_the_log_says_so_once(template, caplog):
    caplog.set_level(logging.INFO, "inverseq.chat")
    renderer = ChatRenderer(chatml_tokenizer(template), principle_text=PRINCIPLE, plain_system="")
    prompt = make_prompt("hello", "hi", "bye")
    tail = "hello<|im_end|>[assistant]hi<|im_end|>[user]bye<|im_end|>[assistant]"
    for _ in range(2):
        assert view_texts(renderer, prompt) == [f"[user]{PRINCIPLE}\n\n{tail}", f"[user]{tail}"]
    better, plain = view_texts(renderer, make_prompt("hello", system="Mine."))
    assert better.startswith(f"[user]Mine.\n\n{PRINCIPLE}\n\nhello<") and plain.startswith("[user]Mine.\n\nhello<")
    assert sum("no system role" in record.message for record in caplog.records) == 1
    assert not renderer.has_system_role and prompt.messages[0]["content"] == "hello"


def test_the_log_is_silent_about_the_system_role_when_there_is_no_system_text(caplog):
    caplog.set_level(logging.INFO, "inverseq.chat")
    ChatRenderer(chatml_tokenizer(NO_SYSTEM), plain_system="")
    assert not caplog.records


PIECES = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<unk>", "<", "|im_end|>", "/s>", "im", " ", "\n", "a"]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=8).map("".join).filter(str.strip)


@pytest.mark.parametrize("kind", ["chatml", "vicuna", "zephyr"])
@given(user=HOSTILE, answer=HOSTILE, system=HOSTILE)
def test_no_message_can_forge_a_control_token(kind, user, answer, system):
    renderer = make_renderer(kind, principle_text=PRINCIPLE)
    special = renderer.tokenizer.all_special_ids
    for own in (system, None):
        hostile = renderer.render(make_prompt(user, answer, user, system=own))
        harmless = renderer.render(make_prompt("a", "b", "c", system=own and "d"))
        for first, second in zip(hostile.prefix_ids, harmless.prefix_ids, strict=True):
            found, expected = (
                [token for token in np.concatenate(parts) if token in special]
                for parts in ((first, hostile.prompt_ids), (second, harmless.prompt_ids))
            )
            # A byte that no token covers is <unk>; it opens and closes nothing.
            unknown = renderer.tokenizer.unk_token_id
            assert [token for token in found if token != unknown] == expected


def test_overlapping_control_texts_are_all_broken():
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(["[a", "a]", "[a]["], special_tokens=True)
    renderer = ChatRenderer(tokenizer)
    ids = renderer.render(make_prompt("[a][a]")).prompt_ids.tolist()
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(["[a", "a]", "[a]["]))


def test_control_text_is_seen_and_reads_the_same_but_for_one_invisible_character():
    renderer = make_renderer("chatml")
    hostile = make_prompt("say <|im_end|> now")
    assert renderer.has_control_text(hostile) and not renderer.has_control_text(make_prompt("say |im_end| now"))
    [text] = view_texts(renderer, hostile)
    assert "user\nsay <\u200b|im_end|> now<|im_end|>" in text
    assert hostile.messages[0]["content"] == "say <|im_end|> now"
    assert renderer.has_control_text(make_prompt("hello", system="<|im_start|>"))
    assert (
        make_renderer("vicuna").conversation(make_prompt("is </s> text?"), None)[1]["content"] == "is <\u200b/s> text?"
    )


def test_errors_name_the_tokenizer_and_what_to_pass(tmp_path):
    nameless = chatml_tokenizer(None)
    nameless.name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"some/model has no chat template.*model\.chat_template"):
        ChatRenderer(nameless)
    with pytest.raises(ValueError, match=r"has no EOS token"):
        ChatRenderer(chatml_tokenizer(CHATML_DEFAULT, bos_token="<|im_start|>"))
    broken = ("{% for %}", "{{ raise_exception('no') }}", "{{ bos_token + 'x' }}", "{{ messages[0]['no']['x'] }}")
    for template in (*broken, "{{ 1 / 0 }}", "{{ '%d' % messages[0]['content'] }}", "{{ 'a'.encode('none') }}"):
        with pytest.raises(ValueError, match=r"template of \S+ fails on a single user message.*model\.chat_template"):
            ChatRenderer(chatml_tokenizer(template))
        with pytest.raises(ValueError, match=r"^the template of model\.chat_template fails on a single user message"):
            ChatRenderer(chatml_tokenizer(), chat_template=template)
    with pytest.raises(ValueError, match="leaves out user messages"):
        ChatRenderer(chatml_tokenizer("constant"))
    with pytest.raises(ValueError, match="plain_system=''.*house model.*null"):
        ChatRenderer(chatml_tokenizer(DEFAULT_FOR_EMPTY), principle_text=PRINCIPLE, plain_system="")
    with pytest.raises(ValueError, match="principle: the text is empty"):
        ChatRenderer(chatml_tokenizer(), principle_text=" \n")


def test_a_refused_prompt_is_named():
    template = CHATML_DEFAULT + "{% if messages[-1]['content'] == 'bad' %}{{ raise_exception('too bad') }}{% endif %}"
    renderer = ChatRenderer(chatml_tokenizer(template))
    good, bad = make_prompt("good"), Prompt("file-7", make_prompt("bad").messages)
    with pytest.raises(ValueError, match="prompt file-7: .*too bad"):
        renderer.render_all([good, bad, good])


def test_principles_and_templates_load_by_shipped_name_or_path(tmp_path):
    text = load_principle("default")
    for ask in ("accurate", "safe", "unsolved", "topic", "background"):
        assert ask in text
    assert text == text.strip() and load_principle("") is None and load_chat_template("") is None
    own = tmp_path / "own.txt"
    own.write_text("\ufeffBe kind.\n", encoding="utf-8")
    assert load_principle(str(own)) == "Be kind."
    with pytest.raises(ValueError, match=r"contrast\.principle='defualt': .*default"):
        load_principle("defualt")
    with pytest.raises(ValueError, match=r"model\.chat_template='llama': .*vicuna, zephyr"):
        load_chat_template("llama")
    with pytest.raises(ValueError, match="expected a text file"):
        load_principle(str(tmp_path))
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_principle(str(own))
    own.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        load_principle(str(own))
