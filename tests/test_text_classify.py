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

import support.run
import text_classify
from rnn_models import CELLS, GATES, POOLS
from support import datasets
from support.files import UserError
from text_classify import Corpus, build_vocabularies, cached_words, tokenize

SMALL = "--hidden 8 --embedding 8 --batch-size 8 --lr 0.05 --fall-steps 0 --pool mean --device cpu"

# --- reviews ------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path):
    """`read(labels, texts, *options)`: the reviews in a file with these columns."""

    def read(labels, texts="很好", *options):
        path = str(tmp_path / "reviews.csv")
        pd.DataFrame({"cat": labels, "review": texts}).to_csv(path, index=False)
        args = text_classify.parse_args(["--data", path, *options])
        return text_classify.read_reviews(args)

    return read


def test_every_fifth_row_tests_and_the_row_before_it_validates(read):
    split = read(["a", "b"] * 13).split  # row i of the file has the number i - 1
    assert split["test"].tolist() == [4, 9, 14, 19, 24]
    assert split["validation"].tolist() == [3, 8, 13, 18, 23]
    assert split["train"][-4:].tolist() == [20, 21, 22, 25]
    assert len(split["train"]) == 16


def test_rows_without_text_or_label_are_left_out_and_counted(read, capsys):
    labels = list("a b" + "a" * 22)
    texts = ["\u3000 \t"] + ["很好"] * 24
    split = read(labels, texts).split
    assert split["train"][:2].tolist() == [2, 5]
    assert "2 empty left out" in capsys.readouterr().out


def test_classes_are_numbered_in_order(read):
    reviews = read(list("bcabb" * 5))
    assert reviews.classes == ["a", "b", "c"]
    assert reviews.labels[:4].tolist() == [1, 2, 0, 1]


unfit_labels = {"ab" * 12: "too few usable", "a" * 25: "one class", "aaaab" * 5: "no training row"}


@pytest.mark.parametrize("labels", unfit_labels)
def test_unfit_data_are_refused(labels, read):
    with pytest.raises(UserError, match=unfit_labels[labels]):
        read(list(labels))


def test_the_columns_can_be_named(read):
    options = "--text-column cat --label-column review".split()
    reviews = read(["很好"] * 25, list("bbaab" * 5), *options)
    assert reviews.classes == ["a", "b"]


def test_an_unknown_column_is_answered_with_the_names_of_all(read):
    with pytest.raises(UserError, match="no column 'x'; its columns are: cat, review"):
        read(["a"] * 25, "很好", "--text-column", "x")


# --- words to ids -------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file in which the words of one text are kept."""
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path)
    cached_words(["屏幕清晰"], "hash")
    (path,) = tmp_path.glob("words_*")
    return path


def test_the_second_start_takes_the_words_from_the_cache(cache):
    cache.write_text('[["屏", "幕清晰"]]', encoding="utf-8")
    assert cached_words(["屏幕清晰"], "hash") == [["屏", "幕清晰"]]


@pytest.mark.parametrize("damaged", ["", "[[1]]", "null", '[["瓶幕", "清晰"]]'])
def test_a_damaged_cache_is_ignored(damaged, cache):
    cache.write_text(damaged, encoding="utf-8")
    assert cached_words(["屏幕清晰"], "hash") == [["屏幕", "清晰"]]


def test_tokens_are_words():
    tokens, counts = tokenize([["很", "清晰度"], [], ["好"]], "word")
    assert tokens == {"word": ["很", "清晰度", "\0", "好"]}
    assert counts == [2, 1, 1]


def test_tokens_of_kind_both_are_characters_with_their_words():
    tokens, counts = tokenize([["很", "清晰"], [], ["好"]], "both")
    assert tokens["char"] == list("很清晰\0好")
    assert tokens["word"] == ["很", "清晰", "清晰", "\0", "好"]
    assert counts == [3, 1, 1]


def test_a_vocabulary_holds_what_is_there_twice_the_most_frequent_first():
    cuts = [["清晰", "好"], ["清晰", "好"], ["好", "清洁", "清楚"]]
    words = {"word": ["好", "清晰"]}  # a word counts once, not once a character
    assert build_vocabularies(cuts, "word") == words
    assert build_vocabularies(cuts, "both") == {**words, "char": list("清好晰")}


