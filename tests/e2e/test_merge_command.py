"""`longext merge` on real files: what is written, what `verify` and `extend` make of it, and every way it refuses."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from adapters import add_rope, edit_adapter, load_tensors, make_adapter
from command_line import fails_in_one_line
from families import CONFIGS, save_tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.weights import read_shards
from longext.conversion.config import ExtendConfig, MergeConfig
from longext.conversion.extend import extend_checkpoint, plan_extension
from longext.conversion.merge import merge_adapter
from longext.conversion.verify import verify_checkpoint
from longext.errors import ConfigError
from longext.settings import build_config

pytestmark = pytest.mark.usefixtures("no_pictures")
BOOKS = BUNDLED_MODELS["books-5m"]


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def manifest_of(directory):
    return json.loads((directory / "run.json").read_text())


@pytest.fixture(scope="module")
def shared_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("books") / "adapter"
    return add_rope(make_adapter(BOOKS, directory), "books-5m")


@pytest.fixture
def adapter(shared_adapter, tmp_path):
    """An adapter of books-5m with yarn, as `finetune` leaves it."""
    return shutil.copytree(shared_adapter, tmp_path / "adapter")


@pytest.fixture(scope="module")
def merged(shared_adapter, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "out"
    merge_adapter(MergeConfig(adapter=str(shared_adapter), output=str(output)))
    return output


@pytest.fixture
def out(merged, tmp_path):
    """A merged checkpoint to spoil."""
    return shutil.copytree(merged, tmp_path / "out")


@pytest.fixture
def tiny(tmp_path):
    """A tiny untied Llama."""
    return save_tiny_model(CONFIGS["llama"](), tmp_path / "tiny")


@pytest.fixture
def verify(monkeypatch):
    """`verify` without its fresh process (six seconds each): config and weights; the whole of it runs once below."""
    monkeypatch.setattr("longext.conversion.verify._reload", lambda *_: {"computed": {}})
    return lambda directory: verify_checkpoint(str(directory), logits=False)


# --- what is written ----------------------------------------------------------------------------------------------


def test_merge_says_what_it_did_and_proved(run, adapter, tmp_path):
    result = run("merge", "adapter", "-o", "out")
    assert result.exit_code == 0, result.output
    for text in (
        "adapter merged into books-5m",
        "16 tensors, 786,432 parameters",
        "9 tensors, 2,304 parameters",
        "embedding replaced",
        "tied",
        "bfloat16",
        '"rope_type": "yarn"',
        "512 -> 4,096",
        "max |d logit|",
        "rounding costs KL",
        "longext verify out",
    ):
        assert text in result.stdout, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_json_alone_on_standard_output(run, adapter):
    result = run("merge", "adapter", "-o", "out", "--json", "--dtype", "float32")
    record = json.loads(result.stdout)
    assert (record["kind"], record["output_matrix"], record["dtypes"]) == ("merge", "tied", ["float32"])
    assert record["proof"]["max_difference"] <= record["proof"]["limit"]
    assert record["extension"]["trained"] is True


def test_both_spellings_and_nothing_else_of_the_config_changes(merged):
    before, after = config_of(BOOKS), config_of(merged)
    assert after["rope_parameters"]["rope_type"] == after["rope_scaling"]["rope_type"] == "yarn"
    assert (after["rope_theta"], after["max_position_embeddings"]) == (10000.0, 4096)
    ours = {"rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings"}
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


def test_the_directory_is_a_plain_checkpoint(merged):
    assert sorted(file.name for file in merged.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not (merged / "model.safetensors").samefile(BOOKS / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert model.config.rope_parameters["factor"] == 8.0
    assert not any(value for value in info.values())


def test_the_tokenizer_of_the_adapter_wins(run, adapter, tmp_path):
    held = json.loads((BOOKS / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**held, "padding_side": "left", "mark": 1}))
    (adapter / "trainer_state.json").write_text("{}")
    (adapter / "metrics.jsonl").write_text("{}")
    assert run("merge", "adapter", "-o", "out", "--no-check").exit_code == 0
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (written["mark"], written["model_max_length"]) == (1, 4096)
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert not {"trainer_state.json", "metrics.jsonl"} & {file.name for file in (tmp_path / "out").iterdir()}


def test_the_card_says_what_was_merged(merged):
    card = (merged / "README.md").read_text()
    for text in ("LoRA adapter", "merged in", "bfloat16", "largest logit difference", "512 to 4,096", "0.1 ln s + 1"):
        assert text in card
    assert "unchanged" not in card
    assert "hard links" not in card


def test_the_recipe_beside_an_output_makes_it_again(run, adapter, tmp_path):
    assert run("merge", "adapter", "-o", "out", "--dtype", "float16", "--no-check").exit_code == 0
    config = build_config(MergeConfig, tmp_path / "out/recipe.yaml", [], {"output": str(tmp_path / "again")})
    merge_adapter(config)
    ours, again = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "again")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_no_check_says_so_everywhere(run, adapter, tmp_path, verify):
    result = run("merge", "adapter", "-o", "out", "--no-check")
    assert "Not checked (--no-check)" in result.stdout
    assert manifest_of(tmp_path / "out")["merge"]["proof"] is None
    checks = {check.name: check.detail for check in verify(tmp_path / "out").checks}
    assert "not proven" in checks["merged weights"]


def test_force_replaces_an_earlier_merge(run, adapter):
    assert run("merge", "adapter", "-o", "out", "--no-check").exit_code == 0
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "already exists", "--force")
    assert run("merge", "adapter", "-o", "out", "--no-check", "--force").exit_code == 0


# --- the base -----------------------------------------------------------------------------------------------------


def test_a_base_that_moved_is_given_by_hand(run, tiny, tmp_path, verify):
    add_rope(make_adapter(tiny, tmp_path / "adapter"), tiny, "linear", 2.0)
    tiny.rename(tmp_path / "moved")
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, str(tiny), "--base")
    assert run("merge", "adapter", "--base", "moved", "-o", "out", "--no-check").exit_code == 0
    assert manifest_of(tmp_path / "out")["extension"]["base_model"] == "moved"
    assert verify(tmp_path / "out").ok


def test_an_adapter_from_elsewhere_keeps_the_rope_of_its_base_and_says_so(run, tiny, tmp_path, verify):
    make_adapter(tiny, tmp_path / "adapter")
    result = run("merge", "adapter", "-o", "out")
    assert "no config.json: the RoPE is the base's (none, 64 tokens)" in result.stdout
    written = config_of(tmp_path / "out")
    assert written["rope_parameters"]["rope_theta"] == written["rope_theta"] == 20_000.0
    assert verify(tmp_path / "out").ok


def test_a_record_without_the_method_falls_back_on_the_config(adapter, tmp_path):
    """`finetune --method none` on a model that somebody else scaled has no more than the parameters to record."""
    manifest = manifest_of(adapter)
    kept = {"base_model", "base_path", "rope_parameters", "trained"}
    manifest["extension"] = {key: value for key, value in manifest["extension"].items() if key in kept}
    (adapter / "run.json").write_text(json.dumps(manifest))
    merge_adapter(MergeConfig(adapter=str(adapter), output=str(tmp_path / "out"), check=False))
    record = manifest_of(tmp_path / "out")["extension"]
    assert (record["spec"]["method"], record["new_length"], record["relation"]) == ("yarn", 4096, "replaces")


def test_the_rope_of_an_extended_base_counts_as_trained_after_the_merge(tiny, tmp_path):
    asked = ExtendConfig(model=str(tiny), method="ntk", factor=4.0, output=str(tmp_path / "extended"))
    extend_checkpoint(asked)
    make_adapter(tmp_path / "extended", tmp_path / "adapter")
    merge_adapter(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    record = manifest_of(tmp_path / "out")["extension"]
    assert (record["spec"]["method"], record["spec"]["factor"], record["trained"]) == ("ntk", 4.0, True)
    assert config_of(tmp_path / "out")["max_position_embeddings"] == 256


def test_a_plain_config_beside_the_adapter_gives_the_rope(tiny, tmp_path, verify):
    """No run.json: somebody's own training, saved with transformers (new spelling only)."""
    make_adapter(tiny, tmp_path / "adapter")
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 4.0}
    config.max_position_embeddings = 256
    config.save_pretrained(tmp_path / "adapter")
    merge_adapter(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    written = config_of(tmp_path / "out")
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert (written["rope_theta"], written["max_position_embeddings"]) == (20_000.0, 256)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("method", ["dynamic", "ntk-by-parts", "ntk", "linear"])
def test_every_method_goes_through(tiny, tmp_path, method, verify):
    add_rope(make_adapter(tiny, tmp_path / "adapter", norms=False), tiny, method, 4.0)
    merge_adapter(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    assert config_of(tmp_path / "out")["rope_parameters"] == config_of(tmp_path / "adapter")["rope_parameters"]
    result = verify(tmp_path / "out")
    assert result.ok, result.checks


# --- verify and extend afterwards ---------------------------------------------------------------------------------


def test_verify_passes_and_names_what_it_could_check(merged):
    result = verify_checkpoint(str(merged))
    assert result.ok, result.checks
    by_name = {check.name: check for check in result.checks}
    assert by_name["merged weights"].status == by_name["weights"].status == by_name["loads"].status == "pass"
    assert "12 tensors identical" in by_name["weights"].detail
    assert "26 changed by the adapter" in by_name["weights"].detail
    assert by_name["logits in old window"].status == "info"


def test_verify_compares_untouched_tensors_of_another_type(shared_adapter, tmp_path, verify):
    merge_adapter(MergeConfig(adapter=str(shared_adapter), output=str(tmp_path / "out"), dtype="float32", check=False))
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_verify_finds_a_changed_tensor(out, name, verify):
    tensors = load_tensors(out)
    tensors[name] = tensors[name] * 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    failed = [check for check in verify(out).checks if check.status == "fail"]
    assert failed[0].name == "merged weights"
    assert "model.safetensors" in failed[0].detail
    assert [check.name for check in failed[1:]] == (["weights"] if "mlp" in name else [])


def test_verify_finds_a_changed_rope(out, verify):
    config = config_of(out)
    config["rope_parameters"]["factor"] = config["rope_scaling"]["factor"] = 4.0
    (out / "config.json").write_text(json.dumps(config))
    failed = [check for check in verify(out).checks if check.status == "fail"]
    assert "rope_parameters.factor" in failed[0].detail


def test_a_merged_checkpoint_extends_as_the_trained_one_it_is(merged, tmp_path, verify):
    with pytest.raises(ConfigError, match="was trained with yarn RoPE .factor 8 of 512.*--replace"):
        plan_extension(ExtendConfig(model=str(merged), method="linear", factor=16.0))
    with pytest.raises(ConfigError, match="absolute"):
        plan_extension(ExtendConfig(model=str(merged), method="yarn", factor=4.0))
    asked = ExtendConfig(model=str(merged), method="yarn", factor=16.0, output=str(tmp_path / "longer"))
    plan = extend_checkpoint(asked)
    assert (plan.relation, plan.new_length, plan.old_length) == ("composes with", 8192, 4096)
    assert verify(tmp_path / "longer").ok
    # extending again starts from the trained yarn, not from the training-free one
    assert plan_extension(ExtendConfig(model=str(tmp_path / "longer"), method="yarn", factor=32.0)).origin.factor == 8.0


def test_a_method_that_the_config_cannot_name_is_remembered(tiny, tmp_path):
    """ntk is a `default` RoPE with another theta; only run.json knows that it is a factor of 4."""
    add_rope(make_adapter(tiny, tmp_path / "adapter"), tiny, "ntk", 4.0)
    merge_adapter(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    assert config_of(tmp_path / "out")["rope_parameters"]["rope_type"] == "default"
    plan = plan_extension(ExtendConfig(model=str(tmp_path / "out"), method="ntk", factor=8.0))
    straight = plan_extension(ExtendConfig(model=str(tiny), method="ntk", factor=8.0))
    assert (plan.relation, plan.parameters) == ("composes with", straight.parameters)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("nowhere", "-o", "out"), ("No adapter at 'nowhere'", "adapter_config.json")),
        (("no/where", "-o", "out"), ("no/where", "Hub")),
        (("books-5m", "-o", "out"), ("No adapter at 'books-5m'",)),
        (("-o", "out"), ("Missing: adapter",)),
        (("adapter",), ("-o",)),
        (("adapter", "-o", "out", "--dtype", "int8"), ("--dtype must be one of auto, float32", "int8")),
        (("adapter", "-o", "adapter/out"), ("overlap",)),
        (("adapter", "-o", "out", "--base", "nowhere"), ("No model at 'nowhere'",)),
        (("adapter", "-o", "out", "--base", "adapter"), ("adapter holds an adapter, not a model",)),
        (("adapter", "-o", "out", "--set", "bse=x"), ("unknown key 'bse'", "Did you mean 'base'")),
    ],
)
def test_merge_refuses(run, adapter, tmp_path, args, texts):
    fails_in_one_line(run("merge", *args), 2, *texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_model_is_not_an_adapter(run, tiny):
    fails_in_one_line(run("merge", "tiny", "-o", "out"), 2, "No adapter_config.json", "a whole model")


def test_pickled_weights(run, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "No adapter_model.safetensors", "adapter_model.bin")


def test_truncated_weights(run, adapter):
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[:-10])
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "truncated")


