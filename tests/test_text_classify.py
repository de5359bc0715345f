"""Text classification: split, words, tokens and batches by hand; scores; the script from arguments to files."""

import csv
import io
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import datasets
import plots
import samples
import text_classify
import training
from rnn_models import CELLS, TextClassifier
from text_classify import (
    Corpus,
    Reviews,
    build_vocabularies,
    cached_words,
    cut_words,
    encode,
    gradient_reach,
    parse_args,
    probabilities,
    read_reviews,
)
from text_classify import test_scores as scores_of

CPU = torch.device("cpu")
CUTS = [["屏幕", "很", "清晰"], ["很", "好"], []]
QUICK = ["--hidden", 4, "--embedding", 4, "--batch-size", 32, "--epochs", 1, "--device", "cpu"]


def run_main(*arguments, pictures=False):
    """Call main() with these command line arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["text_classify.py", *map(str, arguments)])
        for name in () if pictures else ("draw_curves", "draw_confusion", "draw_gradients"):
            patch.setattr(plots, name, lambda *arguments: None)
        text_classify.main()


def write_corpus(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("cat", "label", "review"), *rows])
    return path


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def history(folder):
    """history.csv without its times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / "history.csv")]


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    """150 made-up reviews; of the ten labels one holds a tab and a line feed, its texts too."""
    frame = samples.reviews(150)
    frame = frame.replace({"cat": {"蒙牛": "蒙\t牛\n奶"}})
    tabbed = frame["cat"] == "蒙\t牛\n奶"
    frame.loc[tabbed, "review"] = frame.loc[tabbed, "review"].str.replace("，", "\t")
    path = tmp_path_factory.mktemp("corpus") / "reviews.csv"
    frame.to_csv(path, index=False)
    return path


# --- reviews ------------------------------------------------------------------------------------


def test_the_split_follows_the_rows_of_the_file(tmp_path, capsys):
    rows = [("ab"[i % 2], "1", f" 第{i}条 ") for i in range(1, 41)]
    rows[6], rows[7] = ("a", "1", " \t "), (" ", "1", "好")  # 7 has no text, 8 no label: left out
    rows[0], rows[39] = (" b ", "1", "\ufeff第一条"), ("a", "1", "NA")
    path = write_corpus(tmp_path / "corpus.csv", rows)
    reviews = read_reviews(parse_args(["--data", str(path)]))
    numbers = {part: (index + 1).tolist() for part, index in reviews.split.items()}
    assert numbers["validation"] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert numbers["test"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert numbers["train"] == [i for i in range(1, 41) if i % 5 in (1, 2, 3) and i not in (7, 8)]
    assert reviews.classes == ["a", "b"] and reviews.labels[[0, 1, 2, 3]].tolist() == [1, 0, 1, 0]
    assert [reviews.texts[i] for i in (0, 1, 39)] == ["第一条", "第2条", "NA"]
    assert "40 rows (22 train, 8 validation, 8 test; 2 empty left out), 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["validation", "test"])
def test_vocabulary_and_training_read_no_other_rows(part, tmp_path):
    generator = random.Random(0)
    labels = ["ab"[i % 3 == 0] for i in range(60)]
    rows = [(label, "1", ("好坏" if label == "a" else "快慢")[generator.random() < 0.5] * 3) for label in labels]
    own = {"validation": 4, "test": 0}[part]
    changed = [("b", "1", "别的词") if i % 5 == own else row for i, row in enumerate(rows, 1)]
    for name, table in (("one", rows), ("two", changed)):
        data = write_corpus(tmp_path / f"{name}.csv", table)
        run_main(*QUICK, "--model", "rnn", "--data", data, "--out", tmp_path / name, "--epochs", 2)
    one, two = (tmp_path / name / "text_rnn" for name in ("one", "two"))
    columns = [name for name in history(one)[0] if part == "test" or not name.startswith("validation")]
    assert [[r[c] for c in columns] for r in history(one)] == [[r[c] for c in columns] for r in history(two)]
    first, second = (torch.load(folder / "best.pt", weights_only=True) for folder in (one, two))
    assert first["vocabularies"] == second["vocabularies"] and "别" not in first["vocabularies"]["char"]


# --- words and tokens ---------------------------------------------------------------------------


def test_words_are_read_from_the_cache_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    texts = ["屏幕清晰，运行流畅", "", "😀 emoji\tand\n换行\r\n", "好" * 50, ""]
    cuts = cut_words(texts)
    assert cuts[0][:2] == ["屏幕", "清晰"] and ["".join(cut) for cut in cuts] == texts
    assert cached_words(texts, "0") == cuts and len(list(tmp_path.iterdir())) == 1
    cached_words([*texts, "x"], "0")
    cached_words(texts, "1")
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(text_classify, "cut_words", lambda texts: pytest.fail("not from the cache"))
    assert cached_words(texts, "0") == cuts


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:20], lambda content: content[: len(content) // 2],
    lambda content: b"\xff\x00" * 50, lambda content: content.replace("屏".encode(), "瓶".encode()),
    lambda content: content + b"\x1e", lambda content: content.replace(b"\x1e", b"\x1f", 1),
])  # fmt: skip
def test_a_damaged_cache_is_cut_again(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    texts = ["屏幕清晰，运行流畅", "好", "很好"]
    cuts = cached_words(texts, "0")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cached_words(texts, "0") == cuts and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "file" / "data")
    assert cached_words(["屏幕很好"], "0") == cut_words(["屏幕很好"])


