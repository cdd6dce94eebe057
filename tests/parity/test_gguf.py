"""GGUF: files against the package `gguf`, what llama.cpp computes against transformers, for every method."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from rope_examples import CASES, case_id, example

from longext.checkpoint.bundled import BUNDLED_MODELS, SAMPLE_DOCUMENT
from longext.checkpoint.gguf import BLOCKS, FLOAT32, STRING, UINT32, read_gguf, write_changed
from longext.checkpoint.gguf_rope import READ_FREQS, GgufRope, read_gguf_rope, rope_for
from longext.conversion.config import ExportConfig
from longext.conversion.gguf.extend import RECORD_KEY, extension_record, path_from, read_record, record_value
from longext.errors import CheckpointError, ConfigError
from longext.rope.spec import ROPE_METHODS, RopeSpec, compute_inv_freq, rope_parameters

LENGTH, FACTOR = 32, 8.0
TINY = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LENGTH}


def spec_of(method, number=0, **fields):
    values = {"rope_theta": 1e4, "rotary_dim": 64, "original_max_position_embeddings": LENGTH, "factor": FACTOR}
    if method == "none":
        values["factor"] = 1.0
    return RopeSpec(method=method, **{**values, **example(method, 64, number), **fields})


# --- the format -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of the package `gguf`: every kind of key, a quantised tensor, an odd size."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.context_length", 2048)
    writer.add_uint32("llama.embedding_length", 128)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ß", "", "long " * 50])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_uint64("made.up", 2**40)
    weights = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(path):
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {each.name: (each.tensor_type, np.array(each.data)) for each in reader.tensors}


def test_sizes_of_blocks_are_those_of_the_package():
    gguf = pytest.importorskip("gguf")
    for kind, (values, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.value in BLOCKS:
            assert BLOCKS[kind.value] == (values, size), kind
    assert {kind.value for kind in gguf.GGML_QUANT_SIZES} >= set(BLOCKS) - {39, 40, 41}


def test_a_changed_file_reads_as_the_package_reads_it(written, tmp_path):
    file = read_gguf(written)
    keys = {"llama.context_length": (UINT32, 4096), "made.up": None, "longext.extension": (STRING, "{}")}
    write_changed(file, tmp_path / "out.gguf", keys, {"rope_freqs.weight": np.arange(32, dtype=np.float32)})
    (old, weights), (new, copied) = contents(written), contents(tmp_path / "out.gguf")
    assert new == {**{k: v for k, v in old.items() if k != "made.up"}, "llama.context_length": 4096, keys_added: "{}"}
    assert np.array_equal(copied.pop("rope_freqs.weight")[1], np.arange(32))
    for name, (kind, data) in weights.items():
        assert copied[name][0] == kind and np.array_equal(copied[name][1], data)
    ours = read_gguf(tmp_path / "out.gguf")
    assert ours.array("tokenizer.ggml.tokens") == old["tokenizer.ggml.tokens"]
    assert ours.array("tokenizer.ggml.scores") == [0.5, -1.0]
    assert all(ours.sha256(ours.tensors[name]) == file.sha256(each) for name, each in file.tensors.items())


keys_added = "longext.extension"


@pytest.mark.parametrize("cut", [3, 7, 20, 60, 200, -1])
def test_a_broken_file_is_one_line(written, tmp_path, cut):
    path = tmp_path / "cut.gguf"
    path.write_bytes(written.read_bytes()[:cut] if cut > 0 else written.read_bytes()[:-60])
    with pytest.raises(CheckpointError, match=r"GGUF|cut short"):
        read_gguf(path)


def test_random_damage_never_ends_in_another_error(written, tmp_path):
    content, random = written.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, len(content) - 500, 3):
            damaged[place] = random.integers(256)
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            read_gguf_rope(read_gguf(tmp_path / "x.gguf"))
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"split.count": (STRING, "x")}, "one part of 'x'"),
        ({"llama.rope.dimension_count": (UINT32, 63)}, "rotates 63 of 64"),
        ({"llama.rope.scaling.type": (STRING, "new")}, "llama.cpp does not know"),
        ({"llama.rope.scaling.type": (UINT32, 3)}, "llama.cpp does not know"),
        ({"llama.attention.head_count": (STRING, "x")}, "not a number"),
    ],
)
def test_keys_of_another_type_or_meaning_are_one_line(written, tmp_path, keys, told):
    write_changed(read_gguf(written), tmp_path / "x.gguf", keys, {})
    with pytest.raises(CheckpointError, match=told):
        read_gguf_rope(read_gguf(tmp_path / "x.gguf"))


@pytest.mark.parametrize("change", [{"base_path": 3}, {"new_length": "x"}, {"new_length": None}, {"spec": [1]}])
def test_a_note_with_parts_of_another_type_is_one_line(written, tmp_path, change):
    spec = spec_of("none")
    note = extension_record(base_model="b", base_path="b", origin=spec, spec=spec, old_length=1, new_length=2)
    write_changed(read_gguf(written), tmp_path / "x.gguf", {RECORD_KEY: record_value({**note, **change})}, {})
    with pytest.raises(CheckpointError, match=next(iter(change))):
        read_record(read_gguf(tmp_path / "x.gguf"))


def test_a_note_names_no_home(tmp_path, monkeypatch):
    home = tmp_path / "home" / "me"
    monkeypatch.setattr(Path, "home", lambda: home)
    assert path_from(home / "out" / "a.gguf", home / "models" / "b.gguf") == str(Path("..", "models", "b.gguf"))
    assert path_from(tmp_path / "out" / "a.gguf", home / "models" / "b.gguf") == "b.gguf"


# --- keys of a RoPE ---------------------------------------------------------------------------------------------------


def changed(written, path, change: GgufRope):
    write_changed(read_gguf(written), path, change.keys, change.tensors)
    return read_gguf(path)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_what_is_written_reads_as_the_formula(written, tmp_path, case):
    method, number = case
    spec = spec_of(method, number)
    parameters = rope_parameters(spec)
    if ROPE_METHODS[method].follows_length and parameters.get("short_factor") != parameters.get("long_factor", ()):
        with pytest.raises(ConfigError, match="one RoPE for every length"):
            rope_for("llama", spec, 256)
        return
    rope = read_gguf_rope(changed(written, tmp_path / "out.gguf", rope_for("llama", spec, 256)))
    (inv_freq, temperature), (wanted, own) = compute_inv_freq(rope.spec), compute_inv_freq(spec)
    assert np.allclose(inv_freq, wanted, rtol=1e-6, atol=0)
    assert temperature == pytest.approx(own, rel=1e-6)
    assert rope.max_position_embeddings == 256


def test_keys_that_longext_does_not_write_are_read(written, tmp_path):
    def read(name, **keys):
        own = {"type": (STRING, name), "factor": (FLOAT32, 4.0), **keys}
        found = GgufRope({f"llama.rope.scaling.{key}": value for key, value in own.items()})
        return read_gguf_rope(changed(written, tmp_path / "x.gguf", found)).spec

    yarn = read("yarn", yarn_beta_fast=(FLOAT32, 16.0), yarn_beta_slow=(FLOAT32, 2.0))
    assert (yarn.beta_fast, yarn.beta_slow) == (16.0, 2.0)
    assert read("linear").original_max_position_embeddings == 2048 // 4  # by convention
    recorded = read("linear", original_context_length=(UINT32, 2048))
    assert (recorded.original_max_position_embeddings, recorded.factor) == (2048, 4.0)


def test_graphs_without_rope_freqs_take_what_keys_can_say():
    for method in ("abf", "ntk", "linear", "yarn"):
        assert not rope_for("qwen2", spec_of(method), 256).tensors
    with pytest.raises(ConfigError, match=r"reads no rope_freqs.weight"):
        rope_for("qwen2", spec_of("ntk-by-parts"), 256)
    with pytest.raises(ConfigError, match="not known to rotate every layer"):
        rope_for("gemma3", spec_of("yarn"), 256)


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def tiny(kind, path, **more):
    """Save a random model of one family with the tokenizer of books-5m, and return it."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **HEADS, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # large queries and keys: attention is sharp, and a wrong rotation shows
            parameter.mul_(20.0 if "q_proj" in name or "k_proj" in name else 3.0 if parameter.ndim > 1 else 1.0)
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama, as a checkpoint and as GGUF."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("llama")
    model = tiny("Llama", folder / "base")
    return model, export(folder / "base"), folder


