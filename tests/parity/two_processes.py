"""What test_distributed.py runs in each of two gloo processes; prints "NAME equal" where all assertions held."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from longext.attention.layout import make_layout
from longext.attention.sequence import make_sequence_group, split_sequence
from longext.attention.shifted import PLAN, AttentionPlan, register_attention, train_attention
from longext.attention.variant import ATTENTION_VARIANTS

LENGTH, GROUP = 32, 8


def check_sequence_parallel() -> None:
    """Ulysses attention against the same function on whole rows."""
    sequence = make_sequence_group(2)
    documents = torch.tensor([[0] * 13 + [1] * 19, [0] * 30 + [-1] * 2])
    for name, (heads, kv_heads) in itertools.product(ATTENTION_VARIANTS, [(4, 4), (4, 2), (4, 1), (6, 3), (8, 2)]):
        layouts = [make_layout(2, LENGTH)]
        if name != "s2-wrapped":
            layouts.append(make_layout(2, LENGTH, None, documents, True))
        for layout in layouts:
            torch.manual_seed(0)
            whole = [torch.randn(2, h, LENGTH, 8, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
            weight = torch.randn(2, LENGTH, heads, 8, dtype=torch.float64)
            for x in whole:
                x.requires_grad_()
            expected = train_attention(ATTENTION_VARIANTS[name], AttentionPlan(layout, GROUP), *whole, scale=0.3)
            gradients = torch.autograd.grad((expected * weight).sum(), whole)
            parts = [x.detach().chunk(2, 2)[sequence.rank].clone().requires_grad_() for x in whole]
            plan = AttentionPlan(layout, GROUP, "auto", sequence)
            found = train_attention(ATTENTION_VARIANTS[name], plan, *parts, scale=0.3)
            torch.testing.assert_close(found, split_sequence(expected, sequence), rtol=1e-10, atol=1e-10)
            own = torch.autograd.grad((found * split_sequence(weight, sequence)).sum(), parts)
            for a, b in zip(own, gradients, strict=True):
                torch.testing.assert_close(a, b.chunk(2, 2)[sequence.rank], rtol=1e-10, atol=1e-10)


def check_fsdp() -> None:
    """fully_shard (FSDP2) against one process that sees both ranks' rows."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from longext.training.losses import chunked_loss, shift

    register_attention()
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    single = LlamaForCausalLM(config).train()
    sharded = copy.deepcopy(single)
    ids = torch.randint(3, 60, (2, LENGTH))
    for model in (single, sharded):
        model.set_attn_implementation("s2_attn")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)

    def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        plan = AttentionPlan(make_layout(*rows.shape), GROUP)
        with chunked_loss(model, 7):
            return model(rows, shift_labels=shift(rows), use_cache=False, **{PLAN: plan}).loss

    expected = loss_of(single, ids)
    expected.backward()
    mine = loss_of(sharded, ids[dist.get_rank()][None])
    mine.backward()
    total = mine.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, expected.detach(), rtol=1e-5, atol=1e-6)
    for a, b in zip(sharded.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-5, atol=1e-6)


def check_segment_parallel() -> None:
    """Two ranks that share a document's segments against one that has them all: loss and gradient."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import numpy as np
    from compressors import INDEPENDENT, flat_gradient, gradient_of, make_compressor, make_document, random_ids

    from longext.compressor.gradients import backprop
    from longext.compressor.objectives import Batch, Objectives, compare_gradients
    from longext.compressor.policies import parse_policy
    from longext.processes.group import sum_gradients

    for name, segments in itertools.product(INDEPENDENT, (1, 2, 5)):
        torch.manual_seed(0)
        compressor = make_compressor(name)
        document = make_document(compressor, random_ids(2, segments))
        for policy in ("exact", "subset:2", "full"):
            loss, expected = gradient_of(compressor, document, policy)
            compressor.zero_grad()
            found = backprop(document, parse_policy(policy), np.random.default_rng(0), dist.group.WORLD)
            sum_gradients(compressor)
            assert abs(float(found) - loss) <= 1e-9 * abs(loss)
            torch.testing.assert_close(flat_gradient(compressor), expected, rtol=1e-10, atol=1e-12)
    ids = random_ids(2, 5)
    batch = Batch(ids, ids, torch.tensor([80, 80]), 0, 0.01, 0.5)
    objectives = Objectives({"lm": 1.0, "ae": 0.5}, parse_policy("exact"), 0)
    assert compare_gradients(compressor, objectives, batch, dist.group.WORLD)["relative_error"] < 1e-9


def run_commands(directory: Path) -> None:
    """Run the command lines of commands.json in both processes, each in its `in`; outcomes go to NAME-RANK.json.

    `copy` [from, to] comes first, and the `spoil`ed file gets another last byte. With `rope` the model that is loaded
    rotates wrongly in this way.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from typer.testing import CliRunner
    from wrong_ropes import loaded_wrong

    from longext.cli import app

    gc.collect()
    gc.freeze()  # every training ends in a collection: without all that was imported
    rank = dist.get_rank()
    for name, command in json.loads((directory / "commands.json").read_text()).items():
        if rank == 0:
            for origin, target in command.get("copy", []):
                shutil.copytree(directory / origin, directory / target)
            if "spoil" in command:
                content = (directory / command["spoil"]).read_bytes()
                (directory / command["spoil"]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        where = directory / command.get("in", (name, name))[rank]
        where.mkdir(exist_ok=True)
        os.chdir(where)
        with loaded_wrong(command["rope"]) if "rope" in command else contextlib.nullcontext():
            done = CliRunner().invoke(app, command["args"])
        outcome = {"code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr}
        (directory / f"{name}-{rank}.json").write_text(json.dumps(outcome))
        dist.barrier()


CHECKS = {"sequence": check_sequence_parallel, "fsdp": check_fsdp, "segments": check_segment_parallel}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        CHECKS[name]()
        print(f"{name} equal", flush=True)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from command_line import undrawn

    with undrawn():
        run_commands(Path(sys.argv[1]))
    dist.destroy_process_group()