def test_vocabularies_by_hand():
    known = ["<pad>", "<unk>"]
    assert build_vocabularies(CUTS, "word", 1) == {"word": [*known, "很", "屏幕", "清晰", "好"]}
    assert build_vocabularies(CUTS, "char", 1) == {"char": [*known, *"很屏幕清晰好"]}
    assert build_vocabularies([*CUTS, ["屏幕", "很"]], "word", 2) == {"word": [*known, "很", "屏幕"]}
    both = build_vocabularies(CUTS, "both", 2)
    places = ["<pad>", "alone", "first", "inside", "last"]
    assert both == {"char": [*known, "很"], "word": [*known, "很"], "pair": known, "place": places}
    pairs = [build_vocabularies([["很", "好"]] * n, "both", m)["pair"] for n, m in ((19, 2), (20, 2), (20, 21))]
    assert pairs == [known, [*known, "很好", "好\n"], known]


def test_the_numbers_of_the_tokens_by_hand():
    known = ["<pad>", "<unk>"]
    vocabularies = {"char": [*known, "屏", "很", "晰"], "word": [*known, "很", "清晰"],
                    "pair": [*known, "好\n", "清晰", "幕很"], "place": ["<pad>"] * 5}  # fmt: skip
    ids, counts = encode(CUTS, vocabularies)
    # 屏 幕 | 很 | 清 晰 ; 很 | 好 ; the empty text is one unknown token
    assert counts.tolist() == [5, 2, 1] and ids.dtype == np.int32
    assert ids[:, 0].tolist() == [2, 1, 3, 1, 4, 3, 1, 1]
    assert ids[:, 1].tolist() == [1, 1, 2, 3, 3, 2, 1, 1]
    assert ids[:, 2].tolist() == [1, 4, 1, 3, 1, 1, 2, 1]  # 屏幕 幕很 很清 清晰 晰; 很好 好; nothing
    assert ids[:, 3].tolist() == [2, 4, 1, 2, 4, 1, 1, 1]
    assert encode([["电视机", "遥控器盒"]], vocabularies)[0][:, 3].tolist() == [2, 3, 4, 2, 3, 3, 4]
    ids, counts = encode(CUTS, {"word": vocabularies["word"]})
    assert ids.tolist() == [[1], [2], [3], [2], [1], [1]] and counts.tolist() == [3, 2, 1]
    ids, counts = encode(CUTS, {"char": vocabularies["char"]})
    assert ids.tolist() == [[2], [1], [3], [1], [4], [3], [1], [1]] and counts.tolist() == [5, 2, 1]


# --- batches ------------------------------------------------------------------------------------


def make_corpus(counts, max_tokens=500):
    """Texts of these lengths; the tokens are numbered through in the first aspect, negative in the second."""
    ids = np.arange(1, sum(counts) + 1, dtype=np.int32)
    labels = 10 * np.arange(len(counts))
    return Corpus(np.stack([ids, -ids], axis=1), np.array(counts), labels, max_tokens, CPU)


