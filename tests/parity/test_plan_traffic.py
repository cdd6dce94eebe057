"""Bytes that memory-bound operators move, in closed form, against every operator of a step counted.

An operator moves its inputs and outputs once; views move nothing. Left out are attention and matrix products, but for
those with a side of adapter's rank, which are memory-bound. TOLERANCE is 10 %, set beforehand. Liger's kernels need a
GPU: their widths are what they must read and write.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from steps import SPLIT, build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longext.planning.seconds import layer_traffic, moved_bytes
from longext.planning.setup import TrainingSetup
from longext.planning.shape import shape_of

TOLERANCE = 0.10
TOKENS = 1024  # enough that weights, read once a step, do not count
RANK = 8
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach",
    "split", "split_with_sizes", "alias", "as_strided", "unbind", "empty", "empty_like", "new_empty_strided",
}  # fmt: skip
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 352, "vocab_size": 64, "pad_token_id": 0}
FAMILIES = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 40},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 32},
}


class Traffic(TorchDispatchMode):
    """Adds up the bytes of inputs and outputs of operators."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        is_product = name in ("mm", "addmm", "bmm") and min(min(x.shape[-2:]) for x in tensors[:2]) > RANK
        if not (name in VIEWS or "scaled_dot" in name or "embedding" in name or is_product):
            self.moved += sum(size(x) for x in tensors)
        return result


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, what is repeated by a stride of zero once."""
    shape = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(shape).numel() * tensor.element_size()


def model_of(name: str, method: str, layers: int, vocabulary: int = 64):
    sizes = {**SIZES, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config = getattr(transformers, f"{name}Config")(**sizes, **FAMILIES[name])
    return build(config, SPLIT, method, checkpointing=False, mixed=True), config


def count(name: str, method: str, layers: int, vocabulary: int = 64) -> tuple[int, int]:
    """Bytes moved forward and backward."""
    model, _ = model_of(name, method, layers, vocabulary)
    ids = torch.randint(0, 64, (1, TOKENS))
    with Traffic() as forward, torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with Traffic() as backward:
        loss.backward()
    return forward.moved, backward.moved


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "method"), list(itertools.product(FAMILIES, ("lora", "longlora", "full"))))
def test_a_layer(name, method):
    """The difference of two depths is one layer."""
    shallow, deep = count(name, method, 1), count(name, method, 2)
    shape = shape_of(model_of(name, method, 1)[1].to_dict(), Path(name))
    setup = TrainingSetup(length=TOKENS, method=method, lora_r=RANK)
    for planned, before, after in zip(layer_traffic(shape, setup), shallow, deep, strict=True):
        assert TOKENS * planned == pytest.approx(after - before, rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_loss():
    """The difference of two vocabularies is the logits'."""
    small, large = (sum(count("Llama", "lora", 1, vocabulary)) for vocabulary in (64, 1064))
    shapes = [shape_of({**model_of("Llama", "lora", 1, n)[1].to_dict()}, Path("llama")) for n in (64, 1064)]
    setup = TrainingSetup(length=TOKENS, method="lora", checkpointing=False)
    planned = moved_bytes(shapes[1], setup) - moved_bytes(shapes[0], setup)
    assert planned == pytest.approx(large - small, rel=TOLERANCE)
