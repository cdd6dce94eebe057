"""`extend` on more than a hundred architectures of transformers: right by float64 formulas, or refused in one line.

The formulas here are a second implementation: they start from the frequencies that the base model itself computes, not
from its config, and know nothing of longext. What the extended model computes is read out of cos and sin.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import LENGTH, tiny_config
from rope_examples import METHODS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from longext.checkpoint.rope_config import ModelRope, read_model_rope
from longext.checkpoint.source import read_config
from longext.conversion import extend
from longext.conversion.computed import compute
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extend_checkpoint, extended_config, plan_extension
from longext.errors import LongextError
from longext.models.hf import HFLanguageModel
from longext.rope.spec import ROPE_METHODS

# other values of the same keys: tests/parity/test_rope_parity.py holds the values
WRITTEN_AS_COPE = ("drope", "p-rope", "resonance")
FACTOR, BASE = 4.0, 1e8
SHORT, LONG = LENGTH, int(LENGTH * FACTOR) + 1

TEXT = (
    "afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bitnet cohere cohere2 cohere2_moe "
    "cohere_compass_text cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 "
    "exaone_moe falcon falcon_h1 flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text "
    "gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_neox gpt_neox_japanese gpt_oss granite "
    "granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense "
    "hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 "
    "llama llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral "
    "ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi "
    "phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open "
    "stablelm starcoder2 vaultgemma youtu zamba2 zaya "
)
IMAGE_TEXT = (
    "aria aya_vision gemma3 glm4v glm4v_moe glm_ocr idefics3 internvl lfm2_vl llava llava_next mistral3 paddleocr_vl "
    "qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm "
)
REFUSED = "beam bert codegen deepseek_v4 gpt2 gptj jamba mamba mpt opt recurrent_gemma "
# Methods that a family cannot carry, and a part of the reason that is given; everything else must be right.
PROPORTIONAL = {
    name: "proportional RoPE" for name in METHODS if ROPE_METHODS[name].rope_type not in ("default", "linear")
}
CANNOT = {
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text", "lfm3"), PROPORTIONAL),
    "granite_swa": {"abf": "all layers one base"},
    "phi3": {"dynamic": "depends on the sequence length"},
    "phimoe": {"dynamic": "depends on the sequence length", "longrope": "would not compute"},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(model_type) -> directory of its config.json, written as transformers saves it."""
    root = tmp_path_factory.mktemp("architectures")

    def saved(model_type: str) -> Path:
        if not (root / model_type).is_dir():
            tiny_config(model_type).save_pretrained(root / model_type)
        return root / model_type

    return saved


def request(directory: Path, method: str, **keys: Any) -> ExtendConfig:
    if method == "longrope":
        pairs = read_model_rope(directory).spec.rotary_dim // 2
        factors = directory.parent / f"factors-{pairs}.json"
        factors.write_text(json.dumps({"long_factor": list(range(1, pairs + 1)), "factor": FACTOR}))
        keys["factors"] = str(factors)
    if method == "abf":
        keys["rope_theta"] = BASE
    return ExtendConfig(model=str(directory), method=method, factor=FACTOR, **keys)


def turn(frequencies: np.ndarray, method: str, length: int, theta: float) -> np.ndarray:
    """Frequencies of one rotary module under `method`, from the base's own (with zeros where nothing rotates)."""
    rotating = frequencies > 0
    own = frequencies[rotating]
    ordered = np.unique(own)[::-1]
    ordered = ordered[np.append(True, ordered[1:] < ordered[:-1] * (1 - 1e-5))]  # equal but for rounding
    pairs, rank = len(ordered), np.abs(np.log(own)[:, None] - np.log(ordered)).argmin(1)
    if method == "linear":
        new = own / FACTOR
    elif method in ("ntk", "dynamic"):
        grown = FACTOR if method == "ntk" else max(length, LENGTH) / LENGTH
        new = own * grown ** (-rank / (pairs - 1))
    elif method == "abf":
        new = own ** (math.log(BASE) / math.log(theta))
    elif method == "longrope":
        new = own / (rank + 1) if length > LENGTH else own
    elif method == "cope":
        count = (LENGTH * ordered < 1).sum()
        phi = np.pi * (rank - pairs + count) / max(count - 1, 1)
        faded = np.where(rank < pairs - count, 1.0, (1 + np.cos(phi)) / 2) if count else 1.0
        new = own * FACTOR ** (-rank / (pairs - 1)) * faded
    else:
        assert method in ("ntk-by-parts", "yarn", "llama3"), f"write the formula of {method} here, from its paper"
        new = own * blend(own, rank, pairs, method)
    out = np.zeros_like(frequencies)
    out[rotating] = new
    return out


