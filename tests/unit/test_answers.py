"""Where answers end, what of them is read, what records say of how models were asked: scripts, exact values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longext.compressor.writing.pieces import TextStream
from longext.errors import ConfigError
from longext.evals.base import Work
from longext.evals.suites.longeval import LongEval, LongEvalCase
from longext.evals.suites.mrcr import Mrcr
from longext.evals.suites.needle import Needle
from longext.models import chat, turns
from longext.models.answers import Request, answer_notes, generate_predictions
from longext.models.hf import HFLanguageModel
from longext.options import ChatConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS = CHATML.replace("{% if enable", "{% if enable_thinking is not defined %}<think>\n{% endif %}{% if enable")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
)
GLM = "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}<|assistant|>\n"
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
VICUNA = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }} {% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
    "{% endif %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
)
MARKERS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"]
MARKERS += [
    "<end_of_turn>",
    "[gMASK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|system|>",
    "[INST]",
    "[/INST]",
]
MARKERS += ["<|channel|>", "<|message|>", "<|end|>"]


@pytest.fixture(scope="module")
def tokens():
    """The tokenizer of books-5m with control tokens of many families; those of thoughts and <|im_end|> not special."""
    tokenizer = AutoTokenizer.from_pretrained("longext/assets/books-5m")
    special = [text for text in MARKERS if text != "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["<|im_end|>", "<think>", "</think>"])
    return tokenizer


class Scripted(LlamaForCausalLM):
    """Says its script after every prompt, whatever is asked; then <s> for ever."""

    script: list[int] = []

    def generate(self, *args, **kwargs):
        said = iter([*self.script, *[0] * 1000])
        with self.lm_head.register_forward_hook(lambda _, __, logits: self.saying(next(said), logits)):
            return super().generate(*args, **kwargs)

    def saying(self, token, logits):
        return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], token), logits.shape[-1]).float()


@pytest.fixture(scope="module")
def network(tokens):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokens), max_position_embeddings=4096, eos_token_id=1, bos_token_id=0, **sizes)
    model = Scripted(config).eval()
    model.generation_config.eos_token_id = 1
    return model


@pytest.fixture
def says(tokens, network):
    """Return a model that answers `script` under a chat template: says(template, script)."""

    def make(template, script="", **settings):
        tokens.chat_template = template
        network.script = tokens(script, add_special_tokens=False).input_ids
        model = HFLanguageModel("m", network, tokens, {"model_type": "llama"}, "longext/assets/books-5m")
        model.describe = lambda: {"id": "m"}
        chat.set_asking(model, ChatConfig(**settings))
        return model

    yield make
    tokens.chat_template = None


def answer(model, prompt="Where?", budget=64, **request):
    ids = tuple(chat.chat_tokens(model, prompt)) if chat.has_template(model) else tuple(model.encode(prompt))
    (prediction,) = generate_predictions(
        model, [Request("x", ids, budget, **request)], None, is_chat=chat.has_template(model)
    )
    return prediction


# --- what ends an answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, {"<|im_end|>"}),
        (LLAMA3, {"<|eot_id|>"}),
        (GEMMA, {"<end_of_turn>"}),
        (GLM, {"<|user|>", "<|tool|>", "<|system|>"}),
        (MISTRAL, {"</s>"}),
        (VICUNA, set()),
        (ALTERNATING, {"<|im_end|>"}),
        (CHATML.replace("<|im_end|>", "<|end|>") + "<|channel|>", set()),
        (None, set()),
        ("{{ raise_exception('never') }}", set()),
    ],
)
def test_the_template_says_what_ends_a_turn(says, tokens, template, ends):
    model = says(template)
    named = {tokens.convert_ids_to_tokens(token) for token in model.ending_tokens}
    assert named == ends | {"</s>"}  # the model's and the tokenizer's EOS always


@pytest.mark.parametrize("named", [1, [1, 5], None])
def test_ending_tokens_are_a_union(says, network, tokens, named):
    model = says(CHATML)
    own, network.generation_config.eos_token_id = network.generation_config.eos_token_id, named
    try:
        expected = {1, tokens.convert_tokens_to_ids("<|im_end|>")} | ({5} if isinstance(named, list) else set())
        assert model.ending_tokens == expected
    finally:
        network.generation_config.eos_token_id = own


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (GLM, "<|user|>"), (None, "</s>")],
)
def test_an_answer_ends_with_its_turn_and_leaves_no_trace_of_the_end(says, template, end):
    model = says(template, f"It is 42.{end}\nuser: and 77?")
    found = answer(model)
    assert found.text.strip() == "It is 42."
    assert not found.is_cut and found.num_new_tokens == len(model.encode("It is 42.", add_bos=False)) + 1
    told: list[str] = []
    stream = TextStream(model, told.append)
    for token in model.model.script:
        stream.add(token)
        if token in model.ending_tokens:
            break
    stream.end()
    assert "".join(told).strip() == "It is 42." == stream.result(3, None).text.strip()


def test_the_last_integer_of_longeval_is_of_the_answer_not_of_an_invented_turn(says):
    case = LongEvalCase("lines", 5, "line one: <42>. Which?", "42", "one")
    model = says(CHATML, "The number is 42.<|im_end|>\n<|im_start|>user\nAnd of line 77?<|im_end|>")
    record = LongEval(model="m", tasks=("lines",)).measure(model, [case], Work()).record
    assert [row["score"] for row in record["results"]] == [1.0]
    assert len(record["protocol"]["prompts_sha256"]) == len(record["protocol"]["template_sha256"]) == 64


# --- what stands before -----------------------------------------------------------------------------------------------


def test_the_prefix_is_whatever_the_tokenizer_puts_there_and_stands_once(tokens, says):
    from tokenizers.processors import TemplateProcessing

    own = tokens.backend_tokenizer.post_processor
    ids = [(text, tokens.convert_tokens_to_ids(text)) for text in ("[gMASK]", "<sop>", "</s>")]
    try:
        tokens.backend_tokenizer.post_processor = TemplateProcessing(single="[gMASK] <sop> $A </s>", special_tokens=ids)
        model = says(GLM)
        assert model.prefix == (ids[0][1], ids[1][1])
        assert model.encode("a") == [*model.prefix, *model.encode("a", add_bos=False)]
        rendered = chat.chat_tokens(model, "Where?")
        assert rendered.count(ids[0][1]) == rendered.count(ids[1][1]) == 1 and rendered[:2] == list(model.prefix)
        assert chat.chat_frame(model).begins
        assert chat.chat_tokens(says(CHATML), "Where?")[:2] == list(model.prefix)
    finally:
        tokens.backend_tokenizer.post_processor = own


# --- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "script", "text", "is_open"),
    [
        (CHATML, "<think>\nIs it 7? No.\n</think>\n\nIt is 42.<|im_end|>", "It is 42.", False),
        (CHATML, "It is 42.<|im_end|>", "It is 42.", False),
        (CHATML, "It is <think> 42 </think>.<|im_end|>", "It is <think> 42 </think>.", False),
        (CHATML, "<think>\nIs it 7? Is it 8? Is it", "", True),
        (OPENS, "Is it 7?\n</think>\n\nIt is 42.<|im_end|>", "It is 42.", False),
        (OPENS, "Is it 7? Is it 8? Is it", "", True),
    ],
)
def test_a_leading_thought_is_taken_off(says, template, script, text, is_open):
    model = says(template, script)
    found = answer(model, budget=len(model.model.script))
    assert (found.text, found.is_thought_open) == (text, is_open)
    assert found.is_cut == is_open
    assert (found.num_thought_tokens > 0) == (text != found.text or "</think>\n\n" in script or is_open)
    notes = " ".join(answer_notes([found]))
    assert ("1 had no end within the budget" in notes) == is_open and ("are empty" in notes) == is_open


def test_thoughts_stay_where_that_is_asked_and_arguments_reach_the_template(says):
    model = says(CHATML, "<think>\nhm\n</think>\n\n42<|im_end|>", strip_thinking=False)
    assert answer(model).text.startswith("<think>")
    model = says(CHATML, template_arg=("enable_thinking=false",))
    assert model.tokenizer.decode(chat.chat_tokens(model, "x")).endswith("<think>\n\n</think>\n\n")
    assert turns.parse_arguments(["a=3", "b=26 Jul 2024", "c=false"]) == {"a": 3, "b": "26 Jul 2024", "c": False}


@pytest.mark.parametrize("given", ["enable_thinking", "=1", "tokenize=true", "add_generation_prompt=false"])
def test_what_is_no_template_argument_is_refused(given):
    with pytest.raises(ConfigError, match="--template-arg"):
        turns.parse_arguments([given])


def test_stop_strings_inside_a_thought_end_nothing(says):
    model = says(CHATML, "<think>\nHm.\n\nWell.\n</think>\n\nIt is 42.\n\nReally.<|im_end|>")
    assert answer(model, stop=("\n\n",)).text == "It is 42."


def test_the_beginning_of_a_needle_answer_never_stands_inside_a_thought(says):
    task = Needle(model="m", tasks=("single",), lengths=(300,), num_trials=1, max_new_tokens=40)
    model = says(OPENS)
    (question,) = task.questions(model, None)
    text = model.tokenizer.decode(question.prompt.input_ids)
    assert text.endswith("<think>\n") and len(question.prompt.input_ids) + 40 == 300
    model = says(OPENS, f"\nI see it.\n</think>\n\n{question.prompt.answers[0]}<|im_end|>")
    record = task.measure(model, None, Work()).record
    assert record["results"][0]["score"] == 1.0 and record["protocol"]["answer_prefix"] is False
    assert "opens a thought" in record["notes"][0]
    closed = says(OPENS, template_arg=("enable_thinking=false",))
    (question,) = task.questions(closed, None)
    assert closed.tokenizer.decode(question.prompt.input_ids).endswith(" is")
    with pytest.raises(ConfigError, match="--scoring exact reads the answer right behind"):
        dataclasses.replace(task, scoring="exact").questions(says(OPENS), None)


# --- notes and records ------------------------------------------------------------------------------------------------


def test_cut_and_empty_answers_are_counted(says):
    found = [answer(says(CHATML, script), budget=3) for script in ("one two three four", "no<|im_end|>", "<|im_end|>")]
    assert [own.is_cut for own in found] == [True, False, False]
    assert answer_notes(found) == [
        "1 of 3 answers (33%) ended at the budget of new tokens, not at their own end.",
        "1 of 3 answers (33%) are empty.",
    ]


@pytest.mark.parametrize("template", [CHATML, None])
def test_control_tokens_in_a_question_are_told_and_can_be_neutralised(says, tokens, template):
    text = "He wrote <|im_end|> and </think> there."
    asked = answer(says(template), text)
    assert asked.spells_control and "--neutralise-control-tokens" in answer_notes([asked])[-1]
    assert not answer(says(template), "He wrote nothing.").spells_control
    model = says(template, neutralise_control_tokens=True)
    written = chat.user_text(model, text)
    assert written == "He wrote < |im_end|> and < /think> there."
    assert not answer(model, written).spells_control
    assert tokens.convert_tokens_to_ids("<|im_end|>") not in model.encode(written)


def test_turns_of_a_conversation_are_not_spelled_by_its_texts(says):
    task = Mrcr(model="m", lengths=(1500,), needles=(2,), num_trials=1, answer_words=20)
    said = task.measure(says(CHATML), task.read_data(), Work()).record["notes"]
    assert not any("control tokens" in note for note in said)
    (question,) = task.questions(says(CHATML), task.read_data())
    spelled = question.input_ids + tuple(says(CHATML).encode("<|im_end|>", add_bos=False))
    request = Request("x", spelled, 4, frame_ids=question.frame_ids)
    (prediction,) = generate_predictions(says(CHATML), [request], None, is_chat=True)
    assert prediction.spells_control


def test_the_hash_of_a_template_is_of_its_text_arguments_and_rendering(says):
    def digest(template, **settings):
        return chat.template_facts(says(template, **settings), True)["template_sha256"]

    dated = CHATML.replace("<|im_start|>", "<|im_start|>{{ strftime_now('%S.%f') }} ", 1)
    assert digest(CHATML) == digest(CHATML)
    others = [
        digest(CHATML + " "),
        digest(CHATML, template_arg=("enable_thinking=false",)),
        digest(dated),
        digest(dated),
    ]
    assert len({digest(CHATML), *others}) == 5
    assert chat.template_facts(says(CHATML), False)["template_sha256"] is None
