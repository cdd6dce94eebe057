"""Every perplexity protocol against the straightforward loop: full logits from transformers, one window at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from extensions import books_config
from families import CONFIGS
from transformers import AutoModelForCausalLM

from longext.data.documents import Document
from longext.evals.perplexity import TokenizedDocument, bucket_edges, evaluate_perplexity, tokenize_documents
from longext.evals.suites.ppl import PERPLEXITY_PROTOCOLS, Perplexity
from longext.models.hf import HFLanguageModel

RTOL = 1e-5


def config_for(protocol, **keys):
    defaults = {"lengths": (48, 96), "stride": 16, "num_bootstrap": 50, "batch_tokens": 400}
    return Perplexity(model="books-5m", protocol=protocol, **{**defaults, **keys})


def documents(*lengths, vocabulary=8192):
    generator = torch.Generator().manual_seed(1)
    return [
        TokenizedDocument(f"d{i}", tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist()))
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def reference_nll(model, ids):
    """NLL of tokens 1 .. T-1 from the model's own full float64 log-softmax; float64 [T - 1]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return -logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_sliding_equals_the_loop_over_windows(books):
    docs = documents(150, 131)
    for row in evaluate_perplexity(books, docs, config_for("sliding")):
        total, count = 0.0, 0
        for doc in docs:
            for start in range(0, len(doc.input_ids) - row.length + 1, 16):
                nll = reference_nll(books.model, list(doc.input_ids[start : start + row.length]))
                new = nll if start == 0 else nll[-16:]
                total, count = total + new.sum(), count + len(new)
        assert row.num_tokens == count
        assert row.nll == pytest.approx(total / count, rel=RTOL)
        assert row.ppl == pytest.approx(math.exp(total / count), rel=RTOL)


def test_sliding_scores_each_token_once(books):
    row = evaluate_perplexity(books, documents(48 + 3 * 16), config_for("sliding", lengths=(48,)))[0]
    assert row.num_tokens == 48 - 1 + 3 * 16
    assert row.num_windows == 4


def test_yarn_truncated_is_the_mean_over_documents_of_one_window_each(books):
    docs = documents(150, 131, 120)
    for row in evaluate_perplexity(books, docs, config_for("yarn-truncated")):
        means = [reference_nll(books.model, list(doc.input_ids[: row.length])).mean() for doc in docs]
        assert row.nll == pytest.approx(np.mean(means), rel=RTOL)
        assert row.num_windows == len(docs)


@pytest.mark.parametrize("bos", [(), (1,)])
def test_yarn_sliding_is_the_mean_over_windows_that_begin_with_bos_and_reach_the_end(books, bos):
    """Every window: BOS and L - 1 tokens (without BOS: L), a stride on; loss of what no window before has scored."""
    docs = [TokenizedDocument(doc.id, doc.input_ids, bos) for doc in documents(150, 131)]
    for row in evaluate_perplexity(books, docs, config_for("yarn-sliding")):
        means, scored = [], 0
        for doc in docs:
            done, room, total = 0, row.length - len(bos), len(doc.input_ids)
            for start in range(0, total, 16):
                end = min(start + room, total)
                nll = reference_nll(books.model, [*bos, *doc.input_ids[start:end]])
                new = nll[-(end - done) :]
                means.append(new.mean())
                scored, done = scored + len(new), end
                if end == total:
                    break
        assert row.num_tokens == scored == sum(len(doc.input_ids) for doc in docs) - (0 if bos else len(docs))
        assert row.num_windows == len(means)
        assert row.nll == pytest.approx(np.mean(means), rel=RTOL)
        assert row.ppl_low < row.ppl < row.ppl_high


def test_yarn_sliding_puts_the_tokenizers_bos_in_front_of_every_window(books, monkeypatch):
    monkeypatch.setattr(type(books), "prefix", property(lambda self: [1]))
    task = config_for("yarn-sliding")
    (doc,), _ = tokenize_documents(books, [Document("a", "One two three. " * 40)], task)
    assert doc.head == (1,)
    assert doc.input_ids[0] != 1


def test_longlora_scores_all_tokens_of_overlapping_windows_and_drops_the_last(books):
    docs = documents(200)
    row = evaluate_perplexity(books, docs, config_for("longlora", lengths=(48,)))[0]
    starts = list(range(0, 200 - 48, 16))[:-1]
    means = [reference_nll(books.model, list(docs[0].input_ids[s : s + 48])).mean() for s in starts]
    assert row.num_windows == len(starts)
    assert row.nll == pytest.approx(np.mean(means), rel=RTOL)


