"""Chat templates and tokenizers of every family: where an answer begins, what ends it, what a template drops. In each
case what is right comes from transformers' own rendering of the whole conversation."""

import pytest
from conftest import CHATML
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from contexts import BadInput, answer_text, open_chat

# In the manner of each family, shortened.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n\n' }}{% endif %}"
)
NO_HEADER = CHATML[: CHATML.index("{% if add_generation_prompt")]
THINKING = (  # Qwen3: an empty thought before a given answer, earlier thoughts dropped
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].strip() %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
R1 = (  # the header opens a thought, a given answer has none
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<U>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
)
SPACE = (  # a header that ends in a space
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LAST_ONLY = "{{ '<U>' + messages[-1].content + '<A>' }}"
DATED = "{{ strftime_now('%d %B %Y') }}" + CHATML
WORDS = ["Ar", "Arr", "▁A", "▁Ar", "▁Arr", "▁▁", "[", "▁["]
MERGES = [("▁", "A"), ("▁A", "r"), ("▁Ar", "r"), ("A", "r"), ("Ar", "r"), ("▁", "▁"), ("▁", "[")]


def byte_level(adds):
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ar", "Arr", "ĠA", "ĠAr", "ĠArr"]
    merges = [("Ġ", "A"), ("ĠA", "r"), ("ĠAr", "r"), ("A", "r"), ("Ar", "r")]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece(adds):  # as Llama 2's: a text begins with a space, and spaces are letters
    symbols = [f"<0x{i:02X}>" for i in range(256)] + [
        chr(i) for i in range(33, 127) if chr(i) != "["
    ]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, "▁", *WORDS])}
    model = models.BPE(vocab=vocabulary, merges=MERGES, byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def make(folder, template, kind=byte_level, adds="", eos="<|im_end|>", ends=None, more=()):
    """A tokenizer's folder -> (its name, its size). `adds`: what it puts around a text, e.g. "bos $A eos"."""
    tokenizer = kind(adds)
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot|>",
        "<|head|>",
        "<s>",
        "</s>",
        "<U>",
        "<A>",
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    if adds:
        pairs = [(token, tokenizer.token_to_id(token)) for token in ("<s>", eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=pairs)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(fast), eos_token_id=[fast.convert_tokens_to_ids(t) for t in ends or [eos]]
    ).save_pretrained(folder)
    return str(folder), len(fast)


def opened(folder, template, kind=byte_level, **how):
    args = how.pop("template_args", {})
    name, size = make(folder, template, kind, **how)
    return open_chat(name, size, **args), AutoTokenizer.from_pretrained(name)


FAMILIES = {  # template, tokenizer, end token, what stands before the answer, and what ends it
    "ChatML": (CHATML, byte_level, "<|im_end|>", "", "<|im_end|>"),
    "ChatML on a base model's tokenizer": (CHATML, byte_level, "<|endoftext|>", "", "<|im_end|>"),
    "Llama 2": (LLAMA2, sentence_piece, "</s>", " ", " </s>"),
    "Llama 3": (LLAMA3, byte_level, "<|endoftext|>", "", "<|eot|>"),
    "Qwen 3": (THINKING, byte_level, "<|im_end|>", "<think>\n\n</think>\n\n", "<|im_end|>"),
    "none": (None, byte_level, "<|endoftext|>", " ", "<|endoftext|>"),
    "none, SentencePiece": (None, sentence_piece, "</s>", " ", "</s>"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["Arr", "No. Arr!"])
def test_a_target_is_what_the_template_writes_after_the_header(tmp_path, family, answer):
    template, kind, eos, before, after = FAMILIES[family]
    chat, tokenizer = opened(tmp_path, template, kind, eos=eos)
    header, y = chat.render(None, "Hi"), chat.target("Hi", answer)
    assert y[-1] in chat.ends and y[-1] == tokenizer.convert_tokens_to_ids(after.strip())
    if template:
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        theirs = tokenizer.apply_chat_template(said, return_dict=False)
    else:
        text = f"Question: Hi\n\nAnswer: {answer}{after}"
        theirs = tokenizer.encode(text, add_special_tokens=False)
    assert header + y == theirs[: len(header + y)]
    assert tokenizer.decode(theirs).startswith(tokenizer.decode(header) + before + answer + after)
    apart = tokenizer.encode(answer, add_special_tokens=False)
    assert kind is byte_level or family == "ChatML" or y[: len(apart)] == apart  # "▁Arr"


def test_student_and_teacher_end_in_the_same_header_and_read_the_same_answer(tmp_path):
    for i, (template, kind, eos, *_) in enumerate(FAMILIES.values()):
        chat, _ = opened(tmp_path / str(i), template, kind, eos=eos)
        shown = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Arr"}]
        student, teacher = chat.render(None, "Hi"), chat.render(shown, "Hi")
        tail = student[-3:]
        assert teacher[-3:] == tail and len(teacher) > len(student)


@pytest.mark.parametrize(
    "case, template, message",
    [
        ("header", NO_HEADER, "chat template writes no header for add_generation_prompt"),
        ("type", "{{ messages + 1 }}", "TypeError"),
        ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("syntax", "{% if %}", "TemplateSyntaxError"),
        ("refusal", "{{ raise_exception('not today') }}", "not today"),
        ("range", "{{ messages[7].content }}", "UndefinedError"),
    ],
)
def test_templates_that_cannot_be_used_are_one_line(tmp_path, case, template, message):
    with pytest.raises(BadInput) as error:
        opened(tmp_path, template)
    assert str(tmp_path) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template, why", [(R1, "under another header"), (SPACE, "under another header")]
)
def test_a_given_answer_that_does_not_continue_the_header_is_refused_for_sft_alone(
    tmp_path, template, why
):
    chat, _ = opened(tmp_path, template)
    assert chat.render(None, "Hi")
    with pytest.raises(BadInput, match=why):
        chat.target("Hi", "Arr")


# --------------------------------------------------------------------------------------- end tokens
@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (["<|endoftext|>"], None, {"<|im_end|>", "<|endoftext|>"}),  # there is no generation config
        (["<|endoftext|>", "<|eot|>"], None, {"<|im_end|>", "<|endoftext|>", "<|eot|>"}),
        (["<|endoftext|>"], ["<|eot|>"], {"<|im_end|>", "<|endoftext|>", "<|eot|>"}),
        (
            ["<|eot|>"],
            ["<|head|>"],
            {"<|im_end|>", "<|endoftext|>", "<|head|>"},
        ),  # as generate does
    ],
)
def test_end_tokens_come_from_where_generate_takes_them_and_from_the_template(
    tmp_path, config, generation, expected
):
    name, size = make(tmp_path, CHATML, eos="<|endoftext|>", ends=config)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if generation:
        ids = tokenizer.convert_tokens_to_ids(generation)
        GenerationConfig(eos_token_id=ids).save_pretrained(name)
    chat = open_chat(name, size)
    assert chat.ends == set(tokenizer.convert_tokens_to_ids(sorted(expected)))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, "x"]}', '{"eos_token_id": -7}'],
)
def test_a_damaged_generation_config_is_refused(tmp_path, text):
    name, size = make(tmp_path, CHATML)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(BadInput, match=f"{name}: its end tokens: "):
        open_chat(name, size)


