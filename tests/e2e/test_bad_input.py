"""Whatever is wrong ends in one clear line, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json

import pytest
from command_line import EXTEND, fails, no_leftovers


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("nowhere", *EXTEND), ("No model at 'nowhere'", "Available: books-5m")),
        (("no/where", *EXTEND), ("No directory", "no/where", "Hub")),
        (("books5m", *EXTEND), ("Did you mean 'books-5m'",)),
        (
            ("books-5m", "--method", "yarnn", "--factor", 8, "-o", "out"),
            ("Unknown method 'yarnn'", "Did you mean 'yarn'"),
        ),
        (("books-5m", "--method", "yarn", "--factor", 0.5, "-o", "out"), ("--factor must be >= 1", "0.5")),
        (("books-5m", "--method", "yarn", "--factor", "nan", "-o", "out"), ("`factor` must be a finite number", "nan")),
        (
            ("books-5m", "--method", "yarn", "--target-length", 256, "-o", "out"),
            ("at least the trained length 512", "256"),
        ),
        (("books-5m", "--method", "yarn", "-o", "out"), ("--factor", "--target-length")),
        (("books-5m", "--method", "yarn", "--factor", 8, "--target-length", 4096, "-o", "out"), ("not both",)),
        (("books-5m", "--factor", 8, "-o", "out"), ("Missing: method",)),
        (("--method", "yarn", "--factor", 8, "-o", "out"), ("Missing: model",)),
        (("books-5m", "--method", "abf", "--factor", 8, "-o", "out"), ("--rope-theta",)),
        (("books-5m", "--method", "abf", "--factor", 8, "--rope-theta", 100, "-o", "out"), ("must not be below",)),
        (
            ("books-5m", "--method", "linear", "--factor", 8, "--beta-fast", 16, "-o", "out"),
            ("no parameter `beta_fast`",),
        ),
        (("books-5m", *EXTEND, "--beta-fast", 0.5), ("`beta_fast` must be above `beta_slow`",)),
        (("books-5m", *EXTEND, "--ramp", "steep"), ("'code' or 'paper'",)),
        (("books-5m", "--method", "longrope", "--factor", 8, "-o", "out"), ("--factors",)),
        (("books-5m", "--method", "longrope", "--factor", 8, "--factors", "no.json", "-o", "out"), ("no.json",)),
        (("books-5m", "--method", "none", "--factor", 8, "-o", "out"), ("`none` leaves the RoPE as it is",)),
        (("books-5m", *EXTEND, "--ramp", "paper", "--no-truncate"), ("`truncate` is for the code ramp",)),
        (("books-5m", *EXTEND, "--set", "metod=yarn"), ("unknown key 'metod'", "Did you mean 'method'")),
        (("books-5m", *EXTEND, "--set", "factor"), ("key=value",)),
        (("books-5m", *EXTEND, "-c", "no-such-recipe"), ("No recipe 'no-such-recipe'",)),
    ],
)
def test_extend_refuses(run, tmp_path, args, texts):
    fails(run("extend", *args), 2, *texts)
    no_leftovers(tmp_path)


def write_config(base, **changes):
    config = json.loads((base / "config.json").read_text())
    config.update(changes)
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_gpt2_has_no_rope(run, base, tmp_path):
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_positions": 64}))
    fails(run("extend", base, *EXTEND), 2, "gpt2", "learned absolute positions", "Llama")
    no_leftovers(tmp_path, "base")


def test_a_config_without_rope(run, base, tmp_path):
    (base / "config.json").write_text(
        json.dumps({"model_type": "mystery", "hidden_size": 64, "num_attention_heads": 2})
    )
    fails(run("extend", base, *EXTEND), 2, "No RoPE", "rope_parameters", "mystery")


def test_falcon_with_alibi(run, base):
    (base / "config.json").write_text(json.dumps({"model_type": "falcon", "alibi": True}))
    fails(run("extend", base, *EXTEND), 2, "ALiBi")


def test_a_foreign_rope_type(run, base):
    write_config(base, rope_parameters={"rope_type": "dynamic-yarn", "rope_theta": 1e4, "factor": 2})
    fails(run("extend", base, *EXTEND), 2, "dynamic-yarn", "cannot be extended")


def test_broken_config_json(run, base, tmp_path):
    (base / "config.json").write_text('{"model_type": "llama",')
    fails(run("extend", base, *EXTEND), 2, "config.json is not valid JSON", "line 1")
    no_leftovers(tmp_path, "base")


def test_missing_config_json(run, base):
    (base / "config.json").unlink()
    fails(run("extend", base, *EXTEND), 2, "No config.json")


def test_an_adapter_directory(run, base):
    (base / "config.json").rename(base / "adapter_config.json")
    fails(run("extend", base, *EXTEND), 2, "adapter", "Merge")


def test_a_file_instead_of_a_directory(run, base):
    fails(run("extend", base / "config.json", *EXTEND), 2, "is a file")


def test_legacy_bin_weights(run, base, tmp_path):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    fails(run("extend", base, *EXTEND), 2, "pytorch_model.bin", "save_pretrained")
    no_leftovers(tmp_path, "base")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\x00\x01", "truncated"),
        (b"\xff" * 64, "no readable safetensors header"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}", "broken safetensors header"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "broken safetensors header"),
    ],
)
def test_unreadable_safetensors(run, base, tmp_path, content, text):
    (base / "model.safetensors").write_bytes(content)
    fails(run("extend", base, *EXTEND), 2, text, "model.safetensors", "Download it again")
    no_leftovers(tmp_path, "base")


def test_truncated_safetensors(run, base):
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])
    fails(run("extend", base, *EXTEND), 2, "truncated", str(len(data) - 100), str(len(data)))


def test_an_index_that_names_a_missing_shard(run, base):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors").unlink()  # which would go before the index
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(run("extend", base, *EXTEND), 2, "model-00001-of-00002.safetensors", "missing")


def test_existing_output(run, base, tmp_path):
    assert run("extend", base, *EXTEND).exit_code == 0
    fails(run("extend", base, *EXTEND), 2, "already exists", "--force")
    assert run("extend", base, *EXTEND, "--force").exit_code == 0
    no_leftovers(tmp_path, "base", "out")


def test_output_inside_the_model(run, base):
    fails(run("extend", base, "--method", "yarn", "--factor", 8, "-o", base / "out"), 2, "overlap")


@pytest.mark.parametrize("target", ["shutil.copyfile", "longext.conversion.extend.write_manifest"])
def test_a_full_disk_leaves_nothing(run, base, tmp_path, monkeypatch, target):
    def full(*_args, **_keys):
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    monkeypatch.setattr(target, full)
    fails(run("extend", base, *EXTEND), 1, "no space left", "some/file")
    no_leftovers(tmp_path, "base")


def test_ctrl_c_midway_leaves_nothing(run, base, tmp_path, monkeypatch):
    def interrupt(*_args, **_keys):
        raise KeyboardInterrupt

    monkeypatch.setattr("longext.conversion.extend.write_manifest", interrupt)
    fails(run("extend", base, *EXTEND), 130, "interrupted")
    no_leftovers(tmp_path, "base")


def test_a_failed_replacement_keeps_the_old_output(run, base, tmp_path, monkeypatch):
    assert run("extend", base, *EXTEND).exit_code == 0
    before = (tmp_path / "out/config.json").read_text()

    def interrupt(*_args, **_keys):
        raise KeyboardInterrupt

    monkeypatch.setattr("longext.conversion.extend.write_manifest", interrupt)
    fails(run("extend", base, "--method", "linear", "--factor", 2, "-o", "out", "--force"), 130)
    assert (tmp_path / "out/config.json").read_text() == before
    no_leftovers(tmp_path, "base", "out")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--data", "no.txt"), ("No data at 'no.txt'", "sample")),
        (("--data", "no/where"), ("Hub dataset", "--data DIR")),
        (("--protocol", "slidding"), ("Unknown protocol 'slidding'", "Did you mean 'sliding'")),
        (("--lengths", "0"), ("--lengths",)),
        (("--lengths", "512,512"), ("different whole numbers", "512,512")),
        (("--lengths", "inf"), ("`lengths` must be a whole number", "inf")),
        (("--factor", "8"), ("needs a --method",)),
        (("--seed", "-1"), ("`seed` must be >= 0",)),
        (("--set", "max_documents=-1"), ("`max_documents` must be >= 1",)),
        (("--device", "meta"), ("--device must be",)),
        (("--lengths", "many"), ("`lengths` must be a whole number", "many")),
        (("--lengths", "512", "--stride", "512"), ("--stride must be below",)),
        (("--lengths", "99999"), ("No document of sample has 99999 tokens", "--lengths")),
        (("--device", "tpu9"), ("--device",)),
        (("--dtype", "int3"), ("--dtype",)),
        (("--method", "yarn"), ("--factor",)),
    ],
)
def test_eval_ppl_refuses(run, tmp_path, args, texts):
    fails(run("eval", "ppl", "books-5m", *args), 2, *texts)
    no_leftovers(tmp_path)


def test_broken_jsonl_names_file_and_line(run, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    fails(run("eval", "ppl", "books-5m", "--data", "d.jsonl"), 2, "d.jsonl, line 2 is not valid JSON (", "at column ")


def test_jsonl_that_is_not_utf8_names_the_line(run, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    fails(run("eval", "ppl", "books-5m", "--data", "d.jsonl"), 2, "d.jsonl, line 2")


def test_an_output_under_a_file_is_refused_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("x")
    fails(run("eval", "ppl", "books-5m", "-o", "file/x"), 2, "not a writable directory")


def test_an_index_that_points_into_a_folder(run, base):
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "sub/a.safetensors"}}))
    fails(run("extend", base, *EXTEND), 2, "sub/a.safetensors", "next to their index")


def test_inspect_refuses_a_factor_without_a_method(run, tmp_path):
    fails(run("inspect", "books-5m", "--factor", 8), 2, "need a --method")


def test_jsonl_without_the_text_column_names_what_is_there(run, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"body": "fine"}\n')
    fails(run("eval", "ppl", "books-5m", "--data", "d.jsonl"), 2, "line 1", "found: body", "--text-field")


def test_data_that_is_not_text(run, tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    fails(run("eval", "ppl", "books-5m", "--data", "d.txt"), 2, "not UTF-8")
    (tmp_path / "d.pdf").write_bytes(b"%PDF")
    fails(run("eval", "ppl", "books-5m", "--data", "d.pdf"), 2, "known kinds", ".jsonl")
    (tmp_path / "d.parquet").write_bytes(b"PAR0")
    fails(run("eval", "ppl", "books-5m", "--data", "d.parquet"), 2, "not a readable parquet")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--depths", "0.5,0.501"), ("--depths must differ",)),
        (("--factor", "8"), ("needs a --method",)),
        (("--depths", "1.5"), ("`depths` must be <= 1, got 1.5",)),
        (("--num-trials", "0"), ("`num_trials` must be >= 1, got 0",)),
        (("--lengths", "64"), ("needs at least",)),
        (("--protocol", "landmarks"), ("Did you mean 'landmark'",)),
        (("--protocol", "yarn", "--num-digits", 8), ("--num-digits and --filler are for landmark",)),
        (("--protocol", "yarn", "--num-needles", "2"), ("as published",)),
        (("--filler", "nothing.txt"), ("--filler",)),
    ],
)
def test_passkey_refuses(run, tmp_path, args, texts):
    fails(run("passkey", "books-5m", *args), 2, *texts)
    no_leftovers(tmp_path)


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--methods", "none,yarm"), ("Unknown method 'yarm'",)),
        (("--methods", "yarn,yarn"), ("twice",)),
        (("--set", "lengths=[]"), ("--lengths must be different whole numbers",)),
        (("--methods", "none:factor=8"), ("takes no parameters",)),
        (("--methods", "yarn:betafast=3"), ("unknown key 'betafast'",)),
        (("--factor", "0.5"), ("factor",)),
    ],
)
def test_compare_refuses(run, tmp_path, args, texts):
    fails(run("compare", "books-5m", *args), 2, *texts)
    no_leftovers(tmp_path)


def test_out_of_memory_says_what_to_lower(run, monkeypatch):
    import torch

    def explode(*_args, **_keys):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("longext.models.hf.HFLanguageModel.score", explode)
    fails(run("eval", "ppl", "books-5m", "--lengths", "64", "--stride", "32"), 1, "out of memory", "--batch-tokens")


def test_a_full_disk_while_results_are_written(run, tmp_path, monkeypatch):
    def full(*_args, **_keys):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("longext.report.results.write_manifest", full)
    fails(
        run("passkey", "books-5m", "--lengths", "128", "--num-trials", "1", "--depths", "0", "-o", "r"),
        1,
        "no space left",
    )
    no_leftovers(tmp_path, "r.scores.jsonl")  # what was scored is kept: the same command goes on from it


def test_verify_exits_one_and_names_the_culprit(run, base, tmp_path):
    assert run("extend", base, *EXTEND).exit_code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["rope_theta"] = 5e5
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    fails(run("verify", "out", "--no-logits"), 1, "rope_theta")


def test_verify_of_a_model_that_transformers_cannot_build(run, base, tmp_path):
    assert run("extend", base, *EXTEND).exit_code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["hidden_act"] = "nonsense"
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    fails(run("verify", "out"), 1, "plain transformers cannot load")


def test_debug_shows_the_traceback(run):
    result = run("--debug", "extend", "nowhere", *EXTEND)
    assert result.exit_code == 1
    assert "nowhere" in str(result.exception)


def test_an_interrupt_inside_a_lazy_import_is_an_interrupt():
    """transformers turns one into a ModuleNotFoundError of the name that was asked for."""
    from longext.cli.errors import _explain

    first, last = ImportError("partially initialised"), ModuleNotFoundError("Could not import module 'Trainer'")
    first.__context__, last.__cause__ = KeyboardInterrupt(), first
    assert _explain(last, "generate")[1] == 130
    assert _explain(ModuleNotFoundError("No module named 'x'"), "generate")[1] == 1
