"""Shared fixtures: offline, seeded, one real model loaded once."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from unittest import mock

# Before any import of the Hub's libraries: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it brings, also in subprocesses
os.environ.update(COLUMNS="200", NO_COLOR="1")
os.environ.pop("FORCE_COLOR", None)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import typer.testing  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from longext.checkpoint.bundled import BUNDLED_MODELS  # noqa: E402
from longext.models.hf import HFLanguageModel, load_language_model  # noqa: E402
from longext.options import RuntimeConfig  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"  # real data beside a developer's checkout; absent in a clone


def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in (item.config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.skip(reason="needs the Hub"))


def pytest_collection_finish():
    """Take what the imports made, a million objects that stay, out of every garbage collection to come."""
    gc.collect()
    gc.freeze()


for helpers in ("command_line", "harness_tasks"):
    pytest.register_assert_rewrite(helpers)
torch.set_num_threads(1)

# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP ignored, and longext respects that: tests of
# signals need them as a terminal gives them. Processes that tests start inherit it.
with contextlib.suppress(ValueError):  # only the main thread may
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)

# Building the 22 commands out of their signatures takes 60 ms: once, not for every command that a test runs.
typer.testing._get_command = functools.cache(typer.testing._get_command)


@pytest.fixture(autouse=True, scope="session")
def one_reading_of_the_tokenizer():
    """Commands on books-5m get copies of its tokenizer: building it out of its file takes twice as long."""
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained
    directory, kept = str(BUNDLED_MODELS["books-5m"]), {}

    def from_pretrained(name, *args, **keys):
        if str(name) != directory or args:
            return load(name, *args, **keys)
        options = repr(sorted(keys.items()))
        if options not in kept:
            kept[options] = load(name, **keys)
        return copy.deepcopy(kept[options])

    with mock.patch.object(AutoTokenizer, "from_pretrained", from_pretrained):
        yield


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory):
    """One token cache for all tests, apart from the user's."""
    os.environ["LONGEXT_CACHE"] = str(tmp_path_factory.mktemp("token-cache"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same torch seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def reload_here(request, monkeypatch):
    """`verify` loads a checkpoint in a fresh interpreter (4 s): here in this one, unless marked `isolated`."""
    if "isolated" in request.keywords:
        return
    real_run = subprocess.run

    def run(command, *args, **kwargs):
        if not isinstance(command, list) or not str(command[-2:][0]).endswith("_reload.py"):
            return real_run(command, *args, **kwargs)
        return _reload_here(Path(command[-1]))

    monkeypatch.setattr(subprocess, "run", run)


def _reload_here(request: Path) -> subprocess.CompletedProcess:
    from longext.conversion import _reload

    with mock.patch.object(sys, "argv", ["_reload.py", str(request)]):
        try:
            _reload.main()
        except BaseException:
            return subprocess.CompletedProcess([], 1, "", traceback.format_exc())
    answer_path = Path(json.loads(request.read_text())["answer_path"])
    answer = {**json.loads(answer_path.read_text()), "longext_imported": False}
    answer_path.write_text(json.dumps(answer))
    return subprocess.CompletedProcess([], 0, "", "")


@pytest.fixture
def no_pictures(request, monkeypatch):
    """Figures are made but not drawn, which takes a fifth of a short run; drawn for tests marked `pictures`."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("longext.report.plots.save_png", lambda figure, path: path.touch())
        monkeypatch.setattr("longext.report.page._svg", lambda picture, name, size: "")


@pytest.fixture(scope="session")
def loaded_books() -> HFLanguageModel:
    """books-5m, loaded once and never run: `books` is a copy."""
    return load_language_model(RuntimeConfig(model="books-5m", device="cpu"))


@pytest.fixture
def books(loaded_books) -> HFLanguageModel:
    """books-5m as it is: a copy of its own, which cannot be spoilt by another test."""
    return copy.deepcopy(loaded_books)


@pytest.fixture
def base(tmp_path):
    """A copy of books-5m, to be broken."""
    shutil.copytree(BUNDLED_MODELS["books-5m"], tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command line in an empty directory: run("extend", "books-5m", ...) -> result."""
    from advice import unknown_advice

    from longext.cli import app

    def invoke(*args):
        typed = [str(arg) for arg in args]
        result = CliRunner().invoke(app, typed)
        if result.exit_code in (1, 2):
            assert not unknown_advice(typed, result.stderr), result.stderr
        return result

    monkeypatch.chdir(tmp_path)
    return invoke