# ---------------------------------------------------------------------------------- prompts as meant
@pytest.mark.parametrize(
    "adds, begins", [("$A", False), ("<s> $A", True), ("<s> $A </s>", True), ("$A </s>", False)]
)
@pytest.mark.parametrize("template", [None, CHATML])
def test_a_prompt_begins_as_the_tokenizer_wants_and_never_ends_in_an_end_token(
    tmp_path, template, adds, begins
):
    chat, tokenizer = opened(tmp_path, template, eos="</s>", adds=adds)
    ids = chat.render(None, "Hi")
    assert (ids[0] == tokenizer.bos_token_id) == (begins and template is None)
    assert tokenizer.eos_token_id not in ids and ids.count(tokenizer.bos_token_id) == (
        ids[0] == tokenizer.bos_token_id
    )
    assert chat.decode(ids).endswith("Answer:" if template is None else "<|im_start|>assistant\n")


@pytest.mark.parametrize("kind", [byte_level, sentence_piece])
@pytest.mark.parametrize("template", [None, CHATML])
def test_control_tokens_in_a_users_text_are_text(tmp_path, template, kind):
    chat, tokenizer = opened(tmp_path, template, kind)
    asked = "What does <|im_end|> mean, <s>old</s>?"
    plain, spelled = chat.render(None, "What"), chat.render(None, asked)
    special = set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<s>", "</s>"]))
    assert [t for t in spelled if t in special] == [t for t in plain if t in special]
    assert asked in chat.decode(spelled)
    taught = chat.target("Hi", "It is <|im_end|>, you see")
    assert [t in chat.ends for t in taught] == [False] * (len(taught) - 1) + [True]
    chat, tokenizer = opened(
        tmp_path / "2", CHATML + "{% if false %}<think></think>{% endif %}", kind
    )
    thought = chat.target("Hi", "<think>so</think>Arr")  # no control token: a demonstration's own
    assert tokenizer.convert_tokens_to_ids("</think>") in thought


