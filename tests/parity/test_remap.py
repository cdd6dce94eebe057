"""Position remapping on loaded models: every family, padding, caches, training, and back again."""

from __future__ import annotations

import math

import pytest
import torch
from contributing import added_file
from families import CONFIGS, LENGTH, tiny_model

from longext.attention.bands import REMAPS
from longext.attention.layout import make_layout
from longext.attention.shifted import PLAN, AttentionPlan
from longext.errors import ConfigError
from longext.models.remap import attach

REFUSED = {
    "gemma2": "caps attention scores",
    "mistral": "no layer that rotates its queries and keys and sees the whole text",  # every layer has its window
    "stablelm": "attention through transformers' interfaces",
    "falcon": "attention through transformers' interfaces",
}
WINDOW = {"window": 20}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", attention="sdpa").double().eval()


def _ids(rows, length, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model, ids, **arguments):
    return model(ids, **{"use_cache": False, **arguments}).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family):
    model, ids = tiny_model(family, attention="sdpa" if family not in REFUSED else "eager").eval(), _ids(2, 40)
    if family in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[family]):
            attach(model, "rerope")
        return
    plain, short = _logits(model, ids), _logits(model, ids[:, :20])
    with attach(model, "leaky-rerope", 4 * LENGTH, **WINDOW) as remapping:
        remapped = _logits(model, ids)
        assert not torch.equal(plain, remapped)
        assert torch.equal(_logits(model, ids[:, :20]), short)  # within the window, bit for bit
        remapping.is_plain = True  # distances as they are: rotation by us equals rotation by the family
        assert torch.equal(_logits(model, ids), plain)
        remapping.is_plain = False
        first = model(ids[:, :30], use_cache=True)
        steps = [first.logits]
        for number in range(30, 40):  # local layers keep their window in the cache
            first = model(ids[:, number : number + 1], past_key_values=first.past_key_values, use_cache=True)
            steps.append(first.logits)
        assert torch.allclose(torch.cat(steps, 1), remapped, atol=1e-5)
    assert torch.equal(_logits(model, ids), plain)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def _own_forward(model, ids, distance, logn):
    """Llama in its own words: scores of rotated queries and keys with distances of our own, float64."""
    text, decoder = model.config, model.model
    heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    length = len(ids)
    inv_freq = decoder.rotary_emb.inv_freq.double()
    distances = torch.tensor([[float(distance(i, j)) if j <= i else 0.0 for j in range(length)] for i in range(length)])
    angles = distances.double()[..., None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    x = decoder.embed_tokens(ids)
    for layer in decoder.layers:
        y, own = layer.input_layernorm(x), layer.self_attn
        q = own.q_proj(y).view(length, heads, size)
        k, v = (
            part(y).view(length, kv_heads, size).repeat_interleave(heads // kv_heads, 1)
            for part in (own.k_proj, own.v_proj)
        )
        (qa, qb), (ka, kb) = (x.chunk(2, -1) for x in (q, k))
        scores = sum(
            torch.einsum("ihp,jhp,ijp->hij", left, right, table)
            for left, right, table in ((qa, ka, cos), (qb, kb, cos), (qa, kb, sin), (-qb, ka, sin))
        )  # fmt: skip
        if logn:
            number = torch.arange(length).double()
            scores = scores * (torch.log(number + 1) / math.log(LENGTH)).clip(min=1)[:, None]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        weights = (scores / math.sqrt(size)).masked_fill(~seen, -math.inf).softmax(-1)
        x = x + own.o_proj(torch.einsum("hij,jhd->ihd", weights, v).reshape(length, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("logn", [False, True])
def test_a_whole_model_is_its_definition(llama, logn):
    ids = _ids(1, 90)
    expected = _own_forward(llama, ids[0], lambda i, j: i - j if i - j < 20 else 20 + (i - j - 20) / 4, logn)
    with attach(llama, "leaky-rerope", 256, window=20, k=4, logn=logn):
        assert torch.allclose(_logits(llama, ids)[0], expected, atol=1e-10)


@pytest.mark.parametrize("method", REMAPS)
def test_padding_batches_and_later_tokens_change_nothing(llama, method):
    rows = [_ids(1, length, seed=length) for length in (75, 62, 75)]
    with attach(llama, method, 128, logn=True):
        alone = [_logits(llama, row)[0] for row in rows]
        for side in ("left", "right"):
            ids, mask = torch.zeros(3, 80, dtype=torch.int64), torch.zeros(3, 80, dtype=torch.int64)
            places = [slice(80 - r.shape[1], 80) if side == "left" else slice(0, r.shape[1]) for r in rows]
            for number, (row, place) in enumerate(zip(rows, places, strict=True)):
                ids[number, place], mask[number, place] = row[0], 1
            together = _logits(llama, ids, attention_mask=mask)
            for number, place in enumerate(places):
                assert torch.allclose(together[number, place], alone[number], atol=1e-10)
        changed = rows[0].clone()
        changed[0, 50:] = 5
        assert torch.equal(_logits(llama, changed)[0, :50], alone[0][:50]) or torch.allclose(
            _logits(llama, changed)[0, :50], alone[0][:50], atol=1e-12
        )
        prompts = torch.stack([torch.cat((torch.zeros(13, dtype=torch.int64), rows[1][0])), rows[0][0]])
        mask = torch.ones_like(prompts)
        mask[0, :13] = 0
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        both = llama.generate(prompts, attention_mask=mask, **settings)[:, -5:]
        assert [llama.generate(row, **settings)[0, -5:].tolist() for row in (rows[1], rows[0])] == both.tolist()


def test_a_static_cache_and_a_prompt_in_pieces(llama):
    from transformers import StaticCache

    ids = _ids(1, 60)
    with attach(llama, "dca", 128), torch.no_grad():
        whole = _logits(llama, ids)
        cache = StaticCache(config=llama.config, max_cache_len=100)
        parts = [
            llama(ids[:, first:stop], past_key_values=cache, use_cache=True).logits
            for first, stop in ((0, 25), (25, 52), (52, 53), (53, 60))
        ]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
        padded, mask = torch.nn.functional.pad(ids, (7, 0)), torch.tensor([[0] * 7 + [1] * 60])
        settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        dynamic, static = (llama.generate(padded, cache_implementation=c, **settings) for c in (None, "static"))
        assert torch.equal(dynamic, static)


def test_training_on_packed_documents_equals_each_alone(llama):
    ids = _ids(1, 90)
    documents = torch.tensor([[0] * 40 + [1] * 45 + [-1] * 5])
    with attach(llama, "string", 128):
        llama.train()
        plan = AttentionPlan(make_layout(1, 90, None, documents, True), 16)
        packed = llama(ids, use_cache=False, **{PLAN: plan}).logits[0]
        loss = packed[:85].square().mean()
        gradient = torch.autograd.grad(loss, llama.model.layers[0].self_attn.k_proj.weight)[0]
        alone = torch.cat([llama(ids[:, place], use_cache=False).logits[0] for place in (slice(0, 40), slice(40, 85))])
        expected = torch.autograd.grad(alone.square().mean(), llama.model.layers[0].self_attn.k_proj.weight)[0]
        llama.eval()
    assert torch.allclose(packed[:85], alone, atol=1e-10)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_mistakes_are_told(llama):
    for arguments, message in (
        ({"method": "leaky"}, "Did you mean 'leaky-rerope'"),
        ({"method": "dca", "group": 3}, "takes no `group`. It takes chunk, window"),
        ({"method": "rerope", "window": 2.5}, "must be one whole number"),
        ({"method": "rerope", "logn": "yes"}, "true or false"),
        ({"method": "rerope", "temperature": 0}, "must be above 0"),
        ({"method": "selfextend", "target_length": 1}, "`target_length` must be >= 2"),
        ({"method": "dca", "window": 63}, "keeps no distance as it is with chunk 48, window 63"),
        ({"method": "dpe", "factors": "2-0-3"}, "`factors` must be >= 1, got 0"),
        ({"method": "leaky-rerope", "k": math.inf}, "finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            attach(llama, **arguments)
    with attach(llama, "dca"), pytest.raises(ConfigError, match="detach that first"):
        attach(llama, "rerope")
    twice, holed = torch.arange(30)[None] % 15, torch.ones(1, 30, dtype=torch.int64)
    holed[0, 9:12] = 0
    for arguments, message in (
        ({"attention_mask": torch.ones(1, 1, 30, 30, dtype=torch.bool)}, "2-D attention_mask"),
        ({"position_ids": twice}, "jump or begin again"),  # packed rows, which were read as one text
        ({"attention_mask": holed}, "zeros between its tokens"),  # which were read as tokens
    ):
        with attach(llama, "dca", chunk=8), pytest.raises(ConfigError, match=message):
            _logits(llama, _ids(1, 30), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_gpu_give_the_same(dtype):
    model, ids = tiny_model("llama", attention="sdpa").eval(), _ids(2, 90)
    with attach(model, "leaky-rerope", 256, window=20, logn=True):
        expected = _logits(model, ids)
    model = model.to("cuda", dtype)
    with attach(model, "leaky-rerope", 256, window=20, logn=True):
        found = _logits(model, ids.cuda()).float().cpu()
    assert (found - expected).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * expected.norm()


def test_a_file_in_the_folder_is_a_method(llama, tmp_path, monkeypatch):
    import longext.attention.remaps

    (tmp_path / "halves.py").write_text(added_file("longext/attention/remaps/halves.py"))
    monkeypatch.setattr(longext.attention.remaps, "__path__", [*longext.attention.remaps.__path__, str(tmp_path)])
    with attach(llama, "halves", window=20) as remapping:
        expected = _own_forward(
            llama, _ids(1, 50)[0], lambda i, j: i - j if i - j < 20 else 20 + (i - j - 20) / 2, False
        )
        assert torch.allclose(_logits(llama, _ids(1, 50))[0], expected, atol=1e-10)
        assert remapping.describe()["window"] == 20
    assert REMAPS.summary("halves") == "Distances beyond a window count half"
    REMAPS.unregister("halves")
