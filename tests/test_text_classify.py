"""Text classification: split, words, tokens, batches and scores by hand; the script itself."""

import contextlib
import dataclasses
import io
import random
import sys

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NAMES, history, read_json, run_main
from torch import nn
from torch.nn import functional as F

import datasets
import samples
import text_classify as script
from rnn_models import CELLS, TextClassifier

KNOWN = ["<pad>", "<unk>"]
CUTS = [["屏幕", "很", "清晰"], ["很", "好"], []]
QUICK = ["--hidden", 4, "--embedding", 4, "--batch-size", 32, "--device", "cpu", "--epochs"]


def write_corpus(path, rows):
    pd.DataFrame(rows, columns=["cat", "review"]).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "reviews.csv"
    samples.reviews(150).to_csv(path, index=False)
    return path


def test_the_split_follows_the_rows_of_the_file(tmp_path, capsys):
    rows = [("ab"[i % 2], f" 第{i}条 ") for i in range(1, 26)]
    rows[6], rows[7] = ("a", " \t "), (" ", "好")  # row 7 has no text, 8 no label: left out
    rows[0], rows[24] = (" b ", "\ufeff第一条"), ("a", "NA")
    path = write_corpus(tmp_path / "corpus.csv", rows)
    reviews = script.read_reviews(script.parse_args(["--data", str(path)]))
    numbers = {part: (index + 1).tolist() for part, index in reviews.split.items()}
    assert numbers["validation"] == [4, 9, 14, 19, 24]
    assert numbers["test"] == [5, 10, 15, 20, 25]
    assert numbers["train"] == [1, 2, 3, 6, 11, 12, 13, 16, 17, 18, 21, 22, 23]
    assert reviews.classes == ["a", "b"] and reviews.labels[:4].tolist() == [1, 0, 1, 0]
    assert [reviews.texts[i] for i in (0, 1, 24)] == ["第一条", "第2条", "NA"]
    assert "13 train, 5 validation, 5 test; 2 empty left out" in capsys.readouterr().out


def test_vocabulary_and_training_read_training_rows_only(tmp_path):
    draw = random.Random(0)
    rows = [(label, 3 * draw.choice({"a": "好坏", "b": "快慢"}[label])) for label in "aab" * 20]
    changed = [("b", "别的词") if i % 5 in (0, 4) else row for i, row in enumerate(rows, 1)]
    found = []
    for name, table in (("one", rows), ("two", changed)):
        data, run = write_corpus(tmp_path / f"{name}.csv", table), tmp_path / name / "text_rnn"
        run_main(script, *QUICK, 2, "--model", "rnn", "--data", data, "--out", run.parent)
        vocabularies = torch.load(run / "best.pt", weights_only=True)["vocabularies"]
        found.append((vocabularies, history(run)[["train_loss", "train_accuracy"]].to_csv()))
    assert found[0] == found[1] and "别" not in vocabularies["char"]


def test_words_are_cut_once_and_again_if_the_cache_is_unfit(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setattr(datasets, "DATA_DIR", folder)
    texts = ["屏幕清晰，运行流畅", "", "😀 emoji\tand\n换行\r\n", "好" * 50, ""]
    cuts = script.cut_words(texts)
    assert cuts[0][:2] == ["屏幕", "清晰"] and ["".join(cut) for cut in cuts] == texts
    folder.write_text("a file where a folder should be")
    assert script.cached_words(texts, "0") == cuts
    folder.unlink()
    assert script.cached_words(texts, "0") == cuts
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:20], b"\xff\x00", whole.replace("屏".encode(), "瓶".encode())):
        path.write_bytes(damaged)
        assert script.cached_words(texts, "0") == cuts and path.read_bytes() == whole
    script.cached_words(texts, "1")
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(script, "cut_words", lambda texts: pytest.fail("not from the cache"))
    assert script.cached_words(texts, "0") == cuts


def test_vocabularies_by_hand():
    build = script.build_vocabularies
    assert build(CUTS, "word", 1) == {"word": [*KNOWN, "很", "屏幕", "清晰", "好"]}
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


def test_every_epoch_sees_every_row_once_in_batches_of_similar_length():
    torch.manual_seed(0)
    counts = (torch.randperm(800) + 1).tolist()
    corpus, rows = make_corpus(counts), torch.arange(0, 800, 2)  # 400 rows: four pools
    batches, others = ([tuple(x.tolist()) for x in corpus.shuffled(rows, 2)] for _ in range(2))
    assert sorted(row for batch in batches for row in batch) == rows.tolist()
    assert np.mean([abs(counts[a] - counts[b]) for a, b in batches]) < 16  # 267 without sorting
    assert set(map(frozenset, others)) != set(map(frozenset, batches))
    order = np.corrcoef([counts[a] for a, _ in batches[:50]], range(50))[0, 1]
    assert abs(order) < 0.5  # the lengths of the batches do not rise


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


REACHES = [("lstm", "max"), ("gru", "mean"), ("bi_lstm", "max"), ("bi_lstm", "last")]