def blend(own: np.ndarray, rank: np.ndarray, pairs: int, method: str) -> np.ndarray:
    """(1 - g) / s + g of the ramp methods."""
    if method == "yarn":
        step = -math.log(own.min()) / (pairs - 1)
        low, high = (math.log(LENGTH / (turns * 2 * math.pi)) / step for turns in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * pairs - 1)
        keep = 1 - np.clip((rank - low) / max(high - low, 0.001), 0, 1)
    else:
        slow, fast = (1, 4) if method == "llama3" else (1, 32)
        keep = np.clip((LENGTH * own / (2 * math.pi) - slow) / (fast - slow), 0, 1)
    return (1 - keep) / FACTOR + keep


def temperature(method: str) -> float:
    rules = {"yarn": 0.1 * math.log(FACTOR) + 1, "longrope": math.sqrt(1 + math.log(FACTOR) / math.log(LENGTH))}
    return rules.get(method, 1.0)


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(extend, "read_shards", lambda directory: [])


@pytest.mark.parametrize("model_type", [*TEXT.split(), *IMAGE_TEXT.split()])
def test_every_method_is_right_or_refused_in_one_line(base, no_weights, model_type):
    directory = base(model_type)
    rope = read_model_rope(directory)
    before = compute(read_config(directory), [SHORT, LONG])
    assert before.used
    for method in (name for name in METHODS if name not in WRITTEN_AS_COPE):
        why = CANNOT.get(model_type, {}).get(method)
        if why:
            with pytest.raises(LongextError, match=why) as raised:
                plan_extension(request(directory, method))
            assert "\n" not in str(raised.value)
            continue
        plan = plan_extension(request(directory, method))
        after = compute(extended_config(plan), [SHORT, LONG])
        assert after.layers == before.layers
        for name, length in before.rotary:
            if name in before.used:
                assert_turned(before, after, name, length, rope, method)


def assert_turned(before: Any, after: Any, name: str, length: int, rope: ModelRope, method: str) -> None:
    own, found = before.rotary[name, length], after.rotary[name, length]
    if ":" in name and not name.endswith(f":{rope.kind}"):
        assert (found[0] == own[0]).all() and found[1] == own[1]
        return
    expected = turn(own[0], method, length, rope.spec.rope_theta)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-12, err_msg=f"{method} {name} {length}")
    assert found[1] == pytest.approx(temperature(method), rel=1e-6), method


@pytest.mark.parametrize("model_type", REFUSED.split())
@pytest.mark.parametrize("method", ["yarn", "ntk"])
def test_what_has_no_rope_that_could_be_extended_is_refused_in_one_line(base, no_weights, model_type, method):
    with pytest.raises(LongextError) as raised:
        plan_extension(request(base(model_type), method))
    assert "\n" not in str(raised.value)


# families whose random tiny model has logits that are not finite, or whose forward needs more than tokens
NOT_RUN = {"bailing_hybrid", "zaya", "aria"}


@pytest.mark.parametrize("model_type", [name for name in f"{TEXT}{IMAGE_TEXT}".split() if name not in NOT_RUN])
def test_a_method_in_memory_is_the_written_checkpoint(model_type, tmp_path):
    config = tiny_config(model_type)
    auto = AutoModelForImageTextToText if model_type in IMAGE_TEXT.split() else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path / "base")
    method = "linear" if model_type in CANNOT else "yarn"
    plan = extend_checkpoint(request(tmp_path / "base", method, output=str(tmp_path / "out")))
    ids = torch.arange(2 * LENGTH)[None] * 7 % 100 + 3

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    loaded = auto.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    plain, written = logits(loaded), logits(auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval())
    model = HFLanguageModel(model_type, loaded, None, read_config(tmp_path / "base"), tmp_path / "base")
    model.set_rope(extended_config(plan))
    assert torch.equal(logits(model.model), written)
    assert not torch.equal(plain, written)
    model.set_rope(read_config(tmp_path / "base"))
    assert torch.equal(logits(model.model), plain)
