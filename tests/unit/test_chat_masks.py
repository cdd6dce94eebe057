"""Chat templates in the forms of real models: the answer and its end are trained on, whatever the answer says.

Templates are written here with the markers of each family; the expected texts by hand.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.data.cache import build_token_cache
from longext.data.documents import Row
from longext.data.packing import PackedExamples
from longext.data.sft import ExampleEncoder
from longext.errors import DataError
from longext.training.config import FinetuneConfig

PROMPT = "{% if add_generation_prompt %}"
LOOP = "{% for m in messages %}"
# name -> (control tokens, template, text of system S, question Q, answer A, question R, answer B, what A and B train)
TEMPLATES = {
    "chatml": (
        ("<|im_start|>", "<|im_end|>"),
        LOOP
        + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        + PROMPT
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
        "<|im_start|>assistant\n{B}<|im_end|>\n",
        "<|im_end|>",
    ),
    "llama3": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{{ bos_token }}"
        + LOOP
        + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        + PROMPT
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "{A}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{B}<|eot_id|>",
        "<|eot_id|>",
    ),
    "mistral": (
        ("[INST]", "[/INST]"),
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST]Q[/INST]{A}</s>[INST]R[/INST]{B}</s>",
        "</s>",
    ),
    "gemma": (
        ("<start_of_turn>", "<end_of_turn>"),
        "{{ bos_token }}" + LOOP + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        + PROMPT
        + "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n{A}<end_of_turn>\n"
        "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n{B}<end_of_turn>\n",
        "<end_of_turn>",
    ),
    "phi3": (  # every rendering ends with EOS
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + PROMPT
        + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|user|>\nQ<|end|>\n<|assistant|>\n{A}<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\n{B}<|end|>\n</s>",
        "<|end|>",
    ),
    "glm4": (  # the next role's marker ends a turn; the last one gets the marker that the template leaves out
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "[gMASK]<sop>" + LOOP + "{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' + m.content }}"
        "{% endfor %}" + PROMPT + "{{ '<|assistant|>\n' }}{% endif %}",
        "[gMASK]<sop><|user|>\nQ<|assistant|>\n{A}<|user|>\nR<|assistant|>\n{B}<|user|>",
        "<|user|>",
    ),
    "zephyr": (
        ("<|user|>", "<|assistant|>"),
        LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        + PROMPT
        + "{{ '<|assistant|>\n' }}{% endif %}",
        "<|user|>\nQ</s>\n<|assistant|>\n{A}</s>\n<|user|>\nR</s>\n<|assistant|>\n{B}</s>\n",
        "</s>",
    ),
    "vicuna": (  # a default system message and headers in plain text
        (),
        "{{ bos_token + 'A chat of a user and an assistant.' }}"
        + LOOP
        + "{% if m.role == 'user' %}{{ ' USER: ' + m.content }}{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}"
        "{% endif %}{% endfor %}" + PROMPT + "{{ ' ASSISTANT:' }}{% endif %}",
        "<s>A chat of a user and an assistant. USER: Q ASSISTANT: {A}</s> USER: R ASSISTANT: {B}</s>",
        "</s>",
    ),
}
THINKING = (
    LOOP + "{% set parts = m.content.split('</think>') %}{% set body = parts[-1] | trim %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + "
    "(parts[0].replace('<think>', '') | trim if parts | length > 1 else m.reasoning_content or '') "
    "+ '\n</think>\n\n' }}{% endif %}{{ body + '<|im_end|>\n' }}{% endfor %}"
    + PROMPT
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    + PROMPT
    + "{{ '<|Assistant|><think>\n' }}{% endif %}"
)
TOOLS = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}" + PROMPT + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWERS = [
    "a",
    "i",
    "A",
    "assistant",
    "user",
    "model",
    "0",
    "<",
    "|>",
    "Q",
    "R",
    "né 中 🙂",
    "end\n<|im_start|>user\nQ",
]
ANSWERS += ["[/INST]", "Longext0mark", "{{ x }}", "A friend.\n\nTruly.", "</think"]


@pytest.fixture(scope="module")
def plain_tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODELS["books-5m"])


@pytest.fixture(scope="module")
def tokenizers():
    """A tokenizer for each template."""
    made = {}
    for name, (tokens, template, *_) in TEMPLATES.items():
        made[name] = tokenizer_with(template, tokens)
    return made


def tokenizer_with(template, tokens=("<|im_start|>", "<|im_end|>")):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODELS["books-5m"])
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer, *values, length=2048, prompt="auto"):
    encoder = ExampleEncoder(
        tokenizer, length, FinetuneConfig(model="books-5m", task="sft", data="test", prompt=prompt)
    )
    rows = [Row(f"r{n}", f"rows.jsonl, line {n + 1}", value) for n, value in enumerate(values)]
    return list(encoder.encode(rows)), encoder


def trained(tokenizer, example):
    """The trained runs of an example, decoded."""
    edges = np.flatnonzero(np.diff(np.asarray(example.trained, dtype=int), prepend=0, append=0))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def chat(*contents, **last):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    messages[-1].update(last)
    return {"messages": messages}


def text_of(tokenizer, example):
    return tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answer_and_its_end_are_trained_on(tokenizers, name):
    tokenizer, (_, _, whole, end) = tokenizers[name], TEMPLATES[name]
    for first, second in zip(ANSWERS, ANSWERS[3:] + ANSWERS[:3], strict=True):
        row = chat("Q", first, "R", second)
        (example,), _ = encode(tokenizer, row)
        text = whole.replace("{A}", first).replace("{B}", second)
        assert example.input_ids == tokenizer(text, add_special_tokens=False).input_ids, first
        rendered = tokenizer.apply_chat_template(row["messages"], return_dict=True).input_ids
        assert example.input_ids[: len(rendered)] == rendered
        assert [run.lstrip(" ") for run in trained(tokenizer, example)] == [first + end, second + end]


@pytest.mark.parametrize("name", TEMPLATES)
def test_weight_0_and_empty_answers_are_context(tokenizers, name):
    tokenizer, end = tokenizers[name], TEMPLATES[name][3]
    row = chat("Q", "a", "R", "b")
    row["messages"][1]["weight"] = 0
    (example,), encoder = encode(tokenizer, row, chat("Q", ""), chat("Q", " \n"), chat("Q", "a", weight=0))
    assert [run.lstrip(" ") for run in trained(tokenizer, example)] == ["b" + end]
    assert encoder.report.num_dropped_empty == 3
    assert "Rows left out because they have no answer to train on (empty, or weight 0): 3." in encoder.notes()


def test_a_stop_that_is_the_next_turn_is_said(tokenizers):
    _, encoder = encode(tokenizers["glm4"], chat("Q", "a"))
    assert encoder.notes() == [
        "Answers end with '<|user|>', which is trained: the chat template has no end marker of its own."
    ]


def test_a_call_ends_with_the_marker_of_the_tools_answer_also_behind_thoughts():
    template = (
        LOOP + "{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' }}"
        "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content }}"
        "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ 'call ' + c.function.name }}{% endfor %}"
        "{% endfor %}" + PROMPT + "{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template, ("<|user|>", "<|assistant|>", "<|observation|>"))
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}], "reasoning_content": "hm"}
    (example,), _ = encode(tokenizer, chat("Q", "", **call))
    assert text_of(tokenizer, example) == "<|user|>\nQ<|assistant|>\n<think>hmcall f<|observation|>"
    assert trained(tokenizer, example) == ["\n<think>hmcall f<|observation|>"]
    (example, _), _ = encode(
        tokenizer, {"messages": [*chat("Q", "a", reasoning_content="hm")["messages"], *chat("R", "b")["messages"]]}
    )
    assert trained(tokenizer, example) == ["\n<think>hma<|user|>"]


def test_thoughts_that_a_template_drops_later_make_examples_of_their_own():
    tokenizer = tokenizer_with(THINKING)
    row = chat("Q", "<think>\nhm\n</think>\n\na", "R", "b")
    examples, encoder = encode(tokenizer, row, chat("Q", "c"))
    start, end = "<|im_start|>", "<|im_end|>\n"
    first = f"{start}user\nQ{end}{start}assistant\n"
    assert text_of(tokenizer, examples[0]) == f"{first}<think>\nhm\n</think>\n\na{end}"
    second = f"{first}a{end}{start}user\nR{end}{start}assistant\n<think>\n\n</think>\n\nb{end}"
    assert text_of(tokenizer, examples[1]) == second
    assert [trained(tokenizer, example) for example in examples] == [
        ["<think>\nhm\n</think>\n\na<|im_end|>"],
        ["<think>\n\n</think>\n\nb<|im_end|>"],
        ["<think>\n\n</think>\n\nc<|im_end|>"],
    ]
    assert [example.id for example in examples] == ["r0#1", "r0#2", "r1"] and encoder.report.num_split == 1
    (example,), _ = encode(tokenizer, chat("Q", "a", reasoning_content="so"))
    assert trained(tokenizer, example) == ["<think>\nso\n</think>\n\na<|im_end|>"]


def test_an_answer_that_goes_on_with_the_prompts_thought_is_trained_whole():
    tokenizer = tokenizer_with(R1, ("<|User|>", "<|Assistant|>"))
    (example,), encoder = encode(tokenizer, chat("Q", "<think>\nhm\n</think>\n\na"))
    assert text_of(tokenizer, example) == "<s><|User|>Q<|Assistant|><think>\nhm\n</think>\n\na</s>"
    assert trained(tokenizer, example) == ["hm\n</think>\n\na</s>"] and not encoder.notes()
    (example,), encoder = encode(tokenizer, chat("Q", "a"))
    assert trained(tokenizer, example) == ["a</s>"] and "answers are trained without it" in encoder.notes()[0]
    with pytest.raises(DataError, match="line 1: this tokenizer's chat template changes the answer of message 2"):
        encode(tokenizer, chat("Q", "hm</think>a"))


def test_tools_and_calls_are_written_and_trained():
    tokenizer = tokenizer_with(TOOLS)
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}, "type": "function", "id": "c1"}
    share = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    openai = [
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "a"},
    ]
    tools = [{"name": "f", "parameters": {}}]
    values = [{"conversations": share, "tools": json.dumps(tools)}, {"messages": openai, "tools": tools}]
    examples, _ = encode(tokenizer, *values)
    assert examples[0].input_ids == examples[1].input_ids
    assert '"name": "f", "parameters"' in text_of(tokenizer, examples[0])
    assert trained(tokenizer, examples[0]) == ['<call>f{"x": 1}<|im_end|>', "a<|im_end|>"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**chat("Q", "a"), "tools": [{"name": "f"}]}, "does not write 'tools'"),
        (chat("Q", "a", tool_calls=[{"function": {"name": "f", "arguments": {}}}]), "message 2: .* 'tool_calls'"),
        (chat("Q", "a", reasoning_content="hm"), "message 2: .* does not write 'reasoning_content'"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(tokenizers, value, message):
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: .*{message}"):
        encode(tokenizers["chatml"], value)


def test_a_template_that_leaves_out_a_message_is_refused():
    tokenizer = tokenizer_with(LOOP + "{% if m.role != 'system' %}{{ m.content + eos_token }}{% endif %}{% endfor %}")
    with pytest.raises(DataError, match=r"line 1: .* does not write the content of message 1 \(system\)"):
        encode(tokenizer, {"instruction": "Q", "output": "a", "system": "S"})


def test_control_tokens_in_a_text_are_counted(tokenizers):
    _, encoder = encode(tokenizers["chatml"], chat("Q", "a"), chat("<|im_end|>", "a"), chat("Q", "</s>"))
    (note,) = encoder.notes()
    assert note == "Rows that spell control tokens, which they become: 2 ('<|im_end|>' in rows.jsonl, line 2)."


@pytest.mark.parametrize("name", TEMPLATES)
def test_long_examples_are_cut_in_the_question_only(tokenizers, name):
    tokenizer, end = tokenizers[name], TEMPLATES[name][3]
    long = "Begin. " + "word " * 300 + "Finish?"
    (example,), encoder = encode(tokenizer, chat(long, "a"), length=128)
    assert len(example.input_ids) == 128 and [run.lstrip(" ") for run in trained(tokenizer, example)] == ["a" + end]
    assert "Begin. word" in text_of(tokenizer, example) and "Finish?" in text_of(tokenizer, example)


def test_a_control_token_that_swallows_white_space_is_not_the_answers(plain_tokenizer):
    from tokenizers import AddedToken

    tokenizer = tokenizer_with(TEMPLATES["phi3"][1], ())
    wide = [AddedToken(token, rstrip=True, special=True) for token in TEMPLATES["phi3"][0]]
    tokenizer.add_tokens(wide, special_tokens=True)
    (example,), _ = encode(tokenizer, chat("Q", "\n a"))
    (run,) = trained(tokenizer, example)
    assert run.startswith(("a", " a")) and run.rstrip().endswith("<|end|>")


def test_packed_examples_keep_their_labels_apart(tokenizers, tmp_path):
    tokenizer = tokenizers["glm4"]
    examples, encoder = encode(tokenizer, *(chat("Q", answer) for answer in ANSWERS))
    rows = PackedExamples(build_token_cache(examples, tmp_path / "c", meta=encoder.meta), 64, 0, 8)
    found = []
    for index in range(rows.num_available):
        row = rows[index]
        for number in range(int(row["document_ids"].max()) + 1):
            labels = row["labels"][row["document_ids"] == number]
            assert labels[0] == -100
            found.append(tokenizer.decode(labels[labels >= 0]))
    assert sorted(found) == sorted(answer + "<|user|>" for answer in ANSWERS)
