"""Text classification: split, words, ids, batches, the classifier; then the script as a whole."""

import io
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import rnn_models
import support.run
import text_classify
from rnn_models import CELLS, POOLS
from support import datasets
from support.files import UserError

CPU = torch.device("cpu")
SMALL = ["--hidden", "8", "--embedding", "8", "--batch-size", "16", "--lr", "0.03", "--fall-steps", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def train(run_main, reviews_path):
    """`train(folder, options)`: a small training on the made-up reviews."""

    def train(folder, options, data=reviews_path):
        arguments = [*SMALL, *options.split(), "--data", data, "--out", folder]
        run_main(text_classify, *arguments)

    return train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """The folder of `--model all`."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "--model all --epochs 4")
    return folder


@pytest.fixture(scope="module")
def reviews(reviews_path):
    """The made-up reviews as a DataFrame."""
    return pd.read_csv(reviews_path)


@pytest.fixture
def predict(run_main, capsys):
    """`predict(text, *checkpoints)`: the fields of each line that `--predict` prints."""

    def predict(text, *checkpoints):
        capsys.readouterr()
        run_main(text_classify, "--checkpoint", *checkpoints, "--predict", text, "--device", "cpu")
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    return predict


# --- reviews ------------------------------------------------------------------------------------


def write_reviews(folder, labels, texts=None):
    """A CSV of these reviews, and its path."""
    frame = pd.DataFrame({"cat": labels, "review": texts or ["很好"] * len(labels)})
    path = folder / "reviews.csv"
    frame.to_csv(path, index=False)
    return path


def read_reviews(path, *options):
    arguments = ["--data", str(path), *options]
    return text_classify.read_reviews(text_classify.parse_args(arguments))


def test_the_fifth_row_of_five_tests_and_the_fourth_validates(tmp_path):
    split = read_reviews(write_reviews(tmp_path, ["a", "b"] * 13)).split
    assert (split["validation"] + 1).tolist() == [4, 9, 14, 19, 24]
    assert (split["test"] + 1).tolist() == [5, 10, 15, 20, 25]
    assert (split["train"] + 1).tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13, 16, 17, 18, 21, 22, 23, 26]


def test_rows_without_text_or_label_are_left_out_and_counted(tmp_path, capsys):
    labels = ["a", "b", " "] + ["a"] * 22
    texts = ["\u3000 \t", *["很好"] * 24]
    reviews = read_reviews(write_reviews(tmp_path, labels, texts))
    assert (reviews.split["train"] + 1).tolist()[:3] == [2, 6, 7]
    assert "13 train, 5 validation, 5 test; 2 empty left out" in capsys.readouterr().out


def test_classes_are_numbered_in_order(tmp_path):
    reviews = read_reviews(write_reviews(tmp_path, ["b", "c", "a", "b", "b"] * 5))
    assert reviews.classes == ["a", "b", "c"]
    assert reviews.labels[:5].tolist() == [1, 2, 0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", "b"] * 12, "too few usable rows: 15 train, 5 validation, 4 test"),
        (["a"] * 25, "one class only"),
        (["a", "a", "a", "a", "b"] * 5, "class 'b' .* no training row"),
    ],
)
def test_unfit_data_are_refused(labels, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_reviews(write_reviews(tmp_path, labels))


def test_columns_can_be_named(tmp_path):
    path = write_reviews(tmp_path, labels=["很好"] * 25, texts=["a", "b"] * 12 + ["b"])
    reviews = read_reviews(path, "--text-column", "cat", "--label-column", "review")
    assert reviews.classes == ["a", "b"]


@pytest.mark.parametrize("option", ["--text-column", "--label-column"])
def test_an_unknown_column_is_answered_with_the_names_of_all(option, tmp_path):
    with pytest.raises(UserError, match="no column 'x'; its columns are: cat, review"):
        read_reviews(write_reviews(tmp_path, ["a", "b"] * 13), option, "x")


# --- words to ids -------------------------------------------------------------------------------


@pytest.fixture
def words_cache(tmp_path, monkeypatch):
    """The path of the cached words of one text."""
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    text_classify.cached_words(["屏幕清晰"], "hash")
    (path,) = tmp_path.glob("words_*")
    return path


def test_the_second_start_takes_the_words_from_the_cache(words_cache):
    words_cache.write_text('[["屏", "幕清", "晰"]]', encoding="utf-8")
    assert text_classify.cached_words(["屏幕清晰"], "hash") == [["屏", "幕清", "晰"]]


@pytest.mark.parametrize("damaged", ["", "null", "[[1]]", "[]", '[["瓶幕", "清晰"]]'])
def test_a_damaged_cache_is_ignored_and_mended(words_cache, damaged):
    content = words_cache.read_bytes()
    words_cache.write_text(damaged, encoding="utf-8")
    assert text_classify.cached_words(["屏幕清晰"], "hash") == [["屏幕", "清晰"]]
    assert words_cache.read_bytes() == content


CUTS = [["很", "清晰度"], [], ["好"]]


def test_tokens_of_kind_both_are_characters_with_their_word_and_pair():
    tokens, counts = text_classify.tokenize(CUTS, "both")
    assert tokens["char"] == ["很", "清", "晰", "度", "\0", "好"]
    assert tokens["word"] == ["很", "清晰度", "清晰度", "清晰度", "\0", "好"]
    assert tokens["pair"] == ["很清", "清晰", "晰度", "度\n", "\0\n", "好\n"]
    assert counts == [4, 1, 1]


def test_tokens_of_kind_word_are_words():
    tokens, counts = text_classify.tokenize(CUTS, "word")
    assert tokens == {"word": ["很", "清晰度", "\0", "好"]}
    assert counts == [2, 1, 1]


@pytest.mark.parametrize("kind", ["both", "word"])
def test_the_most_frequent_word_is_first_and_a_word_counts_once(kind):
    cuts = [["清晰", "好"], ["清晰", "好"], ["好", "清晰度"]]
    vocabularies = text_classify.build_vocabularies(cuts, kind)
    assert vocabularies["word"] == ["好", "清晰"]


def test_a_character_counts_in_every_word():
    cuts = [["清晰", "清晰度"], ["清", "好"]]
    vocabularies = text_classify.build_vocabularies(cuts, "both")
    assert vocabularies["char"] == ["清", "晰"]


@pytest.mark.parametrize(("times", "expected"), [(19, []), (20, ["好\n", "很好"])])
def test_a_pair_must_be_more_frequent(times, expected):
    vocabularies = text_classify.build_vocabularies([["很", "好"]] * times, "both")
    assert sorted(vocabularies["pair"]) == expected


def test_ids_begin_at_2_and_1_is_unknown():
    tokens = {"word": ["很", "好", "屏幕"], "char": ["晰", "很", "清"]}
    ids = text_classify.encode(tokens, {"word": ["好", "很"], "char": ["清", "度", "晰"]})
    assert ids.tolist() == [[3, 4], [2, 1], [1, 2]]


# --- batches ------------------------------------------------------------------------------------


def numbered_corpus(counts):
    """Texts of these lengths; their tokens are numbered 1, 2, 3, ... through all texts."""
    ids = np.arange(1, sum(counts) + 1, dtype=np.int32)[:, None]
    return text_classify.Corpus(ids, counts, 10 * np.arange(len(counts)), CPU)


def corpus_of_many_lengths():
    """100 texts of the lengths 1 to 100 in random order."""
    torch.manual_seed(0)
    return numbered_corpus((torch.randperm(100) + 1).tolist())


def test_a_batch_is_padded_with_0():
    tokens, lengths, labels = numbered_corpus([2, 1, 3]).batch(torch.tensor([2, 0]))
    assert tokens[:, :, 0].tolist() == [[4, 1], [5, 2], [6, 0]]
    assert lengths.tolist() == [3, 2]
    assert labels.tolist() == [20, 0]


def test_a_text_is_cut_after_256_tokens():
    tokens, lengths, _ = numbered_corpus([300, 1]).batch(torch.tensor([1, 0]))
    assert tokens[:, 1, 0].tolist() == list(range(1, 257))
    assert tokens[:2, 0, 0].tolist() == [301, 0]
    assert lengths.tolist() == [1, 256]


def test_batches_by_length_contain_every_row_once_short_texts_first():
    corpus = corpus_of_many_lengths()
    rows = torch.arange(1, 100, 2)
    batches = corpus.by_length(rows, 4)
    order = torch.cat(batches)
    assert order.sort().values.equal(rows)
    assert corpus.lengths[order].equal(corpus.lengths[rows].sort().values)
    assert [len(batch) for batch in batches] == [4] * 12 + [2]


def test_shuffled_batches_contain_every_row_once_in_another_order_each_time():
    corpus = corpus_of_many_lengths()
    rows = torch.arange(1, 100, 2)
    order = torch.cat(corpus.shuffled(rows, 4))
    assert order.sort().values.equal(rows)
    assert not order.equal(torch.cat(corpus.shuffled(rows, 4)))


def test_shuffled_batches_hold_texts_of_similar_length_but_do_not_go_from_short_to_long():
    corpus = corpus_of_many_lengths()
    batches = torch.stack(corpus.shuffled(torch.arange(100), 2))
    shorter, longer = corpus.lengths[batches].T
    assert (longer - shorter).tolist() == [1] * 50
    assert abs(np.corrcoef(shorter, np.arange(50))[0, 1]) < 0.5


# --- the model ----------------------------------------------------------------------------------


def small_model(cell="rnn", pool="max", vocab_sizes=(50, 50), num_inputs=4):
    torch.manual_seed(0)
    return text_classify.TextClassifier(
        cell=cell,
        vocab_sizes=vocab_sizes,
        num_inputs=num_inputs,
        num_hiddens=3,
        num_classes=2,
        pool=pool,
        dropout=0.5,
    ).eval()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_texts_logits_do_not_depend_on_what_it_is_batched_with(cell, pool):
    model = small_model(cell, pool).double()
    tokens = torch.randint(50, (6, 3, 2))
    together = model(tokens, torch.tensor([6, 2, 4]))
    alone = model(tokens[:2, 1:2], torch.tensor([2]))
    torch.testing.assert_close(together[1], alone[0])


def test_a_token_is_the_sum_of_its_embeddings():
    model = small_model()
    inputs = model.embed(torch.tensor([[[7, 3]]]))
    words, characters = model.embeddings
    torch.testing.assert_close(inputs[0, 0], words.weight[7] + characters.weight[3])


@pytest.mark.parametrize("num_aspects", [1, 3])
def test_inputs_have_variance_1(num_aspects):
    model = small_model(vocab_sizes=[1000] * num_aspects, num_inputs=20)
    inputs = model.embed(torch.arange(1000)[:, None, None].expand(-1, 1, num_aspects))
    assert inputs.var().item() == pytest.approx(1, abs=0.05)


def test_a_text_has_one_dropout_mask_for_all_its_steps():
    model = small_model(num_inputs=40)
    tokens = torch.randint(50, (5, 2, 2))
    inputs = model.embed(tokens)
    mask = (model.train().embed(tokens) / inputs).round()  # (T, B, D)
    assert mask.unique().tolist() == [0, 2]
    assert mask.equal(mask[:1].expand(5, 2, 40))
    assert not mask[0, 0].equal(mask[0, 1])


def test_hidden_words_are_about_the_given_share_and_nothing_else_is_hidden():
    torch.manual_seed(0)
    tokens = torch.full((100, 50, 2), 7)
    words, characters = text_classify.hide_words(tokens, 0.3).unbind(2)
    assert (words == 1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert words.unique().tolist() == [1, 7]
    assert characters.unique().tolist() == [7]
    assert tokens.unique().tolist() == [7]


def test_the_gradients_reach_is_the_median_of_three_texts_by_the_plain_loop():
    corpus = numbered_corpus([44, 40, 50, 39])  # the last one is too short
    corpus.labels = torch.tensor([0, 1, 1, 0])
    model = small_model("lstm", "last", vocab_sizes=[200])
    zeros = torch.zeros(1, 3)
    shares = []
    for row in range(3):
        tokens, _, label = corpus.batch(torch.tensor([row]))
        inputs = model.embed(tokens).detach().requires_grad_()
        outputs, _ = rnn_models.lstm(inputs, (zeros, zeros), model.recurrence.params)
        F.cross_entropy(outputs[-1], label).backward()
        norms = inputs.grad[-40:, 0].norm(dim=1).flip(0)
        shares.append(norms / norms.sum())
    expected = np.median(torch.stack(shares), axis=0)
    reach = text_classify.gradient_reach(model.train(), corpus, torch.arange(4))
    np.testing.assert_allclose(reach, expected / expected[0], rtol=1e-4)


# --- a whole run --------------------------------------------------------------------------------


def class_scores(truth, predicted, classes):
    """Precision, recall, F1 and support of each class."""
    table = pd.crosstab(np.array(truth), np.array(predicted))
    matrix = table.reindex(index=classes, columns=classes, fill_value=0).to_numpy()
    hits = matrix.diagonal()
    support = matrix.sum(axis=1)
    guesses = matrix.sum(axis=0)
    scores = pd.DataFrame(index=classes)
    scores["precision"] = hits / np.maximum(guesses, 1)
    scores["recall"] = hits / np.maximum(support, 1)
    scores["f1"] = 2 * hits / np.maximum(support + guesses, 1)
    scores["support"] = support
    return scores


def one_by_one(checkpoint, texts):
    """A saved model's classes, and its probabilities (n, K) of texts, each alone, not padded."""
    saved = torch.load(checkpoint)
    model = text_classify.build_model(saved).eval()
    model.load_state_dict(saved["weights"])
    probabilities = []
    for cut in text_classify.cut_words(texts):
        tokens, counts = text_classify.tokenize([cut], "both")
        ids = text_classify.encode(tokens, saved["vocabularies"])
        logits = model(torch.from_numpy(ids)[:, None], torch.tensor(counts))
        probabilities.append(logits.softmax(dim=1).detach())
    return np.array(saved["labels"]), torch.cat(probabilities).numpy()


every_model = pytest.mark.parametrize("cell", CELLS)


def test_every_model_has_a_folder(trained):
    names = sorted(path.name for path in trained.iterdir())
    assert names == ["text_all", "text_bi_lstm", "text_gru", "text_lstm", "text_rnn"]


@every_model
def test_the_scores_are_those_of_the_predictions(cell, trained, reviews, read_json):
    table = pd.read_csv(trained / f"text_{cell}" / "predictions.csv")
    expected = class_scores(table["label"], table["predicted"], sorted(set(reviews["cat"])))
    scores = read_json(trained / f"text_{cell}" / "metrics.json")["test"]
    assert scores["accuracy"] == pytest.approx((table["label"] == table["predicted"]).mean())
    assert scores["precision_macro"] == pytest.approx(expected["precision"].mean())
    assert scores["f1_macro"] == pytest.approx(expected["f1"].mean())
    assert scores["recall_weighted"] == pytest.approx(scores["accuracy"])  # always so
    per_class = pd.DataFrame(scores["per_class"]).T
    pd.testing.assert_frame_equal(per_class, expected, check_dtype=False)


@every_model
def test_the_predictions_are_those_of_the_saved_model(cell, trained, reviews):
    test_rows = reviews[4::5]
    classes, p = one_by_one(trained / f"text_{cell}" / "best.pt", test_rows["review"])
    table = pd.read_csv(trained / f"text_{cell}" / "predictions.csv")
    assert table["row"].tolist() == list(range(5, 151, 5))
    assert table["text"].tolist() == test_rows["review"].tolist()
    assert table["label"].tolist() == test_rows["cat"].tolist()
    assert table["predicted"].tolist() == classes[p.argmax(axis=1)].tolist()
    np.testing.assert_allclose(table["probability"], p.max(axis=1), atol=1e-4)


@every_model
def test_the_best_epoch_has_the_highest_validation_score(cell, trained, read_json):
    scores = pd.read_csv(trained / f"text_{cell}" / "history.csv")["validation_f1_macro"]
    best_epoch = read_json(trained / f"text_{cell}" / "metrics.json")["best_epoch"]
    assert best_epoch == scores.argmax() + 1


@every_model
def test_the_validation_score_is_that_of_the_validation_rows(cell, trained, reviews):
    rows = reviews[3::5]
    classes, p = one_by_one(trained / f"text_{cell}" / "best.pt", rows["review"])
    expected = class_scores(rows["cat"], classes[p.argmax(axis=1)], classes)["f1"].mean()
    history = pd.read_csv(trained / f"text_{cell}" / "history.csv")
    assert history["validation_f1_macro"].max() == pytest.approx(expected)


@every_model
def test_the_comparison_repeats_the_results_of_each_run(cell, trained, read_json):
    metrics = read_json(trained / f"text_{cell}" / "metrics.json")
    rows = read_json(trained / "text_all" / "comparison.json")["rows"]
    row = rows[list(CELLS).index(cell)]
    title = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "bi_lstm": "Bi-LSTM"}[cell]
    assert row.pop("model") == title
    expected = {**metrics, **metrics["test"]}
    assert row == {name: expected[name] for name in row}


