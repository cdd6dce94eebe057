"""`extend` and `verify` on real files: what is written, what is shared, how extensions combine."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.load import load_config
from longext.checkpoint.rope_config import length_of, read_model_rope
from longext.checkpoint.weights import read_shards
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extend_checkpoint, plan_extension
from longext.conversion.publish import pack
from longext.conversion.verify import _check_adapter_free, _check_layouts, verify_checkpoint
from longext.errors import ConfigError
from longext.rope.spec import compute_inv_freq
from longext.untrusted import take_notes

BASE = BUNDLED_MODELS["books-5m"]


def copy_of_books(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for file in BASE.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture
def base(tmp_path):
    return copy_of_books(tmp_path / "base")


def extend(model, output, method="yarn", **keys):
    if not {"factor", "target_length"} & set(keys):
        keys["factor"] = 8.0
    return extend_checkpoint(ExtendConfig(model=str(model), method=method, output=str(output), **keys))


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def edit_config(directory, edit):
    config = config_of(directory)
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_both_spellings_are_written_and_nothing_else_changes(base, tmp_path):
    extend(base, tmp_path / "out")
    before, after = config_of(base), config_of(tmp_path / "out")
    assert after["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    }
    assert after["rope_theta"] == 10000.0
    assert after["rope_scaling"] == {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
    assert after["max_position_embeddings"] == 4096
    ours = {"rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings"}
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_max_length"] == 4096


def test_weights_are_linked_and_small_files_are_not(base, tmp_path):
    extend(base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").samefile(base / "model.safetensors")
    assert not (tmp_path / "out/tokenizer.json").samefile(base / "tokenizer.json")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_copy_shares_nothing(base, tmp_path):
    extend(base, tmp_path / "out", copy=True)
    assert not (tmp_path / "out/model.safetensors").samefile(base / "model.safetensors")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_bundled_weights_are_never_shared(tmp_path):
    extend("books-5m", tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").samefile(BASE / "model.safetensors")


def test_a_filesystem_that_cannot_link_gets_a_copy(base, tmp_path, monkeypatch):
    def refuse(*_args, **_keys):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    extend(base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_hub_cache_symlink_becomes_a_link_to_its_blob(base, tmp_path):
    blob = tmp_path / "blob"
    (base / "model.safetensors").rename(blob)
    (base / "model.safetensors").symlink_to(blob)
    extend(base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").samefile(blob)
    assert not (tmp_path / "out/model.safetensors").is_symlink()


def sparse_checkpoint(directory: Path, gigabytes: int) -> Path:
    """books-5m's config with one huge sparse tensor: a checkpoint of that size that takes no disk."""
    copy_of_books(directory)
    size = gigabytes * 10**9
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return directory


def test_a_13_gb_checkpoint_costs_less_than_a_megabyte(tmp_path):
    base = sparse_checkpoint(tmp_path / "base", 13)
    plan = extend(base, tmp_path / "out")
    assert plan.weight_bytes > 13e9
    new = [file for file in (tmp_path / "out").iterdir() if not file.samefile(base / "model.safetensors")]
    assert sum(file.stat().st_size for file in new) < 1e6


def test_sharded_checkpoints_keep_their_index(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    extend(base, tmp_path / "out")
    assert len(read_shards(tmp_path / "out")) == 2
    assert verify_checkpoint(str(tmp_path / "out")).ok


def test_dynamic_keeps_the_trained_length(base, tmp_path):
    plan = extend(base, tmp_path / "out", "dynamic")
    config = config_of(tmp_path / "out")
    assert config["max_position_embeddings"] == 512
    assert config["rope_parameters"] == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}
    assert plan.new_length == 4096


def test_target_length_gives_an_exact_factor(base, tmp_path):
    assert extend(base, tmp_path / "out", "linear", target_length=3000).spec.factor == 3000 / 512
    assert config_of(tmp_path / "out")["max_position_embeddings"] == 3000


def test_by_parts_code_ramp_writes_both_temperature_keys(base, tmp_path):
    extend(base, tmp_path / "out", "ntk-by-parts", ramp="code")
    parameters = config_of(tmp_path / "out")["rope_parameters"]
    assert parameters["rope_type"] == "yarn"
    assert parameters["attention_factor"] == 1.0
    assert parameters["attn_factor"] == pytest.approx(1 / (0.1 * np.log(8) + 1))


def test_llama3_type_says_its_length_at_the_top_level_too(base, tmp_path):
    extend(base, tmp_path / "out", "ntk-by-parts")
    config = config_of(tmp_path / "out")
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert config["original_max_position_embeddings"] == 512


