"""Supervised examples: exactly the answers are trained on, in every format, however an example is shortened."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import SHARED
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.data.conversations import Turn, read_conversation
from longext.data.documents import Row, iterate_rows
from longext.data.prompts import resolve_prompt
from longext.data.rows import open_rows
from longext.data.sft import ExampleEncoder, padding_token, shorten
from longext.errors import ConfigError, DataError
from longext.options import DataConfig
from longext.training.config import FinetuneConfig

LONGALPACA = SHARED / "sft/longalpaca_schema_sample.json"

# ChatML as many models have it; the same with transformers' generation blocks; one that trims and has no header.
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize + ': ' + m.content | trim + '\\n' }}{% endfor %}"
)
REWRITING = (
    "{{ bos_token }}{% for m in messages %}{{ (m.content if loop.last else m.content | upper) + eos_token }}"
    "{% endfor %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGEXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODELS["books-5m"])


def config(**keys):
    return FinetuneConfig(model="books-5m", task="sft", **{"data": "test", **keys})


def chat(*contents, roles=("user", "assistant")):
    return {"messages": [{"role": roles[n % len(roles)], "content": text} for n, text in enumerate(contents)]}


def encode(tokenizer, *values, length=512, **keys):
    encoder = ExampleEncoder(tokenizer, length, config(**keys))
    rows = [Row(f"r{n}", f"test, line {n + 1}", value) for n, value in enumerate(values)]
    return list(encoder.encode(rows)), encoder.report


def answers(tokenizer, example):
    """The trained runs of an example, decoded."""
    mask = np.asarray(example.trained, dtype=int)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_three_kinds_of_rows_are_told_apart():
    turns = [Turn(role="user", content="Q"), Turn(role="assistant", content="A")]
    read = lambda value: list(read_conversation(Row("r", "f, line 1", value)).turns)  # noqa: E731
    assert read({"instruction": "Q", "output": "A", "file": "x"}) == turns
    assert read({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}) == turns
    assert read({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}) == turns
    assert read({"conversations": [{"role": "user", "content": "Q"}, {"role": "model", "content": "A"}]}) == turns
    assert read({"instruction": "Do", "input": "this", "output": "A", "messages": None})[0].content == "Do\n\nthis"


def turns_of(value, unused=None):
    return [(turn.role, turn.content) for turn in read_conversation(Row("r", "f, line 1", value), unused).turns]


def test_every_field_of_a_row_that_has_a_meaning_is_used():
    asked = [("user", "Q"), ("assistant", "A")]
    alpaca = {"instruction": "Q", "input": "", "output": "A"}
    for name in ("system", "system_prompt"):
        assert turns_of({**alpaca, name: "S"}) == [("system", "S"), *asked]
        assert turns_of({"conversations": [{"from": "human", "value": "Q"}], name: "S"}) == [("system", "S"), asked[0]]
    earlier = [("user", "B"), ("assistant", "C")]
    assert turns_of({**alpaca, "history": [["B", "C"]], "system": "S"}) == [("system", "S"), *earlier, *asked]
    assert turns_of({**alpaca, "history": [], "system": None, "tools": "[]"}) == asked
    same = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "system": "S"}
    assert turns_of(same) == [("system", "S"), ("user", "Q")]
    empty = {"messages": [{"role": "system", "content": " "}, {"role": "user", "content": "Q"}]}
    assert turns_of({**empty, "system": "S"}) == [("system", "S"), ("user", "Q")]
    assert turns_of(empty) == [("system", " "), ("user", "Q")]
    assert turns_of({"messages": [{"role": "developer", "content": ["a", {"type": "text", "text": "b"}]}]}) == [
        ("system", "ab")
    ]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (2.5, "2.5"), (True, "true"), (False, "false"), (None, "")])
def test_a_number_is_an_answer_and_null_is_none(value, text):
    assert turns_of({"instruction": "Q", "output": value})[-1] == ("assistant", text)
    assert turns_of({"messages": [{"role": "assistant", "content": value}]}) == [("assistant", text)]


def test_prompt_and_completion_are_text_as_it_stands(tokenizer):
    tokenizer.chat_template = CHATML
    row = {"prompt": "The sky is", "completion": " blue."}
    (example,), _ = encode(tokenizer, row)
    assert tokenizer.decode(example.input_ids) == "<s>The sky is blue.</s>"
    assert answers(tokenizer, example) == [" blue.</s>"]
    (example,), _ = encode(tokenizer, row, prompt="chat")
    assert tokenizer.decode(example.input_ids).startswith("<s><|user|>\nThe sky is<|end|>")
    row = {"prompt": chat("a", "b", "c")["messages"], "completion": [{"role": "assistant", "content": "d"}]}
    (example,), _ = encode(tokenizer, row, prompt="plain")
    assert answers(tokenizer, example) == ["d</s>"]


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"masked": True}, {"loss": 0.0}])
def test_switches_of_a_message_are_heeded(tokenizer, switch):
    value = chat("Q", "A", "R", "B")
    value["messages"][1].update(switch)
    value["messages"][3]["weight"] = 1
    for prompt in ("plain", "llama2"):
        (example,), _ = encode(tokenizer, value, prompt=prompt)
        assert [answer.strip() for answer in answers(tokenizer, example)] == [
            "B</s>" if prompt == "plain" else "B </s>"
        ]


def test_unknown_fields_are_counted_and_descriptions_are_not(tokenizer):
    values = [{**chat("Q", "A"), "title": "T", "id": "x", "num_turns": 2, "source": "s", "empty": ""} for _ in range(2)]
    values[0]["messages"][0]["name"] = "Ann"
    encoder = ExampleEncoder(tokenizer, 512, config())
    list(encoder.encode([Row("r", "f", value) for value in values]))
    assert encoder.notes() == ["Fields of rows that are not used: 'title' (2), of a message: 'name' (1)."]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "f, line 1: 'chosen' cannot be used: rows of preferences"),
        ({"prompt": "Q", "completion": "A", "label": True}, "'label' cannot be used"),
        ({**chat("Q", "A"), "images": ["a.png"]}, "'images' cannot be used: only text"),
        ({**chat("Q", "A"), "weight": 0.5}, "'weight' of a whole row"),
        ({"messages": [{"role": "assistant", "content": "A", "weight": 0.5}]}, "message 1: 'weight' can be 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "A", "function_call": {"name": "f"}}]}, "'function_call'"),
        ({"messages": [{"role": "user"}]}, "message 1: 'content' must be text, found nothing"),
        ({"messages": [{"content": "Q"}]}, "message 1: no role"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "message 1: 'value' is not valid JSON"),
        ({"instruction": "Q", "output": "A", "history": ["B"]}, "'history' must be a list of pairs"),
        ({"instruction": "Q", "output": "A", "tools": "[1]"}, "'tools' must be a list of functions"),
        ({"instruction": "Q", "output": float("nan")}, "'output' must be text, found float"),
        ({**chat("Q", "A"), "system": "S", "system_prompt": "T"}, "'system' and another system message"),
    ],
)
def test_what_changes_the_meaning_of_a_row_is_refused_by_name(value, message):
    with pytest.raises(DataError, match=message):
        turns_of(value)


@pytest.mark.parametrize("prompt", ["plain", "llama2"])
def test_tools_take_a_chat_template(tokenizer, prompt):
    with pytest.raises(DataError, match=f"test, line 1: the {prompt} prompt cannot write 'tools'"):
        encode(tokenizer, {**chat("Q", "A"), "tools": [{"name": "f"}]}, prompt=prompt)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "a", "id": 1}, r"f, line 1: no supervised example \(found: id, text\)"),
        (["a"], r"f, line 1: no supervised example \(found: list\)"),
        ({"instruction": "Q"}, r"found: instruction\)"),
        ({"instruction": "Q", "output": ["A"]}, "f, line 1: 'output' must be text, found list"),
        ({"messages": [{"role": "asistant", "content": "A"}]}, "unknown role 'asistant'. Did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'content' has a part of type 'image'"),
        ({"messages": ["Q"]}, "a message must hold role and content, found str"),
    ],
)
def test_a_row_of_no_kind_names_its_place(value, message):
    with pytest.raises(DataError, match=message):
        read_conversation(Row("r", "f, line 1", value))


def test_errors_name_file_and_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, {"instruction": "Q", "output": "A"})
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match="a.jsonl, line 2 is not valid JSON"):
        open_rows(config(data=str(path)), tokenizer, length=64, num_rows=1)
    write(path, {"instruction": "Q", "output": "A"}, {"text": "A"})
    with pytest.raises(DataError, match="a.jsonl, line 2: no supervised example"):
        open_rows(config(data=str(path)), tokenizer, length=64, num_rows=1)
    with pytest.raises(DataError, match="sample.txt: no supervised example"):
        open_rows(config(data="sample"), tokenizer, length=64, num_rows=1)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, tokenizer):
    values = [{"instruction": f"Question {n}", "output": f"Answer {n}"} for n in range(3)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    else:
        path.write_text(json.dumps(values) if kind == "json" else "\n".join(map(json.dumps, values)))
    assert [row.value for row in iterate_rows(DataConfig(data=str(path)))] == values
    rows = open_rows(config(data=str(path)), tokenizer, length=64, num_rows=4)
    assert rows.num_available == 1 and rows.report["num_examples"] == 3


# --- masks ------------------------------------------------------------------------------------------------------------

TEXTS = ["Who goes there?", "A friend, né à Köln.\n\nTruly 中.", "Which friend", "42 of  them \n"]


def test_plain_examples_train_on_the_answer_and_eos(tokenizer):
    (example,), _ = encode(tokenizer, {"instruction": "Say", "input": "it", "output": "It is said."})
    assert tokenizer.decode(example.input_ids) == "<s>Say\n\nit\nIt is said.</s>"
    assert answers(tokenizer, example) == ["It is said.</s>"]
    assert example.input_ids[0] == tokenizer.bos_token_id and example.input_ids[-1] == tokenizer.eos_token_id
    (example,), _ = encode(tokenizer, chat(*TEXTS))
    assert answers(tokenizer, example) == [f"{TEXTS[1]}</s>", f"{TEXTS[3]}</s>"]


def test_llama2_examples_are_its_chat_format(tokenizer):
    value = {"messages": [{"role": "system", "content": "Be kind."}, *chat("A?", "B.", "C?", "D.")["messages"]]}
    (example,), _ = encode(tokenizer, value, prompt="llama2")
    head = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nA? [/INST]"
    assert tokenizer.decode(example.input_ids) == f"{head} B. </s><s>[INST] C? [/INST] D. </s>"
    assert answers(tokenizer, example) == [" B. </s>", " D. </s>"]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chat_masks_are_the_assistant_turns(tokenizer, template, trim):
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)  # Llama 3 trims white space
    messages = [{"role": "system", "content": "Be brief."}, *chat(*TEXTS)["messages"]]
    (example,), _ = encode(tokenizer, {"messages": messages})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert example.input_ids == tokenizer(whole, add_special_tokens=False).input_ids  # as it is tokenised in use
    assert answers(tokenizer, example) == [f"{TEXTS[1]}<|end|>", f"{TEXTS[3]}<|end|>"]


def test_generation_blocks_agree_with_transformers(tokenizer):
    tokenizer.chat_template = MARKED
    messages = chat(*TEXTS)["messages"]
    (example,), _ = encode(tokenizer, {"messages": messages})
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert list(map(bool, marked["assistant_masks"])) == example.trained
    assert marked["input_ids"] == example.input_ids


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_token_that_joins_prompt_and_answer_is_trained_on(tokenizer, template, trim):
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    (example,), _ = encode(tokenizer, chat("Who?", "\n\n You"))  # the header's newline and the answer's are one token
    (answer,) = answers(tokenizer, example)
    assert answer == "\n\n\n You<|end|>"


@pytest.mark.parametrize("trim", [False, True])
def test_a_template_that_trims_and_ends_turns_with_a_newline(tokenizer, trim):
    tokenizer.chat_template = TRIMMING
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    examples, report = encode(tokenizer, chat(" Who? ", " Me. ", "Who?", "Who? You."))
    texts = [tokenizer.decode(example.input_ids) for example in examples]  # each ends with the EOS that it lacks
    assert texts[0] == "<s>User: Who?\nAssistant: Me.\n</s>"
    assert texts[1] == "<s>User: Who?\nAssistant: Me.\nUser: Who?\nAssistant: Who? You.\n</s>"
    trained = [answer.lstrip() for example in examples for answer in answers(tokenizer, example)]
    assert trained == ["Me.\n</s>", "Who? You.\n</s>"] and report.num_split == 1


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(tokenizer):
    tokenizer.chat_template = REWRITING
    examples, report = encode(tokenizer, chat("a", "b", "c", "d"))
    assert [tokenizer.decode(example.input_ids) for example in examples] == ["<s>A</s>b</s>", "<s>A</s>B</s>C</s>d</s>"]
    assert [answers(tokenizer, example) for example in examples] == [["b</s>"], ["d</s>"]] and report.num_split == 1


def test_templates_that_refuse_say_so(tokenizer):
    tokenizer.chat_template = REFUSING
    with pytest.raises(DataError, match="test, line 1: the chat template .* refuses .*roles must alternate"):
        encode(tokenizer, chat("a", "b"))
    assert answers(tokenizer, encode(tokenizer, chat("a", "b"), prompt="plain")[0][0]) == ["b</s>"]


def test_prompts_are_named(tokenizer):
    assert resolve_prompt("auto", tokenizer) == "plain"
    with pytest.raises(ConfigError, match="Unknown prompt 'lama2'. Did you mean 'llama2'"):
        resolve_prompt("lama2", tokenizer)
    with pytest.raises(ConfigError, match="no chat template"):
        resolve_prompt("chat", tokenizer)
    tokenizer.chat_template = CHATML
    assert resolve_prompt("auto", tokenizer) == "chat"


def test_the_first_token_is_never_trained_on(tokenizer):
    tokenizer.bos_token = None
    (example,), _ = encode(tokenizer, chat("Hello there", roles=("assistant",)))
    assert example.trained == [False] + [True] * (len(example.input_ids) - 1)


# --- too long, or empty -----------------------------------------------------------------------------------------------


def test_shorten_takes_the_middle_of_the_longest_material():
    trained = np.zeros(100, dtype=bool)
    trained[90:] = True
    assert shorten(trained, [(5, 15), (20, 80)], 100, 4).tolist() == list(range(100))
    kept = shorten(trained, [(5, 15), (20, 80)], 60, 4).tolist()
    assert kept == [*range(30), *range(70, 100)]
    kept = shorten(trained, [(5, 15), (20, 80)], 47, 4).tolist()  # the longest gives 52, the next one more
    assert kept == [*range(10), *range(11, 24), *range(76, 100)]
    assert shorten(trained, [(5, 15), (20, 80)], 46, 4).tolist() == [*range(9), *range(11, 24), *range(76, 100)]
    assert shorten(trained, [(5, 15), (20, 80)], 45, 4) is None
    assert shorten(trained, [], 99, 4) is None


@pytest.mark.parametrize("prompt", ["plain", "llama2", "auto"])
def test_long_examples_lose_material_only(tokenizer, prompt):
    tokenizer.chat_template = CHATML
    story = " ".join(f"{n} men went to mow." for n in range(300))
    question = f"Read this. {story} How many went?"
    whole, _ = encode(tokenizer, chat(question, "All of them."), length=10_000, prompt=prompt)
    cut, report = encode(tokenizer, chat(question, "All of them."), length=256, prompt=prompt)
    assert (report.num_examples, report.num_truncated) == (1, 1)
    ids = cut[0].input_ids
    assert len(ids) == 256 and answers(tokenizer, cut[0]) == answers(tokenizer, whole[0])
    head = next(n for n in range(256) if ids[n] != whole[0].input_ids[n])
    assert ids == [*whole[0].input_ids[:head], *whole[0].input_ids[head - 256 :]]  # one gap
    text = tokenizer.decode(ids)
    assert "Read this. 0 men" in text and "298 men went to mow. 299 men went to mow. How many went?" in text


def test_examples_are_dropped_and_counted(tokenizer):
    long = "word " * 200
    values = [chat("Q", "A"), chat("Q", long), chat("Q", " "), chat("Q"), chat("", ""), chat(long, "B")]
    kept, report = encode(tokenizer, *values, length=128)
    assert [answers(tokenizer, example) for example in kept] == [["A</s>"], ["B</s>"]]
    assert (report.num_examples, report.num_truncated) == (2, 1)
    assert (report.num_dropped_long, report.num_dropped_empty) == (1, 3)


def test_nothing_left_says_what_to_change(tokenizer):
    with pytest.raises(DataError, match="No answer tokens left in test: 1 examples too long, 1 .* more than 64 tokens"):
        encode(tokenizer, chat("Q", "word " * 200), chat("Q", ""), length=64)


def test_max_tokens_limits_an_example(tokenizer):
    kept, _ = encode(tokenizer, chat("word " * 200, "A"), max_tokens=100)
    assert len(kept[0].input_ids) == 100


def test_padding_never_needs_a_new_embedding(tokenizer):
    assert padding_token(tokenizer) == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert tokenizer.pad_token_id == 8192 and padding_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert padding_token(tokenizer) == 0


# --- all of it --------------------------------------------------------------------------------------------------------


def test_rows_hold_the_answers_of_the_file_exactly_once_an_epoch(tmp_path, tokenizer):
    values = [{"instruction": f"Question {n}? " * (n + 1), "output": f"Answer {n}."} for n in range(40)]
    data = write(tmp_path / "a.jsonl", *values)
    rows = open_rows(config(data=data), tokenizer, length=128, num_rows=100)
    texts = []
    for i in range(rows.num_available):
        row = rows[i]
        labels = row["labels"]
        trained = labels >= 0
        assert (labels[trained] == row["input_ids"][trained]).all() and not trained[row["document_ids"] < 0].any()
        texts += tokenizer.decode(labels[trained]).split("</s>")[:-1]
    assert sorted(texts) == sorted(value["output"] for value in values)
    assert rows.report["num_examples"] == 40 and rows.report["num_truncated"] > 0
    again = open_rows(config(data=data), tokenizer, length=128, num_rows=1, on_progress=pytest.fail)
    assert again.report == rows.report
    made = []
    open_rows(config(data=data), tokenizer, length=64, num_rows=1, on_progress=made.append)  # cut differently
    open_rows(config(data=data, prompt="llama2"), tokenizer, length=64, num_rows=1, on_progress=made.append)
    tokenizer.chat_template = CHATML
    open_rows(config(data=data), tokenizer, length=64, num_rows=1, on_progress=made.append)
    assert len(made) == 3 * 40


@pytest.mark.skipif(not LONGALPACA.exists(), reason="needs ../shared")
@pytest.mark.parametrize("length", [512, 8192])
def test_real_examples_keep_their_answers(length):
    directory = SHARED / "models/books-27m"
    tokenizer = AutoTokenizer.from_pretrained(directory if directory.exists() else BUNDLED_MODELS["books-5m"])
    rows = list(iterate_rows(DataConfig(data=str(LONGALPACA))))
    encoder = ExampleEncoder(tokenizer, length, config(data=str(LONGALPACA)))
    examples = list(encoder.encode(rows))
    assert encoder.report.num_examples == len(examples) == len(rows) == 80
    assert max(len(example.input_ids) for example in examples) <= length
    for row, example in zip(rows, examples, strict=True):
        assert answers(tokenizer, example) == [row.value["output"] + "</s>"]
