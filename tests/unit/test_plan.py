"""`longext plan` without running a model: shapes, devices, the search for what fits, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from families import CONFIGS, LLAMA2_7B, save_tiny_model
from transformers import AutoModelForCausalLM

from longext.checkpoint.families import family_of
from longext.errors import CheckpointError, ConfigError
from longext.planning.config import PlanConfig
from longext.planning.devices import DEVICES, GIB, parse_gpus
from longext.planning.fit import plan_record, plan_training
from longext.planning.memory import plan_memory
from longext.planning.setup import TrainingSetup
from longext.planning.shape import read_shape
from longext.planning.ways import STEP, Machine, longest_length


@pytest.fixture
def llama(tmp_path):
    """A directory with Llama-2-7B's config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    return tmp_path


def config_for(directory, **changes) -> PlanConfig:
    return PlanConfig(**{"model": str(directory), "length": 32768, "gpus": "A100-80GB", **changes})


KNOWN = [name for name, make in CONFIGS.items() if family_of(make().model_type).layout]


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_counted_exactly_from_config_alone(name, tmp_path):
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.counted is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_neox"])
def test_headers_confirm_the_count_where_weights_are(name, tmp_path):
    shape = read_shape(save_tiny_model(CONFIGS[name](), tmp_path / name))
    assert shape.counted == shape.num_parameters


def test_llama2_7b_has_its_known_size(llama):
    assert read_shape(llama).num_parameters == 6_738_415_616


def test_weights_that_differ_from_the_config_are_noted(tmp_path):
    directory = save_tiny_model(CONFIGS["llama"](), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert any("weight files hold" in note for note in plan_training(config_for(directory, length=64)).notes())


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xA100-80GB", 8, "A100-80GB"),
        ("H200-141GB", 1, "H200-141GB"),
        ("4xh200", 4, "H200-141GB"),
        ("2 x rtx-4090-24gb", 2, "RTX-4090-24GB"),
    ],
)
def test_gpus_are_parsed(text, count, name):
    assert parse_gpus(text) == (count, DEVICES[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": "8xA100-60GB"}, "Did you mean 'A100-40GB'|Did you mean 'A100-80GB'"),
        ({"gpus": "8xA100"}, "Did you mean 'A100-40GB'|Did you mean 'A100-80GB'"),
        ({"gpus": "0xA100-80GB"}, "at least one GPU"),
        ({"gpus": "many of them"}, "for example 8xA100-80GB"),
        ({"length": 0}, "`length` must be >= 1, got 0"),
        ({"method": "longlore"}, "Did you mean 'longlora'"),
        ({"attention": "s3"}, "Unknown attention 's3'"),
        ({"sharding": "zero9"}, "Unknown sharding 'zero9'"),
        ({"sharding": "fsdp"}, "needs several GPUs"),
        ({"dtype": "int4"}, "Unknown dtype 'int4'"),
        ({"group_ratio": 0.0}, r"`group_ratio` must be in \(0, 1\]"),
        ({"group_size": 333}, "must be even"),
        ({"utilisation": 1.5}, "fraction of the peak"),
        ({"offload": True, "checkpointing": False}, "cannot go with --no-checkpointing"),
        ({"sequence_parallel": 3, "gpus": "8xA100-80GB"}, "must divide the 8 GPU"),
        ({"sequence_parallel": 5, "gpus": "5xA100-80GB"}, "must divide the model's 32 attention heads"),
    ],
)
def test_bad_settings_are_one_clear_error(llama, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan_training(config_for(llama, **changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "No config.json"),
        ({**LLAMA2_7B, "model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({**LLAMA2_7B, "model_type": "mamba"}, "of type 'mamba', whose cost"),
        ({**LLAMA2_7B, "hidden_size": "wide"}, "`hidden_size` must be a whole number"),
    ],
)
def test_models_without_a_known_cost_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        plan_training(config_for(tmp_path))


@pytest.mark.parametrize("gpus", ["H200-141GB", "A100-80GB", "8xA100-80GB", "RTX-4090-24GB"])
@pytest.mark.parametrize("method", ["longlora", "lora", "full"])
def test_the_longest_length_fits_and_the_next_does_not(llama, gpus, method):
    count, device = parse_gpus(gpus)
    setup = TrainingSetup(length=1, method=method, sharding="fsdp" if count > 1 else "none", num_gpus=count)
    shape = read_shape(llama)
    longest = longest_length(shape, setup, Machine(device=device, host=128 * GIB))

    def needed(length):
        return plan_memory(shape, dataclasses.replace(setup, length=length)).needed

    if longest:
        assert needed(longest) <= device.memory
    assert needed(longest + STEP) > device.memory


def test_full_training_is_offered_lora(llama):
    plan = plan_training(config_for(llama, method="full", gpus="H200-141GB"))
    assert plan.ways[-1].name == "LoRA, checkpointing"
    assert plan.setup.group is None
    assert plan.dense == plan.sparse


def test_a_run_that_does_not_fit_says_what_would(llama):
    plan = plan_training(config_for(llama, length=262144))
    flags = "--group-size 8192 --sweep auto"
    assert plan.verdict() == f"does not fit as asked (GPU memory); the first way that does: S2 sweep, 8,192 ({flags})"
    assert plan.way_out.flags == flags
    hopeless = plan_training(config_for(llama, gpus="T4-16GB"))
    assert "no other way does" in hopeless.verdict()


def test_auto_sharding_takes_the_first_that_fits(llama):
    assert plan_training(config_for(llama)).setup.sharding == "none"
    assert plan_training(config_for(llama, gpus="8xA100-80GB")).setup.sharding == "ddp"
    full = config_for(llama, gpus="8xA100-80GB", method="full")
    assert plan_training(full).setup.sharding == "zero2"
    assert plan_training(dataclasses.replace(full, length=131072)).setup.sharding == "fsdp"


def test_parts_add_up_and_a_record_is_json(llama):
    plan = plan_training(config_for(llama, num_tokens=10**9, gpus="4xH100-80GB", sequence_parallel=2, offload=True))
    assert sum(plan.memory.parts.values()) == pytest.approx(plan.memory.needed)
    record = json.loads(json.dumps(plan_record(plan)))
    assert record["hours"] == pytest.approx(1e9 / record["tokens_per_second"] / 3600)
    assert record["setup"]["group"] == 8192
    assert record["memory"]["host"] == 32 * 16384 * 4096 * 2


def test_sequence_parallel_halves_activations_and_time(llama):
    shape, (_, device) = read_shape(llama), parse_gpus("A100-80GB")
    one = TrainingSetup(length=65536, num_gpus=2, sharding="ddp")
    two = dataclasses.replace(one, sequence_parallel=2)
    assert plan_memory(shape, two).saved == plan_memory(shape, one).saved / 2
    plans = [plan_training(config_for(llama, gpus="2xA100-80GB", sequence_parallel=n)) for n in (1, 2)]
    assert plans[1].seconds == plans[0].seconds / 2
    assert plans[1].tokens_per_second == pytest.approx(plans[0].tokens_per_second)
    assert device.memory < 80 * GIB