def test_broken_adapter_config(run, adapter):
    (adapter / "adapter_config.json").write_text("{")
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "adapter_config.json is not valid JSON")


def base_like(directory, **changes):
    config = CONFIGS["llama"]()
    for key, value in changes.items():
        setattr(config, key, value)
    return save_tiny_model(config, directory)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"hidden_size": 64}, ("has shape", "other sizes", "--base")),
        ({"vocab_size": 80}, ("has shape [64, 32]", "another vocabulary", "resize_token_embeddings(64)")),
        ({"num_hidden_layers": 1}, ("layers.1.", "more layers", "--base")),
        ({"num_hidden_layers": 3}, ("lacks", "layers.2.", "fewer layers")),
    ],
    ids=["width", "vocabulary", "fewer layers", "more layers"],
)
def test_an_adapter_for_another_base(run, tiny, tmp_path, changes, texts):
    make_adapter(tiny, tmp_path / "adapter", norms=False)
    base_like(tmp_path / "other", **changes)
    fails_in_one_line(run("merge", "adapter", "--base", "other", "-o", "out"), 2, *texts)
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_architecture(run, tiny, tmp_path):
    make_adapter(tiny, tmp_path / "adapter", norms=False)
    save_tiny_model(CONFIGS["gpt_neox"](), tmp_path / "other")
    fails_in_one_line(run("merge", "adapter", "--base", "other", "-o", "out"), 2, "does not fit", "q_proj")


