"""An architecture is a class and a name: one of 30 lines trains, reads, is saved and evaluated as those of longext."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressors import compressor_reader, document_nll, gradient_of, make_compressor, make_document, random_ids

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.independent import IndependentCompressor
from longext.compressor.objectives import Batch, Objectives
from longext.compressor.policies import parse_objectives, parse_policy
from longext.compressor.reading.session import Session
from longext.errors import ConfigError


class MeanPool(IndependentCompressor):
    """A slot is the mean of what attention sees of `ratio` tokens, in every layer."""

    reference = "a test"
    encoder, transfer, nested = "encoder", "transfer", False

    def __init__(self, backbone, spec):
        super().__init__(backbone, spec)
        self.adapters.add("encoder", "qv", len(backbone.attentions) - 1)
        self.adapters.add("transfer", "kv")

    def encode(self, tokens, ratio, first_slots):
        with self.adapters.use(self.encoder):
            captured = self.backbone.attention_inputs(self.embed(tokens), slice(None))
        captured.hidden = [hidden.unflatten(1, (-1, ratio)).mean(2) for hidden in captured.hidden]
        slots = first_slots[:, None] + torch.arange(tokens.shape[1] // ratio)
        with self.adapters.use(self.transfer):
            return self.backbone.project(captured, slots)


@pytest.fixture
def mean_pool():
    COMPRESSORS.register("meanpool", MeanPool, "the mean of every few tokens")
    yield make_compressor("meanpool")
    COMPRESSORS.unregister("meanpool")


def test_it_is_listed_and_described(mean_pool):
    assert list(COMPRESSORS)[-1] == "meanpool"
    assert mean_pool.summary == "the mean of every few tokens"


def test_its_exact_gradient_is_autograd_through_one_graph(mean_pool):
    document = make_document(mean_pool, random_ids(2, 6))
    loss, expected = gradient_of(mean_pool, document, "full")
    for policy in ("exact", "window:5", "subset:5", "stop:6"):
        found_loss, found = gradient_of(mean_pool, document, policy)
        assert found_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert expected.norm() > 1e-4


def test_it_trains(mean_pool):
    ids = random_ids(2, 4)
    objectives = Objectives(parse_objectives("lm,ae:0.1"), parse_policy("exact"), 0)
    optimiser = torch.optim.Adam(mean_pool.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        parts = objectives.backward(mean_pool, Batch(ids, ids, torch.tensor([64, 64]), 0, 1 / ids.numel(), 1.0))
        optimiser.step()
        losses.append(float(sum(parts.values())))
    assert losses[-1] < losses[0]


def test_it_is_read_as_in_training(mean_pool):
    ids = random_ids(2, 6)
    reader = compressor_reader(mean_pool)
    np.testing.assert_allclose(reader.score(ids, 1).nll, document_nll(mean_pool, ids, 4), rtol=2e-6, atol=1e-6)
    session = Session(mean_pool)
    session.absorb(ids[0, :-10])
    assert session.generate(12) == reader.greedy(ids[0, :-10].tolist(), 12)


def test_a_ratio_it_was_not_trained_at_is_refused(mean_pool):
    with pytest.raises(ConfigError, match="this meanpool compressor was trained at 4, 8"):
        mean_pool.find_ratio(2)
