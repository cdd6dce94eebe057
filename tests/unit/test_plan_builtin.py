"""Built-in sizes, and the ways that a plan offers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longext.errors import CheckpointError, ConfigError
from longext.planning.builtin import BUILT_IN, config_directory
from longext.planning.config import PlanConfig
from longext.planning.devices import GIB
from longext.planning.fit import plan_record, plan_training
from longext.planning.setup import AUTO, TrainingSetup
from longext.planning.shape import shape_of
from longext.planning.ways import flags_of
from longext.settings import option_of
from longext.training.config import FinetuneConfig

# as the safetensors headers of the models on the Hub say; Gemma 3 from 4b on without its vision tower and projector
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "gemma3-12b": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "gemma3-27b": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
    "phi3-mini": 3_821_079_552,
    "olmo2-7b": 7_298_617_344,
}


def plan(**settings):
    return plan_training(PlanConfig(**{"model": "llama3-8b", "length": 1048576, "gpus": "1xH200", **settings}))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_size_has_its_published_parameters(name):
    assert shape_of(BUILT_IN[name], Path(name)).num_parameters == PUBLISHED[name]


def test_a_directory_comes_before_a_built_in_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3-8b").mkdir()
    (tmp_path / "llama3-8b" / "config.json").write_text(json.dumps(BUILT_IN["llama2-7b"]))
    found = plan(length=4096)
    assert (found.source, found.shape.num_layers, found.shape.vocab_size) == (Path("llama3-8b"), 32, 32000)


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(CheckpointError, match="not a directory or a known size. Did you mean 'llama3-8b'"):
        plan(model="llama3-9b")


def test_a_probe_of_a_built_in_size_has_a_directory():
    with config_directory("qwen3-8b", None) as directory:
        assert json.loads((directory / "config.json").read_text())["hidden_size"] == 4096
    assert not directory.exists()


def test_the_ways_to_a_million_tokens():
    """On one H200 with 128 GiB beside it only a sweep of groups fits; host memory, not the GPU, ends it."""
    found = plan(price_per_hour=3.0)
    ways = {way.name: way for way in found.ways}
    assert list(ways) == [
        "checkpointing", "+ offload", "+ nested 6", "S2 sweep, 8,192", "full sweep, GPU", "full sweep, host",
    ]  # fmt: skip
    assert [name for name, way in ways.items() if way.cost.fits] == ["S2 sweep, 8,192"]
    assert ways["+ offload"].limit == "GPU+host"
    assert ways["full sweep, host"].limit == "host"
    swept = ways["S2 sweep, 8,192"]
    assert (swept.limit, swept.flags) == ("host", "--group-size 8192 --sweep auto")
    assert swept.cost.storage.pinned == 32 * GIB
    assert swept.longest * 32768 == pytest.approx(124 * GIB, rel=0.01)
    assert found.way_out is swept
    assert found.price(swept.cost) == pytest.approx(3.0 * swept.cost.seconds.total / 3600)
    record = json.loads(json.dumps(plan_record(found), allow_nan=False))
    assert [way["fits"] for way in record["ways"]] == [way.cost.fits for way in found.ways]


@pytest.mark.parametrize("settings", [{"disk": 20.0}, {"host_memory": 1.0}])
def test_other_limits_bind(settings):
    found = plan(length=8192, **settings)
    assert not found.fits
    assert found.cost.exceeded == (("disk",) if "disk" in settings else ("host",))
    assert "no other way does" in found.verdict()


def test_the_run_as_asked_is_among_the_ways():
    found = plan(length=65536, tile=4096, checkpointing=False)
    assert found.ways[0].name == "as asked"
    assert found.ways[0].flags == "--no-checkpointing --tile 4096"
    assert all(way.cost.setup.tile == 4096 for way in found.ways)
    assert "as asked" not in [way.name for way in plan(length=65536).ways]


def test_ways_with_several_gpus():
    found = plan(length=131072, gpus="8xH100-80GB")
    shared = next(way for way in found.ways if way.name == "8 GPUs a row")
    assert shared.flags == "--num-processes 8 --sequence-parallel 8"
    assert shared.cost.setup.sharding == "ddp"


def test_half_of_what_is_free_holds_keys_and_values():
    found = plan(length=524288, attention="full", sweep="auto")
    setup, memory = found.setup, found.memory
    everything = plan(length=524288, attention="full", sweep="auto", kv_memory=0.0).memory.needed
    assert setup.kv_memory == pytest.approx((found.device.memory - everything) / 2 / GIB)
    assert memory.needed < found.device.memory
    assert found.cost.storage.pinned > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep": "some"}, "`sweep` must be a number of tokens, auto or off, got 'some'"),
        ({"sweep": "0"}, "`sweep` must be a number"),
        ({"sweep": "auto", "gpus": "8xH200", "sequence_parallel": 8}, "give one of them"),
        ({"nested": 4, "checkpoint_every": 2}, "give one of them"),
        ({"nested": 4, "checkpointing": False}, "leave --no-checkpointing out"),
        ({"kernels": "fast"}, "Unknown kernels 'fast'"),
    ],
)
def test_what_cannot_be_is_one_clear_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan(**settings)


def test_flags_are_flags_of_finetune():
    setup = TrainingSetup(
        length=2**20, method="lora", attention="full", checkpoint_every=2, nested=3, offload=True, sweep=AUTO,
        kv_memory=3.2, tile=64, kernels="liger", num_gpus=2, sequence_parallel=2, checkpointing=False,
    )  # fmt: skip
    names = {word[2:].replace("-", "_") for word in flags_of(setup).split() if word.startswith("--")}
    fields = FinetuneConfig.__dataclass_fields__
    assert {"kv_memory", "sweep", "nested"} < names
    assert all(name.removeprefix("no_") in fields for name in names)


def test_options_that_finetune_has_too_have_its_defaults():
    ours, theirs = PlanConfig.__dataclass_fields__, FinetuneConfig.__dataclass_fields__
    same = ("kernels", "tile", "nested", "checkpoint_every", "sweep", "kv_memory", "loss_chunk", "offload", "lora_r",
            "checkpointing", "group_size", "group_ratio", "attention", "batch_size", "sequence_parallel")  # fmt: skip
    for name in same:
        assert ours[name].default == theirs[name].default, name
        assert option_of(ours[name]).ge == option_of(theirs[name]).ge, name