def test_ids_begin_at_2_and_1_is_unknown():
    tokens = {"word": ["很", "好", "屏"], "char": ["晰", "很", "清"]}
    ids = text_classify.encode(tokens, {"word": ["好", "很"], "char": list("清度晰")})
    assert ids.tolist() == [[3, 4], [2, 1], [1, 2]]


# --- batches ------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(0).permutation(100) + 1  # 1 to 100 in random order


def numbered_corpus(lengths):
    """A corpus whose tokens are numbered 1, 2, 3, ... through all texts."""
    ids = np.arange(sum(lengths), dtype=np.int32)[:, None] + 1
    labels = np.arange(len(lengths))
    return Corpus(ids, counts=lengths, labels=labels, device=torch.device("cpu"))


def test_a_batch_is_padded_with_0():
    corpus = numbered_corpus([2, 1, 3])
    tokens, lengths, labels = corpus.batch(torch.tensor([2, 0]))
    assert tokens[:, :, 0].tolist() == [[4, 1], [5, 2], [6, 0]]
    assert lengths.tolist() == [3, 2]
    assert labels.tolist() == [2, 0]


def test_a_text_is_cut_after_256_tokens():
    corpus = numbered_corpus([300, 1])
    tokens, lengths, _ = corpus.batch(torch.tensor([1, 0]))
    assert tokens[0].tolist() == [[301], [1]]
    assert tokens[-1].tolist() == [[0], [256]]
    assert lengths.tolist() == [1, 256]


@pytest.mark.parametrize("plan", [Corpus.by_length, Corpus.shuffled])
def test_batches_contain_every_row_once(plan):
    rows = torch.arange(1, 100, 2)
    batches = plan(numbered_corpus(LENGTHS), rows, 4)
    assert torch.cat(batches).sort().values.equal(rows)


def test_batches_by_length_go_from_short_to_long():
    batches = numbered_corpus(LENGTHS).by_length(torch.arange(100), 4)
    assert LENGTHS[torch.cat(batches)].tolist() == list(range(1, 101))


def test_shuffled_batches_hold_texts_of_similar_length_in_no_order():
    torch.manual_seed(0)
    batches = numbered_corpus(LENGTHS).shuffled(torch.arange(100), 2)
    shorter, longer = LENGTHS[torch.stack(batches)].T
    assert (longer - shorter == 1).all()
    assert abs(np.corrcoef(shorter, range(50))[0, 1]) < 0.5


# --- the model ----------------------------------------------------------------------------------


def make_model(cell="rnn", pool="last", vocab_sizes=(200,)):
    torch.manual_seed(0)
    sizes = {"num_inputs": 20, "num_hiddens": 3, "num_classes": 4}
    return text_classify.TextClassifier(cell, vocab_sizes, **sizes, pool=pool, dropout=0.5)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_texts_logits_do_not_depend_on_what_it_is_batched_with(cell, pool):
    model = make_model(cell, pool).double().eval()
    tokens = torch.randint(200, (6, 3, 1))
    together = model(tokens, torch.tensor([6, 2, 4]))
    alone = model(tokens[:2, 1:2], torch.tensor([2]))
    torch.testing.assert_close(together[1], alone[0])


def test_the_sum_of_a_tokens_embeddings_has_variance_1():
    model = make_model(vocab_sizes=[1000, 1000, 1000]).eval()
    tokens = torch.randint(1000, (1000, 1, 3))
    assert model.embed(tokens).var().item() == pytest.approx(1, abs=0.05)


def test_a_text_has_one_dropout_mask_for_all_its_steps():
    tokens = torch.randint(200, (5, 2, 1))
    is_dropped = make_model().embed(tokens) == 0  # (T, B, D)
    assert (is_dropped == is_dropped[0]).all()
    assert not is_dropped[0, 0].equal(is_dropped[0, 1])


