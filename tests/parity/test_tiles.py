"""MLPs and norms in tiles of the sequence, against the same model without: loss, every gradient, FLOPs, memory.

In float64 the relative difference of a gradient may be 1e-10 of its largest entry. Gemma's norms compute in float32
whatever they are given, and their weight's gradient is a sum over tokens there: 1e-6 for those.
"""

from __future__ import annotations

import pytest
import torch
from families import CONFIGS, tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from longext.errors import ConfigError
from longext.planning.tracker import MemoryTracker
from longext.training.layers.tiles import check_token_wise, token_wise_modules, use_tiles
from longext.training.loading import enable_checkpointing, narrow_hidden_states
from longext.training.losses import chunked_loss

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2", "stablelm",
]  # fmt: skip
LENGTH = 30


def model_of(family, **changes):
    if family == "gemma":
        family, changes = "llama", {"model_type": "gemma"}
    if not changes:
        return tiny_model(family)
    from transformers import GemmaConfig

    config = GemmaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=24, intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def step(model, length=LENGTH, rows=2):
    ids = torch.arange(rows * length).view(rows, length) % 60
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hold(found, expected, tolerance=1e-10, norms=1e-10):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        allowed = norms if "norm" in name else tolerance
        assert (found[1][name] - gradient).abs().max() <= allowed * gradient.abs().max(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning(family, checkpointing):
    results = []
    for tile in (None, 7):  # does not divide 30
        torch.manual_seed(0)
        model = model_of(family).double().train()
        names = token_wise_modules(model)
        check_token_wise(model, names)
        if checkpointing:
            enable_checkpointing(model, offload=False)
        if tile:
            use_tiles(model, names, tile)
        results.append(step(model))
    hold(*results[::-1], norms=1e-6 if "gemma" in family else 1e-10)


@pytest.mark.parametrize("nested", [1, 2])
@pytest.mark.parametrize("tile", [1, 16, 29])
def test_adapters_inside_the_mlp_trained_norms_and_dropout(tile, nested):
    """With dropout there is no untiled run of the same random numbers: the same tiles with a graph of their own."""
    results = []
    for tiled in (False, True):
        torch.manual_seed(0)
        model = tiny_model("qwen3").double()
        names = token_wise_modules(model)
        lora = LoraConfig(
            r=4, lora_dropout=0.0 if tile == 16 else 0.3, target_modules=["gate_proj", "down_proj", "q_proj"],
            modules_to_save=["input_layernorm", "post_attention_layernorm", "norm"], init_lora_weights=False,
        )  # fmt: skip
        adapted = get_peft_model(model, lora).train().double()
        if tiled:
            use_tiles(model, names, tile)
            enable_checkpointing(model, offload=False, nested=nested)
        elif lora.lora_dropout:
            for name in names:
                tile_by_cat(model.get_submodule(name), tile)
        results.append(step(adapted))
    hold(*results[::-1])
    assert any("gate_proj.lora_A" in name for name in results[0][1])
    assert any("layernorm.modules_to_save" in name for name in results[0][1])


def tile_by_cat(module, tile):
    """The definition: tiles one after the other, joined."""
    forward = module.forward

    def tiled(x):
        empty = forward(x[:, :0])  # what the hooks of a tiled module run first draws nothing
        return torch.cat([empty, *(forward(part) for part in x.split(tile, 1))], 1)

    module.forward = tiled


def test_frozen_layers_get_no_gradient():
    model = tiny_model("llama").double().train().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    use_tiles(model, token_wise_modules(model), 4)
    assert set(step(model)[1]) == {"lm_head.weight"}


def test_evaluation_and_short_rows_are_left_alone():
    model = tiny_model("llama")
    use_tiles(model, token_wise_modules(model), 4)
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *call: seen.append(call[1][0].shape[1]))
    ids = torch.arange(12)[None]
    model.eval()(ids)
    model.train()(ids[:, :4])
    assert seen == [12, 4]
    model(ids)
    assert seen[2:] == [0, 4, 4, 4]


