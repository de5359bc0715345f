"""Text classification: split, words, tokens, batches and scores by hand; the script itself."""

import io
import random
import sys
from types import SimpleNamespace

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NAMES, history, read_json, run_main
from torch import nn

import datasets
import plots
import samples
import text_classify as script
from rnn_models import CELLS, TextClassifier

CPU, KNOWN = torch.device("cpu"), ["<pad>", "<unk>"]
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


# --- reviews ------------------------------------------------------------------------------------


def test_the_split_follows_the_rows_of_the_file(tmp_path, capsys):
    rows = [("ab"[i % 2], f" 第{i}条 ") for i in range(1, 41)]
    rows[6], rows[7] = ("a", " \t "), (" ", "好")  # row 7 has no text, 8 no label: left out
    rows[0], rows[39] = (" b ", "\ufeff第一条"), ("a", "NA")
    path = write_corpus(tmp_path / "corpus.csv", rows)
    reviews = script.read_reviews(script.parse_args(["--data", str(path)]))
    numbers = {part: (index + 1).tolist() for part, index in reviews.split.items()}
    assert numbers["validation"] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert numbers["test"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert numbers["train"] == [i for i in range(1, 41) if i % 5 in (1, 2, 3) and i not in (7, 8)]
    assert reviews.classes == ["a", "b"] and reviews.labels[:4].tolist() == [1, 0, 1, 0]
    assert [reviews.texts[i] for i in (0, 1, 39)] == ["第一条", "第2条", "NA"]
    assert "22 train, 8 validation, 8 test; 2 empty left out" in capsys.readouterr().out


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


# --- words and tokens ---------------------------------------------------------------------------


def test_words_are_cut_once_and_again_if_the_cache_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    texts = ["屏幕清晰，运行流畅", "", "😀 emoji\tand\n换行\r\n", "好" * 50, ""]
    cuts = script.cut_words(texts)
    assert cuts[0][:2] == ["屏幕", "清晰"] and ["".join(cut) for cut in cuts] == texts
    assert script.cached_words(texts, "0") == cuts
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:20], b"\xff\x00", whole.replace("屏".encode(), "瓶".encode())):
        path.write_bytes(damaged)
        assert script.cached_words(texts, "0") == cuts and path.read_bytes() == whole
    script.cached_words(texts, "1")
    assert len(list(tmp_path.iterdir())) == 2
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


# --- scores -------------------------------------------------------------------------------------


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


def test_a_reach_of_nothing_is_zero():
    model, corpus = TextClassifier("rnn", [12], 3, 3, 3, "max"), long_texts([39, 45])
    assert script.gradient_reach(model, corpus, torch.tensor([0])) == []  # too short
    nn.init.zeros_(model.recurrence.W_hq)  # no gradient at the end either
    assert script.gradient_reach(model, corpus, torch.tensor([0, 1])) == [0] * 40


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
    options = ["--model", "all", "--pool", "mean", "--lr", 0.05, "--descent", 0]
    options += ["--batch-size", 8, "--hidden", 8, "--data", corpus_path, "--out", folder]
    run_main(script, *QUICK, 4, *options, pictures=("text_gru", "text_all"))
    return folder