def test_about_the_given_share_of_words_is_hidden_and_nothing_else():
    tokens = torch.full((100, 50, 2), 7)
    words, characters = text_classify.hide_words(tokens, 0.3).unbind(2)
    assert words.unique().tolist() == [1, 7]
    assert (words == 1).sum().item() == pytest.approx(1500, abs=150)
    assert (characters == 7).all()
    assert (tokens == 7).all()


def test_the_gradient_of_a_linear_network_halves_with_every_step():
    model = make_model()
    model.recurrence.W_xh.data *= 1e-4  # tanh(x) = x for small x
    model.recurrence.W_hh.data = torch.eye(3) / 2
    corpus = numbered_corpus([44, 40, 50, 39])  # the last text is too short
    reach = text_classify.gradient_reach(model, corpus, torch.arange(4))
    np.testing.assert_allclose(reach, 0.5 ** np.arange(40), rtol=1e-4)


# --- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(run_main, reviews_path):
    """`train(folder, options)`: a training on the made-up reviews."""

    def train(folder, options, data=reviews_path):
        options = f"{SMALL} {options}".split()
        run_main(text_classify, *options, "--data", data, "--out", folder)

    return train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """The folder of `--model all`."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "--model all --epochs 4")
    return folder


@pytest.fixture(params=CELLS)
def run(request, trained):
    """The folder of one model."""
    return trained / f"text_{request.param}"


@pytest.fixture(scope="module")
def reviews(reviews_path):
    return pd.read_csv(reviews_path)


@pytest.fixture
def predict(run_main, capsys):
    """`predict(text, *checkpoints)`: what --predict prints, as a table."""

    def predict(text, *checkpoints):
        capsys.readouterr()
        options = ["--predict", text, "--device", "cpu", "--checkpoint", *checkpoints]
        run_main(text_classify, *options)
        names = ["predicted", "probability", "text"]
        return pd.read_csv(io.StringIO(capsys.readouterr().out), sep="\t", names=names)

    return predict


@pytest.fixture
def predict_lines(predict, monkeypatch):
    """`predict_lines(texts, *checkpoints)`: the same for the lines of the standard input."""

    def predict_lines(texts, *checkpoints, encoding="utf-8"):
        content = io.BytesIO("\n".join(texts).encode(encoding))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
        return predict("-", *checkpoints)

    return predict_lines


def class_scores(truth, predicted):
    """Precision, recall and F1 of each of the ten classes, in their order."""
    is_hit = pd.Series(np.array(truth) == np.array(predicted))
    scores = pd.DataFrame(index=sorted(text_classify.plots.ENGLISH))
    scores["precision"] = is_hit.groupby(np.array(predicted)).mean()
    scores["recall"] = is_hit.groupby(np.array(truth)).mean()
    scores["f1"] = 2 / (1 / scores["precision"] + 1 / scores["recall"])
    return scores.fillna(0)


def test_every_model_has_a_folder(trained):
    names = sorted(path.name for path in trained.iterdir())
    assert names == ["text_all", "text_bi_lstm", "text_gru", "text_lstm", "text_rnn"]


def test_the_scores_are_those_of_the_predictions(run, read_json):
    table = pd.read_csv(run / "predictions.csv")
    expected = class_scores(table["label"], table["predicted"])
    scores = read_json(run / "metrics.json")["test"]
    assert scores["accuracy"] == pytest.approx((table["label"] == table["predicted"]).mean())
    assert scores["f1_macro"] == pytest.approx(expected["f1"].mean())
    per_class = pd.DataFrame(scores["per_class"]).T.drop(columns="support")
    pd.testing.assert_frame_equal(per_class, expected)


def test_the_predictions_are_those_of_the_saved_model_for_each_text_alone(run, reviews, predict):
    table = pd.read_csv(run / "predictions.csv")
    answers = [predict(text, run / "best.pt") for text in reviews["review"][4::5]]
    expected = pd.concat(answers, ignore_index=True)
    pd.testing.assert_frame_equal(table[expected.columns], expected, atol=2e-4)
    assert table["label"].tolist() == reviews["cat"][4::5].tolist()


def test_the_best_epoch_is_the_one_with_the_highest_validation_score(run, read_json):
    scores = pd.read_csv(run / "history.csv")["validation_f1_macro"]
    assert read_json(run / "metrics.json")["best_epoch"] == scores.argmax() + 1


def test_the_best_validation_score_is_that_of_the_saved_model(run, reviews, predict_lines):
    rows = reviews[3::5]
    answers = predict_lines(rows["review"], run / "best.pt")
    scores = pd.read_csv(run / "history.csv")["validation_f1_macro"]
    expected = class_scores(rows["cat"], answers["predicted"])["f1"].mean()
    assert scores.max() == pytest.approx(expected)


def test_the_comparison_repeats_the_results_of_each_run(trained, read_json):
    rows = read_json(trained / "text_all" / "comparison.json")["rows"]
    for cell, row in zip(CELLS, rows[:-1], strict=True):
        metrics = read_json(trained / f"text_{cell}" / "metrics.json")
        expected = {**metrics, **metrics["test"], "model": row["model"]}
        assert row == {name: expected[name] for name in row}
    titles = [row["model"] for row in rows]
    assert titles == ["RNN", "GRU", "LSTM", "Bi-LSTM", "mean of all"]


def test_the_comparisons_last_row_is_the_mean_of_all(trained, reviews, predict_lines, read_json):
    rows = reviews[4::5]
    checkpoints = [trained / f"text_{cell}" / "best.pt" for cell in CELLS]
    answers = predict_lines(rows["review"], *checkpoints)
    expected = class_scores(rows["cat"], answers["predicted"])
    mean = read_json(trained / "text_all" / "comparison.json")["rows"][-1]
    assert mean["f1_macro"] == pytest.approx(expected["f1"].mean())


def test_the_reach_of_every_gradient_starts_with_1(trained, read_json):
    reach = read_json(trained / "text_all" / "comparison.json")["gradient_reach"]
    assert [values[0] for values in reach.values()] == [1] * 8  # of trained and untrained models


# --- training -----------------------------------------------------------------------------------


def test_validation_and_test_rows_change_no_weight(train, reviews, tmp_path):
    changed = reviews.copy()
    changed.iloc[3::5] = reviews.iloc[0]
    changed.iloc[4::5] = reviews.iloc[0]
    saved = []
    for table in (reviews, changed):
        table.to_csv(tmp_path / "reviews.csv")
        train(tmp_path, "--model rnn --epochs 1", data=tmp_path / "reviews.csv")
        saved.append(torch.load(tmp_path / "text_rnn" / "best.pt"))
    assert saved[0]["vocabularies"] == saved[1]["vocabularies"]
    torch.testing.assert_close(saved[0]["weights"], saved[1]["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("option", ["--label-smoothing", "--word-dropout"])
def test_smoothed_labels_and_hidden_words_keep_a_model_from_being_sure(option, train, tmp_path):
    losses = []
    for share in (0, 0.9):
        train(tmp_path, f"--model gru --epochs 3 --tokens word {option} {share}")
        losses.append(pd.read_csv(tmp_path / "text_gru" / "history.csv")["train_loss"].min())
    assert losses[0] < losses[1] - 0.1


def test_a_second_run_into_the_same_folder_leaves_nothing_of_the_first(train, outcome, tmp_path):
    train(tmp_path / "used", "--model rnn --epochs 2")
    for name in ("used", "new"):
        train(tmp_path / name, "--model rnn --epochs 1 --seed 1")
    assert outcome(tmp_path / "used" / "text_rnn") == outcome(tmp_path / "new" / "text_rnn")


def test_a_stopped_and_resumed_run_ends_as_if_left_alone(train, outcome, tmp_path, monkeypatch):
    options = "--model gru --epochs 4 --patience 0"
    train(tmp_path / "alone", options)
    # Two epochs are saved, then the user stops the run while it saves the third.
    effects = [DEFAULT, DEFAULT, KeyboardInterrupt]
    save = Mock(wraps=support.run.save_checkpoint, side_effect=effects)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(support.run, "save_checkpoint", save)
        train(tmp_path / "stopped", options)
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
    """`start(folder)`: begin or resume a training in a process of its own."""

    def start(folder):
        options = f"{SMALL} --model gru --epochs 60 --patience 0 --resume".split()
        options += ["--data", reviews_path, "--out", folder]
        command = [sys.executable, "-c", START, data_folder, *options]
        root = Path(text_classify.__file__).parent
        return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)

    return start


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(start, outcome, tmp_path):
    start(tmp_path / "alone").communicate()
    random.seed(0)
    for _ in range(20):
        process = start(tmp_path / "killed")
        next(line for line in process.stdout if b"parameters" in line)  # the training begins
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.communicate()
    start(tmp_path / "killed").communicate()
    assert outcome(tmp_path / "killed" / "text_gru") == outcome(tmp_path / "alone" / "text_gru")


def mgu(inputs, state, params):
    """Minimal gated unit (Zhou et al. 2016): one gate forgets and resets."""
    W_xf, W_hf, b_f, W_xh, W_hh, b_h, W_hq, b_q = params
    (H,) = state
    outputs = []
    for X in inputs:
        F = torch.sigmoid(X @ W_xf + H @ W_hf + b_f)
        H_tilde = torch.tanh(X @ W_xh + (F * H) @ W_hh + b_h)
        H = (1 - F) * H + F * H_tilde
        outputs.append(H @ W_hq + b_q)
    return torch.stack(outputs), (H,)


def test_a_fifth_cell_needs_its_loop_and_its_gates(train, predict, tmp_path, monkeypatch):
    monkeypatch.setitem(CELLS, "mgu", mgu)
    monkeypatch.setitem(GATES, "mgu", "fh")
    train(tmp_path, "--model mgu --epochs 4 --tokens word")
    table = pd.read_csv(tmp_path / "text_mgu" / "predictions.csv")
    assert (table["label"] == table["predicted"]).mean() > 0.3  # by chance 0.1
    answer = predict(table["text"][0], tmp_path / "text_mgu" / "best.pt")
    assert answer["predicted"][0] == table["predicted"][0]


# --- prediction and mistakes --------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_the_lines_of_the_input_are_classified(encoding, trained, predict_lines):
    table = pd.read_csv(trained / "text_gru" / "predictions.csv")
    table = pd.concat([table] * 10, ignore_index=True)  # 300 lines, more than are read at once
    answers = predict_lines(table["text"], trained / "text_gru" / "best.pt", encoding=encoding)
    pd.testing.assert_frame_equal(answers, table[answers.columns], atol=2e-4)


def test_several_checkpoints_average_their_probabilities(trained, reviews, predict):
    text = reviews["review"][0]
    checkpoints = [trained / "text_gru" / "best.pt", trained / "text_lstm" / "best.pt"]
    total = 0
    for checkpoint in checkpoints:
        saved = torch.load(checkpoint)
        model = text_classify.build_model(saved)
        model.load_state_dict(saved["weights"])
        cuts = text_classify.cut_words([text])
        total += text_classify.class_shares(cuts, model, config=saved, device="cpu")[0]
    answer = predict(text, *checkpoints)
    assert answer["predicted"][0] == saved["labels"][total.argmax()]
    assert answer["probability"][0] == pytest.approx(total.max().item() / 2, abs=1e-4)


def test_checkpoints_of_different_classes_are_refused(trained, predict, tmp_path):
    checkpoint = trained / "text_rnn" / "best.pt"
    saved = torch.load(checkpoint)
    saved["labels"].reverse()
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(UserError, match="different classes"):
        predict("很好", checkpoint, tmp_path / "other.pt")


mistakes = {
    "--epochs 0": "--epochs",
    "--lr nan": "--lr",
    "--model cnn": "'cnn'",
    "--data absent.csv --out .": "absent.csv does not exist",
    "--checkpoint missing.pt --predict x": "missing.pt is no file",
    "--checkpoint temp.pt --predict x": "of another script",
    "--checkpoint best.pt --predict x --lr 4e-3": "--lr has no effect",
}


@pytest.mark.parametrize("line", mistakes)
def test_a_mistake_ends_with_one_line(line, exit_status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    support.run.save_checkpoint(tmp_path / "temp.pt", {"task": "temp"})
    assert exit_status(text_classify, *line.split()) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert mistakes[line] in message
    assert list(tmp_path.iterdir()) == [tmp_path / "temp.pt"]  # no new file
