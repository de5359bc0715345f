"""Text classification: split, words, tokens, batches and scores by hand; the script itself."""

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
from conftest import ROOT, history, outcome, read_json
from torch import nn

import datasets
import plots
import samples
import text_classify as script
import training
from rnn_models import CELLS, TextClassifier

CPU, KNOWN = torch.device("cpu"), ["<pad>", "<unk>"]
CUTS = [["屏幕", "很", "清晰"], ["很", "好"], []]
QUICK = ["--hidden", 4, "--embedding", 4, "--batch-size", 32, "--epochs", 1, "--device", "cpu"]
QUICK += ["--model"]
FOUR = ["rnn", "gru", "lstm", "bilstm"]
NAMES = ["RNN", "GRU", "LSTM", "Bi-LSTM"]


def run_main(*arguments, pictures=()):
    """Call main() with these command line arguments; pictures: the folders that get theirs."""

    def drawn(draw):
        return lambda path, *rest: draw(path, *rest) if path.parent.name in pictures else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["text_classify.py", *map(str, arguments)])
        for name in ("draw_curves", "draw_confusion", "draw_gradients"):
            patch.setattr(plots, name, drawn(getattr(plots, name)))
        script.main()


def write_corpus(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("cat", "label", "review"), *rows])
    return path


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    """150 made-up reviews; one of the ten labels holds a tab and a line feed, its texts tabs."""
    frame = samples.reviews(150).replace({"cat": {"蒙牛": "蒙\t牛\n奶"}})
    milk = frame["cat"] == "蒙\t牛\n奶"
    frame.loc[milk, "review"] = frame.loc[milk, "review"].str.replace("，", "\t")
    path = tmp_path_factory.mktemp("corpus") / "reviews.csv"
    frame.to_csv(path, index=False)
    return path


# --- reviews ------------------------------------------------------------------------------------


def test_the_split_follows_the_rows_of_the_file(tmp_path, capsys):
    rows = [("ab"[i % 2], "1", f" 第{i}条 ") for i in range(1, 41)]
    rows[6], rows[7] = ("a", "1", " \t "), (" ", "1", "好")  # 7 has no text, 8 no label: left out
    rows[0], rows[39] = (" b ", "1", "\ufeff第一条"), ("a", "1", "NA")
    path = write_corpus(tmp_path / "corpus.csv", rows)
    reviews = script.read_reviews(script.parse_args(["--data", str(path)]))
    numbers = {part: (index + 1).tolist() for part, index in reviews.split.items()}
    assert numbers["validation"] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert numbers["test"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert numbers["train"] == [i for i in range(1, 41) if i % 5 in (1, 2, 3) and i not in (7, 8)]
    assert reviews.classes == ["a", "b"] and reviews.labels[:4].tolist() == [1, 0, 1, 0]
    assert [reviews.texts[i] for i in (0, 1, 39)] == ["第一条", "第2条", "NA"]
    output = capsys.readouterr().out
    assert "40 rows (22 train, 8 validation, 8 test; 2 empty left out), 2 classes" in output


@pytest.mark.parametrize("part", ["validation", "test"])
def test_vocabulary_and_training_read_no_other_rows(part, tmp_path):
    draw = random.Random(0)
    words = {"a": "好坏", "b": "快慢"}
    rows = [(label, "1", 3 * draw.choice(words[label])) for label in "aab" * 20]
    own = {"validation": 4, "test": 0}[part]
    changed = [("b", "1", "别的词") if i % 5 == own else row for i, row in enumerate(rows, 1)]
    histories, vocabularies = [], []
    for name, table in (("one", rows), ("two", changed)):
        data = write_corpus(tmp_path / f"{name}.csv", table)
        run_main(*QUICK, "rnn", "--data", data, "--out", tmp_path / name, "--epochs", 2)
        run = tmp_path / name / "text_rnn"
        histories.append(history(run)[["train_loss", "train_accuracy"]] if own else history(run))
        vocabularies.append(torch.load(run / "best.pt", weights_only=True)["vocabularies"])
    assert histories[0].equals(histories[1])
    assert vocabularies[0] == vocabularies[1] and "别" not in vocabularies[0]["char"]


# --- words and tokens ---------------------------------------------------------------------------


def test_words_are_read_from_the_cache_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    texts = ["屏幕清晰，运行流畅", "", "😀 emoji\tand\n换行\r\n", "好" * 50, ""]
    cuts = script.cut_words(texts)
    assert cuts[0][:2] == ["屏幕", "清晰"] and ["".join(cut) for cut in cuts] == texts
    assert script.cached_words(texts, "0") == cuts and len(list(tmp_path.iterdir())) == 1
    script.cached_words([*texts, "x"], "0")
    script.cached_words(texts, "1")
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(script, "cut_words", lambda texts: pytest.fail("not from the cache"))
    assert script.cached_words(texts, "0") == cuts


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[: len(content) // 2], lambda content: b"\xff\x00",
    lambda content: content.replace("屏".encode(), "瓶".encode()),
    lambda content: content + b"\x1e", lambda content: content.replace(b"\x1e", b"\x1f", 1),
])  # fmt: skip
def test_a_damaged_cache_is_cut_again(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    texts = ["屏幕清晰，运行流畅", "好", "很好"]
    cuts = script.cached_words(texts, "0")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert script.cached_words(texts, "0") == cuts and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "file" / "data")
    assert script.cached_words(["屏幕很好"], "0") == script.cut_words(["屏幕很好"])