def test_the_last_row_of_the_comparison_is_the_mean_of_the_probabilities(
    trained, reviews, read_json
):
    total = 0
    for cell in CELLS:
        classes, p = one_by_one(trained / f"text_{cell}" / "best.pt", reviews["review"][4::5])
        total = total + p
    truth = reviews["cat"][4::5].to_numpy()
    predicted = classes[total.argmax(axis=1)]
    mean = read_json(trained / "text_all" / "comparison.json")["rows"][-1]
    assert mean["accuracy"] == pytest.approx((truth == predicted).mean())
    assert mean["f1_macro"] == pytest.approx(class_scores(truth, predicted, classes)["f1"].mean())


def test_the_comparison_holds_the_reach_of_trained_and_untrained_models(trained, read_json):
    reach = read_json(trained / "text_all" / "comparison.json")["gradient_reach"]
    expected = []
    for title in ("RNN", "GRU", "LSTM", "Bi-LSTM"):
        expected += [(title, 1, 40), (f"{title}, untrained", 1, 40)]
    assert [(title, values[0], len(values)) for title, values in reach.items()] == expected


# --- training -----------------------------------------------------------------------------------


def test_validation_and_test_rows_change_no_weight(train, reviews, reviews_path, tmp_path):
    changed = reviews.copy()
    is_training = np.arange(1, 151) % 5 % 4 > 0
    changed.loc[~is_training, "review"] = "天气晴朗" * 20
    changed.loc[~is_training, "cat"] = "书籍"
    changed.to_csv(tmp_path / "changed.csv", index=False)
    checkpoints = []
    for path in (reviews_path, tmp_path / "changed.csv"):
        train(tmp_path, "--model rnn --epochs 1", data=path)
        checkpoints.append(torch.load(tmp_path / "text_rnn" / "best.pt"))
    before, after = checkpoints
    assert before["vocabularies"] == after["vocabularies"]
    torch.testing.assert_close(before["weights"], after["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("option", ["--label-smoothing", "--word-dropout"])
def test_smoothed_labels_and_hidden_words_keep_a_model_from_being_sure(option, train, tmp_path):
    losses = []
    for share in (0, 0.9):
        train(tmp_path, f"--model rnn --epochs 3 --tokens word {option} {share}")
        losses.append(pd.read_csv(tmp_path / "text_rnn" / "history.csv")["train_loss"].min())
    assert losses[1] > losses[0] + 0.3


def test_a_second_run_into_the_same_folder_leaves_nothing_of_the_first(train, outcome, tmp_path):
    train(tmp_path / "used", "--model rnn --epochs 2")
    for name in ("used", "new"):
        train(tmp_path / name, "--model rnn --epochs 1 --seed 1")
    assert outcome(tmp_path / "used" / "text_rnn") == outcome(tmp_path / "new" / "text_rnn")


def test_a_stopped_and_resumed_run_ends_as_if_left_alone(train, outcome, tmp_path, monkeypatch):
    options = "--model gru --epochs 4 --patience 0"
    train(tmp_path / "alone", options)
    # The first two epochs are saved; the user stops the run while it saves the third.
    effects = [DEFAULT, DEFAULT, KeyboardInterrupt]
    save = Mock(wraps=support.run.save_checkpoint, side_effect=effects)
    with monkeypatch.context() as patch:
        patch.setattr(support.run, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", options)
    assert not (tmp_path / "stopped" / "text_gru" / "metrics.json").exists()
    train(tmp_path / "stopped", f"{options} --resume")
    assert outcome(tmp_path / "stopped" / "text_gru") == outcome(tmp_path / "alone" / "text_gru")


START = """
import pathlib, sys, text_classify
from support import datasets, options
datasets.DATA_DIR = pathlib.Path(sys.argv.pop(1))
options.run_script(text_classify.main)
"""


@pytest.fixture
def start(data_folder, reviews_path):
    """`start(folder)`: begin or resume a run of 300 epochs in a process of its own."""

    def start(folder):
        options = ["--model", "gru", "--epochs", "300", "--patience", "0", "--resume"]
        arguments = [*SMALL, *options, "--data", str(reviews_path), "--out", str(folder)]
        return subprocess.Popen(
            [sys.executable, "-c", START, str(data_folder), *arguments],
            cwd=Path(text_classify.__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    return start


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(start, outcome, tmp_path):
    start(tmp_path / "alone").communicate()
    random.seed(0)
    for _ in range(20):
        process = start(tmp_path / "killed")
        while b"parameters" not in process.stdout.readline():
            pass  # the training has not begun
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.communicate()
    start(tmp_path / "killed").communicate()
    folder = tmp_path / "killed" / "text_gru"
    assert outcome(folder) == outcome(tmp_path / "alone" / "text_gru")
    assert list(folder.glob(".*.part")) == []


def mgu(inputs, state, params):
    """Minimal gated unit (Zhou et al. 2016): one gate forgets and resets."""
    W_xf, W_hf, b_f, W_xh, W_hh, b_h, W_hq, b_q = params
    (H,) = state
    outputs = []
    for X in inputs:
        gate = torch.sigmoid(X @ W_xf + H @ W_hf + b_f)
        H_tilde = torch.tanh(X @ W_xh + (gate * H) @ W_hh + b_h)
        H = (1 - gate) * H + gate * H_tilde
        outputs.append(H @ W_hq + b_q)
    return torch.stack(outputs), (H,)


def test_a_fifth_cell_needs_its_loop_and_its_gates(train, predict, tmp_path, monkeypatch):
    monkeypatch.setitem(rnn_models.CELLS, "mgu", mgu)
    monkeypatch.setitem(rnn_models.GATES, "mgu", "fh")
    train(tmp_path, "--model mgu --epochs 4 --tokens word")
    table = pd.read_csv(tmp_path / "text_mgu" / "predictions.csv")
    assert (table["label"] == table["predicted"]).mean() > 0.3  # by chance 0.1
    ((label, _, _),) = predict(table["text"][0], tmp_path / "text_mgu" / "best.pt")
    assert label == table["predicted"][0]


# --- prediction and mistakes --------------------------------------------------------------------


def test_one_text_is_classified(trained, predict):
    row = pd.read_csv(trained / "text_gru" / "predictions.csv").iloc[0]
    ((label, share, text),) = predict(row["text"], trained / "text_gru" / "best.pt")
    assert (label, text) == (row["predicted"], row["text"])
    assert float(share) == pytest.approx(row["probability"], abs=2e-4)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_lines_of_the_input_are_classified(encoding, trained, predict, monkeypatch):
    table = pd.read_csv(trained / "text_gru" / "predictions.csv")
    table = pd.concat([table] * 10)  # 300 lines are more than are read at once
    content = "\n".join(table["text"]).encode(encoding)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    labels, _, texts = zip(*predict("-", trained / "text_gru" / "best.pt"), strict=True)
    assert list(labels) == table["predicted"].tolist()
    assert list(texts) == table["text"].tolist()


def test_several_checkpoints_average_their_probabilities(trained, reviews, predict):
    checkpoints = [trained / f"text_{cell}" / "best.pt" for cell in CELLS]
    total = 0
    for checkpoint in checkpoints:
        classes, p = one_by_one(checkpoint, [reviews["review"][0]])
        total = total + p[0]
    ((label, share, _),) = predict(reviews["review"][0], *checkpoints)
    assert label == classes[total.argmax()]
    assert float(share) == pytest.approx(total.max() / 4, abs=2e-4)


def test_checkpoints_of_different_classes_are_refused(trained, exit_status, tmp_path, capsys):
    checkpoint = trained / "text_rnn" / "best.pt"
    saved = torch.load(checkpoint)
    saved["labels"] = saved["labels"][::-1]
    torch.save(saved, tmp_path / "other.pt")
    arguments = ["--checkpoint", checkpoint, tmp_path / "other.pt", "--predict", "很好"]
    assert exit_status(text_classify, *arguments) == 2
    assert "different classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--epochs 0", "--epochs"),
        ("--lr nan", "--lr"),
        ("--model cnn", "'cnn'"),
        ("--data absent.csv --out .", "absent.csv does not exist"),
        ("--checkpoint missing.pt --predict x", "missing.pt is no file"),
        ("--checkpoint temp.pt --predict x", "of another script"),
        ("--checkpoint best.pt --predict x --lr 4e-3", "--lr has no effect"),
    ],
)
def test_a_mistake_ends_with_one_line_and_no_new_file(
    line, words, exit_status, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    support.run.save_checkpoint(tmp_path / "temp.pt", {"task": "temp"})
    status = exit_status(text_classify, *line.split())
    (message,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert words in message
    assert list(tmp_path.iterdir()) == [tmp_path / "temp.pt"]
