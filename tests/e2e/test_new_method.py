"""A RoPE method is one file: dropped in the folder it is in the help, and extends a checkpoint that verifies."""

from __future__ import annotations

import subprocess
import sys

import pytest
from contributing import added_file

from longext.errors import ConfigError
from longext.rope.spec import ROPE_METHODS

# interpolated, then wavelengths rounded to whole positions, the idea of Resonance RoPE
TOY = added_file("longext/rope/methods/whole_waves.py")
RUN = """
import sys
import longext.rope.methods
longext.rope.methods.__path__.append(sys.argv.pop(1))  # a folder of methods that are not longext's own
from longext.__main__ import main
main()
"""


@pytest.fixture
def longext(tmp_path):
    """longext(*args) runs a command that knows the methods of tmp_path/methods, and returns (exit code, output)."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/whole_waves.py").write_text(TOY)

    def run(*args):
        command = [sys.executable, "-c", RUN, str(tmp_path / "methods"), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_file_in_the_folder_is_a_method_everywhere(longext):
    code, text = longext("extend", "--help")
    assert code == 0
    words = " ".join(text.split())
    assert "whole-waves" in words
    assert "ntk-by-parts, whole-waves, yarn: turns in L below which" in words
    code, text = longext("extend", "books-5m", "--method", "whole-waves", "--factor", 4, "-o", "out")
    assert code == 0, text
    code, text = longext("verify", "out", "--json")
    assert code == 0, text
    assert "whole-waves" in longext("inspect", "books-5m", "--method", "whole-waves", "--factor", 4)[1]
    code, text = longext("extend", "books-5m", "--method", "whole-waves", "--factor", 4, "--alpha", 2, "-o", "other")
    assert code == 2
    assert "`whole-waves` has no parameter `alpha`: it takes beta_slow." in text


def test_a_method_registered_at_run_time_goes_again():
    ROPE_METHODS.register("toy", ROPE_METHODS["linear"], "For this test.")
    assert ROPE_METHODS.summary("toy") == "For this test."
    ROPE_METHODS.unregister("toy")
    with pytest.raises(ConfigError, match="Unknown method 'toy'"):
        ROPE_METHODS["toy"]
