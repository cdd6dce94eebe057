"""A RoPE method is one file: dropped in the folder it is in the help, and extends a checkpoint that verifies."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from contributing import added_file

from longext.errors import ConfigError
from longext.rope.spec import ROPE_METHODS

# interpolated, then wavelengths rounded to whole positions, the idea of Resonance RoPE
TOY = added_file("longext/rope/methods/whole_waves.py")
RUN = """
import json, sys
import longext.rope.methods
longext.rope.methods.__path__.append(sys.argv[1])  # a folder of methods that are not longext's own
from typer.testing import CliRunner
from longext.cli import app
for words in json.loads(sys.argv[2]):
    done = CliRunner().invoke(app, words)
    print(json.dumps([done.exit_code, done.output]))
"""
COMMANDS = (
    ("extend", "--help"),
    ("extend", "books-5m", "--method", "whole-waves", "--factor", "4", "-o", "out"),
    ("verify", "out", "--json"),
    ("inspect", "books-5m", "--method", "whole-waves", "--factor", "4"),
    ("extend", "books-5m", "--method", "whole-waves", "--factor", "4", "--alpha", "2", "-o", "other"),
)


def test_a_file_in_the_folder_is_a_method_everywhere(tmp_path):
    """In one new interpreter, which finds the file as it finds longext's own."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/whole_waves.py").write_text(TOY)
    command = [sys.executable, "-c", RUN, str(tmp_path / "methods"), json.dumps(COMMANDS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    help_page, extended, verified, inspected, refused = (json.loads(line) for line in done.stdout.splitlines())
    assert help_page[0] == 0
    words = " ".join(help_page[1].split())
    assert "whole-waves" in words
    assert "ntk-by-parts, whole-waves, yarn: turns in L below which" in words
    assert extended[0] == 0, extended[1]
    assert verified[0] == 0, verified[1]
    assert "whole-waves" in inspected[1]
    assert refused[0] == 2
    assert "`whole-waves` has no parameter `alpha`: it takes beta_slow." in refused[1]


def test_a_method_registered_at_run_time_goes_again():
    ROPE_METHODS.register("toy", ROPE_METHODS["linear"], "For this test.")
    assert ROPE_METHODS.summary("toy") == "For this test."
    ROPE_METHODS.unregister("toy")
    with pytest.raises(ConfigError, match="Unknown method 'toy'"):
        ROPE_METHODS["toy"]