def test_longrope_reads_its_factors_from_a_file(base, tmp_path):
    (tmp_path / "f.json").write_text(json.dumps({"long_factor": [1 + i / 8 for i in range(32)], "factor": 8}))
    plan = extend_checkpoint(
        ExtendConfig(model=str(base), method="longrope", factors=str(tmp_path / "f.json"), output=str(tmp_path / "out"))
    )
    assert plan.spec.factor == 8
    parameters = config_of(tmp_path / "out")["rope_parameters"]
    assert parameters["short_factor"] == [1.0] * 32
    assert parameters["attention_factor"] == pytest.approx(np.sqrt(1 + np.log(8) / np.log(512)))
    assert verify_checkpoint(str(tmp_path / "out")).ok


@pytest.mark.parametrize("method", ["ntk-by-parts", "dynamic", "yarn"])
def test_verify_passes_on_what_extend_writes(base, tmp_path, method):
    extend(base, tmp_path / "out", method)
    result = verify_checkpoint(str(tmp_path / "out"))
    assert result.ok, [check for check in result.checks if check.status == "fail"]
    by_name = {check.name: check for check in result.checks}
    assert by_name["logits in old window"].status == ("pass" if method == "dynamic" else "info")
    assert by_name["old spelling"].status == by_name["new spelling"].status == "pass"


def _failure(directory, **keys):
    result = verify_checkpoint(str(directory), **{"logits": False, **keys})
    assert not result.ok
    return next(check for check in result.checks if check.status == "fail").detail


def test_verify_names_the_key_that_was_changed(base, tmp_path):
    extend(base, tmp_path / "out")
    edit_config(tmp_path / "out", lambda c: c["rope_parameters"].update(factor=4.0))
    edit_config(tmp_path / "out", lambda c: c["rope_scaling"].update(factor=4.0))
    assert "rope_parameters.factor" in _failure(tmp_path / "out")


def test_verify_names_a_difference_between_the_spellings(base, tmp_path):
    extend(base, tmp_path / "out")
    edit_config(tmp_path / "out", lambda c: c["rope_scaling"].update(original_max_position_embeddings=4096))
    assert "original_max_position_embeddings" in _failure(tmp_path / "out")


def test_verify_names_a_lost_theta(base, tmp_path):
    extend(base, tmp_path / "out", "ntk")
    edit_config(tmp_path / "out", lambda c: (c.pop("rope_theta"), c.pop("rope_scaling")))
    assert "rope_theta is missing" in _failure(tmp_path / "out")


def test_verify_names_a_changed_tensor(base, tmp_path):
    extend(base, tmp_path / "out", copy=True)
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + torch.tensor(1.0, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in _failure(tmp_path / "out")


def test_verify_finds_a_leftover_adapter(base, tmp_path):
    extend(base, tmp_path / "out")
    (tmp_path / "out/adapter_model.bin").write_bytes(b"x")
    assert "adapter_model.bin" in _failure(tmp_path / "out")


def test_extending_a_training_free_output_starts_from_the_trained_rope(base, tmp_path):
    extend(base, tmp_path / "once", "linear", factor=2.0)
    plan = extend(tmp_path / "once", tmp_path / "twice", "yarn", factor=8.0)
    assert plan.relation == "replaces"
    assert plan.spec.original_max_position_embeddings == 512
    straight = extend(base, tmp_path / "straight", "yarn", factor=8.0)
    assert plan.parameters == straight.parameters
    assert plan.old_length == 1024


def trained_with(base, parameters, length):
    """A checkpoint that somebody trained with this RoPE: no run.json of ours."""
    edit_config(base, lambda c: c.update(rope_parameters=parameters, max_position_embeddings=length))
    return base


def test_a_trained_extension_composes_with_its_own_method(base, tmp_path):
    trained_with(base, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, 1024)
    plan = extend(base, tmp_path / "out", "linear", factor=8.0)
    assert plan.relation == "composes with"
    assert plan.parameters["factor"] == 8.0
    assert plan.new_length == 4096


def test_composition_keeps_the_trained_parameters(base, tmp_path):
    old = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "beta_fast": 16.0,
        "original_max_position_embeddings": 512,
    }
    trained_with(base, old, 1024)
    plan = extend(base, tmp_path / "out", "yarn", factor=8.0)
    assert plan.spec.beta_fast == 16.0
    expected, _ = compute_inv_freq(plan.spec)
    assert len(expected) == 32