def export(checkpoint: Path, **settings):
    """Export with a tokenizer of as many tokens as the model has."""
    import json

    from longext.conversion.gguf.export import export_gguf

    tokens = json.loads((BUNDLED_MODELS["books-5m"] / "tokenizer.json").read_text())
    model = tokens["model"]
    model["vocab"] = {text: place for text, place in model["vocab"].items() if place < TINY["vocab_size"]}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokens))
    (checkpoint / "tokenizer_config.json").write_bytes(
        (BUNDLED_MODELS["books-5m"] / "tokenizer_config.json").read_bytes()
    )
    output = checkpoint.with_suffix(".gguf")
    export_gguf(ExportConfig(format="gguf", model=str(checkpoint), output=str(output), **settings))
    return output


def engine_logits(path, ids):
    from longext.conversion.gguf.engine import LlamaCpp

    engine = LlamaCpp(path)
    logits = np.concatenate([piece.copy() for piece in engine.logits(ids)])
    engine.close()
    return torch.from_numpy(logits)


IDS = torch.randint(3, TINY["vocab_size"], (256,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_llama_cpp_computes_every_method(base, tmp_path, case):
    """Largest difference of a logit at 8 times the trained length below 1 % of what the method changes."""
    from longext.checkpoint.load import build_model_config
    from longext.checkpoint.rope_config import read_model_rope, write_rope
    from longext.checkpoint.source import read_config
    from longext.models.rotary import rebuild_rope

    model, file, folder = base
    method, number = case
    spec = spec_of(method, number)
    try:
        change = rope_for("llama", spec, 256)
    except ConfigError:
        assert ROPE_METHODS[method].follows_length
        return
    changed(file, tmp_path / "out.gguf", change)
    config, rope = read_config(folder / "base"), read_model_rope(folder / "base")
    plain = engine_logits(file, IDS)
    rebuild_rope(model, build_model_config(write_rope(config, rope, spec, rope_parameters(spec), 256)))
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0]
    found = engine_logits(tmp_path / "out.gguf", IDS)
    effect = float((wanted - plain).abs().max())
    assert method == "none" or effect > 0.5
    assert float((wanted - found).abs().max()) < 0.01 * max(effect, 1.0)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_exported_models_compute_what_transformers_computes(tmp_path, kind, more):
    pytest.importorskip("llama_cpp")
    model = tiny(kind, tmp_path / "base", **more)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS[:32]])).logits[0]
    found = engine_logits(export(tmp_path / "base"), IDS[:32])
    assert float((wanted - found).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_an_extended_checkpoint_and_an_extended_file_are_one(tmp_path):
    pytest.importorskip("llama_cpp")
    import longext

    tiny("Llama", tmp_path / "base")
    file = export(tmp_path / "base")
    longext.extend(tmp_path / "base", "ntk-by-parts", factor=8, output=tmp_path / "extended")
    longext.extend(file, "ntk-by-parts", factor=8, output=tmp_path / "extended-file.gguf")
    ours, theirs = read_gguf(export(tmp_path / "extended")), read_gguf(tmp_path / "extended-file.gguf")
    assert {k: v for k, v in ours.values.items() if "rope" in k} == {
        k: v for k, v in theirs.values.items() if "rope" in k
    }
    assert np.array_equal(ours.floats("rope_freqs.weight"), theirs.floats("rope_freqs.weight"))
    assert torch.equal(engine_logits(ours.path, IDS), engine_logits(theirs.path, IDS))


def test_the_engine_makes_the_tokens_of_the_tokenizer(tmp_path):
    pytest.importorskip("llama_cpp")
    from transformers import AutoTokenizer

    from longext.conversion.gguf.engine import LlamaCpp
    from longext.conversion.gguf.export import export_gguf

    export_gguf(ExportConfig(format="gguf", model="books-5m", output=str(tmp_path / "b.gguf")))
    engine = LlamaCpp(tmp_path / "b.gguf")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODELS["books-5m"])
    for text in (SAMPLE_DOCUMENT.read_text()[:20_000], "It's 1984: ½ of  12,345\n\n\tnaïve 😀 <s>x</s>.", ""):
        ids = tokenizer(text).input_ids
        assert [*engine.prefix, *engine.tokenize(text)] == ids
        assert engine.detokenize(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert dataclasses.asdict(ExportConfig(format="gguf", model="x"))["dtype"] == "auto"
    assert {"llama"} <= READ_FREQS


def test_a_temperature_alone_is_carried(written, tmp_path):
    spec = spec_of("yarn", factor=1.0, attention_factor=1.1)
    rope = read_gguf_rope(changed(written, tmp_path / "out.gguf", rope_for("llama", spec, 256)))
    inv_freq, temperature = compute_inv_freq(rope.spec)
    assert np.allclose(inv_freq, compute_inv_freq(spec)[0], rtol=1e-6) and temperature == pytest.approx(1.1)
