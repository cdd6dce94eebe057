"""A checkpoint that is not whole, or wants to run code, ends every command in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapters import make_adapter
from broken_models import BROKEN, MARKER, add_chat_tokens, add_remote_code, edit_config, edit_weights, make_micro
from command_line import fails
from safetensors.torch import load_file, save_file

from longext.checkpoint.weights import fingerprint_weights, sample_weights
from longext.compressor.checkpoint import find_base
from longext.errors import DataError, LongextError, LongextWarning
from longext.models.answers import Request, generate_predictions
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig

pytestmark = pytest.mark.usefixtures("no_pictures")
PPL = ("eval", "ppl", "model", "--lengths", 64, "--stride", 32, "--max-tokens", 200, "--num-bootstrap", 0)
TRAIN = ("--data", "sample", "--num-steps", 1, "--accumulation", 1, "--set", "warmup_steps=0")
FINETUNE = ("finetune", "model", *TRAIN, "--target-length", 64, "-o", "out")
COMPRESS = ("compress-train", "model", *TRAIN, "--segment", 32, "--ratio", 8, "--document-length", 64, "-o", "out")
PASSKEY = ("passkey", "model", "--lengths", 128, "--num-trials", 1)
MERGE = ("merge", "adapter", "--base", "model", "-o", "out")
VERIFY = ("verify", "model")
COMMANDS = {"ppl": PPL, "finetune": FINETUNE, "compress": COMPRESS, "passkey": PASSKEY, "merge": MERGE}


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A whole micro checkpoint and an adapter of it that touches its first layer alone."""
    folder = tmp_path_factory.mktemp("micro")
    make_micro(folder / "model")
    keys = {"norms": False, "embedding": False, "layers_to_transform": [0]}
    make_adapter(folder / "model", folder / "adapter", **keys)
    return folder


@pytest.fixture
def model(micro, tmp_path):
    """A copy of both in the working directory, to be broken."""
    for name in ("model", "adapter"):
        shutil.copytree(micro / name, tmp_path / name)
    return tmp_path / "model"