def test_vocabularies_by_hand():
    build = script.build_vocabularies
    assert build(CUTS, "word", 1) == {"word": [*KNOWN, "很", "屏幕", "清晰", "好"]}
    assert build(CUTS, "char", 1) == {"char": [*KNOWN, *"很屏幕清晰好"]}
    assert build([*CUTS, ["屏幕", "很"]], "word", 2) == {"word": [*KNOWN, "很", "屏幕"]}
    both = build(CUTS, "both", 2)
    assert both.pop("place") == ["<pad>", "alone", "first", "inside", "last"]
    assert both == {"char": [*KNOWN, "很"], "word": [*KNOWN, "很"], "pair": KNOWN}
    found = [build([["很", "好"]] * n, "both", m)["pair"] for n, m in ((19, 2), (20, 2), (20, 21))]
    assert found == [KNOWN, [*KNOWN, "很好", "好\n"], KNOWN]  # pairs count from 20 times on


def test_the_numbers_of_the_tokens_by_hand():
    vocabularies = {"char": [*KNOWN, "屏", "很", "晰"], "word": [*KNOWN, "很", "清晰"],
                    "pair": [*KNOWN, "好\n", "清晰", "幕很"], "place": ["<pad>"] * 5}  # fmt: skip
    ids, counts = script.encode(CUTS, vocabularies)
    # 屏 幕 | 很 | 清 晰 ; 很 | 好 ; the empty text is one unknown token
    assert counts.tolist() == [5, 2, 1] and ids.dtype == np.int32
    assert ids[:, 0].tolist() == [2, 1, 3, 1, 4, 3, 1, 1]
    assert ids[:, 1].tolist() == [1, 1, 2, 3, 3, 2, 1, 1]
    # 屏幕 幕很 很清 清晰 晰 ; 很好 好 ; nothing
    assert ids[:, 2].tolist() == [1, 4, 1, 3, 1, 1, 2, 1]
    assert ids[:, 3].tolist() == [2, 4, 1, 2, 4, 1, 1, 1]
    places = script.encode([["电视机", "遥控器盒"]], vocabularies)[0][:, 3]
    assert places.tolist() == [2, 3, 4, 2, 3, 3, 4]
    ids, counts = script.encode(CUTS, {"word": vocabularies["word"]})
    assert ids.tolist() == [[1], [2], [3], [2], [1], [1]] and counts.tolist() == [3, 2, 1]
    ids, counts = script.encode(CUTS, {"char": vocabularies["char"]})
    assert ids[:, 0].tolist() == [2, 1, 3, 1, 4, 3, 1, 1] and counts.tolist() == [5, 2, 1]


