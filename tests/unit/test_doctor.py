"""What `longext doctor` finds and says."""

from __future__ import annotations

import importlib.metadata
import json

from longext import doctor, extras


def test_its_json_holds_versions_features_and_folders(run):
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == bool(found["problems"])
    assert found["kind"] == "doctor"
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert {feature["extra"] for feature in found["features"]} == {"", *extras.NEEDED}
    assert all(folder["free"] > 0 for folder in found["folders"])
    assert found["memory"]["total"] >= found["memory"]["available"] > 0
    assert found["verdict"]


def test_the_verdict_comes_first_and_names_what_to_install(run, monkeypatch):
    hidden = {"torch", "transformers", "matplotlib"}
    monkeypatch.setattr(extras, "_is_there", lambda module: module.partition(".")[0] not in hidden)
    first, *rest = run("doctor").stdout.splitlines()
    line = "pip install 'longext[train,eval,report]'"
    assert first == f"extend, inspect, plan, recipes work here. For the rest: {line}"
    assert "needs torch and transformers" in " ".join("\n".join(rest).split())


def test_a_version_that_longext_was_not_made_for_is_a_problem(run, monkeypatch):
    listed = ["peft<0.22,>=0.21; extra == 'train'", "nosuch>=1", "numpy"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed)
    monkeypatch.setattr(doctor, "_version", {"peft": "0.22.0"}.get)
    (problem,) = doctor._outside_of_what_is_allowed()
    assert problem == "peft 0.22.0 is installed, longext takes peft<0.22,>=0.21: pip install 'peft<0.22,>=0.21'"
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stdout.startswith("1 problem, see below.")
    assert f"Problem: {problem}." in result.stdout


def test_a_package_built_for_another_torch_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    problems = [problem for problem in doctor._broken_imports() if problem.startswith("flash-attn")]
    assert len(problems) == 1
    assert "undefined symbol" in problems[0] and "--no-build-isolation" in problems[0]
