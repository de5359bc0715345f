"""Text classification: split, words, tokens, batches and scores by hand; the script itself."""

import contextlib
import dataclasses
import io
import sys
from collections import Counter

import conftest
import datasets
import numpy as np
import pandas as pd
import pytest
import samples
import torch
from conftest import NAMES, history, read_json, run_main
from torch import nn

import text_classify as script
from rnn_models import TextClassifier, lstm

CUTS = [["屏幕", "很", "清晰度"], ["很", "好"], []]
QUICK = ["--hidden", 4, "--embedding", 4, "--batch-size", 32, "--device", "cpu", "--epochs"]


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "reviews.csv"
    samples.reviews(150).to_csv(path, index=False)
    return path


def test_the_split_follows_the_rows_of_the_file(tmp_path, capsys):
    rows = [("ab"[i % 2], f" 第{i}条 ") for i in range(1, 26)]
    rows[6], rows[7] = ("a", " \t "), (" ", "好")  # row 7 has no text, 8 no label: left out
    rows[0], rows[24] = (" b ", "\ufeff第一条"), ("a", "NA")
    path = tmp_path / "corpus.csv"
    pd.DataFrame(rows, columns=["cat", "review"]).to_csv(path, index=False)
    reviews = script.read_reviews(script.parse_args(["--data", str(path)]))
    train, validation, test = [(index + 1).tolist() for index in reviews.split.values()]
    assert validation == [4, 9, 14, 19, 24] and test == [5, 10, 15, 20, 25]
    assert train == [1, 2, 3, 6, 11, 12, 13, 16, 17, 18, 21, 22, 23]
    assert reviews.classes == ["a", "b"] and reviews.labels[:4].tolist() == [1, 0, 1, 0]
    assert [reviews.texts[i] for i in (0, 1, 24)] == ["第一条", "第2条", "NA"]
    assert "13 train, 5 validation, 5 test; 2 empty left out" in capsys.readouterr().out


def test_words_are_cut_once_and_again_if_the_cache_is_unfit(tmp_path, monkeypatch):
    folder, texts = tmp_path / "data", ["屏幕清晰，运行流畅", "", "😀 emoji\tand\n换行\r\n", ""]
    monkeypatch.setattr(datasets, "DATA_DIR", folder)
    folder.write_text("a file where a folder should be")
    cuts = script.cached_words(texts, "0")
    assert cuts[0][:2] == ["屏幕", "清晰"] and ["".join(cut) for cut in cuts] == texts
    folder.unlink()
    script.cached_words(texts, "0")
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (b"\xff\x00", whole.replace("屏".encode(), "瓶".encode())):
        path.write_bytes(damaged)
        assert script.cached_words(texts, "0") == cuts and path.read_bytes() == whole
    script.cached_words(texts[:1], "1")  # of another file
    monkeypatch.setattr(script, "cut_words", lambda texts: pytest.fail("not from the cache"))
    assert script.cached_words(texts, "0") == cuts


def numbers(texts):
    """Characters and pairs of characters as `tokenize` writes them."""
    return [ord(text) if len(text) == 1 else ord(text[0]) << 32 | ord(text[1]) for text in texts]


def test_vocabularies_by_hand():
    def build(cuts, kind, min_freq):
        return script.build_vocabularies(script.tokenize(cuts, kind)[0], min_freq)

    assert build(CUTS[:2], "word", 1) == {"word": ["很", "屏幕", "清晰度", "好"]}
    both = {"char": numbers("很"), "word": ["很"], "pair": [], "place": [2, 3, 4]}
    assert build(CUTS[:2], "both", 2) == both
    for times, least, found in ((19, 2, []), (20, 2, ["很好", "好\n"]), (20, 21, [])):
        assert build([["很", "好"]] * times, "both", least)["pair"] == numbers(found)


def test_the_numbers_of_the_tokens_by_hand():
    vocabularies = {"char": numbers("屏很晰"), "word": ["很", "清晰度"],
                    "pair": numbers(["好\n", "清晰", "幕很"]), "place": [2, 3, 4]}  # fmt: skip
    tokens, counts = script.tokenize(CUTS, "both")
    ids = script.encode(tokens, vocabularies)
    assert counts.tolist() == [6, 2, 1] and ids.dtype == np.int32
    assert ids.T.tolist() == [  # 屏 幕 很 清 晰 度, 很 好, and one unknown for the empty text
        [2, 1, 3, 1, 4, 1, 3, 1, 1],
        [1, 1, 2, 3, 3, 3, 2, 1, 1],
        [1, 4, 1, 3, 1, 1, 1, 2, 1],
        [2, 4, 1, 2, 3, 4, 1, 1, 1],
    ]
    tokens, counts = script.tokenize(CUTS, "word")
    ids = script.encode(tokens, {"word": vocabularies["word"]})
    assert ids.tolist() == [[1], [2], [3], [2], [1], [1]] and counts.tolist() == [3, 2, 1]