# --- batches ------------------------------------------------------------------------------------


def make_corpus(counts, max_tokens=1000):
    """Texts of these lengths; tokens are numbered through, negative in the second aspect."""
    ids = np.arange(1, sum(counts) + 1, dtype=np.int32)[:, None] * [1, -1]
    labels = 10 * np.arange(len(counts))
    return script.Corpus(ids.astype(np.int32), np.array(counts), labels, max_tokens, CPU)


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
    corpus, rows = make_corpus(counts), torch.arange(0, 800, 2)  # 400 rows: four pools

    def plan(seed):
        torch.manual_seed(seed)
        return [tuple(batch.tolist()) for batch in corpus.shuffled(rows, 2)]

    batches = plan(1)
    assert sorted(row for batch in batches for row in batch) == rows.tolist()
    assert np.mean([abs(counts[a] - counts[b]) for a, b in batches]) < 16  # 267 without sorting
    assert plan(1) == batches and set(map(frozenset, plan(2))) != set(map(frozenset, batches))
    order = np.corrcoef([counts[a] for a, _ in batches[:50]], range(50))[0, 1]
    assert abs(order) < 0.5  # the lengths of the batches do not rise


# --- scores -------------------------------------------------------------------------------------


class ByFirstToken(nn.Module):
    """A model whose class probabilities are looked up by a text's first token."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.as_tensor(table)

    def forward(self, tokens, lengths):
        assert not self.training and not torch.is_grad_enabled()
        return self.table[tokens[0, :, 0].long()].log() + 3  # softmax takes the 3 away again


@pytest.mark.parametrize("batch_size", [2, 100])
def test_probabilities_come_in_the_order_of_the_rows(batch_size):
    corpus = make_corpus([3, 9, 1, 4, 2, 8])  # first tokens 1, 4, 13, 14, 18, 20
    table = (torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) + 0.1).softmax(1)
    rows = torch.tensor([5, 0, 3, 1, 4])
    p = script.probabilities(ByFirstToken(table).train(), corpus, rows, batch_size)
    assert torch.allclose(p, table[[20, 1, 14, 4, 18]])


def test_scores_of_some_rows_by_hand():
    table = [[0.0] * 3, [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.0, 1.0, 0.0]]
    reviews = script.Reviews([""] * 4, np.array([0, 1, 1, 0]), ["a", "b", "c"], {}, {})
    model, corpus = ByFirstToken(table), make_corpus([1] * 4)
    loss, share, f1 = script.score(model, corpus, reviews, torch.arange(3))
    assert loss == pytest.approx(np.log([2, 4, 2]).mean()) and share == pytest.approx(2 / 3)
    # a: predicted twice, once right, F1 2/3. b: predicted once, right, one of two, F1 2/3. c: 0.
    assert f1 == pytest.approx(4 / 9)
    loss, share, f1 = script.score(model, corpus, reviews, torch.tensor([3]))
    assert np.isfinite(loss) and loss > 20 and share == 0 == f1  # probability 0 of the truth


def test_test_scores_by_hand():
    labels, split = np.array([2, 0, 0, 2, 1, 1, 0]), {"test": torch.tensor([1, 2, 4, 5, 6])}
    reviews = script.Reviews([], labels, ["a", "b", "c"], split, {})  # the truth is 0 0 1 1 0
    matrix, scores = script.test_scores(reviews, torch.eye(3)[[0, 1, 1, 1, 0]])
    assert matrix.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    names = ("precision", "recall", "f1", "support")
    classes = {"a": (1, 2 / 3, 4 / 5, 3), "b": (2 / 3, 1, 4 / 5, 2), "c": (0, 0, 0, 0)}
    for label, values in classes.items():
        found = scores["per_class"].pop(label)
        assert found == pytest.approx(dict(zip(names, values, strict=True)))
    assert scores.pop("per_class") == {} and scores == pytest.approx({
        "accuracy": 4 / 5, "precision_macro": 5 / 9, "recall_macro": 5 / 9, "f1_macro": 8 / 15,
        "precision_weighted": 13 / 15, "recall_weighted": 4 / 5, "f1_weighted": 4 / 5,
    })  # fmt: skip


# --- how far the gradient reaches ---------------------------------------------------------------


def long_texts(counts):
    ids = np.random.default_rng(0).integers(2, 12, (sum(counts), 1), np.int32)
    return script.Corpus(ids, np.array(counts), np.arange(len(counts)) % 3, 200, CPU)


def test_the_gradient_of_a_decaying_recurrence_halves_at_every_token():
    torch.manual_seed(0)
    model = TextClassifier("rnn", [12], 5, 4, 3, "last", 0.5)
    with torch.no_grad():
        model.recurrence.W_hh.copy_(0.5 * torch.eye(4))
        model.embeddings[0].weight.mul_(1e-3)  # tanh is nearly its argument
    reach = script.gradient_reach(model, long_texts([40, 43, 60, 3, 39]), torch.arange(5))
    assert reach == pytest.approx([0.5**d for d in range(40)], rel=1e-4)


def test_a_reach_of_nothing_is_still_a_row_of_numbers():
    # The maxima stand at the first token of the only text, so no gradient arrives at its end.
    model = TextClassifier("rnn", [4], 3, 3, 3, "max")
    with torch.no_grad():
        model.recurrence.W_hh.copy_(0.5 * torch.eye(3))
        model.recurrence.W_xh.copy_(torch.eye(3))
        model.embeddings[0].weight.copy_(torch.tensor([0.0, 0, 1, 0])[:, None])
    ids = np.array([[2]] + [[3]] * 44, np.int32)
    corpus = script.Corpus(ids, np.array([45]), np.array([0]), 200, CPU)
    json.dumps(script.gradient_reach(model, corpus, torch.tensor([0])), allow_nan=False)


REACHES = [("lstm", "max"), ("gru", "mean"), ("bi_lstm", "max"), ("bi_lstm", "last")]


@pytest.mark.parametrize(("cell", "pool"), REACHES)
def test_the_reach_is_the_mean_gradient_of_single_texts(cell, pool):
    torch.manual_seed(2)
    h, corpus, total = 4, long_texts([44, 3, 52, 47, 40]), torch.zeros(40)
    model = TextClassifier(cell, [12], 5, h, 3, pool, 0.5)
    *params, W_hq, b_q = [param.detach() for param in model.recurrence.params]
    params = [[*part, torch.eye(h), torch.zeros(h)] for part in (params[:12], params[12:])]
    one = CELLS["lstm" if cell == "bi_lstm" else cell]
    for row in (0, 3, 4):
        tokens, _, label = corpus.batch(torch.tensor([row]))
        inputs = model.embeddings[0](tokens[:, :, 0]).detach()
        nudges = [torch.zeros(1, h, requires_grad=True) for _ in inputs]  # dL/dnudge_t = dL/dH_t
        state, states = (torch.zeros(1, h),) * (1 if cell == "gru" else 2), []
        for X, nudge in zip(inputs, nudges, strict=True):
            _, (H, *rest) = one(X[None], state, params[0])
            state = (H + nudge, *rest)
            states.append(state[0])
        H = torch.cat(states)
        pooled = {"max": H.amax(0), "mean": H.mean(0), "last": H[-1]}[pool]
        if cell == "bi_lstm":
            H_b = one(inputs.flip(0), (torch.zeros(1, h),) * 2, params[1])[0][:, 0]
            pooled = torch.cat([pooled, H_b.amax(0) if pool == "max" else H_b[-1]])
        loss = -(pooled @ W_hq + b_q).log_softmax(0)[label[0]]
        norms = torch.stack([grad.norm() for grad in torch.autograd.grad(loss, nudges)])
        total += norms.flip(0)[:40]
    by_length = corpus.by_length
    corpus.by_length = lambda rows, batch_size: by_length(rows, 2)  # a batch of two and one of one
    reach = script.gradient_reach(model, corpus, torch.tensor([4, 1, 3, 0]))
    assert torch.allclose(torch.tensor(reach), total / total[0], rtol=1e-4)


# --- the script ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(corpus_path, tmp_path_factory):
    """The folder of --model all."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--epochs", 2, "--pool", "mean", "--lr", 0.02, "--seed", 3, "--average", 0.99]
    options += ["--batch-size", 8, "--data", corpus_path, "--out", folder]
    run_main(*QUICK, "all", *options, pictures=("text_gru", "text_all"))
    return folder