def test_bfloat16_under_autocast():
    """Float32 weights that autocast casts take their whole gradient: within bfloat16's rounding, 2^-8, of no tiles."""
    results = []
    for tile in (None, 8):
        torch.manual_seed(0)
        model = tiny_model("llama").train()
        narrow_hidden_states(model)
        names = token_wise_modules(model)
        enable_checkpointing(model, offload=False)
        if tile:
            use_tiles(model, names, tile)
        with torch.autocast("cpu", torch.bfloat16), chunked_loss(model, 16):
            results.append(step(model))  # forward and backward under one autocast: its cache is shared
        assert {gradient.dtype for gradient in results[-1][1].values()} == {torch.float32}
    hold(*results[::-1], tolerance=2**-6, norms=2**-6)


def flops(model, length=LENGTH):
    with FlopCounterMode(display=False) as counter:
        step(model, length)
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "more"), [("llama", 0), ("gpt_neox", 0), ("olmo2", 1), ("gemma2", 1)])
def test_how_often_an_mlp_runs(family, more):
    """Checkpointing and tiles cost what checkpointing costs; behind a norm that follows it, one more MLP forward."""
    counts = {}
    for tile, checkpointing in ((None, False), (None, True), (7, False), (7, True)):
        model = model_of(family).train()
        names = token_wise_modules(model)
        if checkpointing:
            enable_checkpointing(model, offload=False)
        if tile:
            use_tiles(model, names, tile)
        counts[tile, checkpointing] = flops(model)
    matrices = [p for name, p in model.named_parameters() if ".mlp." in name and p.ndim == 2]
    mlps = sum(2 * 2 * LENGTH * p.numel() for p in matrices)  # one forward of all MLPs, two rows
    assert counts[7, False] == counts[None, False] + mlps
    # without tiles the recomputation ends before the last matrix of an MLP, unless a norm behind it saves its output
    last = 0 if more else sum(2 * 2 * LENGTH * p.numel() for p in matrices if p.shape[0] == 32 or p.shape[0] == 64)
    assert counts[7, True] == counts[None, True] + last + more * mlps


def test_the_peak_is_a_tile():
    """One Llama layer whose MLP is 16 times as wide as its hidden states, checkpointed, 2,048 tokens: bytes of a step.

    Gate, up, activation and product are saved, and two gradients live with them: six [N, 16 D] untiled, and six
    [tile, 16 D] with tiles, whatever N is. That the peak grows by six more for each token of the tile is held to 2 %.
    """
    peaks = {}
    for tile in (None, 128, 256):
        config = CONFIGS["llama"]()
        config.update({"intermediate_size": 1024, "hidden_size": 64, "head_dim": 32, "num_hidden_layers": 1})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        names = token_wise_modules(model)
        enable_checkpointing(model, offload=False)
        if tile:
            use_tiles(model, names, tile)
        with chunked_loss(model, 128):
            step(model, 2048, rows=1)
            known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
            with MemoryTracker(known) as tracker:
                step(model, 2048, rows=1)
        peaks[tile] = tracker.peak
    wide = 4 * 1024  # bytes of a token
    assert peaks[256] - peaks[128] == pytest.approx(6 * 128 * wide, rel=0.02)
    assert peaks[None] - peaks[128] > 5 * (2048 - 128) * wide


def test_experts_that_return_one_tensor():
    """Float32 (the grouped products of experts know no float64): 1e-5."""
    results = []
    for tile in (None, 7):
        model = tiny_model("mixtral").train()
        names = token_wise_modules(model)
        check_token_wise(model, names)
        if tile:
            use_tiles(model, names, tile)
        results.append(step(model))
    hold(*results[::-1], tolerance=1e-5, norms=1e-5)


def test_what_mixes_tokens_is_refused():
    class Mixing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.linear(x).cumsum(1)

    model = tiny_model("llama")
    model.model.layers[1].mlp = Mixing()
    with pytest.raises(ConfigError, match="depends on the tokens beside it"):
        check_token_wise(model, token_wise_modules(model))
    model.model.layers[1].mlp.forward = lambda x: (x, None)
    with pytest.raises(ConfigError, match="does not return one tensor"):
        check_token_wise(model, token_wise_modules(model))