def make_corpus(counts, max_tokens=1000):
    """Texts of these lengths; tokens are numbered through, negative in the second aspect."""
    ids = (np.arange(1, sum(counts) + 1)[:, None] * [1, -1]).astype(np.int32)
    labels = 10 * np.arange(len(counts))
    return script.Corpus(ids, np.array(counts), labels, max_tokens, torch.device("cpu"))


def test_a_batch_by_hand():
    tokens, lengths, labels = make_corpus([2, 1, 4], max_tokens=3).batch(torch.tensor([2, 1]))
    assert tokens[:, :, 0].tolist() == [[4, 3], [5, 0], [6, 0]]  # the fourth token is cut off
    assert tokens[:, :, 1].tolist() == [[-4, -3], [-5, 0], [-6, 0]]
    assert lengths.tolist() == [3, 1] and labels.tolist() == [20, 10]
    tokens, _, _ = make_corpus([4, 1], max_tokens=3).batch(torch.tensor([1, 0]))
    assert tokens[:, :, 0].tolist() == [[5, 1], [0, 2], [0, 3]]  # what is cut off is skipped


def test_every_epoch_sees_every_row_once_in_batches_of_similar_length():
    torch.manual_seed(0)
    corpus, rows = make_corpus((torch.randperm(800) + 1).tolist()), torch.arange(0, 800, 2)
    batches, others = [torch.stack(corpus.shuffled(rows, 2)) for _ in range(2)]  # of four pools
    assert batches.flatten().sort().values.equal(rows)
    assert set(map(tuple, batches.tolist())) != set(map(tuple, others.tolist()))
    a, b = corpus.lengths[batches].T.numpy()
    assert np.abs(a - b).mean() < 16  # 267 without sorting
    assert abs(np.corrcoef(a[:50], range(50))[0, 1]) < 0.5  # the lengths do not rise


def test_test_scores_by_hand():
    labels, split = np.array([2, 0, 0, 2, 1, 1, 0]), {"test": torch.tensor([1, 2, 4, 5, 6])}
    reviews = script.Reviews([], labels, ["a", "b", "c"], split, {})  # the truth is 0 0 1 1 0
    matrix, scores = script.test_scores(reviews, torch.eye(3)[[0, 1, 1, 1, 0]])
    assert matrix.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    expected = {"precision": 1, "recall": 2 / 3, "f1": 4 / 5, "support": 3}
    assert scores["per_class"]["a"] == pytest.approx(expected)
    assert scores["per_class"]["c"] == dict.fromkeys(expected, 0)
    keys = ["accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_weighted"]
    assert [scores[key] for key in keys] == pytest.approx([4 / 5, 5 / 9, 5 / 9, 8 / 15, 13 / 15])