def test_a_batch_by_hand():
    tokens, lengths, labels = make_corpus([2, 1, 4], max_tokens=3).batch(torch.tensor([2, 1]))
    assert tokens[:, :, 0].tolist() == [[4, 3], [5, 0], [6, 0]]  # the fourth token is cut off
    assert tokens[:, :, 1].tolist() == [[-4, -3], [-5, 0], [-6, 0]]
    assert lengths.tolist() == [3, 1] and labels.tolist() == [20, 10]


def test_rows_in_order_of_their_lengths_by_hand():
    corpus = make_corpus([5, 2, 9, 2, 7, 1, 8], max_tokens=7)  # 9 and 8 count as 7
    batches = corpus.by_length(torch.tensor([6, 3, 2, 1, 0, 4]), 4)
    assert [batch.tolist() for batch in batches] == [[3, 1, 0, 6], [2, 4]]


def test_every_epoch_sees_every_row_once_in_batches_of_similar_length():
    torch.manual_seed(0)
    counts = (torch.randperm(800) + 1).tolist()
    corpus, rows = make_corpus(counts, 1000), torch.arange(0, 800, 2)  # 400 rows: four pools of 50 batches

    def plan(seed):
        torch.manual_seed(seed)
        return [batch.tolist() for batch in corpus.shuffled(rows, 2)]

    batches = plan(1)
    assert sorted(sum(batches, [])) == rows.tolist() and {len(batch) for batch in batches} == {2}
    difference = np.mean([abs(counts[a] - counts[b]) for a, b in batches])
    assert difference < 16  # 8 on average within pools of 100 rows, 267 without sorting
    assert plan(1) == batches and plan(2) != batches
    assert {frozenset(batch) for batch in plan(2)} != {frozenset(batch) for batch in batches}
    first = [counts[a] for a, _ in batches]
    assert abs(np.corrcoef(first, range(200))[0, 1]) < 0.3  # no order of lengths over the epoch


# --- scores -------------------------------------------------------------------------------------


