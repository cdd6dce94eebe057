"""`serve-config`: the command of an engine by kind of RoPE and version, or one line that says why not."""

from __future__ import annotations

import json
import shlex

import pytest
from families import CONFIGS

import longext
from longext.conversion.config import ServeConfig
from longext.conversion.serving import serving
from longext.errors import ConfigError


def command(model="books-5m", engine="vllm", **settings):
    return serving(ServeConfig(model=model, engine=engine, **settings))


def override(text, flag):
    words = shlex.split(text)
    return json.loads(words[words.index(flag) + 1])


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    return longext.extend("books-5m", "yarn", factor=8, output=tmp_path_factory.mktemp("served") / "yarn", check=False)


def test_a_checkpoint_carries_its_rope(extended):
    assert command(str(extended)).command == f"vllm serve {extended} --max-model-len 4096"
    assert command(str(extended), "mlx").command == f"mlx_lm.server --model {extended}"
    assert command(str(extended), "sglang").command.endswith("--context-length 4096")
    assert command(str(extended), "llama.cpp").command == (
        f"longext export gguf {extended} -o MODEL.gguf && llama-server -m MODEL.gguf -c 4096"
    )
    assert "twice" in command(str(extended)).notes[0]


def test_a_folder_may_be_called_anything(extended, tmp_path):
    folder = tmp_path / "my Nets DIR"
    folder.symlink_to(extended, target_is_directory=True)
    assert shlex.split(command(str(folder)).command)[2] == str(folder)


def test_flags_extend_a_model_as_it_is():
    for engine, flag in (("vllm", "--hf-overrides"), ("sglang", "--json-model-override-args")):
        given = override(command(engine=engine, method="yarn", factor=8.0).command, flag)
        assert given["max_position_embeddings"] == 4096
        assert given["rope_parameters"]["rope_type"] == "yarn" and given["rope_parameters"]["factor"] == 8
    with pytest.raises(ConfigError, match="has no flag for RoPE"):
        command(engine="mlx", method="yarn", factor=8.0)
    text = command(engine="llama.cpp", method="yarn", factor=8.0, truncate=False).command
    assert "longext extend MODEL.gguf --method yarn --factor 8 --no-truncate -o EXTENDED.gguf" in text


def test_vllm_before_its_change_of_flags():
    old = command(version="0.10.2", method="yarn", factor=8.0).command
    assert override(old, "--rope-scaling")["rope_type"] == "yarn" and "--rope-theta 10000 " in old
    assert "--rope-scaling" not in command(version="0.11.1", method="yarn", factor=8.0).command
    assert "--rope-scaling" not in command(version="0.10.2", method="ntk", factor=8.0).command
    assert "0.33.0 is the version that was looked at" in command(version="0.10.2").notes[-1]


def test_flags_say_again_what_they_would_replace(tmp_path):
    """A rotated fraction, the RoPE of other layers, a text config's own key: engines put the flag in their place."""

    def saved(name):
        CONFIGS[name]().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    flag, keys = "--hf-overrides", {"method": "yarn", "factor": 4.0}
    assert (
        override(command(saved("gpt_neox"), **keys).command, flag)["rope_parameters"]["partial_rotary_factor"] == 0.25
    )
    given = override(command(saved("gemma3"), **keys).command, flag)["text_config"]
    assert given["max_position_embeddings"] == 256
    assert given["rope_parameters"]["sliding_attention"]["rope_theta"] == 20_000
    assert given["rope_parameters"]["full_attention"]["rope_type"] == "yarn"
    for settings in ({"engine": "sglang"}, {"version": "0.10.2"}):
        with pytest.raises(ConfigError, match="no flag for a RoPE in a text config"):
            command(str(tmp_path / "gemma3"), **keys, **settings)
    flags = command(engine="llama.cpp", method="yarn", factor=2.44140625).command
    assert "--factor 2.44140625 " in flags


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dynamic", "factor": 8.0}, "vLLM 0.33.0 makes something else of this RoPE"),
        ({"method": "dynamic", "factor": 8.0, "engine": "exllamav3"}, "refuses this RoPE"),
        ({"method": "dynamic", "factor": 8.0, "engine": "llama.cpp"}, "one RoPE for every length"),
        ({"method": "dca", "factor": 8.0}, "No engine serves it"),
        ({"engine": "triton"}, "Unknown engine"),
        ({"version": "new"}, "--version takes a version"),
    ],
)
def test_what_cannot_be_served_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        command(**settings)
    assert "\n" not in str(error.value)