def test_a_config_of_another_base(run, adapter, tiny):
    fails_in_one_line(
        run("merge", "adapter", "--base", "tiny", "-o", "out"), 2, "hidden_size 256", "another base", "--base"
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.k_proj.lora_B.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(run, adapter, name):
    edit_adapter(adapter, lambda held: held.pop(f"base_model.model.{name}"))
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, name, "lacks", "1 missing")


def test_a_tensor_without_a_place_is_named(run, adapter):
    edit_adapter(adapter, lambda held: held.update({"base_model.model.model.extra.weight": torch.ones(2)}))
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "model.extra.weight", "does not have")


def test_an_adapter_that_was_saved_without_gathering(run, adapter):
    edit_adapter(adapter, lambda held: held.update({key: torch.zeros(0) for key in held if "lora_" in key}))
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "has shape [0]", "ZeRO-3")


def test_an_empty_adapter(run, tiny, tmp_path):
    adapter = make_adapter(tiny, tmp_path / "adapter", norms=False, embedding=False)
    edit_adapter(adapter, lambda held: [tensor.zero_() for key, tensor in held.items() if "lora_B" in key])
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "changes nothing", "every LoRA B is zero", "ZeRO-3")


def test_an_adapter_with_nan(run, adapter, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_adapter(adapter, lambda held: held[key].fill_(float("nan")))
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "layers.0.self_attn.q_proj.weight", "NaN")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_weight_that_float16_cannot_hold(run, adapter):
    edit_adapter(adapter, lambda held: held["base_model.model.model.norm.weight"].fill_(1e6))
    fails_in_one_line(
        run("merge", "adapter", "-o", "out", "--dtype", "float16"), 2, "model.norm.weight", "bfloat16 or float32"
    )


