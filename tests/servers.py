"""llama-cpp-python's own server in a thread, with settings of RoPE that are injected."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import longext
from longext.conversion.config import ExportConfig
from longext.conversion.gguf.export import export_gguf
from longext.rope.methods.ntk import ntk_rope_theta
from longext.rope.spec import RopeSpec

LENGTH, THETA = 512, 1e4  # of books-5m
_LINEAR, _YARN = 1, 2  # llama.cpp's numbers of `rope_scaling_type`


def injected(factor: float) -> dict[str, dict[str, Any]]:
    """Return server settings, or options of `longext extend`, by the name of the RoPE that they make."""
    square = factor * factor
    spec = RopeSpec(method="ntk", rope_theta=THETA, rotary_dim=64, original_max_position_embeddings=LENGTH)
    yarn = {"rope_scaling_type": _YARN, "yarn_orig_ctx": LENGTH}
    return {
        "none": {},
        f"linear, factor {factor:g}": {"rope_scaling_type": _LINEAR, "rope_freq_scale": 1 / factor},
        f"ntk, factor {factor:g}": {"rope_freq_base": ntk_rope_theta(spec, factor)},
        f"yarn, factor {factor:g}": {**yarn, "rope_freq_scale": 1 / factor},
        f"yarn, factor {factor:g} twice": {**yarn, "rope_freq_scale": 1 / square},
        f"linear, factor {square:g}": {"rope_scaling_type": _LINEAR, "rope_freq_scale": 1 / square},
        f"ntk-by-parts, factor {factor:g}": {"method": "ntk-by-parts", "factor": factor},
        f"yarn, factor {factor:g}, attention_factor 1": {"method": "yarn", "factor": factor, "attention_factor": 1.0},
    }


def model_settings(folder: Path, names: dict[str, dict[str, Any]]) -> list[Any]:
    """Return the server's settings of each name; files that need one of their own are made in `folder`."""
    from llama_cpp.server.settings import ModelSettings

    base = folder / "base.gguf"
    if not base.is_file():
        export_gguf(ExportConfig(format="gguf", model="books-5m", output=str(base), dtype="float32"))
    found = []
    for i, (name, options) in enumerate(names.items()):
        file = base
        if "method" in options:
            file = folder / f"{i}.gguf"
            options = dict(options)
            longext.extend(base, options.pop("method"), output=file, force=True, **options)
            options = {}
        settings = {"n_ctx": LENGTH, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
        found.append(ModelSettings(model=str(file), model_alias=name, n_gpu_layers=0, **settings))
    return found


@contextlib.contextmanager
def served(folder: Path, names: dict[str, dict[str, Any]]):
    """Yield the address of a server that has a model of each name."""
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ServerSettings

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(server_settings=ServerSettings(port=port), model_settings=model_settings(folder, names))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