def test_the_files_of_a_run_and_the_format_of_its_metrics(finished, corpus_path):
    run = finished / "text_gru"
    files = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv"}
    assert {path.name for path in run.iterdir()} == files | {"curves.png", "confusion.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.glob("*.png"))
    metrics, names = read_json(run / "metrics.json"), ("precision", "recall", "f1")
    values = {"task": "text", "model": "gru", "seed": 3, "device": "cpu", "epochs": 2}
    assert metrics == metrics | values | {"torch": torch.__version__}
    assert list(metrics) == [
        "task", "model", "seed", "argv", "device", "torch", "parameters", "epochs", "best_epoch",
        "seconds_per_epoch", "data", "split", "test",
    ]  # fmt: skip
    assert metrics["argv"][:3] == ["--hidden", "4", "--embedding"]
    assert metrics["seconds_per_epoch"] > 0 and len(metrics["data"].pop("sha256")) == 64
    assert metrics["data"] == {"path": str(corpus_path), "source": "file", "rows": 150}
    assert metrics["split"] == {"train": 90, "validation": 30, "test": 30}
    averages = [f"{name}_{kind}" for kind in ("macro", "weighted") for name in names]
    assert list(metrics["test"]) == ["accuracy", *averages, "per_class"]
    classes = metrics["test"]["per_class"].values()
    assert all(list(entry) == [*names, "support"] for entry in classes)
    assert sum(entry["support"] for entry in classes) == 30
    weights = torch.load(run / "best.pt", weights_only=True)["weights"]
    assert metrics["parameters"] == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("name", ["rnn", "bilstm"])
def test_the_metrics_can_be_counted_again_from_the_predictions(name, finished, corpus_path):
    run, table = finished / f"text_{name}", read_csv(corpus_path)
    metrics, rows = read_json(run / "metrics.json"), read_csv(run / "predictions.csv")
    assert [int(row["row"]) for row in rows] == list(range(5, 151, 5))
    for row, source in zip(rows, table[4::5], strict=True):
        assert (row["label"], row["text"]) == (source["cat"], source["review"].strip())
        assert 0.1 <= float(row["probability"]) <= 1
    hits = sum(row["label"] == row["predicted"] for row in rows)
    assert metrics["test"]["accuracy"] == pytest.approx(hits / 30)
    for label, entry in metrics["test"]["per_class"].items():
        right = sum(row["label"] == row["predicted"] == label for row in rows)
        both = sum((row["label"] == label) + (row["predicted"] == label) for row in rows)
        assert entry["f1"] == pytest.approx(2 * right / both if both else 0)
    f1 = history(run)["validation_f1_macro"]
    assert len(f1) == 2 and metrics["best_epoch"] == f1.argmax() + 1


def test_the_history_scores_the_weights_that_are_kept(finished, corpus_path):
    saved = torch.load(finished / "text_gru" / "best.pt", weights_only=True)
    model = script.build_model(saved["options"], saved["vocabularies"], 10).eval()
    model.load_state_dict(saved["weights"])
    epoch = history(finished / "text_gru").iloc[saved["epoch"] - 1]
    losses, hits = {"train": [], "validation": []}, {"train": [], "validation": []}
    for i, row in enumerate(read_csv(corpus_path), 1):
        ids, _ = script.encode(script.cut_words([row["review"].strip()]), saved["vocabularies"])
        tokens = torch.from_numpy(ids[: saved["options"]["max_tokens"], None])
        p = model(tokens, torch.tensor([len(tokens)]))[0].softmax(0)
        part = {0: "test", 4: "validation"}.get(i % 5, "train")
        if part != "test":
            truth = saved["labels"].index(row["cat"])
            losses[part].append(-p[truth].log().item())
            hits[part].append(int(p.argmax()) == truth)
    for part in losses:
        assert epoch[f"{part}_loss"] == pytest.approx(np.mean(losses[part]), rel=1e-4)
        assert epoch[f"{part}_accuracy"] == pytest.approx(np.mean(hits[part]))


def test_the_comparison_shows_the_four_runs(finished):
    folder = finished / "text_all"
    files = {"comparison.md", "comparison.json", "comparison.png", "gradients.png"}
    assert {path.name for path in folder.iterdir()} == files
    content = read_json(folder / "comparison.json")
    assert [row["model"] for row in content["rows"]] == [*NAMES, "mean of the four"]
    assert list(content["gradient_reach"]) == NAMES
    assert all(len(x) == 40 and x[0] == 1 for x in content["gradient_reach"].values())
    lines = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.startswith("|")][2:6]
    scores = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
    counts = ("parameters", "seconds_per_epoch", "best_epoch")
    for name, row, line in zip(FOUR, content["rows"][:4], lines, strict=True):
        metrics = read_json(finished / f"text_{name}" / "metrics.json")
        assert [row[key] for key in scores] == [metrics["test"][key] for key in scores]
        assert [row[key] for key in counts] == [metrics[key] for key in counts]
        first, *cells = line.replace(",", "").strip("| ").split(" | ")
        assert first == row["model"]
        assert list(map(float, cells[:4])) == pytest.approx([row[key] for key in scores], abs=6e-4)


