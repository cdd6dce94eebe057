"""Commands on .gguf files: extend, export, inspect, verify, eval ppl, passkey, and a server's RoPE."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

import longext
from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.gguf import FLOAT32, read_gguf, write_changed

PPL = ("--lengths", "64,256", "--max-tokens", 400, "--stride", 32, "--num-bootstrap", 0)


@pytest.fixture
def run(run):
    """The command line, whose exit code must be as expected."""

    def invoke(*args, expect=0):
        result = run(*args)
        assert result.exit_code == expect, result.output
        return result

    return invoke


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """books-5m as a .gguf in float32."""
    pytest.importorskip("llama_cpp")
    from longext.conversion.config import ExportConfig
    from longext.conversion.gguf.export import export_gguf

    path = tmp_path_factory.mktemp("gguf") / "books.gguf"
    export_gguf(ExportConfig(format="gguf", model="books-5m", output=str(path), dtype="float32"))
    return path


def test_extend_writes_once_and_says_who_reads_it(run, base, tmp_path):
    out = tmp_path / "new" / "out.gguf"
    result = run("extend", base, "--method", "cope", "--factor", 4, "-o", out)
    assert "llama-cpp-python" in result.output and "rope_freqs.weight" in result.output
    assert read_gguf(out).get("context_length") == 2048
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.gguf"]
    again = run("extend", base, "--method", "yarn", "--factor", 4, "-o", out, expect=2)
    assert "already exists" in again.output
    run("extend", base, "--method", "yarn", "--factor", 4, "-o", out, "--force")
    assert read_gguf(out).get("rope.scaling.type") == "yarn"
    assert str(base) not in read_gguf(out).values["longext.extension"]
    record = json.loads(run("verify", out, "--json").stdout)
    assert record["ok"] and {check["status"] for check in record["checks"]} == {"pass"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "dynamic", "--factor", 4), "one RoPE for every length"),
        (("--method", "dca", "--factor", 4), "inside attention"),
        (("--method", "yarn"), "Give --factor"),
        (("--method", "yarn", "--factor", 4, "-o", "out"), "ends in .gguf"),
        (("--method", "yarn", "--factor", 4, "--copy"), "always copied"),
    ],
)
def test_what_cannot_be_extended_is_one_line(run, base, arguments, message):
    assert message in run("extend", base, *arguments, expect=2).output


def test_a_scaled_file_is_refused(run, base, tmp_path):
    out = tmp_path / "yarn.gguf"
    run("extend", base, "--method", "yarn", "--factor", 4, "-o", out)
    assert "was extended by longext already" in run("extend", out, "--method", "ntk", "--factor", 8, expect=2).output
    foreign = tmp_path / "foreign.gguf"
    write_changed(read_gguf(out), foreign, {"longext.extension": None}, {})
    assert "has a scaled RoPE already" in run("extend", foreign, "--method", "ntk", "--factor", 8, expect=2).output
    run("extend", foreign, "--method", "ntk", "--factor", 8, "--replace", "-o", tmp_path / "ntk.gguf")
    assert read_gguf(tmp_path / "ntk.gguf").get("rope.scaling.type") is None
    stranger = run("extend", base, "--method", "yarn", "--factor", 4, "-o", foreign, "--force", expect=2)
    assert "not written by longext" in stranger.output


def test_verify_names_a_key_that_was_changed(run, base, tmp_path):
    out, broken = tmp_path / "out.gguf", tmp_path / "broken.gguf"
    run("extend", base, "--method", "yarn", "--factor", 4, "-o", out)
    write_changed(read_gguf(out), broken, {"llama.rope.scaling.factor": (FLOAT32, 8.0)}, {})
    result = run("verify", broken, expect=1)
    assert "llama.rope.scaling.factor is 8.0, written 4.0" in result.output


def test_inspect_shows_the_method_of_the_file(run, base, tmp_path):
    out = tmp_path / "out.gguf"
    run("extend", base, "--method", "ntk-by-parts", "--factor", 4, "-o", out)
    record = json.loads(run("inspect", out, "--json", "-o", tmp_path / "seen").stdout)
    assert record["method"]["method"] == "ntk-by-parts" and record["trained_length"] == 512


def test_perplexity_and_passkeys_are_those_of_the_checkpoint(run, base, tmp_path):
    def scores(model, name):
        ppl = json.loads(run("eval", "ppl", model, *PPL, "--json", "-o", tmp_path / f"ppl-{name}").stdout)
        passkey = ("--lengths", 128, "--num-trials", 2, "--depths", "0,1", "--json")
        found = json.loads(run("passkey", model, *passkey, "-o", tmp_path / f"key-{name}").stdout)
        return [row["ppl"] for row in ppl["results"]], [cell["num_correct"] for cell in found["results"]], ppl["model"]

    ours, right, model = scores(base, "gguf")
    theirs, as_many, _ = scores("books-5m", "hf")
    assert all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(ours, theirs, strict=True))
    assert right == as_many and "llama-cpp-python" in model["engine"]
    refused = run("eval", "ppl", base, *PPL, "--method", "yarn", "--factor", 2, expect=2)
    assert "Extend it first" in refused.output
    assert "Give a checkpoint" in run("eval", "needle", base, "--lengths", 256, expect=2).output


def test_generation_is_greedy_and_ends(base):
    model = longext.load(base)
    plain = longext.load("books-5m")
    prompt = plain.encode("The old man looked at the sea")
    assert model.encode("The old man looked at the sea") == prompt
    assert model.greedy(prompt, 12) == plain.greedy(prompt, 12)


def test_export_refuses_what_it_does_not_know(run, tmp_path):
    pytest.importorskip("gguf")
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "neox")
    result = run("export", "gguf", tmp_path / "neox", "-o", tmp_path / "x.gguf", expect=2)
    assert "convert_hf_to_gguf.py" in result.output
    assert "longext export writes gguf" in run("export", "onnx", "books-5m", expect=2).output
    copy = shutil.copytree(BUNDLED_MODELS["books-5m"], tmp_path / "large")
    weights = {name: tensor.float() for name, tensor in load_file(copy / "model.safetensors").items()}
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    result = run("export", "gguf", copy, "--dtype", "float16", "-o", tmp_path / "x.gguf", expect=2)
    assert "not finite in torch.float16" in result.output and not (tmp_path / "x.gguf").exists()


def test_a_server_is_told_which_rope_it_applies(run, tmp_path):
    pytest.importorskip("llama_cpp.server.app")
    from servers import injected, served

    model = longext.extend("books-5m", "yarn", factor=4, output=tmp_path / "yarn", check=False)
    wanted = ("yarn, factor 4", "yarn, factor 4 twice")
    settings = {name: given for name, given in injected(4.0).items() if name in wanted}
    with served(tmp_path, settings) as url:
        for name in settings:
            is_right = name == "yarn, factor 4"
            ask = ("verify", model, "--endpoint", url, "--endpoint-model", name)
            result = run(*ask, expect=0 if is_right else 1)
            applied = f"The server applies: {name}." if is_right else f"applies {name}; the config of"
            assert applied in result.output
    nobody = run("verify", model, "--endpoint", "http://127.0.0.1:9", expect=1)
    assert "Is the server up?" in nobody.output