def test_a_quantised_base(run, adapter, tmp_path):
    shutil.copytree(BOOKS, tmp_path / "base")
    tensors = load_tensors(BOOKS)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(256, 256, dtype=torch.uint8)
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    fails_in_one_line(run("merge", "adapter", "--base", "base", "-o", "out"), 2, "stored as U8", "unquantised")


def test_a_config_that_contradicts_its_record(run, adapter):
    config = config_of(adapter)
    config["rope_parameters"]["factor"] = config["rope_scaling"]["factor"] = 4.0
    (adapter / "config.json").write_text(json.dumps(config))
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 2, "different rope_parameters", "run.json")


def test_a_failed_proof_exits_one_and_leaves_nothing(run, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("longext.conversion.merge.merged_tensor", lambda adapter, name, base: base.float())
    fails_in_one_line(run("merge", "adapter", "-o", "out"), 1, "differs from base + adapter", "limit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("error", "code", "texts"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, ("no space left",)),
        (KeyboardInterrupt(), 130, ("interrupted",)),
        (MemoryError(), 1, ("not enough memory", "--no-check")),
    ],
    ids=["disk", "Ctrl-C", "memory"],
)
def test_what_stops_it_midway_leaves_nothing(run, adapter, tmp_path, monkeypatch, error, code, texts):
    def stop(*_args, **_keys):
        raise error

    target = "longext.conversion.proof._probe" if isinstance(error, MemoryError) else "longext.conversion.merge._prove"
    monkeypatch.setattr(target, stop)
    fails_in_one_line(run("merge", "adapter", "-o", "out"), code, *texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_merged_checkpoint_is_read_by_its_headers(merged):
    """The writer's files are what the format's own reader and ours both take: aligned, whole, in order."""
    (shard,) = read_shards(merged)
    assert shard.data_start % 8 == 0
    assert len(shard.tensors) == 38