@pytest.mark.parametrize(("cell", "pool"), REACHES)
def test_the_reach_is_the_mean_gradient_of_single_texts(cell, pool, monkeypatch):
    torch.manual_seed(2)
    corpus, h, total = make_corpus([44, 3, 52, 47, 40, 39], max_tokens=200), 4, torch.zeros(40)
    corpus.ids, corpus.labels = torch.randint(2, 12, (len(corpus.ids), 1)), torch.arange(6) % 3
    model = TextClassifier(cell, [12], 5, h, 3, pool, 0.5)
    directions = [[*own, torch.eye(h), torch.zeros(h)] for own in model.recurrence.directions()]
    one_direction = CELLS["lstm" if cell == "bi_lstm" else cell]
    for row in (0, 3, 4):
        tokens, length, label = corpus.batch(torch.tensor([row]))
        inputs = model.embeddings[0](tokens[:, :, 0])
        nudges = [torch.zeros(1, h, requires_grad=True) for _ in inputs]  # dL/dnudge_t = dL/dH_t
        state, H = [torch.zeros(1, h)] * (1 if cell == "gru" else 2), []
        for X, nudge in zip(inputs, nudges, strict=True):
            _, state = one_direction(X[None], state, directions[0])
            state = [state[0] + nudge, *state[1:]]
            H.append(state[0])
        states = torch.stack(H)  # (T, 1, h)
        if cell == "bi_lstm":
            H_b, _ = one_direction(inputs.flip(0), [torch.zeros(1, h)] * 2, directions[1])
            states = torch.cat([states, H_b.flip(0)], dim=2)
        loss = F.cross_entropy(model.eval().classify(states, length), label)
        norms = torch.cat(torch.autograd.grad(loss, nudges)).norm(dim=1)
        total += norms.flip(0)[:40]
    by_length = corpus.by_length  # in batches of two and of one
    monkeypatch.setattr(corpus, "by_length", lambda rows, batch_size: by_length(rows, 2))
    reach = script.gradient_reach(model.train(), corpus, torch.tensor([4, 1, 3, 0, 5]))
    assert torch.allclose(torch.tensor(reach), total / total[0], rtol=1e-4)
    assert script.gradient_reach(model, corpus, torch.tensor([1, 5])) == []  # too short
    nn.init.zeros_(model.recurrence.W_hq)  # no gradient at the end either
    assert script.gradient_reach(model, corpus, torch.tensor([0, 1])) == [0] * 40


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of --model all on a small bundled sample, the rows of corpus_path."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--model", "all", "--pool", "mean", "--lr", 0.05, "--descent", 0]
    options += ["--batch-size", 8, "--hidden", 8, "--out", folder]
    small = dataclasses.replace(datasets.REVIEWS, sample=lambda: samples.reviews(150))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "REVIEWS", small)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            run_main(script, *QUICK, 4, *options, pictures=("text_gru", "text_all"))
    assert "sample, made-up data" in output.getvalue()
    return folder


def accuracy_and_f1(truth, guess):
    hits, both = (np.bincount(x, minlength=10) for x in (truth[truth == guess], [*truth, *guess]))
    return (truth == guess).mean(), np.mean(2 * hits / np.maximum(both, 1))


def test_all_results_are_those_of_the_weights_that_are_kept(finished, corpus_path):
    table, content = pd.read_csv(corpus_path), read_json(finished / "text_all" / "comparison.json")
    labels, texts, i = sorted(set(table["cat"])), table["review"].str.strip(), table.index + 1
    truth, total = table["cat"].map(labels.index).to_numpy(), 0
    train, validation, test = ~np.isin(i % 5, (0, 4)), i % 5 == 4, i % 5 == 0
    *rows, mean = content["rows"]
    for name, row in zip(NAMES, rows, strict=True):
        run, p = finished / f"text_{name}", []
        saved = torch.load(run / "best.pt", weights_only=True)
        model = script.build_model(saved["options"], saved["vocabularies"], 10).eval()
        model.load_state_dict(saved["weights"])
        for text in texts:  # alone, without padding
            ids, _ = script.encode(script.cut_words([text]), saved["vocabularies"])
            tokens = torch.from_numpy(ids[: saved["options"]["max_tokens"], None])
            p.append(model(tokens, torch.tensor([len(tokens)]))[0].softmax(0).tolist())
        p = np.array(p)
        guess, total, scores = p.argmax(axis=1), total + p, history(run)
        epoch = scores.iloc[saved["epoch"] - 1]
        for part, own in (("train", train), ("validation", validation)):
            loss = -np.log(p[own, truth[own]]).mean()
            accuracy, f1 = accuracy_and_f1(truth[own], guess[own])
            assert epoch[f"{part}_loss"] == pytest.approx(loss, rel=1e-4)
            assert epoch[f"{part}_accuracy"] == pytest.approx(accuracy)
        assert epoch["validation_f1_macro"] == pytest.approx(f1)
        assert scores["validation_f1_macro"].argmax() == saved["epoch"] - 1
        written = pd.read_csv(run / "predictions.csv").to_dict("list")
        assert written.pop("probability") == pytest.approx(p[test].max(axis=1), abs=1e-4)
        assert written == {"row": list(range(5, 151, 5)), "label": table["cat"][test].tolist(),
                           "predicted": [labels[k] for k in guess[test]],
                           "text": texts[test].tolist()}  # fmt: skip
        metrics = read_json(run / "metrics.json")
        metrics |= metrics.pop("test")
        found = metrics["accuracy"], metrics["f1_macro"]
        assert found == pytest.approx(accuracy_and_f1(truth[test], guess[test]))
        assert metrics["split"] == {"train": 90, "validation": 30, "test": 30}
        assert metrics["parameters"] == sum(tensor.numel() for tensor in saved["weights"].values())
        assert row.pop("model") == NAMES[name] and len(row) == 7
        assert row == {key: metrics[key] for key in row}
    expected = accuracy_and_f1(truth[test], total[test].argmax(axis=1))
    assert (mean["accuracy"], mean["f1_macro"]) == pytest.approx(expected)
    assert mean["parameters"] == sum(row["parameters"] for row in rows)
    assert [(len(x), x[0]) for x in content["gradient_reach"].values()] == [(40, 1)] * 4
    for path in (
        "text_gru/curves",
        "text_gru/confusion",
        "text_all/comparison",
        "text_all/gradients",
    ):
        assert (finished / f"{path}.png").read_bytes().startswith(b"\x89PNG")