def test_positional_buckets_are_slices_of_one_pass(books):
    docs = documents(96, 200)
    rows = evaluate_perplexity(books, docs, config_for("positional", num_buckets=4))
    windows = [docs[0].input_ids[:96], docs[1].input_ids[:96], docs[1].input_ids[96:192]]
    nll = np.stack([reference_nll(books.model, list(window)) for window in windows])
    assert [(row.start, row.length) for row in rows] == [(1, 24), (24, 48), (48, 72), (72, 96)]
    for row in rows:
        assert row.nll == pytest.approx(nll[:, row.start - 1 : row.length - 1].mean(), rel=RTOL)
    assert sum(row.num_tokens for row in rows) == nll.size


def test_bucket_edges_cover_the_window_once():
    assert bucket_edges(4096, 4) == [1, 1024, 2048, 3072, 4096]
    assert bucket_edges(3, 16) == [1, 2, 3]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_scores_equal_full_logits_on_every_family(family, tmp_path):
    """Soft caps, logit scales, partial rotary: the sliced output head is the model's own."""
    tiny = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    model = HFLanguageModel(family, tiny, None, {}, tmp_path)
    ids = torch.randint(3, 60, (2, 24))
    scores = model.score(ids, 9)
    assert model._head_is_plain
    for row in range(2):
        np.testing.assert_allclose(scores.nll[row], reference_nll(model.model, ids[row].tolist())[8:], rtol=2e-5)


@pytest.mark.parametrize("method", ["none", "dynamic", "yarn", "linear"])
def test_the_order_of_lengths_and_earlier_runs_do_not_matter(books, method):
    books.set_rope(books_config(method, 8.0 if method != "none" else 1.0))
    docs = documents(1100)
    config = config_for("sliding", lengths=(1024, 600), stride=300)
    together = {row.length: row.nll for row in evaluate_perplexity(books, docs, config)}
    for length in (600, 1024, 600):
        alone = evaluate_perplexity(books, docs, config_for("sliding", lengths=(length,), stride=300))[0]
        assert alone.nll == together[length]


def test_batches_do_not_change_scores(books):
    docs = documents(400, 300)
    alone, batched = (
        evaluate_perplexity(books, docs, config_for("sliding", batch_tokens=tokens)) for tokens in (1, 2000)
    )
    for a, b in zip(alone, batched, strict=True):
        assert a.nll == pytest.approx(b.nll, rel=1e-6)


def test_no_score_sees_the_future(books):
    ids = torch.tensor([documents(64)[0].input_ids])
    changed = ids.clone()
    changed[0, -1] = 5
    before, after = books.score(ids, 1).nll[0, :-1], books.score(changed, 1).nll[0, :-1]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_slices_of_the_head_do_not_change_scores(books, monkeypatch):
    ids = torch.tensor([documents(200)[0].input_ids])
    whole = books.score(ids, 1).nll
    monkeypatch.setattr("longext.models.hf._HEAD_BYTES", 7 * 4 * 8192)
    torch.testing.assert_close(books.score(ids, 1).nll, whole, rtol=1e-6, atol=1e-6)


def test_documents_too_short_for_the_longest_window_are_left_out_at_every_length(books):
    config = config_for("sliding", lengths=(8, 64))
    kept, num_short = tokenize_documents(
        books, [Document("a", "Once upon a time. " * 40), Document("b", "Short.")], config
    )
    assert [document.id for document in kept] == ["a"]
    assert num_short == 1


def test_bos_follows_the_protocol(books):
    text = [Document("a", "Once upon a time. " * 60)]
    for name, protocol in ((name, PERPLEXITY_PROTOCOLS[name]) for name in PERPLEXITY_PROTOCOLS):
        kept, _ = tokenize_documents(books, text, config_for(name))
        assert (kept[0].input_ids[0] == books.tokenizer.bos_token_id) == protocol.adds_bos


def test_top1_is_what_greedy_decoding_would_take_also_where_logits_tie():
    from longext.models.hf import score_logits

    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, 2.0], [2.0, 2.0, 2.0]])
    for target in range(3):
        targets = torch.full((3,), target)
        scores = score_logits(logits.clone(), targets)
        assert torch.equal(scores.is_top1, logits.argmax(-1) == targets)
        torch.testing.assert_close(scores.nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
