"""What `finetune` finds before its first step: a right RoPE passes, a wrong one ends the run with one line."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from command_line import fails_in_one_line, no_leftovers, ok
from families import CONFIGS, LENGTH, save_tiny_model
from transformers import AutoModelForCausalLM
from wrong_ropes import WRONG, loaded_wrong, spoil

from longext.checkpoint.bundled import BUNDLED_MODELS, SAMPLE_DOCUMENT
from longext.checkpoint.load import build_model_config, load_causal_lm
from longext.errors import ConfigError, LongextWarning
from longext.models.hf import HFLanguageModel
from longext.training.config import FinetuneConfig
from longext.training.first_loss import FirstLoss, check_first_loss, loss_problem, measure_first_loss, plan_ropes
from longext.training.loading import plan_training_rope

pytestmark = pytest.mark.usefixtures("no_pictures")
QUICK = ("--data", "sample", "--num-steps", 1, "--accumulation", 1, "--set", "warmup_steps=0", "--set", "save_every=")
METHODS = ("linear", "ntk", "ntk-by-parts", "dynamic", "yarn", "llama3")


def loaded(model, method, factor, dtype=torch.float32, **settings):
    """(what a run would hand to the check, its extension)."""
    config = FinetuneConfig(model=str(model), data="sample", method=method, factor=factor, **settings)
    extension = plan_training_rope(config)
    network = load_causal_lm(extension.source, config=build_model_config(extension.config), dtype=dtype)
    return HFLanguageModel(str(model), network.eval(), None, extension.config, extension.source), extension


def row_of(ids):
    return {"input_ids": ids, "document_ids": torch.zeros_like(ids)}


@pytest.fixture(scope="module")
def story():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODELS["books-5m"])
    text = SAMPLE_DOCUMENT.read_text(encoding="utf-8")
    return row_of(torch.tensor(tokenizer(text, verbose=False).input_ids[:600]))


def look(model, method, extension, row):
    return measure_first_loss(model, plan_ropes(method, extension), extension, row)


# --- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 32])
@pytest.mark.parametrize("method", METHODS)
def test_a_right_rope_passes_and_both_losses_are_those_of_plain_transformers(method, factor, story, recwarn):
    model, extension = loaded("books-5m", method, factor)
    record = check_first_loss(model, method, extension, story)
    ids = story["input_ids"][None, :512]
    with torch.no_grad():
        extended = float(model.model(ids, labels=ids).loss)
        base = AutoModelForCausalLM.from_pretrained(BUNDLED_MODELS["books-5m"], dtype=torch.float32)
        unextended = float(base(ids, labels=ids).loss)
    assert record["extended"] == pytest.approx(extended, abs=1e-5)
    assert record["unextended"] == pytest.approx(unextended, abs=1e-5)
    assert (record["num_tokens"], record["num_frequencies"]) == (512, 2 * 2 * 32)
    assert record["largest_error"] < 1e-6 * factor
    assert record["extended"] < record["uniform"] == pytest.approx(np.log(8192))
    assert not [warning for warning in recwarn if issubclass(warning.category, LongextWarning)]


def test_weights_that_lose_their_positions_may_know_less_than_a_guess(story, monkeypatch):
    """DroPE before its training: its rotation is held to the formula (all still), its loss to nothing."""
    model, extension = loaded("books-5m", "drope", 8)
    monkeypatch.setattr("longext.training.first_loss._loss", lambda model, ids: next(losses))
    losses = iter([12.0, 3.0])
    found, problem = look(model, "drope", extension, story)
    assert (problem, found.extended, found.num_frequencies) == (None, 12.0, 2 * 2 * 32)
    losses = iter([12.0, 3.0])
    model, extension = loaded("books-5m", "yarn", 8)
    assert "above the 9.01 of a uniform guess" in look(model, "yarn", extension, story)[1]


IN_HALF = ("llama", "gemma3", "gpt_neox", "olmo3")  # rotary modules of every kind: plain, nested, partial, two bases


@pytest.mark.parametrize(
    ("family", "dtype"), [*((name, torch.float32) for name in CONFIGS), *((name, torch.bfloat16) for name in IN_HALF)]
)
def test_no_family_is_stopped(family, dtype, tmp_path):
    """Random weights know nothing, so their loss is at the uniform guess; the rotation is what is looked at."""
    directory = save_tiny_model(CONFIGS[family](), tmp_path / "base")
    checked = 0
    for method in ("none", *METHODS):
        try:
            model, extension = loaded(directory, method, None if method == "none" else 4, dtype)
        except ConfigError:  # a family that cannot carry it
            continue
        record = check_first_loss(model, method, extension, row_of(torch.arange(100) % 60))
        assert record["num_tokens"] == LENGTH
        assert record["num_frequencies"] > 0
        checked += 1
    assert checked >= 5


def test_an_extension_without_training_is_compared_with_the_rope_of_training(run, tmp_path, story):
    ok(run("extend", "books-5m", "--method", "linear", "--factor", 4, "-o", "longer"))
    model, extension = loaded(tmp_path / "longer", "none", None)
    record, problem = look(model, "none", extension, story)
    ours, theirs = loaded("books-5m", "linear", 4)
    expected, _ = look(ours, "linear", theirs, story)
    assert problem is None
    assert record == expected


def test_padding_is_not_read(story):
    model, extension = loaded("books-5m", "yarn", 4)
    ids = story["input_ids"][:128]
    expected = check_first_loss(model, "yarn", extension, row_of(ids))
    documents = torch.cat([torch.zeros(128), torch.full((64,), -1)])
    padded = {"input_ids": torch.cat([ids, torch.zeros(64, dtype=torch.long)]), "document_ids": documents}
    assert check_first_loss(model, "yarn", extension, padded) == expected


@pytest.mark.parametrize("method", ["dynamic", "yarn"])
def test_nothing_is_left_of_the_check(method, story):
    """Modules, their values and every generator are as before; so are the logits of a long text, bit for bit."""
    model, extension = loaded("books-5m", method, 8)
    ids = torch.randint(3, 8000, (1, 700))

    def values(module):
        return {name: value for name, value in vars(module).items() if not name.startswith("_")}

    def state():
        modules = {name: (id(module), values(module)) for name, module in model.model.named_modules()}
        numpy = np.random.get_state()[1].tolist()
        return modules, model.config, torch.get_rng_state().tolist(), random.getstate(), numpy

    before = state()
    with torch.no_grad():
        expected = model.model(ids).logits
    model.reset_rope()
    check_first_loss(model, method, extension, story)
    assert state() == before
    with torch.no_grad():
        assert torch.equal(model.model(ids).logits, expected)


def test_the_record_and_the_report_hold_it(run, tmp_path):
    result = run("finetune", "books-5m", *QUICK, "--method", "linear", "--target-length", 1024, "-o", "out")
    ok(result)
    record = json.loads((tmp_path / "out" / "result.json").read_text())["finetune"]["first_loss"]
    assert set(record) == set(FirstLoss.__dataclass_fields__)
    assert record["unextended"] < record["extended"] < record["uniform"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finetune"]["first_loss"] == record
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"{record['extended']:.2f} nats, {record['unextended']:.2f} without the extension" in table
    assert "128 frequencies as the formula's" in table


# --- wrong ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_rope_is_named(how, story):
    model, extension = loaded("books-5m", "linear", 8)
    spoil(model.model, how)
    record, problem = look(model, "linear", extension, story)
    assert record.extended is None
    assert problem.startswith("The loaded model does not rotate as `linear` says: ")


@pytest.mark.parametrize("how", ["scaled twice", "bfloat16 positions"])
def test_a_wrong_rope_ends_the_run_with_one_line_and_nothing_written(how, run, tmp_path):
    args = ("--method", "linear", "--target-length", 4096, "-o", "out")
    with loaded_wrong(how):
        result = run("finetune", "books-5m", *QUICK, *args)
    message = "does not rotate as `linear` says"
    fails_in_one_line(result, 1, message, "Nothing was trained")
    no_leftovers(tmp_path)


def test_what_two_losses_and_a_guess_say():
    """Where the rotation is right and is used wrongly."""
    uniform = 9.0
    assert loss_problem(9.1, 3.6, uniform).startswith("The RoPE is wrong: the first loss is 9.10 nats")
    assert "no number" in loss_problem(None, 3.6, uniform)
    assert loss_problem(8.9, 3.6, uniform) is None  # interpolation at a large factor, untrained
    assert loss_problem(9.3, 5.0, uniform) is None  # a text that the model does not read well
    assert loss_problem(9.3, 9.1, uniform) is None  # random weights
    assert loss_problem(None, None, uniform) is None  # broken weights: the first step says so


def test_a_large_rise_is_said_where_the_method_does_not_explain_it(story):
    model, extension = loaded("books-5m", "abf", 2, rope_theta=1e30)
    with pytest.warns(LongextWarning, match=r"rises from 3\.\d\d to \d\.\d\d nats through abf"):
        check_first_loss(model, "abf", extension, story)


def test_what_cannot_run_is_said_and_ends_nothing(story, monkeypatch):
    from longext.training import first_loss

    model, extension = loaded("books-5m", "yarn", 4)
    monkeypatch.setattr(first_loss._built, "rotary_modules", lambda _: {})
    assert "no rotary module" in check_first_loss(model, "yarn", extension, story)["skipped"]
    monkeypatch.setattr(first_loss, "is_sharded", lambda: True)
    assert "FSDP or DeepSpeed" in check_first_loss(model, "yarn", extension, story)["skipped"]