def test_the_mean_of_the_four_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_curves", lambda *arguments: None)
    monkeypatch.setattr(plots, "draw_gradients", lambda *arguments: None)
    split, data = {"test": torch.tensor([0, 1])}, {"source": "sample"}
    reviews = script.Reviews([], np.array([0, 1, 0]), ["a", "b"], split, data)
    wrong, right = torch.tensor([[0.4, 0.6], [0.6, 0.4]]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    metrics = {"test": dict.fromkeys(script.SCORES, 0.25), "parameters": 1000, "best_epoch": 4}
    metrics["seconds_per_epoch"] = 1.5
    rises = [{"validation_f1_macro": x, "validation_loss": 1} for x in (0.5, 0.94, 0.95, 1, 0.99)]
    results = {
        name: {"metrics": metrics, "history": rises, "probabilities": p}
        for name, p in zip(FOUR, (wrong, wrong, right, wrong), strict=True)
    }
    args = SimpleNamespace(out=tmp_path, seed=0, pool="max")
    script.compare(args, reviews, results, {name: [1.0, 0.5] for name in results})
    *rows, mean = read_json(tmp_path / "text_all" / "comparison.json")["rows"]
    # The mean is (0.525, 0.475) and (0.475, 0.525): right, though three of four are wrong.
    assert mean["accuracy"] == mean["f1_macro"] == 1 and mean["parameters"] == 4000
    assert [row["epochs_to_95_percent"] for row in rows] == [3] * 4
    table = (tmp_path / "text_all" / "comparison.md").read_text(encoding="utf-8")
    assert "made-up data" in table
    assert "| GRU | 0.25" in table and "| mean of the four | 1.0" in table


def test_texts_too_short_for_the_reach_cost_no_comparison(tmp_path):
    rows = [("ab"[i % 2], "1", "好坏"[i % 2] * 5) for i in range(60)]
    data = write_corpus(tmp_path / "short.csv", rows)
    run_main(*QUICK, "all", "--data", data, "--out", tmp_path / "runs")
    assert len(read_json(tmp_path / "runs" / "text_all" / "comparison.json")["rows"]) == 5


@pytest.mark.parametrize("kind", ["both", "word", "char"])
def test_word_dropout_hides_words_from_training_and_nothing_else(
    kind, corpus_path, tmp_path, monkeypatch
):
    seen = {True: [], False: []}

    class Recorder(TextClassifier):
        def forward(self, tokens, lengths):
            text = torch.arange(len(tokens))[:, None] < lengths
            seen[self.training].append(tokens[text])  # (tokens, aspects), without padding
            return super().forward(tokens, lengths)

    monkeypatch.setattr(script, "TextClassifier", Recorder)
    options = ["--tokens", kind, "--word-dropout", 0.3, "--max-tokens", 10_000]
    run_main(*QUICK, "rnn", *options, "--data", corpus_path, "--out", tmp_path)
    reviews = script.read_reviews(script.parse_args(["--data", str(corpus_path)]))
    cuts = script.cut_words([reviews.texts[i] for i in reviews.split["train"]])
    vocabularies = script.build_vocabularies(cuts, kind, 2)
    truth = torch.from_numpy(script.encode(cuts, vocabularies)[0])
    scored = torch.cat(seen[False])[: len(truth)]  # the training rows come first: all words
    for column, name in enumerate(vocabularies):
        parts = truth, torch.cat(seen[True]), scored
        before, shown, later = (tokens[:, column].bincount() for tokens in parts)
        assert before.equal(later)
        hidden = 1 - shown[2:].sum() / before[2:].sum()
        assert float(hidden) == pytest.approx(0.3 * (name == "word"), abs=0.05 * (name == "word"))
        assert shown.sum() == before.sum() and shown[0] == 0


@pytest.mark.parametrize("model", FOUR)
def test_plain_and_fast_loops_give_the_same_epoch(model, tmp_path):
    draw = random.Random(1)
    rows = [("ab"[i % 2], "1", "".join(draw.choices("好坏快慢"[i % 2 :], k=8))) for i in range(60)]
    options = ["--data", write_corpus(tmp_path / "corpus.csv", rows), "--dropout", 0, "--lr", 0.01]
    for loops in ("plain", "fast"):
        out = ["--loops", loops, "--out", tmp_path / loops]
        run_main(*QUICK, model, *options, "--batch-size", 8, *out)
    plain, fast = (history(tmp_path / loops / f"text_{model}") for loops in ("plain", "fast"))
    assert len(plain) == 1 and np.allclose(plain, fast, rtol=0, atol=1e-4)


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(corpus_path, tmp_path, monkeypatch):
    options = [*QUICK, "gru", "--epochs", 4, "--data", corpus_path, "--out"]
    run_main(*options, tmp_path / "alone")
    steps, step = iter(range(100)), training.Run.step

    def interrupted(self, loss):
        if next(steps) == 7:  # an epoch has three steps
            raise KeyboardInterrupt
        step(self, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Run, "step", interrupted)
        run_main(*options, tmp_path / "stopped")
    run = tmp_path / "stopped" / "text_gru"
    assert len(history(run)) == 2 and not (run / "metrics.json").exists()
    run_main(*options, tmp_path / "stopped", "--resume")
    assert outcome(run) == outcome(tmp_path / "alone" / "text_gru")


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(corpus_path, tmp_path):
    code = "import pathlib, sys, datasets, training, text_classify as script;"
    code += "datasets.DATA_DIR = pathlib.Path(sys.argv.pop(1)); training.run_script(script.main)"
    options = [*QUICK, "gru", "--epochs", 120, "--patience", 0, "--data", corpus_path, "--resume"]
    command = [sys.executable, "-c", code, *map(str, (tmp_path, *options)), "--out"]
    quiet = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, tmp_path / "alone"], check=True, **quiet)
    expected, run = outcome(tmp_path / "alone" / "text_gru"), tmp_path / "killed" / "text_gru"
    random.seed(0)
    for _ in range(20):
        process = subprocess.Popen([*command, tmp_path / "killed"], **quiet)
        for line in process.stdout:
            if b"parameters" in line:  # training begins
                break
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.communicate()
        for path in (*run.glob("last.pt"), *run.glob("best.pt")):
            assert training.load_checkpoint(path, "text")
        if (run / "metrics.json").exists():  # it was finished: from the start again
            assert outcome(run) == expected
            (run / "last.pt").unlink()
    subprocess.run([*command, tmp_path / "killed"], check=True, **quiet)
    assert outcome(run) == expected and not list(run.glob(".*.part"))


