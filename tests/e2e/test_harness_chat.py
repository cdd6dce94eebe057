"""`longext eval harness` through a chat template: the prompts and numbers of lm-eval's own model for transformers."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import fails
from harness_tasks import CHOICES, STORY, write_answers, write_choices
from transformers import AutoModelForCausalLM, AutoTokenizer

from longext.checkpoint.bundled import BUNDLED_MODELS

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
ANSWERS = [{"question": "The old man walked down to", "answer": "the sea"}, {"question": STORY, "answer": "x"}]


@pytest.fixture
def chat_model(tmp_path):
    """books-5m with a chat template."""
    directory = tmp_path / "chat"
    shutil.copytree(BUNDLED_MODELS["books-5m"], directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def write_tasks(tmp_path):
    folder = tmp_path / "tasks"
    write_choices(folder, rows=CHOICES[:2], fewshot_split="test", description="Go on with the story.\n\n")
    write_answers(folder, ANSWERS)
    return folder


def theirs(directory, folder, tasks, num_fewshot, **settings):
    """What lm-eval's own command would compute: task -> (prompts, answers)."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=1, max_length=512)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        wrapped, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, bootstrap_iters=0, **settings
    )
    return found["samples"]


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        ((), {"fewshot_as_multiturn": True}),
        (("--fewshot-in-one-turn", "--system-instruction", "Be brief."),
         {"fewshot_as_multiturn": False, "system_instruction": "Be brief."}),
    ],
)  # fmt: skip
def test_prompts_and_numbers_are_those_of_lm_eval(run, tmp_path, chat_model, args, settings):
    folder = write_tasks(tmp_path)
    common = ("--include-path", "tasks", "--device", "cpu", "--num-fewshot", 1, "--chat-template")
    outcome = run("eval", "harness", "chat", "--tasks", "choices,answers", *common, *args, "-o", "out")
    assert outcome.exit_code == 0, outcome.output
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["protocol"]["chat_template"] is True
    assert record["protocol"]["fewshot_as_multiturn"] == settings["fewshot_as_multiturn"]
    assert record["protocol"]["system_instruction"] == settings.get("system_instruction")
    ours = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    for task in ("choices", "answers"):
        own = [sample for sample in ours if sample["task"] == task]
        reference = theirs(chat_model, folder, [task], 1, apply_chat_template=True, **settings)
        for left, right in zip(own, reference[task], strict=True):
            assert left["prompt_hash"] == right["prompt_hash"]
            if task == "answers":
                assert left["filtered_resps"] == right["filtered_resps"]
                continue
            for (value, greedy), (wanted, is_greedy) in zip(
                left["filtered_resps"], right["filtered_resps"], strict=True
            ):
                assert value == pytest.approx(wanted, abs=1e-3) and greedy == is_greedy


def test_a_template_without_system_messages_loses_descriptions_and_says_so(run, tmp_path, chat_model):
    write_tasks(tmp_path)
    (chat_model / "chat_template.jinja").write_text(NO_SYSTEM)
    args = ("eval", "harness", "chat", "--include-path", "tasks", "--tasks", "choices", "--chat-template", "-o", "out")
    outcome = run(*args)
    assert outcome.exit_code == 0, outcome.output
    assert "refuses system messages" in outcome.stdout
    fails(run(*args, "--force", "--system-instruction", "Be brief."), 2, "no system role", "--no-chat-template")


def test_what_cannot_be_is_refused(run, tmp_path):
    write_tasks(tmp_path)
    args = ("eval", "harness", "books-5m", "--include-path", "tasks", "--tasks", "choices", "-o", "out")
    fails(run(*args, "--chat-template"), 2, "books-5m has no chat template", "leave --chat-template out")
    fails(run(*args, "--fewshot-as-multiturn"), 2, "add --chat-template")
    assert not (tmp_path / "out").exists()
