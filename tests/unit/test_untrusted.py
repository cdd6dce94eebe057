"""The one door for untrusted text: what it lets in has a size, a depth and types; what not ends in a line."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

from longext.checkpoint.ranges import check_model_config
from longext.checkpoint.source import read_config
from longext.checkpoint.weights import fingerprint_weights, read_header
from longext.compressor.spec import CompressorSpec
from longext.errors import CheckpointError, ConfigError, DataError
from longext.untrusted import (
    build,
    check_directory,
    check_patterns,
    fields,
    json_lines,
    parse_json,
    parse_yaml,
    read_text,
    tagged_infinity,
    take_notes,
)

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * DEEP, "nested more than"),
        ('{"a":' * DEEP, "nested more than"),
        ("[" * 70 + "]" * 70, "nested more than"),
        ("9" * 5000, "a whole number of 5,000 digits"),
        ("[1e999]", "too large"),
        ("NaN", "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json_is_refused_in_a_line(text, reason):
    with pytest.raises(DataError, match=f"^f.json is not valid JSON .*{re.escape(reason)}"):
        parse_json(text, "f.json")


def test_json_that_a_model_may_hold_stays_as_it_is():
    value = {"a": [1, 2.5, 10**30, True, None, "\U0001f600"], "limit": {"__float__": "Infinity"}}
    assert parse_json(json.dumps(value), "f") == value
    assert parse_json('{"limit": Infinity}', "f", constant=tagged_infinity) == {"limit": {"__float__": "Infinity"}}


def test_lone_surrogates_are_replaced_counted_and_said_once():
    take_notes()
    assert parse_json('{"a\\udc00": "\\ud83d", "b": "\\ud83d\\ude00"}', "f.json:7") == {
        "a\ufffd": "\ufffd",
        "b": "\U0001f600",
    }
    parse_json('"\\udfff"', "f.json:8")
    (note,) = take_notes()
    assert "3 lone surrogates" in note and "f.json:7" in note
    assert take_notes() == []


def test_lines_keep_their_numbers_and_a_mark_in_front_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(json_lines(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2 is not UTF-8 text \(invalid start byte at byte 7\)"):
        list(json_lines(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_files_are_opened(tmp_path, make):
    make(tmp_path / "a.txt")
    with pytest.raises(DataError, match="a.txt is a (FIFO|folder), not a file"):
        read_text(tmp_path / "a.txt")


def test_a_fifo_in_a_model_directory_is_refused_before_a_library_opens_it(tmp_path):
    check_directory(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer.json is a FIFO"):
        check_directory(tmp_path)


def test_fields_are_of_their_types():
    value = {"a": 1, "b": "x", "c": None}
    assert fields(value, "f", {"a": float, "b": str, "c": (dict, None), "d": (int, None)}) == {**value, "d": None}
    for name, wanted, text in (("b", int, "must be a whole number, found 'x'"), ("d", str, "has no `d`")):
        with pytest.raises(DataError, match=text):
            fields(value, "f", {name: wanted})
    with pytest.raises(DataError, match="found true|found True"):
        fields({"a": True}, "f", {"a": int})


def test_a_dataclass_is_built_from_what_it_wrote_and_nothing_else():
    spec = CompressorSpec(ratios=(4, 8))
    assert build(CompressorSpec, json.loads(json.dumps(spec.to_json())), "f") == spec
    for change, text in (
        ({"rank": "8"}, "`rank`"),
        ({"more": 1}, "unknown key `more`"),
        ({"ratios": ["x"]}, "`ratios`"),
    ):
        with pytest.raises(DataError, match=text):
            build(CompressorSpec, {**spec.to_json(), **change}, "f")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "line 3.*'a' is there twice"),
        ("a: 1\n1: 2", "line 2.*must be text"),
        ("a: &x [1]\nb: *x", "line 1.*anchors and aliases"),
        ("a: !!python/object/apply:os.system [id]", "the tag"),
        ("a: " + "[" * DEEP, "nested more than"),
        ("a: " + "9" * 5000, "5,000 characters"),
        ("a: [", "line 1"),
    ],
)
def test_yaml_beyond_plain_values_is_refused_with_its_line(text, reason):
    started = time.process_time()
    with pytest.raises(ConfigError, match=f"^r.yaml.*{reason}"):
        parse_yaml(text, "r.yaml")
    assert time.process_time() - started < 2


def test_dates_in_yaml_are_text():
    assert parse_yaml("a: 2020-13-45\nb: 2020-01-02\nc: 1.5", "r") == {"a": "2020-13-45", "b": "2020-01-02", "c": 1.5}


@pytest.mark.parametrize("text", ["0123456", "1:30", "1.10", "1_000", "0x1f", "+5", "1e5", ".5"])
def test_numbers_that_would_be_spelled_otherwise_are_text(text):
    assert parse_yaml(f"a: {text}", "r") == {"a": text}


def test_expressions_that_would_never_end_are_refused_and_common_ones_pass():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(32)]
    check_patterns([("target_modules", r".*\.(q|k|v)_proj"), ("rank_pattern", r"(.*\.)?(q_proj)$")], names, "f")
    for pattern, text in ((r"((\w|\.)+)+X", "takes more than 2 s"), ("(", "no regular expression")):
        with pytest.raises(CheckpointError, match=text):
            check_patterns([("target_modules", pattern)], names, "f")


# --- safetensors ------------------------------------------------------------------------------------------------------


def _file(tmp_path, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return tmp_path / "model.safetensors"


def _entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": _entry(0, 8), "b": _entry(4, 12)}, "offset for tensor `b`"),
        ({"a": _entry(0, 8)}, "not fully covered"),
        ({"a": _entry(8, 16)}, "offset for tensor `a`"),
        ({"a": _entry(-8, 0)}, "integer `-8`"),
        ({"a": _entry("0", "8")}, 'string "0"'),
        ({"a": _entry(0, 16, (2,))}, "invalid shape, data type, or offset"),
        ({"a": _entry(0, 8, (-2,))}, "integer `-2`"),
        ({"a": _entry(0, 8, ("2",))}, 'string "2"'),
        ({"a": _entry(0, 8, dtype="F99")}, "unknown variant `F99`"),
        ({"a": None}, "invalid type: null"),
        ({"a": _entry(0, 8), "__metadata__": {"a": 1}}, "expected a string"),
        (b'{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},"a":{}}', "'a' is there twice"),
        (b"{" * DEEP, "broken safetensors header"),
        (b"[]", "must hold a JSON object"),
    ],
)
def test_a_header_that_does_not_describe_its_data_is_refused(tmp_path, header, reason):
    with pytest.raises(CheckpointError, match=f"model.safetensors.*{reason}.*Download it again"):
        read_header(_file(tmp_path, header))


def test_a_header_that_does_is_read(tmp_path):
    found = read_header(_file(tmp_path, {"b": _entry(8, 16), "a": _entry(0, 8), "c": _entry(16, 16, (0, 3))}))
    assert found.tensors["a"][:2] == ("F32", (2,)) and found.tensors["a"].end - found.data_start == 8
    assert set(found.tensors) == {"a", "b", "c"}


def test_one_changed_byte_is_another_model(tmp_path):
    header = {"model.a.weight": _entry(0, 2 * 10**6, (500_000,))}
    data = bytearray(2 * 10**6)
    _file(tmp_path, header, data)
    before = fingerprint_weights(tmp_path)
    data[1_234_567] = 1
    _file(tmp_path, header, data)
    assert fingerprint_weights(tmp_path) != before


def test_whole_numbers_are_no_weights(tmp_path):
    _file(tmp_path, {"model.a.weight": _entry(0, 16, dtype="I64")})
    with pytest.raises(CheckpointError, match="'model.a.weight' is stored as I64"):
        fingerprint_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    fingerprint_weights(tmp_path)


# --- values of a config.json ------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        *(({"rope_theta": value}, "rope_theta") for value in (0, -1.0, "10000", True, {"__float__": "NaN"}, 1e300)),
        *(({"head_dim": value}, "head_dim") for value in (0, 15, 10**9, "16", 1.5)),
        *(({"max_position_embeddings": value}, "max_position_embeddings") for value in (0, -5, 10**12, "512")),
        *(({"vocab_size": 0}, "vocab_size"), ({"hidden_size": 62}, "hidden_size"), ({"hidden_size": 60}, "head_dim")),
        *(({"num_attention_heads": 0}, "num_attention_heads"), ({"num_key_value_heads": 3}, "num_key_value_heads")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e300}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": "8"}}}, "factor"),
        ({"rope_scaling": [8]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": 8}}, "rope_type"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"layer_types": [1]}, "layer_types"),
        ({"text_config": {"rope_theta": 0}}, "text_config: `rope_theta"),
    ],
)
def test_values_that_no_model_can_have_are_refused_by_name(tmp_path, change, key):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(CheckpointError, match=f"config.json.*{key}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({}, {"head_dim": None}, {"rope_theta": 10_000}, {"rope_scaling": None}),
        {"model_type": "gemma3n_text", "intermediate_size": [8, 16]},
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}},
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
    ],
)
def test_values_that_models_have_pass(tmp_path, change):
    check_model_config({**LLAMA, **change}, tmp_path / "config.json")