# --- prediction ---------------------------------------------------------------------------------


@pytest.fixture
def predict(capsys, monkeypatch):
    """predict(checkpoint, text, stdin): the lines that --predict prints, split at their tabs."""

    def run(checkpoint, text, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        run_main("--checkpoint", checkpoint, f"--predict={text}", "--device", "cpu")
        return [line.split("\t") for line in capsys.readouterr().out.split("\n")[:-1]]

    return run


@pytest.mark.parametrize("name", ["rnn", "bilstm"])
def test_a_saved_model_predicts_what_it_predicted_in_its_test(name, finished, predict):
    run = finished / f"text_{name}"
    rows = [row for row in read_csv(run / "predictions.csv") if "\t" not in row["text"]] * 11
    text = "\n".join(row["text"] + " " * (i % 3) * 200 for i, row in enumerate(rows))
    answers = predict(run / "best.pt", "-", text.encode())  # the last line does not end
    assert len(answers) == len(rows) > 256 and len(text.encode()) > 65536
    for (label, share, text), row in zip(answers, rows, strict=True):
        assert (label, text) == (" ".join(row["predicted"].split()), row["text"])
        assert float(share) == pytest.approx(float(row["probability"]), abs=1.01e-4)


def test_lines_in_any_encoding_give_one_line_each(finished, predict):
    lines = ["\ufeff屏幕清晰".encode(), "水温很稳定".encode("gb18030"), b"", b"a\tb\x1b[31m\r"]
    lines += ["😀倒\u202e".encode(), "\x01\u3000\t第一".encode(), b"\xff\xff"]
    checkpoint = finished / "text_lstm" / "best.pt"
    answers = predict(checkpoint, "-", b"\n".join(lines) + b"\n")
    assert [len(answer) for answer in answers] == [3] * 7
    texts = ["屏幕清晰", "水温很稳定", "", "a b [31m", "😀倒", "第一"]
    assert [answer[2] for answer in answers[:6]] == texts
    assert [predict(checkpoint, text) for text in texts[:3]] == [[answer] for answer in answers[:3]]
    assert predict(checkpoint, "-") == []


def test_labels_and_texts_are_cleaned_of_tabs_and_line_feeds(finished, tmp_path, predict):
    content = torch.load(finished / "text_rnn" / "best.pt", weights_only=True)
    assert "蒙\t牛\n奶" in content["labels"]
    content["labels"] = [f" 甲\t乙\n{i}\r" for i in range(10)]
    torch.save(content, tmp_path / "best.pt")
    ((label, _, text),) = predict(tmp_path / "best.pt", "第一\t行\n第二行")
    assert label.startswith("甲 乙 ") and text == "第一 行 第二行"


def test_answers_come_line_by_line_in_utf_8(finished):
    options = ["--checkpoint", finished / "text_lstm" / "best.pt", "--predict", "-"]
    process = subprocess.Popen(
        [sys.executable, *map(str, (ROOT / "text_classify.py", *options))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONIOENCODING": "gbk"},
    )  # fmt: skip
    answers = queue.Queue()
    read = threading.Thread(target=lambda: [*map(answers.put, process.stdout)], daemon=True)
    read.start()
    try:
        for text in ("屏幕清晰", "水温稳定 😀"):  # GBK has no 😀
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            assert answers.get(timeout=120).decode("utf-8").rstrip().split("\t")[2] == text
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
