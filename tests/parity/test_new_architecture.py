"""An architecture is one file: the one that CONTRIBUTING.md shows trains, reads and continues as those of longext."""

from __future__ import annotations

import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from compressors import compressor_reader, document_nll, gradient_of, make_compressor, make_document, random_ids
from contributing import added_file

from longext.compressor import architectures
from longext.compressor.architectures import COMPRESSORS
from longext.compressor.config import CompressConfig
from longext.compressor.objectives import Batch, Objectives
from longext.compressor.policies import parse_objectives, parse_policy
from longext.compressor.reading.session import Session
from longext.errors import ConfigError
from longext.settings import option_of


@pytest.fixture
def mean_pool(tmp_path, monkeypatch):
    (tmp_path / "meanpool.py").write_text(added_file("longext/compressor/architectures/meanpool.py"))
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path)])
    yield make_compressor("meanpool")
    COMPRESSORS.unregister("meanpool")
    sys.modules.pop("longext.compressor.architectures.meanpool")


def test_it_is_listed_and_described(mean_pool):
    assert mean_pool.summary == "the mean of every `ratio` tokens, as attention sees them"
    assert "meanpool" in option_of(next(f for f in fields(CompressConfig) if f.name == "arch")).text
    with pytest.raises(ConfigError, match="Did you mean 'meanpool'"):
        COMPRESSORS["meanpol"]


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