def test_the_files_of_a_run_and_of_the_comparison(finished, corpus_path):
    run, comparison = finished / "text_gru", finished / "text_all"
    files = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv"}
    assert {path.name for path in run.iterdir()} == files | {"curves.png", "confusion.png"}
    files = {"comparison.json", "comparison.png", "gradients.png"}
    assert {path.name for path in comparison.iterdir()} == files
    pictures = [*run.glob("*.png"), *comparison.glob("*.png")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    metrics = read_json(run / "metrics.json")
    assert len(metrics["data"].pop("sha256")) == 64
    assert metrics["data"] == {"path": str(corpus_path), "source": "file", "rows": 150}
    assert metrics["split"] == {"train": 90, "validation": 30, "test": 30}
    weights = torch.load(run / "best.pt", weights_only=True)["weights"]
    assert metrics["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_the_metrics_can_be_counted_again_from_the_predictions(finished, corpus_path):
    run, table = finished / "text_bilstm", pd.read_csv(corpus_path)[4::5]
    metrics, rows = read_json(run / "metrics.json"), pd.read_csv(run / "predictions.csv")
    assert rows["row"].tolist() == list(range(5, 151, 5))
    assert rows["label"].tolist() == table["cat"].tolist()
    assert rows["text"].tolist() == table["review"].str.strip().tolist()
    assert rows["probability"].between(0.1, 1).all()
    hits = (rows["label"] == rows["predicted"]).mean()
    assert metrics["test"]["accuracy"] == pytest.approx(hits)
    f1 = history(run)["validation_f1_macro"]
    assert len(f1) == 4 and metrics["best_epoch"] == f1.argmax() + 1


def test_the_history_scores_the_weights_that_are_kept(finished, corpus_path):
    saved = torch.load(finished / "text_gru" / "best.pt", weights_only=True)
    model = script.build_model(saved["options"], saved["vocabularies"], 10).eval()
    model.load_state_dict(saved["weights"])
    epoch = history(finished / "text_gru").iloc[saved["epoch"] - 1]
    table, p = pd.read_csv(corpus_path), []
    for text in table["review"].str.strip():  # one text at a time
        ids, _ = script.encode(script.cut_words([text]), saved["vocabularies"])
        tokens = torch.from_numpy(ids[: saved["options"]["max_tokens"], None])
        p.append(model(tokens, torch.tensor([len(tokens)]))[0].softmax(0).tolist())
    p, truth, i = np.array(p), table["cat"].map(saved["labels"].index).to_numpy(), table.index + 1
    for part, own in (("train", ~np.isin(i % 5, (0, 4))), ("validation", i % 5 == 4)):
        t, guess = truth[own], p[own].argmax(1)
        assert epoch[f"{part}_loss"] == pytest.approx(-np.log(p[own, t]).mean(), rel=1e-4)
        assert epoch[f"{part}_accuracy"] == pytest.approx((t == guess).mean())
    hits, both = (np.bincount(x, minlength=10) for x in (t[t == guess], np.r_[t, guess]))
    assert epoch["validation_f1_macro"] == pytest.approx(np.mean(2 * hits / np.maximum(both, 1)))


def test_the_comparison_shows_the_four_runs(finished):
    content, names = read_json(finished / "text_all" / "comparison.json"), [*NAMES.values()]
    assert [row["model"] for row in content["rows"]] == [*names, "mean of the four"]
    assert list(content["gradient_reach"]) == names
    assert all(len(x) == 40 and x[0] == 1 for x in content["gradient_reach"].values())
    for name, row in zip(NAMES, content["rows"][:4], strict=True):
        metrics = read_json(finished / f"text_{name}" / "metrics.json")
        expected = metrics | metrics["test"]
        del row["model"]
        assert len(row) == 7 and row == {key: expected[key] for key in row}


def test_the_mean_of_the_four_by_hand(tmp_path, monkeypatch, capsys):
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
        for name, p in zip(NAMES, (wrong, wrong, right, wrong), strict=True)
    }
    args = SimpleNamespace(out=tmp_path, seed=0, pool="max")
    script.compare(args, reviews, results, {name: [1.0, 0.5] for name in results})
    *_, mean = read_json(tmp_path / "text_all" / "comparison.json")["rows"]
    # The mean is (0.525, 0.475) and (0.475, 0.525): right, though three of four are wrong.
    assert mean["accuracy"] == mean["f1_macro"] == 1 and mean["parameters"] == 4000
    assert "made-up data" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["both", "word"])
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
    options = ["--model", "rnn", "--tokens", kind, "--word-dropout", 0.3, "--max-tokens", 10_000]
    run_main(script, *QUICK, 1, *options, "--data", corpus_path, "--out", tmp_path)
    shown = torch.cat(seen[True])
    scored = torch.cat(seen[False])[: len(shown)]  # the training rows come first
    best = torch.load(tmp_path / "text_rnn" / "best.pt", weights_only=True)
    for column, name in enumerate(best["vocabularies"]):
        before, after = scored[:, column].sort().values, shown[:, column].sort().values
        if name == "word":
            hidden = 1 - (after > 1).sum() / (before > 1).sum()
            assert float(hidden) == pytest.approx(0.3, abs=0.05) and after[0] == 1
        else:
            assert after.equal(before)


