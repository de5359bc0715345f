"""Text classification: the split, the tokens, the cache by hand; the script through its command line."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import datasets
import tokens
from text_classify import load_corpus, parse_args
from tokens import Corpus, build_vocabularies, build_vocabulary, cached_words, encode

CUTS = [["屏幕", "很", "清晰"], ["很", "好"], []]


def write_corpus(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("cat", "label", "review"), *rows])
    return path


def test_the_split_follows_the_rows_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    rows = [("ab"[i % 2], "1", f"第{i}条") for i in range(1, 41)]
    rows[6] = ("a", "1", "  ")  # row 7 is empty: it is left out, and no other row moves
    reviews = load_corpus(parse_args(["--data", str(write_corpus(tmp_path / "corpus.csv", rows))]))
    numbers = {part: (index + 1).tolist() for part, index in reviews.split.items()}
    assert numbers["validation"] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert numbers["test"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert numbers["train"] == [i for i in range(1, 41) if i % 5 not in (0, 4) and i != 7]
    assert reviews.classes == ["a", "b"] and reviews.texts[3] == "第4条" and reviews.labels[3] == 0


def test_the_vocabulary_by_hand():
    assert build_vocabulary(["b", "a", "b", "c", "a", "b"], 2) == ["<pad>", "<unk>", "b", "a"]
    assert build_vocabularies(CUTS, "word", 1) == {"word": ["<pad>", "<unk>", "很", "屏幕", "清晰", "好"]}
    known = ["<pad>", "<unk>"]
    assert build_vocabularies(CUTS, "both", 2) == {"char": [*known, "很"], "word": [*known, "很"], "pair": known}


def test_a_pair_of_characters_is_known_from_its_twentieth_time_on():
    assert build_vocabularies([["很", "好"]] * 19, "both", 2)["pair"] == ["<pad>", "<unk>"]
    assert build_vocabularies([["很", "好"]] * 20, "both", 2)["pair"] == ["<pad>", "<unk>", "很好", "好\n"]
    assert build_vocabularies([["很", "好"]] * 20, "both", 21)["pair"] == ["<pad>", "<unk>"]


def test_the_numbers_of_the_tokens_by_hand():
    vocabularies = {"char": ["<pad>", "<unk>", "屏", "很", "晰"], "word": ["<pad>", "<unk>", "很", "清晰"]}
    vocabularies["pair"] = ["<pad>", "<unk>", "好\n", "清晰", "幕很"]
    ids, counts = encode(CUTS, "both", vocabularies)
    # 屏 幕 | 很 | 清 晰 ; 很 | 好 ; the empty text is one unknown token
    assert counts.tolist() == [5, 2, 1]
    assert ids[:, 0].tolist() == [2, 1, 3, 1, 4, 3, 1, 1]
    assert ids[:, 1].tolist() == [1, 1, 2, 3, 3, 2, 1, 1]
    assert ids[:, 2].tolist() == [1, 4, 1, 3, 1, 1, 2, 1]  # 屏幕 幕很 很清 清晰 晰; 很好 好; nothing
    assert ids[:, 3].tolist() == [2, 4, 1, 2, 4, 1, 1, 1]
    assert encode([["电视机"]], "both", vocabularies)[0][:, 3].tolist() == [2, 3, 4]
    ids, counts = encode(CUTS, "word", {"word": vocabularies["word"]})
    assert ids.tolist() == [[1], [2], [3], [2], [1], [1]] and counts.tolist() == [3, 2, 1]
    ids, counts = encode(CUTS, "char", {"char": vocabularies["char"]})
    assert ids.tolist() == [[2], [1], [3], [1], [4], [3], [1], [1]] and counts.tolist() == [5, 2, 1]


def test_the_cache_gives_back_the_same_words_and_mends_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    texts = ["屏幕清晰，运行流畅", "", "😀 emoji\tand\n换行", "好" * 50]
    first = cached_words(texts, "0")
    (path,) = tmp_path.glob("words_*.npz")
    assert ["".join(words) for words in first] == texts and first[0][0] == "屏幕"
    monkeypatch.setattr(tokens, "cut_words", lambda texts: pytest.fail("the cache was not used"))
    assert cached_words(texts, "0") == first
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    for broken in (b"", b"PK\x03\x04 half a file", path.read_bytes()[:100]):
        path.write_bytes(broken)
        assert cached_words(texts, "0") == first
    cached_words(texts, "1")
    cached_words([*texts, "另一条"], "0")
    assert len(list(tmp_path.glob("words_*.npz"))) == 3


def make_corpus(counts, max_tokens=100):
    ids = np.arange(1, sum(counts) + 1, dtype=np.int32)[:, None]
    return Corpus(ids, np.array(counts), np.zeros(len(counts), np.int64), max_tokens, torch.device("cpu"))


def test_a_batch_by_hand():
    batch, lengths, _ = make_corpus([2, 1, 4], max_tokens=3).batch(torch.tensor([2, 1]))
    assert batch[:, :, 0].tolist() == [[4, 3], [5, 0], [6, 0]] and lengths.tolist() == [3, 1]


def test_every_epoch_sees_every_row_once_in_batches_of_similar_length():
    torch.manual_seed(0)
    counts = torch.randint(1, 200, (1000,)).tolist()
    corpus, rows = make_corpus(counts, 200), torch.arange(0, 1000, 2)
    plan = corpus.plan(rows, 16, shuffle=True)
    assert sorted(torch.cat(plan).tolist()) == rows.tolist() and max(map(len, plan)) == 16
    padded = sum(len(batch) * max(counts[i] for i in batch.tolist()) for batch in plan)
    assert padded < 1.25 * sum(counts[i] for i in rows.tolist())
    assert [b.tolist() for b in plan] != [b.tolist() for b in corpus.plan(rows, 16, shuffle=True)]


# --- the command line -------------------------------------------------------------------------------------------------

QUICK = ("text_classify.py", "--hidden", 8, "--embedding", 8, "--batch-size", 32, "--device", "cpu")


@pytest.fixture(scope="module")
def run_folder(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    result = script(*QUICK, "--model", "all", "--epochs", 2, "--lr", 0.02, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_script_says_what_it_does(run_folder):
    _, result = run_folder
    assert "BUNDLED SAMPLE" in result.stdout and "1200 train, 400 validation, 400 test" in result.stdout
    for name in ("RNN", "GRU", "LSTM", "Bi-LSTM"):
        assert f"{name}, test rows, epoch" in result.stdout
    assert result.stdout.count("epoch 1/2") == 4 and "Traceback" not in result.stderr


def test_the_files_of_a_run_and_what_they_hold(run_folder):
    folder, _ = run_folder
    run = folder / "text_gru"
    names = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv", "curves.png", "confusion.png"}
    assert {path.name for path in run.iterdir()} == names | {".lock"}
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    keys = "task model seed argv device torch parameters epochs best_epoch seconds_per_epoch data split test"
    assert " ".join(metrics) == keys
    assert metrics["task"] == "text" and metrics["model"] == "gru" and metrics["data"]["source"] == "sample"
    assert metrics["split"] == {"train": 1200, "validation": 400, "test": 400}
    # Test accuracy and macro-F1 counted again from predictions.csv
    with open(run / "predictions.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["row"]) for row in rows] == list(range(5, 2001, 5))
    assert metrics["test"]["accuracy"] == pytest.approx(sum(row["label"] == row["predicted"] for row in rows) / 400)
    scores = []
    for label in metrics["test"]["per_class"]:
        hits = sum(row["label"] == row["predicted"] == label for row in rows)
        total = sum(row["label"] == label for row in rows) + sum(row["predicted"] == label for row in rows)
        scores.append(2 * hits / total)
    assert metrics["test"]["f1_macro"] == pytest.approx(sum(scores) / 10)
    with open(run / "history.csv", encoding="utf-8", newline="") as stream:
        history = list(csv.DictReader(stream))
    best = max(history, key=lambda row: float(row["validation_f1_macro"]))
    assert len(history) == 2 and int(best["epoch"]) == metrics["best_epoch"]
    for name in ("curves.png", "confusion.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_the_comparison(run_folder):
    folder, _ = run_folder
    rows = json.loads((folder / "text_all" / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in rows] == ["RNN", "GRU", "LSTM", "Bi-LSTM", "mean of the four"]
    metrics = json.loads((folder / "text_lstm" / "metrics.json").read_text(encoding="utf-8"))
    assert rows[2]["accuracy"] == metrics["test"]["accuracy"] and rows[2]["parameters"] == metrics["parameters"]
    table = (folder / "text_all" / "comparison.md").read_text(encoding="utf-8")
    assert "made-up" in table and f"{rows[3]['f1_macro']:.4f}" in table
    assert (folder / "text_all" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_model_predicts_what_it_predicted_in_its_test(run_folder, script):
    folder, _ = run_folder
    with open(folder / "text_bilstm" / "predictions.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))[:40]
    texts = "\n".join(row["text"] for row in rows) + "\n"
    checkpoint = folder / "text_bilstm" / "best.pt"
    result = script("text_classify.py", "--checkpoint", checkpoint, "--predict", "-", input=texts)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert result.returncode == 0 and len(lines) == 40
    for (label, probability, text), row in zip(lines, rows, strict=True):
        assert (label, text) == (row["predicted"], row["text"])
        assert math.isclose(float(probability), float(row["probability"]), abs_tol=2e-4)
    result = script("text_classify.py", "--checkpoint", checkpoint, "--predict", "屏幕清晰，\t运行流畅")
    assert result.stdout.count("\t") == 2 and result.stdout.endswith("\t屏幕清晰， 运行流畅\n")


def test_nothing_of_the_test_rows_reaches_training(script, tmp_path):
    # Other labels and texts in the test rows: the same history to the last digit, the same best epoch.
    generator = np.random.default_rng(0)
    rows = [
        (label := "ab"[i % 3 == 0], "1", "好坏快慢"[2 * (label == "a") + generator.integers(2)] * 3) for i in range(300)
    ]
    changed = [("b", "1", "别的") if i % 5 == 0 else row for i, row in enumerate(rows, 1)]
    histories = []
    for name, table in (("one", rows), ("two", changed)):
        data = write_corpus(tmp_path / f"{name}.csv", table)
        result = script(*QUICK, "--model", "rnn", "--epochs", 2, "--data", data, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        with open(tmp_path / name / "text_rnn" / "history.csv", newline="") as stream:
            histories.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)])
        weights = torch.load(tmp_path / name / "text_rnn" / "best.pt", weights_only=True)
        assert "别" not in weights["vocabularies"]["char"]
    assert histories[0] == histories[1]