def test_an_attention_factor_that_is_yarns_own_grows_with_the_factor(base, tmp_path):
    old = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    trained_with(base, {**old, "attention_factor": 0.1 * math.log(4) + 1}, 2048)
    grown = extend(base, tmp_path / "grown", "yarn", factor=16.0, check=False).spec
    assert compute_inv_freq(grown)[1] == pytest.approx(0.1 * math.log(16) + 1)
    trained_with(base, {**old, "attention_factor": 1.05}, 2048)  # a choice of its makers, which stays
    assert extend(base, tmp_path / "kept", "yarn", factor=16.0, check=False).parameters["attention_factor"] == 1.05


def test_a_config_that_claims_more_than_its_factor_keeps_its_length_or_says_so(base, tmp_path):
    ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    trained_with(base, {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **ends}, 8192)  # as Llama 3.1
    [hint] = _check_layouts(config_of(base), read_model_rope(base), None)
    assert "--method llama3 --factor 8 -o" in hint.detail
    same = extend(base, tmp_path / "same", "llama3", factor=8.0, check=False)
    assert (same.new_length, same.warnings) == (8192, ())
    assert config_of(tmp_path / "same")["max_position_embeddings"] == 8192
    equal = extend(base, tmp_path / "equal", "llama3", factor=16.0, check=False)
    assert equal.new_length == 8192 and "gains no length" in equal.warnings[0]
    for method, keys in (("llama3", {"target_length": 4096}), ("yarn", {"factor": 4.0, "replace": True})):
        assert "shortens the model to" in extend(base, tmp_path / method, method, check=False, **keys).warnings[0]
    assert not extend(base, tmp_path / "longer", "llama3", target_length=16384, check=False).warnings


def test_a_pre_training_length_beside_a_linear_factor_counts(base, tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    trained_with(base, linear, 512)
    assert extend(base, tmp_path / "out", "linear", factor=8.0, check=False).new_length == 4096


def test_a_linear_factor_counts_from_a_length_of_which_another_key_says_the_multiple(base, tmp_path):
    trained_with(base, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 512)
    assert read_model_rope(base).spec.original_max_position_embeddings == 128
    edit_config(base, lambda c: c.update(max_sequence_length=2048))  # Vicuna 1.5 16k
    plan = extend(base, tmp_path / "out", "linear", factor=8.0, check=False)
    assert (plan.spec.original_max_position_embeddings, plan.old_length, plan.new_length) == (512, 2048, 4096)
    assert length_of(load_config(base)) == 2048
    after = read_model_rope(tmp_path / "out")
    assert (after.spec.original_max_position_embeddings, after.max_position_embeddings) == (512, 4096)
    assert any("read as trained on the former" in text for text in take_notes())


def test_limits_and_templates_in_other_places_travel(base, tmp_path):
    lengths = {"max_sequence_length": 512, "seq_length": 256, "model_max_length": 10**9, "max_length": 20}
    edit_config(base, lambda c: c.update(lengths))
    (base / "params.json").write_text('{"max_seq_len": 512}')
    named = "additional_chat_templates/rag.jinja"
    (base / named).parent.mkdir()
    (base / named).write_text("{{ messages }}")
    extend(base, tmp_path / "out", check=False)
    after = config_of(tmp_path / "out")
    expected = {"max_sequence_length": 4096, "seq_length": 4096, "model_max_length": 10**9, "max_length": 20}
    assert {key: after[key] for key in lengths} == expected
    assert not (tmp_path / "out/params.json").exists()
    assert (tmp_path / "out" / named).read_text() == "{{ messages }}"
    assert {named, "config.json"} <= set(pack(tmp_path / "out", "me/it").files)


def test_a_factor_file_that_does_not_fit_is_told_by_its_own_key(base, tmp_path):
    for text, told in (('{"long_factor": [1, 2]}', "`long_factor` must have 32"), ('{"x"', "Write it again")):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(ConfigError, match=told):
            extend(base, tmp_path / "out", "longrope", factors=str(tmp_path / "f.json"))


def test_auto_map_of_a_class_that_transformers_has_and_pickled_weights_are_no_adapter(base):
    edit_config(base, lambda c: c.update(auto_map={"AutoConfig": "configuration_llama.LlamaConfig"}))
    (base / "pytorch_model.bin").write_bytes(b"x")
    assert _check_adapter_free(base).status == "pass"
    edit_config(base, lambda c: c.update(model_type="of-its-own"))
    assert _check_adapter_free(base).status == "fail"


def test_a_trained_extension_refuses_another_method_and_says_the_way_out(base, tmp_path):
    trained_with(base, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, 1024)
    with pytest.raises(ConfigError, match="--replace"):
        extend(base, tmp_path / "out", "yarn")
    assert extend(base, tmp_path / "out", "yarn", replace=True).relation == "replaces"


def test_a_smaller_factor_than_the_trained_one_is_refused(base, tmp_path):
    trained_with(base, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 2048)
    with pytest.raises(ConfigError, match="absolute"):
        extend(base, tmp_path / "out", "linear", factor=2.0)


def test_original_length_corrects_a_config_that_lies(base, tmp_path):
    edit_config(base, lambda c: c.update(max_position_embeddings=2048))
    plan = extend(base, tmp_path / "out", original_length=512, target_length=4096)
    assert plan.spec.factor == 8.0


def test_force_replaces_only_what_longext_wrote(base, tmp_path):
    out = tmp_path / "out"
    extend(base, out)
    with pytest.raises(ConfigError, match="--force"):
        extend(base, out)
    assert extend(base, out, "linear", force=True).parameters["rope_type"] == "linear"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "mine/run.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="not written by longext"):
        extend(base, tmp_path / "mine", force=True)
    assert (tmp_path / "mine/thesis.txt").exists()


def test_the_card_has_formula_numbers_command_and_base(base, tmp_path):
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nhello")
    extend(base, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    for text in (
        "license: apache-2.0",
        f"The weights of `{base.name}`",
        "s (factor) = 8",
        "theta = 10000",
        "512 to 4,096",
        "0.1 ln s + 1",
    ):
        assert text in card
    assert str(tmp_path) not in card, "a card is published: it holds no path of this machine"
    assert "| vLLM 0.33.0 | yes | `vllm serve DIR --max-model-len 4096` |" in card
    assert "- It was trained on 512 tokens and not trained since" in card


def test_the_recipe_beside_an_output_makes_it_again(base, tmp_path):
    from longext.settings import build_config

    extend(base, tmp_path / "out", beta_fast=16.0)
    config = build_config(ExtendConfig, tmp_path / "out/recipe.yaml", [], {"output": str(tmp_path / "again")})
    extend_checkpoint(config)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")


def test_rewritten_side_files_never_touch_the_base_however_large(base, tmp_path):
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "padding": "x" * 2**20}))
    before = (base / "tokenizer_config.json").read_bytes()
    extend(base, tmp_path / "out")
    assert (base / "tokenizer_config.json").read_bytes() == before
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_max_length"] == 4096