class ByFirstToken(nn.Module):
    """A model whose class probabilities are looked up by a text's first token."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, tokens, lengths):
        assert not self.training and not torch.is_grad_enabled()
        return self.table[tokens[0, :, 0].long()].log() + 3  # softmax takes the 3 away again


def test_probabilities_come_in_the_order_of_the_rows():
    counts = [3, 9, 1, 4, 2, 8]  # first tokens 1, 4, 13, 14, 18, 20
    table = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    table /= table.sum(1, keepdim=True)
    rows = torch.tensor([5, 0, 3, 1, 4])
    for batch_size in (2, 100):
        p = probabilities(ByFirstToken(table.tolist()).train(), make_corpus(counts), rows, batch_size)
        assert torch.allclose(p, table[[20, 1, 14, 4, 18]])


def test_scores_of_some_rows_by_hand():
    table = [[0.0] * 3, [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]
    reviews = Reviews([""] * 4, np.array([0, 1, 1, 0]), ["a", "b", "c"], {}, {})
    loss, share, f1 = text_classify.score(ByFirstToken(table), make_corpus([1] * 4), reviews, torch.arange(3))
    assert loss == pytest.approx((np.log(2) + np.log(4) + np.log(2)) / 3)
    assert share == pytest.approx(2 / 3)
    # a: predicted twice, once right, F1 2/3. b: predicted once, right, one of two, F1 2/3. c: 0.
    assert f1 == pytest.approx(4 / 9)
    assert np.isfinite(text_classify.score(ByFirstToken(table), make_corpus([1] * 4), reviews, torch.tensor([3]))[0])


def test_test_scores_by_hand():
    labels, split = np.array([2, 0, 0, 2, 1, 1, 0]), {"test": torch.tensor([1, 2, 4, 5, 6])}  # 0 0 1 1 0
    p = torch.eye(3)[[0, 1, 1, 1, 0]]
    matrix, scores = scores_of(Reviews([], labels, ["a", "b", "c"], split, {}), p)
    assert matrix.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    # a: precision 1, recall 2/3, F1 4/5. b: 2/3, 1, 4/5. c: nothing. Weights 3/5, 2/5, 0.
    expected = {
        "accuracy": 4 / 5, "precision_macro": 5 / 9, "recall_macro": 5 / 9, "f1_macro": 8 / 15,
        "precision_weighted": 13 / 15, "recall_weighted": 4 / 5, "f1_weighted": 4 / 5,
    }  # fmt: skip
    classes = {"a": (1, 2 / 3, 4 / 5, 3), "b": (2 / 3, 1, 4 / 5, 2), "c": (0, 0, 0, 0)}
    for label, values in classes.items():
        names = ("precision", "recall", "f1", "support")
        assert scores["per_class"].pop(label) == pytest.approx(dict(zip(names, values, strict=True)))
    assert scores.pop("per_class") == {} and scores == pytest.approx(expected)


# --- how far the gradient reaches ---------------------------------------------------------------


def long_texts(counts):
    ids = np.random.default_rng(0).integers(2, 12, (sum(counts), 1), np.int32)
    return Corpus(ids, np.array(counts), np.arange(len(counts)) % 3, 200, CPU)


def test_the_gradient_of_a_decaying_recurrence_halves_at_every_token():
    torch.manual_seed(0)
    model = TextClassifier("rnn", [12], 5, 4, 3, "last", 0.5)
    with torch.no_grad():
        model.recurrence.W_hh.copy_(0.5 * torch.eye(4))
        model.embeddings[0].weight.mul_(1e-3)  # tanh is nearly its argument
    reach = gradient_reach(model, long_texts([40, 43, 60, 3, 39]), torch.arange(5))
    assert reach == pytest.approx([0.5**d for d in range(40)], rel=1e-4)


def test_a_reach_of_nothing_is_still_a_row_of_numbers():
    # The maxima stand at the first token of the only text, so no gradient arrives at its end.
    model = TextClassifier("rnn", [4], 3, 3, 3, "max")
    with torch.no_grad():
        model.recurrence.W_hh.copy_(0.5 * torch.eye(3))
        model.recurrence.W_xh.copy_(torch.eye(3))
        model.embeddings[0].weight.copy_(torch.tensor([0.0, 0, 1, 0])[:, None])
    corpus = Corpus(np.array([[2]] + [[3]] * 44, np.int32), np.array([45]), np.array([0]), 200, CPU)
    json.dumps(gradient_reach(model, corpus, torch.tensor([0])), allow_nan=False)


@pytest.mark.parametrize(("cell", "pool"), [("lstm", "max"), ("gru", "mean"), ("bi_lstm", "max"), ("bi_lstm", "last")])
def test_the_reach_is_the_mean_gradient_of_single_texts(cell, pool):
    torch.manual_seed(2)
    h, counts = 4, [44, 3, 52, 47, 40]
    model, corpus = TextClassifier(cell, [12], 5, h, 3, pool, 0.5), long_texts(counts)
    one, total = ("lstm" if cell == "bi_lstm" else cell), torch.zeros(40)
    *params, W_hq, b_q = [param.detach() for param in model.recurrence.params]
    identity = [torch.eye(h), torch.zeros(h)]
    for row in (0, 3, 4):
        tokens, _, label = corpus.batch(torch.tensor([row]))
        inputs = model.embeddings[0](tokens[:, :, 0]).detach()
        nudges = [torch.zeros(1, h, requires_grad=True) for _ in inputs]  # dL/dnudge_t is dL/dH_t
        state, states = tuple(torch.zeros(1, h) for _ in range(1 + (one == "lstm"))), []
        for X, nudge in zip(inputs, nudges, strict=True):
            state = CELLS[one](X[None], state, [*params[: 12 if cell == "bi_lstm" else None], *identity])[1]
            state = (state[0] + nudge, *state[1:])
            states.append(state[0])
        H = torch.cat(states)
        pooled = {"max": H.amax(0), "mean": H.mean(0), "last": H[-1]}[pool]
        if cell == "bi_lstm":
            H_b = CELLS["lstm"](inputs.flip(0), (torch.zeros(1, h),) * 2, [*params[12:], *identity])[0][:, 0]
            pooled = torch.cat([pooled, H_b.amax(0) if pool == "max" else H_b[-1]])
        loss = -(pooled @ W_hq + b_q).log_softmax(0)[label[0]]
        norms = torch.stack([grad.norm() for grad in torch.autograd.grad(loss, nudges)])
        total += norms.flip(0)[:40]
    reach = gradient_reach(model, corpus, torch.tensor([4, 1, 3, 0]))
    assert torch.allclose(torch.tensor(reach), total / total[0], rtol=1e-4)


# --- the script ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(corpus_path, tmp_path_factory):
    """The folder of --model all."""
    folder = tmp_path_factory.mktemp("runs")
    run_main(*QUICK, "--pool", "mean", "--model", "all", "--epochs", 2, "--lr", 0.02, "--data", corpus_path, "--out", folder,
         "--seed", 3, pictures=True)  # fmt: skip
    return folder


def test_the_files_of_a_run_and_the_format_of_its_metrics(finished, corpus_path):
    run = finished / "text_gru"
    pictures = {"curves.png", "confusion.png"}
    files = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv"} | pictures
    assert {path.name for path in run.iterdir()} == files
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    metrics = read_json(run / "metrics.json")
    keys = "task model seed argv device torch parameters epochs best_epoch seconds_per_epoch data split test"
    assert " ".join(metrics) == keys
    assert [metrics[key] for key in ("task", "model", "seed", "device", "torch", "epochs")] == [
        "text", "gru", 3, "cpu", torch.__version__, 2,
    ]  # fmt: skip
    assert metrics["argv"][:3] == ["--hidden", "4", "--embedding"] and metrics["seconds_per_epoch"] > 0
    assert set(metrics["data"]) == {"path", "sha256", "source", "rows"}
    assert metrics["data"]["source"] == "file" and metrics["data"]["rows"] == 150
    assert metrics["data"]["path"] == str(corpus_path) and len(metrics["data"]["sha256"]) == 64
    assert metrics["split"] == {"train": 90, "validation": 30, "test": 30}
    averages = [f"{name}_{kind}" for kind in ("macro", "weighted") for name in ("precision", "recall", "f1")]
    assert list(metrics["test"]) == ["accuracy", *averages, "per_class"]
    for entry in metrics["test"]["per_class"].values():
        assert list(entry) == ["precision", "recall", "f1", "support"]
    assert sum(entry["support"] for entry in metrics["test"]["per_class"].values()) == 30
    weights = torch.load(run / "best.pt", weights_only=True)["weights"]
    assert metrics["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_the_metrics_can_be_counted_again_from_the_predictions(finished, corpus_path):
    table = read_csv(corpus_path)
    for name in ("rnn", "bilstm"):
        run = finished / f"text_{name}"
        metrics, rows = read_json(run / "metrics.json"), read_csv(run / "predictions.csv")
        assert [int(row["row"]) for row in rows] == list(range(5, 151, 5))
        for row in rows:
            assert row["label"] == table[int(row["row"]) - 1]["cat"]
            assert row["text"] == table[int(row["row"]) - 1]["review"].strip()
            assert 0.1 <= float(row["probability"]) <= 1
        hits = sum(row["label"] == row["predicted"] for row in rows)
        assert metrics["test"]["accuracy"] == pytest.approx(hits / 30)
        for label, entry in metrics["test"]["per_class"].items():
            right = sum(row["label"] == row["predicted"] == label for row in rows)
            both = sum((row["label"] == label) + (row["predicted"] == label) for row in rows)
            assert entry["f1"] == pytest.approx(2 * right / both if both else 0)
        records = history(run)
        best = max(records, key=lambda record: float(record["validation_f1_macro"]))
        assert len(records) == 2 and int(best["epoch"]) == metrics["best_epoch"]


def test_the_comparison_shows_the_four_runs(finished):
    folder = finished / "text_all"
    assert {path.name for path in folder.iterdir()} == {
        "comparison.md", "comparison.json", "comparison.png", "gradients.png",
    }  # fmt: skip
    assert (folder / "gradients.png").read_bytes().startswith(b"\x89PNG")
    content = read_json(folder / "comparison.json")
    names = ["RNN", "GRU", "LSTM", "Bi-LSTM"]
    assert [row["model"] for row in content["rows"]] == [*names, "mean of the four"]
    assert list(content["gradient_reach"]) == names
    assert all(len(values) == 40 and values[0] == 1 for values in content["gradient_reach"].values())
    lines = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    for name, row in zip(("rnn", "gru", "lstm", "bilstm"), content["rows"], strict=False):
        metrics = read_json(finished / f"text_{name}" / "metrics.json")
        scores = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
        assert [row[key] for key in scores] == [metrics["test"][key] for key in scores]
        counts = ("parameters", "seconds_per_epoch", "best_epoch")
        assert [row[key] for key in counts] == [metrics[key] for key in counts]
        (line,) = [line for line in lines if line.startswith(f"| {row['model']} |")]
        cells = [float(cell.replace(",", "")) for cell in line.strip("|").split("|")[1:]]
        numbers = [row[key] for key in (*scores, *counts, "epochs_to_95_percent")]
        assert cells == pytest.approx(numbers, abs=0.051) and cells[:4] == pytest.approx(numbers[:4], abs=6e-4)


def test_the_mean_of_the_four_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_curves", lambda *arguments: None)
    monkeypatch.setattr(plots, "draw_gradients", lambda *arguments: None)
    reviews = Reviews([], np.array([0, 1, 0]), ["a", "b"], {"test": torch.tensor([0, 1])}, {"source": "sample"})
    own = torch.tensor([[0.4, 0.6], [0.6, 0.4]]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])  # wrong, right
    metrics = {"test": dict.fromkeys(text_classify.SCORES, 0.25), "parameters": 1000, "seconds_per_epoch": 1.26}
    rises = [{"validation_f1_macro": f1, "validation_loss": 1.0} for f1 in (0.5, 0.94, 0.95, 1.0, 0.99)]
    results = {
        name: {"metrics": metrics | {"best_epoch": 4}, "history": rises, "probabilities": own[name == "gru"]}
        for name in ("rnn", "gru", "lstm", "bilstm")
    }
    args = SimpleNamespace(out=tmp_path, seed=0, pool="max")
    text_classify.compare(args, reviews, results, {name: [1.0, 0.5] for name in results})
    content = read_json(tmp_path / "text_all" / "comparison.json")
    # The mean is (0.525, 0.475) and (0.475, 0.525): right, though three of four are wrong.
    mean = content["rows"][-1]
    assert mean["accuracy"] == mean["f1_macro"] == 1 and mean["parameters"] == 4000
    assert [row["epochs_to_95_percent"] for row in content["rows"][:4]] == [3] * 4
    table = (tmp_path / "text_all" / "comparison.md").read_text(encoding="utf-8")
    assert "made-up data" in table and "| GRU | 0.25" in table and "| mean of the four | 1.0" in table


def test_texts_too_short_for_the_reach_cost_no_comparison(tmp_path):
    rows = [("ab"[i % 2], "1", "好坏"[i % 2] * 5) for i in range(60)]
    data = write_corpus(tmp_path / "short.csv", rows)
    run_main(*QUICK, "--model", "all", "--data", data, "--out", tmp_path / "runs")
    assert len(read_json(tmp_path / "runs" / "text_all" / "comparison.json")["rows"]) == 5


@pytest.mark.parametrize("kind", ["both", "word", "char"])
def test_word_dropout_hides_words_from_training_and_nothing_else(kind, corpus_path, tmp_path, monkeypatch):
    seen = {True: [], False: []}

    class Recorder(TextClassifier):
        def forward(self, tokens, lengths):
            steps = torch.arange(len(tokens))[:, None] < lengths
            seen[self.training].append(tokens[steps])  # (tokens, aspects), without padding
            return super().forward(tokens, lengths)

    monkeypatch.setattr(text_classify, "TextClassifier", Recorder)
    run_main(*QUICK, "--model", "rnn", "--tokens", kind, "--word-dropout", 0.3, "--data", corpus_path, "--out", tmp_path)
    reviews = read_reviews(parse_args(["--data", str(corpus_path)]))
    cuts = cut_words([reviews.texts[i] for i in reviews.split["train"]])
    vocabularies = build_vocabularies(cuts, kind, 2)
    ids = torch.from_numpy(encode([cut for cut in cuts if len("".join(cut)) <= 256], vocabularies)[0])
    training_ids, hidden = torch.cat(seen[True]), {}
    for column, name in enumerate(vocabularies):
        before = torch.bincount(ids[:, column], minlength=2000)
        after = torch.bincount(training_ids[:, column], minlength=2000)
        hidden[name] = 1 - after[2:].sum() / before[2:].sum()
        assert after[0] == 0
    assert hidden.pop("word", 0.3) == pytest.approx(0.3, abs=0.05)
    assert all(abs(share) < 0.05 for share in hidden.values())
    # What is scored, training rows among it, shows every word.
    words = list(vocabularies).index("word") if "word" in vocabularies else 0
    scored = torch.cat(seen[False])[:, words]
    assert (scored == 1).float().mean() < 0.2


@pytest.mark.parametrize("model", ["rnn", "gru", "lstm", "bilstm"])
def test_plain_and_fast_loops_give_the_same_epoch(model, tmp_path):
    generator = random.Random(1)
    rows = [("ab"[i % 2], "1", "".join(generator.choices("好坏快慢大小"[i % 2 :], k=8))) for i in range(60)]
    data = write_corpus(tmp_path / "corpus.csv", rows)
    for loops in ("plain", "fast"):
        run_main(*QUICK, "--model", model, "--loops", loops, "--dropout", 0, "--batch-size", 8, "--lr", 0.01,
             "--data", data, "--out", tmp_path / loops)  # fmt: skip
    (plain,), (fast,) = (history(tmp_path / loops / f"text_{model}") for loops in ("plain", "fast"))
    for key in plain:
        assert float(plain[key]) == pytest.approx(float(fast[key]), abs=1e-4)


def outcome(folder):
    """What a run found, without what differs between machines and starts."""
    metrics = read_json(folder / "metrics.json")
    kept = {key: value for key, value in metrics.items() if key not in ("argv", "seconds_per_epoch")}
    return kept, history(folder), (folder / "predictions.csv").read_bytes()


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(corpus_path, tmp_path, monkeypatch):
    options = [*QUICK, "--model", "gru", "--epochs", 4, "--data", corpus_path]
    run_main(*options, "--out", tmp_path / "alone")
    steps, step = iter(range(100)), training.Run.step

    def interrupted(self, loss):
        if next(steps) == 7:  # an epoch has three steps
            raise KeyboardInterrupt
        step(self, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Run, "step", interrupted)
        run_main(*options, "--out", tmp_path / "stopped")
    run = tmp_path / "stopped" / "text_gru"
    assert len(history(run)) == 2 and not (run / "metrics.json").exists()
    run_main(*options, "--out", tmp_path / "stopped", "--resume")
    assert outcome(run) == outcome(tmp_path / "alone" / "text_gru")


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(corpus_path, tmp_path):
    code = (
        "import pathlib, sys, datasets, training, text_classify as script;"
        "datasets.DATA_DIR = pathlib.Path(sys.argv.pop(1)); training.run_script(script.main)"
    )
    options = [*QUICK, "--model", "gru", "--epochs", 120, "--patience", 0, "--data", corpus_path]
    command = [sys.executable, "-c", code, tmp_path, *options, "--resume", "--out"]
    subprocess.run([*map(str, command), tmp_path / "alone"], cwd=ROOT, check=True, capture_output=True)
    random.seed(0)
    run, killed, finished = tmp_path / "killed" / "text_gru", 0, 0
    while killed < 20:
        process = subprocess.Popen(
            [*map(str, command), tmp_path / "killed"], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for line in process.stdout:
            if b"parameters" in line:  # training begins
                break
        time.sleep(random.uniform(0, 0.4))
        if process.poll() is None:
            killed += 1
        process.kill()
        process.communicate()
        for name in ("last.pt", "best.pt"):
            assert not (run / name).exists() or training.load_checkpoint(run / name, "text")
        if (run / "metrics.json").exists():  # it was finished: from the start again
            finished += 1
            assert finished < 20
            assert outcome(run) == outcome(tmp_path / "alone" / "text_gru")
            for path in run.iterdir():
                path.unlink()
    subprocess.run([*map(str, command), tmp_path / "killed"], cwd=ROOT, check=True, capture_output=True)
    assert outcome(run) == outcome(tmp_path / "alone" / "text_gru")
    assert not list(run.glob(".*.part"))


# --- prediction ---------------------------------------------------------------------------------


def predicted(checkpoint, text, capsys, monkeypatch, stdin=b""):
    """The lines that --predict prints, split at their tabs."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    capsys.readouterr()
    run_main("--checkpoint", checkpoint, f"--predict={text}", "--device", "cpu")
    return [line.split("\t") for line in capsys.readouterr().out.split("\n")[:-1]]