def test_a_turn_that_the_template_drops_is_found_whatever_its_words(tmp_path):
    dropping = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    chat, _ = opened(tmp_path / "system", dropping)
    for system in ("Be a pirate.", "Hi", "user", "a"):
        with pytest.raises(BadInput, match="drops one of .'system', 'user'.*give C as turns"):
            chat.render(system, "Hi there, user, a")
    chat, _ = opened(tmp_path / "last", LAST_ONLY)
    assert chat.render(None, "Hi")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    with pytest.raises(BadInput, match="drops one of"):
        chat.render(turns, "Hi")


def test_a_template_with_a_date_reads_the_same_tomorrow(tmp_path, monkeypatch):
    import transformers.utils.chat_template_utils as theirs

    chat, tokenizer = opened(tmp_path, DATED)
    today = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "26 Jul 2024" not in today
    text = chat.decode(chat.render(None, "Hi"))
    assert text.startswith("26 Jul 2024<|im_start|>user")
    monkeypatch.setattr(theirs, "datetime", None)
    assert chat.decode(chat.render(None, "Hi")) == text


# ------------------------------------------------------------------------------------- thinking
def test_arguments_of_the_template(tmp_path):
    on, _ = opened(tmp_path / "on", THINKING)
    off, _ = opened(tmp_path / "off", THINKING, template_args={"enable_thinking": False})
    assert (
        off.decode(off.render(None, "Hi"))
        == on.decode(on.render(None, "Hi")) + "<think>\n\n</think>\n\n"
    )
    assert off.decode(off.target("Hi", "Arr")) == "Arr<|im_end|>"
    assert on.decode(on.target("Hi", "Arr")) == "<think>\n\n</think>\n\nArr<|im_end|>"


def test_a_thought_in_an_earlier_turn_is_left_to_the_template(tmp_path):
    chat, _ = opened(tmp_path, THINKING)
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "<think>hm</think>Arr"},
    ]
    text = chat.decode(chat.render(turns, "Hi"))
    assert "assistant\nArr<|im_end|>" in text and "hm" not in text


@pytest.mark.parametrize(
    "template, said, read",
    [
        (THINKING, "<think>\n\n</think>\n\n42<|im_end|>", "42"),
        (THINKING, "<think>5 and 6</think>\n\n42<|im_end|>", "42"),
        (THINKING, "42<|im_end|>", "42"),
        (THINKING, "<think>so 42", " …"),
        (THINKING, "<think>so</think>it is 4", "it is 4 …"),
        (R1, "so 42 then\n</think>\n\n7<|im_end|>", "7"),
        (R1, "so 42 then", " …"),
        (R1, "42<|im_end|>", ""),  # the thought was never closed
        (CHATML, "42", "42 …"),
        (CHATML, "2 < 3 </think> 42<|im_end|>", "2 < 3 </think> 42"),
    ],
)
def test_scores_read_the_answer_without_its_thought(tmp_path, template, said, read):
    chat, tokenizer = opened(tmp_path, template)
    assert answer_text(chat, tokenizer.encode(said, add_special_tokens=False)) == read