def test_the_whole_checkpoint_is_taken_by_every_command(run, model):
    for command in (PPL, PASSKEY, MERGE, FINETUNE):
        result = run(*command, *(["--force"] if "-o" in command else []))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_weights_are_refused_by_name(run, model, tmp_path, kind, command):
    edit, texts = BROKEN[kind]
    edit_weights(model, edit)
    if command == "merge" and kind in ("torch.compile", "other shape", "integers"):
        texts = ()  # what a merge computes with is looked at before the proof loads anything
    fails(run(*COMMANDS[command]), 2, *texts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("layer missing", "missing keys: model.layers.1.input_layernorm.weight (9 in all)"),
        ("NaN", "logits that are not finite"),
    ],
)
def test_verify_names_what_is_broken(run, model, kind, text):
    edit_weights(model, BROKEN[kind][0])
    result = run(*VERIFY)
    assert result.exit_code == 1 and text in result.output, result.output


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_attention_heads": 3}, "a divisor of num_attention_heads (3)"),
        ({"vocab_size": 0}, "`vocab_size` must be a whole number from 1"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "lama"}, "lama"),
        ({"hidden_act": "no-such"}, "no-such"),
        ({"head_dim": 7}, ""),
        ({"num_hidden_layers": 10**4}, "`num_hidden_layers` 10,000 does not belong to these files"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` must be a whole number from 1"),
        ({"num_labels": 10**13}, "`num_labels` must be at most 100,000"),
        ({"vocab_size": 10**8}, "`vocab_size` 100,000,000 does not belong to these files"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": 10**30}, "eos_token_id"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_a_config_that_transformers_refuses_is_one_line(run, model, changes, text):
    edit_config(model, **changes)
    for command in (PPL, FINETUNE, COMPRESS):
        fails(run(*command), 2, text)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ppl", "finetune", "compress", "passkey"])
def test_chat_tokens_without_rows_are_refused(run, model, command):
    add_chat_tokens(model, "<|im_start|>", "<|im_end|>")
    fails(run(*COMMANDS[command]), 2, "2 token(s)", "'<|im_start|>' (8192)", "resize_token_embeddings(8194)")


def test_a_filler_without_a_row_is_never_used(run, model):
    """Llama 2's <pad>: texts do not hold it, and batches are filled with another."""
    whole = load_language_model(RuntimeConfig(model=str(model), device="cpu"))
    tokens = [tuple(whole.encode(text)) for text in ("A short one", "One that is quite a bit longer than the other")]
    requests = [Request(str(i), ids, 4) for i, ids in enumerate(tokens)]
    expected = generate_predictions(whole, requests, None, batch_tokens=1000)
    add_chat_tokens(model, "[PAD]")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[PAD]"}))
    loaded = load_language_model(RuntimeConfig(model=str(model), device="cpu"))
    assert loaded.tokenizer.pad_token_id == 8192
    assert generate_predictions(loaded, requests, None, batch_tokens=1000) == expected
    with pytest.raises(DataError, match=r"'\[PAD\]' \(8192\), and the model has 8,192 rows"):
        loaded.encode("spelled [PAD] out")


def test_training_data_that_spells_a_token_without_a_row(run, model, tmp_path):
    add_chat_tokens(model, "<image>")
    (tmp_path / "text.txt").write_text("once upon a time " * 200 + "<image>" + " there was a king" * 200)
    for command in (FINETUNE, COMPRESS):
        fails(run(*command, "--data", "text.txt"), 2, "text.txt", "'<image>' (8192)")


def test_a_tokenizer_of_another_model(run, model):
    edit_weights(model, lambda s: {k: v[:100] if v.shape[0] == 8192 else v for k, v in s.items()})
    edit_config(model, vocab_size=100)
    fails(run(*PPL), 2, "8,192 tokens", "100 rows", "another model")


def test_a_missing_tokenizer(run, model):
    for file in model.glob("*token*"):
        file.unlink()
    fails(run(*PPL), 2, "no tokenizer")


def test_a_tokenizer_without_a_vocabulary(run, model):
    """Some classes come up with nothing but special tokens where their files are missing."""
    for file in model.glob("*token*"):
        file.unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTNeoXTokenizer"}')
    fails(run(*PPL), 2, "no tokenizer", "vocabulary is empty")


def test_training_evaluation_data_that_spells_a_token_without_a_row(run, model, tmp_path):
    add_chat_tokens(model, "<image>")
    (tmp_path / "text.txt").write_text("<image>" + "once upon a time " * 2000)
    fails(run(*COMPRESS, "--eval-data", "text.txt"), 2, "text.txt", "'<image>' (8192)")


def test_ending_tokens_that_do_not_exist_are_said(model):
    edit_config(model, eos_token_id=[1, 9000])
    (model / "generation_config.json").unlink()
    with pytest.warns(LongextWarning, match="eos_token_id 9000"):
        load_language_model(RuntimeConfig(model=str(model), device="cpu"))


def test_a_tokenizer_with_settings_of_the_wrong_type(run, model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": "long"}))
    fails(run(*PPL), 2, "no tokenizer that transformers can load", "'int' and 'str'")


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["score", "greedy", "batch"])
def test_logits_that_are_not_numbers_end_the_run(model, score):
    loaded = load_language_model(RuntimeConfig(model=str(model), device="cpu"))
    with torch.no_grad():
        loaded.model.lm_head.weight[7] = float("nan")  # as an overflow makes one, after loading
    with pytest.raises(LongextError, match="not finite numbers") as caught:
        if score == "score":
            loaded.score(torch.arange(3, 35)[None], 9)
        elif score == "greedy":
            loaded.greedy([3, 4, 5], 2)
        else:
            generate_predictions(loaded, [Request("a", (3, 4, 5), 2)], None)
    assert caught.value.exit_code == 1
    assert score != "score" or "for token 9 of a window of 32" in str(caught.value)


def test_weights_that_float16_cannot_hold(run, model):
    edit_weights(model, lambda s: {k: v * 1e6 if "norm" in k else v for k, v in s.items()})
    fails(run(*PPL, "--dtype", "float16"), 2, "float16", "65,504", "--dtype bfloat16")


def test_a_compressor_of_nan_is_refused(run, model, tmp_path):
    assert run(*COMPRESS).exit_code == 0
    state = load_file(tmp_path / "out" / "compressor.safetensors")
    name = next(name for name in state if state[name].numel() > 1)
    state[name].view(-1)[0] = float("nan")
    save_file(state, tmp_path / "out" / "compressor.safetensors")
    fails(run("eval", "ppl", "--memory", "out@8", *PPL[3:]), 2, f"'{name}' holds 1 of")


# --- remote code ------------------------------------------------------------------------------------------------------

HARMLESS = {
    "inspect": ("inspect", "model"),
    "plan": ("plan", "model", "--length", 128),
    "extend": ("extend", "model", "--method", "yarn", "--factor", 4, "-o", "out"),
    **COMMANDS,
}


@pytest.mark.parametrize("command", HARMLESS)
@pytest.mark.parametrize("model_type", ["llama", "mystery"])
def test_no_command_runs_the_code_of_a_checkpoint(run, model, tmp_path, monkeypatch, model_type, command):
    """A class of transformers is loaded as such; what is not one is refused, and nobody is asked."""
    add_remote_code(model, model_type)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run remote code"))
    result = run(*HARMLESS[command])
    if model_type == "llama":
        assert result.exit_code == 0, result.output
    elif command not in ("inspect", "extend"):  # these read the numbers in config.json, whatever the class
        fails(result, 2)
        assert ("--trust-remote-code" in result.stderr) == (command in ("ppl", "passkey", "merge")), result.stderr
    assert not [*tmp_path.rglob(MARKER)]


@pytest.mark.parametrize("model_type", ["llama", pytest.param("mystery", marks=pytest.mark.isolated)])
def test_verify_runs_no_code_of_checkpoint_or_recorded_base(run, model, tmp_path, model_type):
    assert run(*HARMLESS["extend"]).exit_code == 0
    add_remote_code(model, model_type)
    result = run("verify", "out")
    assert result.exit_code == (0 if model_type == "llama" else 2), result.output
    assert not [*tmp_path.rglob(MARKER)]


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_one_changed_number_is_another_model(model):
    before, sampled = fingerprint_weights(model), sample_weights(model)
    assert before.startswith("whole:")

    def edit(state):
        state["model.embed_tokens.weight"][4000, 3] += 1
        return state

    edit_weights(model, edit)
    assert fingerprint_weights(model) != before
    assert sample_weights(model) == sampled  # the recorded kind of longext 0.1 does not see it


def test_a_record_of_longext_0_1_is_still_recognised(model):
    base = find_base(str(model))
    rope = base.weights.rpartition("-")[2]
    assert base.is_that_of(base.weights) and base.is_that_of(f"{sample_weights(model)}-{rope}")
    assert not base.is_that_of(f"{sample_weights(model)}-{'0' * 8}") and not base.is_that_of(f"{'0' * 16}-{rope}")
