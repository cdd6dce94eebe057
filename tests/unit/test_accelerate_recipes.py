"""The config files for `accelerate launch`: accelerate reads them as they are meant. Nothing is launched."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from longext.settings import shipped_recipes

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "fsdp2-multinode": DistributedType.FSDP,
    "deepspeed-zero2": DistributedType.DEEPSPEED,
    "deepspeed-zero3": DistributedType.DEEPSPEED,
}


def environment(name):
    """What `accelerate launch` hands to the processes it starts."""
    file = str(FOLDER / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "-m", "longext", "finetune"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert arguments.module
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


@pytest.fixture
def launched(request, monkeypatch):
    """The environment of a launched process, for the test named by its parameter."""
    for key, value in environment(request.param).items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    return request.param


def test_every_file_is_tested_and_none_is_a_recipe():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(KINDS)
    assert not any(name.startswith("accelerate") for name in shipped_recipes())


@pytest.mark.parametrize("name", sorted(KINDS))
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.mixed_precision == "bf16"
    machines = 8 if "multinode" in name else 1
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    text = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert "accelerate launch --config_file" in text[0]


@pytest.mark.parametrize("launched", ["fsdp2", "fsdp2-multinode"], indirect=True)
def test_fsdp_is_version_2_and_shards_decoder_layers(launched):
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.activation_checkpointing
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("launched", ["deepspeed-zero2", "deepspeed-zero3"], indirect=True)
def test_deepspeed_takes_its_stage_and_leaves_the_rest_to_longext(launched):
    config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == int(launched[-1])
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config[key] == "auto"
    assert config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save") is (launched[-1] == "3")