def test_a_generation_limit_at_the_old_length_is_raised(base, tmp_path):
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**generation, "max_length": 512}))
    extend(base, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["max_length"] == 4096


def test_verify_promises_no_identity_where_the_trained_ramp_was_replaced(base, tmp_path):
    ramp = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    trained_with(base, ramp, 1024)
    extend(base, tmp_path / "out", "dynamic", replace=True)
    result = verify_checkpoint(str(tmp_path / "out"))
    assert result.ok, result.checks
    assert next(check for check in result.checks if check.name == "logits in old window").status == "info"


def test_verify_says_when_the_recorded_base_is_gone(base, tmp_path):
    extend(base, tmp_path / "out")
    base.rename(tmp_path / "moved")
    (check,) = (
        check for check in verify_checkpoint(str(tmp_path / "out"), logits=False).checks if check.name == "weights"
    )
    assert check.status == "skip"
    assert str(base) in check.detail
    assert verify_checkpoint(str(tmp_path / "out"), str(tmp_path / "moved"), logits=False).checks[-1].status == "pass"


def test_a_checkpoint_verifies_against_itself(base, tmp_path):
    extend(base, tmp_path / "out")
    result = verify_checkpoint(str(tmp_path / "out"), str(tmp_path / "out"))
    assert result.ok, result.checks
    assert "max |d| 0," in {check.name: check.detail for check in result.checks}["logits in old window"]


def test_layers_that_slide_are_counted_as_transformers_builds_them(tmp_path):
    from families import CONFIGS

    from longext.checkpoint.rope_config import read_model_rope

    config = CONFIGS["gemma2"]().to_dict()
    config.pop("layer_types")
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
    assert "1 of them see at most 16 tokens" in read_model_rope(tmp_path).describe_layers()


def test_a_plan_writes_nothing(base, tmp_path):
    plan_extension(ExtendConfig(model=str(base), method="yarn", factor=8.0, output=str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