def test_the_reach_is_the_mean_gradient_of_single_texts():
    torch.manual_seed(2)
    corpus, h, total = make_corpus([44, 3, 40]), 4, torch.zeros(40)
    corpus.ids, corpus.labels = torch.randint(2, 12, (87, 1)), torch.arange(3)
    model, zeros = TextClassifier("bi_lstm", [12], 5, h, 3, "last", 0.5).eval(), torch.zeros(1, h)
    forward, backward = [[*own, torch.eye(h), zeros[0]] for own in model.recurrence.directions()]
    for row in (0, 2):
        tokens, length, label = corpus.batch(torch.tensor([row]))
        inputs, H, C, states = model.embed(tokens), zeros, zeros, []
        nudges = torch.zeros(len(inputs), 1, h, requires_grad=True)  # dL/dnudge_t = dL/dH_t
        for X, nudge in zip(inputs, nudges, strict=True):
            _, (H, C) = lstm(X[None], (H, C), forward)
            H = H + nudge
            states.append(H)
        H_b, _ = lstm(inputs.flip(0), (zeros, zeros), backward)
        states = torch.cat([torch.stack(states), H_b.flip(0)], dim=2)
        nn.functional.cross_entropy(model.classify(states, length), label).backward()
        total += nudges.grad[:, 0].norm(dim=1).flip(0)[:40]
    rows = torch.tensor([0, 1, 2] * 33)  # in two batches, the first with both lengths
    reach = script.gradient_reach(model.train(), corpus, rows)
    assert torch.allclose(torch.tensor(reach), total / total[0], rtol=1e-4)
    assert script.gradient_reach(model, corpus, torch.tensor([1])) == []  # too short
    nn.init.zeros_(model.recurrence.W_hq)  # no gradient at the end either
    assert script.gradient_reach(model, corpus, rows) == [0] * 40


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of --model all on a small bundled sample, the rows of corpus_path."""
    folder, output = tmp_path_factory.mktemp("runs"), io.StringIO()
    options = ["--model", "all", "--pool", "mean", "--lr", 0.05, "--descent", 0, "--batch-size", 8]
    small = dataclasses.replace(datasets.REVIEWS, sample=lambda: samples.reviews(150))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(datasets, "REVIEWS", small)
        pictures = ("text_gru", "text_all")
        run_main(script, *QUICK, 4, *options, "--out", folder, pictures=pictures)
    assert "(bundled sample)" in output.getvalue()
    return folder


def accuracy_and_f1(truth, guess):
    hits, both = (np.bincount(x, minlength=10) for x in (truth[truth == guess], [*truth, *guess]))
    return (truth == guess).mean(), np.mean(2 * hits / np.maximum(both, 1))


def test_all_results_are_those_of_the_weights_that_are_kept(finished, corpus_path):
    table, content = pd.read_csv(corpus_path), read_json(finished / "text_all" / "comparison.json")
    labels, i, total = sorted(set(table["cat"])), table.index + 1, 0
    truth, test = table["cat"].map(labels.index).to_numpy(), i % 5 == 0
    *rows, mean = content["rows"]
    for name, row in zip(NAMES, rows, strict=True):
        run, p = finished / f"text_{name}", []
        saved, scores = torch.load(run / "best.pt"), history(run)
        model = script.build_model(saved["options"], saved["vocabularies"], 10).eval()
        model.load_state_dict(saved["weights"])
        for text in table["review"]:  # alone, without padding
            tokens, _ = script.tokenize(script.cut_words([text]), "both")
            ids = script.encode(tokens, saved["vocabularies"])
            tokens = torch.from_numpy(ids[:256, None])
            p.append(model(tokens, torch.tensor([len(tokens)]))[0].softmax(0).tolist())
        p = np.array(p)
        guess, total, epoch = p.argmax(axis=1), total + p, scores.iloc[saved["epoch"] - 1]
        for part, own in (("train", ~np.isin(i % 5, (0, 4))), ("validation", i % 5 == 4)):
            accuracy, f1 = accuracy_and_f1(truth[own], guess[own])
            found = epoch[[f"{part}_loss", f"{part}_accuracy"]].tolist()
            assert found == pytest.approx([-np.log(p[own, truth[own]]).mean(), accuracy], rel=1e-4)
        assert epoch["validation_f1_macro"] == scores["validation_f1_macro"].max()
        assert epoch["validation_f1_macro"] == pytest.approx(f1)
        expected = pd.DataFrame({
            "row": i[test], "label": table["cat"][test], "predicted": np.array(labels)[guess[test]],
            "probability": p[test].max(axis=1), "text": table["review"][test],
        }).reset_index(drop=True)  # fmt: skip
        written = pd.read_csv(run / "predictions.csv")
        pd.testing.assert_frame_equal(written, expected, rtol=0, atol=1e-4)
        metrics = read_json(run / "metrics.json")
        metrics |= metrics.pop("test") | {"model": NAMES[name]}
        found = metrics["accuracy"], metrics["f1_macro"]
        assert found == pytest.approx(accuracy_and_f1(truth[test], guess[test]))
        assert metrics["split"] == {"train": 90, "validation": 30, "test": 30}
        assert metrics["parameters"] == sum(tensor.numel() for tensor in saved["weights"].values())
        assert len(row) == 8 and row == {key: metrics[key] for key in row}
    expected = accuracy_and_f1(truth[test], total[test].argmax(axis=1))
    assert (mean["accuracy"], mean["f1_macro"]) == pytest.approx(expected)
    assert mean["parameters"] == sum(row["parameters"] for row in rows)
    assert [(len(x), x[0]) for x in content["gradient_reach"].values()] == [(40, 1)] * 4
    for name in ("gru/curves", "gru/confusion", "all/comparison", "all/gradients"):
        assert (finished / f"text_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_training_sees_training_rows_some_words_hidden(corpus_path, tmp_path, monkeypatch, capsys):
    shown = []

    class Recorder(TextClassifier):
        def forward(self, tokens, lengths):
            assert self.recurrence.loops == "plain"
            if self.training:
                shown.extend(tokens[tokens[:, :, 3] > 0].tolist())  # without padding
            return super().forward(tokens, lengths)

    monkeypatch.setattr(script, "TextClassifier", Recorder)
    options = ["--model", "rnn", "--word-dropout", 0.3, "--min-freq", 1, "--loops", "plain"]
    run_main(script, *QUICK, 1, *options, "--data", corpus_path, "--out", tmp_path)
    assert "sample" not in capsys.readouterr().out
    texts = pd.read_csv(corpus_path)["review"]
    expected = Counter("".join(texts[~np.isin((texts.index + 1) % 5, (0, 4))]))
    known = torch.load(tmp_path / "text_rnn" / "best.pt")["vocabularies"]["char"]
    assert set(known) == set(map(ord, expected)) and set("".join(texts)) > set(expected)
    chars, words, _, _ = zip(*shown, strict=True)
    assert Counter(chr(known[char - 2]) for char in chars) == expected
    assert words.count(1) / len(words) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("model", NAMES)
def test_plain_and_fast_loops_give_the_same_epoch(model, corpus_path, tmp_path):
    options = ["--model", model, "--dropout", 0, "--lr", 0.01, "--batch-size", 8]
    conftest.assert_loops_agree(script, [*QUICK, 1, *options, "--data", corpus_path], tmp_path)


def test_label_smoothing_keeps_a_model_from_being_sure(corpus_path, tmp_path):
    losses = []
    for share in ("0", "0.9"):
        options = ["--model", "rnn", "--lr", 0.05, "--descent", 0, "--label-smoothing", share]
        run_main(script, *QUICK, 2, *options, "--data", corpus_path, "--out", tmp_path / share)
        losses.append(history(tmp_path / share / "text_rnn")["train_loss"][1])
    assert losses[0] < losses[1] - 0.05


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(corpus_path, tmp_path):
    options = [*QUICK, 4, "--model", "gru", "--data", corpus_path]
    conftest.assert_a_resumed_run_repeats(script, options, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(corpus_path, tmp_path):
    options = [*QUICK, 120, "--model", "gru", "--patience", 0, "--data", corpus_path]
    conftest.assert_a_killed_run_repeats(script, options, tmp_path, kills=20)


def test_a_saved_model_predicts_lines_in_any_encoding(finished, tmp_path, monkeypatch, capsys):
    def predict(text, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        options = ["--device", "cpu", "--checkpoint", tmp_path / "best.pt", f"--predict={text}"]
        run_main(script, *options)
        return [line.split("\t") for line in capsys.readouterr().out.split("\n")[:-1]]

    content = torch.load(finished / "text_bilstm" / "best.pt")
    content["labels"] = [f" 甲\t{label}\n\r" for label in content["labels"]]
    torch.save(content, tmp_path / "best.pt")
    rows = pd.read_csv(finished / "text_bilstm" / "predictions.csv")
    rows = pd.concat([rows] * 10)  # more than are classified at once
    for encoding in ("utf-8-sig", "gb18030"):
        answers = predict("-", "\n".join(rows["text"]).encode(encoding))
        labels, shares, texts = map(list, zip(*answers, strict=True))
        assert texts == rows["text"].tolist() and labels == ("甲 " + rows["predicted"]).tolist()
        assert [float(share) for share in shares] == pytest.approx(rows["probability"], abs=1.01e-4)
    odd = [b"", b"a\tb\x1b[31m\r", "😀倒\u202e".encode(), "\x01\u3000\t第一".encode(), b"\xff"]
    texts = [text for _, _, text in predict("-", b"\n".join(odd))]
    assert texts == ["", "a b [31m", "😀倒", "第一", "\ufffd"]
    assert predict(rows["text"].iloc[0]) == [answers[0]] and predict("-") == []