def test_a_saved_model_predicts_what_it_predicted_in_its_test(finished, capsys, monkeypatch):
    for name in ("rnn", "bilstm"):
        run = finished / f"text_{name}"
        rows = read_csv(run / "predictions.csv")
        rows = [row for row in rows if "\t" not in row["text"]] * 11  # more than 256 lines, more than 64 KiB
        rows = [row | {"text": row["text"] + " " * (i % 3) * 200} for i, row in enumerate(rows)]
        text = "\n".join(row["text"] for row in rows)  # the last line does not end
        lines = predicted(run / "best.pt", "-", capsys, monkeypatch, text.encode())
        assert len(lines) == len(rows) > 256
        for (label, probability, text), row in zip(lines, rows, strict=True):
            assert (label, text) == (" ".join(row["predicted"].split()), row["text"].strip())
            assert float(probability) == pytest.approx(float(row["probability"]), abs=1.01e-4)


def test_lines_in_any_encoding_give_one_line_each(finished, capsys, monkeypatch):
    lines = [b"\xef\xbb\xbf" + "屏幕清晰".encode(), "水温很稳定".encode("gb18030"), b"", b"a\tb\x1b[31m\r",
             "😀倒\u202e".encode(), b"\xff\xff", "\x01\u3000\t第一".encode()]  # fmt: skip
    checkpoint = finished / "text_lstm" / "best.pt"
    answers = predicted(checkpoint, "-", capsys, monkeypatch, b"\n".join(lines) + b"\n")
    assert [len(answer) for answer in answers] == [3] * 7
    texts = [answer[2] for answer in answers]
    assert texts[:5] == ["屏幕清晰", "水温很稳定", "", "a b [31m", "😀倒"] and texts[6] == "第一"
    for text, same in (("屏幕清晰", 0), ("水温很稳定", 1), ("", 2)):
        assert predicted(checkpoint, text, capsys, monkeypatch) == [answers[same]]
    assert predicted(checkpoint, "-", capsys, monkeypatch) == []