def test_word_dropout_hides_words_from_training_and_nothing_else(
    corpus_path, tmp_path, monkeypatch, capsys
):
    seen = {True: [], False: []}

    class Recorder(TextClassifier):
        def forward(self, tokens, lengths):
            text = torch.arange(len(tokens))[:, None] < lengths
            seen[self.training].append(tokens[text])  # (tokens, aspects), without padding
            return super().forward(tokens, lengths)

    monkeypatch.setattr(script, "TextClassifier", Recorder)
    options = ["--model", "rnn", "--word-dropout", 0.3, "--max-tokens", 10_000]
    run_main(script, *QUICK, 1, *options, "--data", corpus_path, "--out", tmp_path)
    assert "sample" not in capsys.readouterr().out
    shown = torch.cat(seen[True])
    scored = torch.cat(seen[False])[: len(shown)]  # the training rows come first
    for column, name in enumerate(["char", "word", "pair", "place"]):
        before, after = scored[:, column].sort().values, shown[:, column].sort().values
        if name == "word":
            hidden = 1 - (after > 1).sum() / (before > 1).sum()
            assert float(hidden) == pytest.approx(0.3, abs=0.05) and after[0] == 1
        else:
            assert after.equal(before)


@pytest.mark.parametrize("model", NAMES)
def test_plain_and_fast_loops_give_the_same_epoch(model, corpus_path, tmp_path):
    options = ["--model", model, "--dropout", 0, "--lr", 0.01, "--batch-size", 8]
    conftest.assert_loops_agree(script, [*QUICK, 1, *options, "--data", corpus_path], tmp_path)


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(corpus_path, tmp_path):
    options = [*QUICK, 4, "--model", "gru", "--data", corpus_path]
    conftest.assert_a_resumed_run_repeats(script, options, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(corpus_path, tmp_path):
    options = [*QUICK, 120, "--model", "gru", "--patience", 0, "--data", corpus_path]
    conftest.assert_a_killed_run_repeats(script, options, tmp_path, kills=20)


def test_a_saved_model_predicts_lines_in_any_encoding_as_in_its_test(
    finished, tmp_path, monkeypatch, capsys
):
    def predict(text, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        arguments = ["--checkpoint", tmp_path / "best.pt", f"--predict={text}", "--device", "cpu"]
        run_main(script, *arguments)
        return [line.split("\t") for line in capsys.readouterr().out.split("\n")[:-1]]

    content = torch.load(finished / "text_bilstm" / "best.pt", weights_only=True)
    content["labels"] = [f" 甲\t{label}\n\r" for label in content["labels"]]
    torch.save(content, tmp_path / "best.pt")
    rows = pd.concat([pd.read_csv(finished / "text_bilstm" / "predictions.csv")] * 10)
    encodings = ["utf-8", "utf-8-sig", "gb18030"] * 100
    lines = [text.encode(name) for text, name in zip(rows["text"], encodings, strict=True)]
    odd = [b"", b"a\tb\x1b[31m\r", "😀倒\u202e".encode(), "\x01\u3000\t第一".encode(), b"\xff\xff"]
    answers = predict("-", b"\n".join([*odd, *lines]))  # more than are classified at once
    labels, shares, texts = zip(*answers, strict=True)
    assert (
        texts[:4] == ("", "a b [31m", "😀倒", "第一") and list(texts[5:]) == rows["text"].tolist()
    )
    assert list(labels[5:]) == [f"甲 {label}" for label in rows["predicted"]]
    assert list(map(float, shares[5:])) == pytest.approx(rows["probability"].tolist(), abs=1.01e-4)
    assert predict(texts[5]) == [answers[5]] and predict("") == [answers[0]]
    assert predict("第一\t行\n第二行")[0][2] == "第一 行 第二行" and predict("-") == []