@pytest.mark.parametrize("model", NAMES)
def test_plain_and_fast_loops_give_the_same_epoch(model, tmp_path):
    draw = random.Random(1)
    rows = [("ab"[i % 2], "".join(draw.choices("好坏快慢"[i % 2 :], k=8))) for i in range(60)]
    options = ["--model", model, "--dropout", 0, "--lr", 0.01, "--batch-size", 8, "--data"]
    options.append(write_corpus(tmp_path / "corpus.csv", rows))
    conftest.assert_loops_agree(script, [*QUICK, 1, *options], tmp_path)


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(corpus_path, tmp_path):
    options = [*QUICK, 4, "--model", "gru", "--data", corpus_path]
    conftest.assert_a_resumed_run_repeats(script, options, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(corpus_path, tmp_path):
    options = [*QUICK, 120, "--model", "gru", "--patience", 0, "--data", corpus_path]
    conftest.assert_a_killed_run_repeats(script, options, tmp_path, kills=20)


# --- prediction ---------------------------------------------------------------------------------


@pytest.fixture
def predict(capsys, monkeypatch):
    """predict(checkpoint, text, stdin): the lines that --predict prints, split at their tabs."""

    def run(checkpoint, text, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        run_main(script, "--checkpoint", checkpoint, f"--predict={text}", "--device", "cpu")
        return [line.split("\t") for line in capsys.readouterr().out.split("\n")[:-1]]

    return run


def test_a_saved_model_predicts_what_it_predicted_in_its_test(finished, predict):
    run = finished / "text_bilstm"
    rows = pd.concat([pd.read_csv(run / "predictions.csv")] * 20)
    lines = [text + " " * (i % 3) * 100 for i, text in enumerate(rows["text"])]
    content = "\n".join(lines).encode()  # the last line does not end
    # More bytes than are read at once, and more lines in them than are classified at once.
    assert len(content) > 65536 and content[:65536].count(b"\n") > 256
    answers = pd.DataFrame(predict(run / "best.pt", "-", content))
    assert answers[[0, 2]].to_numpy().tolist() == rows[["predicted", "text"]].to_numpy().tolist()
    shares = rows["probability"].to_numpy()
    assert answers[1].astype(float).to_numpy() == pytest.approx(shares, abs=1.01e-4)


def test_labels_and_lines_in_any_encoding_give_one_line_each(finished, tmp_path, predict):
    content = torch.load(finished / "text_rnn" / "best.pt", weights_only=True)
    content["labels"] = [f" 甲\t乙\n{i}\r" for i in range(10)]
    torch.save(content, tmp_path / "best.pt")
    lines = ["\ufeff屏幕清晰".encode(), "水温很稳定".encode("gb18030"), b"", b"a\tb\x1b[31m\r"]
    lines += ["😀倒\u202e".encode(), "\x01\u3000\t第一".encode(), b"\xff\xff"]
    answers = predict(tmp_path / "best.pt", "-", b"\n".join(lines) + b"\n")
    assert [len(answer) for answer in answers] == [3] * 7
    assert all(label in {f"甲 乙 {i}" for i in range(10)} for label, _, _ in answers)
    texts = ["屏幕清晰", "水温很稳定", "", "a b [31m", "😀倒", "第一"]
    assert [answer[2] for answer in answers[:6]] == texts
    alone = [predict(tmp_path / "best.pt", text) for text in (*texts[:3], "第一\t行\n第二行")]
    assert alone[:3] == [[answer] for answer in answers[:3]]
    assert [answer[2] for answer in alone[3]] == ["第一 行 第二行"]
    assert predict(tmp_path / "best.pt", "-") == []