def test_labels_are_cleaned_of_tabs_and_line_feeds(finished, tmp_path, capsys, monkeypatch):
    content = torch.load(finished / "text_rnn" / "best.pt", weights_only=True)
    assert "蒙\t牛\n奶" in content["labels"]
    content["labels"] = [f" 甲\t乙\n{i}\r" for i in range(10)]
    torch.save(content, tmp_path / "best.pt")
    (answer,) = predicted(tmp_path / "best.pt", "第一\t行\n第二行", capsys, monkeypatch)
    assert answer[0].startswith("甲 乙 ") and answer[2] == "第一 行 第二行" and len(answer) == 3


def test_answers_come_line_by_line_in_utf_8(finished):
    command = [ROOT / "text_classify.py", "--checkpoint", finished / "text_lstm" / "best.pt", "--predict", "-"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "gbk", "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    answers = queue.Queue()
    threading.Thread(target=lambda: [answers.put(line) for line in process.stdout], daemon=True).start()
    try:
        for text in ("屏幕清晰", "水温稳定 😀"):  # GBK has no 😀
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            assert answers.get(timeout=120).decode("utf-8").rstrip("\r\n").split("\t")[2] == text
        process.stdin.close()
        assert process.wait(timeout=60) == 0 and answers.empty()
    finally:
        process.kill()
        process.wait()
