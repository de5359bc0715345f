"""Text classification: split, words, ids, batches, the classifier; then the script as a whole."""

import io
import random
import shutil
import subprocess
import sys
import time
from unittest.mock import DEFAULT, Mock

import numpy as np
import pandas as pd
import pytest
import torch

import support.run as runs
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
    split = read(list("ab" * 13)).split
    remainders = {}
    for part, rows in split.items():
        numbers = rows + 1
        remainders[part] = (numbers % 5).unique().tolist()
    assert remainders == {"train": [1, 2, 3], "validation": [4], "test": [0]}


def test_a_stratified_split_takes_70_15_and_15_percent_of_each_class_at_random(read):
    reviews = read(list("a" * 100 + "b" * 20), "很好", "--split=stratified")
    counts = {}
    for part, rows in reviews.split.items():
        counts[part] = np.bincount(reviews.labels[rows]).tolist()
    assert counts == {"train": [70, 14], "validation": [15, 3], "test": [15, 3]}
    assert reviews.split["test"].min() < 70  # in the file's order, row 85 would be the first


def test_rows_without_text_or_label_are_left_out_and_counted(read, capsys):
    labels = list("a b" + "a" * 22)
    texts = ["\ufeff\u3000 \t"] + ["很好"] * 24
    split = read(labels, texts).split
    assert split["train"][:3].tolist() == [2, 5, 6]
    assert "(13 train, 5 validation, 5 test; 2 empty left out)" in capsys.readouterr().out


unfit_labels = {"ab" * 12: "too few usable", "a" * 25: "one class", "aaaab" * 5: "no training row"}


@pytest.mark.parametrize("labels", unfit_labels)
def test_unfit_data_are_refused(labels, read):
    with pytest.raises(UserError, match=unfit_labels[labels]):
        read(list(labels))


def test_columns_can_be_named_and_classes_are_numbered_in_order(read):
    options = ["--text-column", "cat", "--label-column", "review"]
    reviews = read("很好", list("bcabb" * 5), *options)
    assert reviews.classes == ["a", "b", "c"]
    assert reviews.labels[:4].tolist() == [1, 2, 0, 1]


def test_an_unknown_column_is_answered_with_the_names_of_all(read):
    with pytest.raises(UserError, match="no column 'x'; its columns are: cat, review"):
        read(["a"] * 25, "很好", "--text-column", "x")


def test_one_column_is_not_text_and_label_at_once(read):
    with pytest.raises(UserError, match="--text-column and --label-column are the same"):
        read(["a"] * 25, "很好", "--text-column", "cat")


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


def test_a_text_without_words_is_one_token():
    assert tokenize([], "word") == {"word": ["\0"]}
    assert tokenize([], "word+char") == {"word": ["\0"], "char": ["\0"]}


def test_tokens_are_words():
    assert tokenize(["很", "清晰"], "word") == {"word": ["很", "清晰"]}


def test_or_tokens_are_characters_beside_their_words():
    tokens = tokenize(["很", "清晰"], "word+char")
    assert tokens == {"word": ["很", "清晰", "清晰"], "char": ["很", "清", "晰"]}


def test_a_pair_is_a_character_and_the_next_one_of_the_text():
    tokens = tokenize(["很", "清晰"], "word+char+pair")
    assert list(tokens) == ["word", "char", "pair"]
    assert tokens["pair"] == ["很清", "清晰", "晰"]


def test_a_vocabulary_holds_what_is_there_twice_the_most_frequent_first():
    cuts = [["清晰", "好"], ["清晰", "好"], ["好", "清洁", "清楚"]]
    words = ["好", "清晰"]  # a word counts once, not once a character
    assert build_vocabularies(cuts, "word") == {"word": words}
    assert build_vocabularies(cuts, "word+char") == {"word": words, "char": ["清", "好", "晰"]}


def test_a_pair_must_be_there_twenty_times():
    cuts = [["很", "好"]] * 19 + [["很", "好看"], ["好看"]]
    pairs = build_vocabularies(cuts, "word+char+pair")["pair"]
    assert pairs == ["很好"]  # twenty times; "好" at the end 19 times


def test_ids_begin_at_2_and_1_is_unknown():
    vocabularies = {"word": ["好", "清晰"], "char": ["晰", "好"]}
    texts = text_classify.encode([["很", "清晰", "好"], []], "word+char", vocabularies)
    first, without_words = texts
    assert first.tolist() == [[1, 1], [3, 1], [3, 2], [2, 3]]
    assert without_words.tolist() == [[1, 1]]


# --- batches ------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(0).permutation(100) + 1  # 1 to 100 in random order


def numbered_corpus(lengths):
    """A corpus whose tokens are numbered 1, 2, 3, ... through all texts."""
    ids = torch.arange(sum(lengths))[:, None] + 1
    labels = np.arange(len(lengths))
    return Corpus(ids.split(list(lengths)), labels, device="cpu")


def test_a_batch_is_padded_with_0_and_texts_are_cut_after_256_tokens():
    rows = torch.tensor([1, 0])
    tokens, lengths, labels = numbered_corpus([300, 1]).batch(rows)
    assert tokens[0].tolist() == [[301], [1]]
    assert tokens[-1].tolist() == [[0], [256]]
    assert lengths.tolist() == [1, 256]
    assert labels.tolist() == [1, 0]


def test_shuffled_batches_contain_every_row_once_beside_one_of_similar_length():
    torch.manual_seed(0)
    batches = numbered_corpus(LENGTHS).shuffled(torch.arange(100), 2)
    shorter, longer = LENGTHS[torch.stack(batches)].T
    assert sorted(shorter) == list(range(1, 101, 2))
    assert (longer == shorter + 1).all()
    assert abs(np.corrcoef(shorter, range(50))[0, 1]) < 0.5  # in no order


def test_batches_do_not_follow_the_order_of_the_file():
    torch.manual_seed(0)  # the real file stands class by class
    batches = numbered_corpus([1] * 400).shuffled(torch.arange(400), 2)
    first, second = torch.stack(batches).T
    distance = (first - second).abs().double().mean()
    assert 100 < distance < 167  # 400 / 3 for two rows by chance


# --- the model ----------------------------------------------------------------------------------


def make_model(cell="rnn", pool="last", vocab_sizes=(200,), num_hiddens=3):
    torch.manual_seed(0)
    sizes = {"num_inputs": 20, "num_hiddens": num_hiddens, "num_classes": 4}
    return text_classify.TextClassifier(cell, vocab_sizes, **sizes, pool=pool, dropout=0.5)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_texts_logits_do_not_depend_on_what_it_is_batched_with(cell, pool):
    model = make_model(cell, pool).double().eval()
    tokens = torch.randint(200, (6, 3, 1))
    lengths = torch.tensor([6, 2, 4])
    together = model(tokens, lengths)
    alone = model(tokens[:2, [1]], lengths[[1]])
    torch.testing.assert_close(together[1], alone[0])


def test_the_sum_of_a_tokens_embeddings_has_variance_1():
    model = make_model(vocab_sizes=[1000, 1000, 1000]).eval()
    tokens = torch.randint(1000, (1000, 1, 3))
    inputs = model.embed(tokens)
    assert 0.95 < inputs.var() < 1.05


def test_a_text_has_one_dropout_mask_for_all_its_steps():
    tokens = torch.randint(200, (5, 2, 1))
    is_dropped = make_model().embed(tokens) == 0  # (T, B, D)
    assert (is_dropped == is_dropped[0]).all()
    assert not is_dropped[0, 0].equal(is_dropped[0, 1])


def test_dropout_hides_half_of_the_pooled_states():
    model = make_model(num_hiddens=100)
    tokens = torch.randint(200, (5, 1, 1))
    logits = model(tokens, torch.tensor([5]))
    logits.sum().backward()
    unused = model.recurrence.W_hq.grad.sum(dim=1) == 0  # (h,)
    assert 30 < unused.sum() < 70


def test_the_gradient_of_a_linear_network_halves_with_every_step():
    model = make_model()
    model.recurrence.W_xh.data *= 1e-4  # tanh(x) = x for small x
    model.recurrence.W_hh.data = torch.eye(3) / 2
    corpus = numbered_corpus([44, 40, 50, 39])  # the last text is too short
    reach = text_classify.gradient_reach(model, corpus, torch.arange(4))
    norms = 0.5 ** np.arange(40)
    np.testing.assert_allclose(reach, norms / norms.sum(), rtol=1e-4)


def test_the_reach_is_measured_on_texts_from_all_over_the_file():
    texts = [torch.ones(40, 1, dtype=torch.int32)] * 1200
    corpus = Corpus(texts, labels=np.zeros(1200, int), device="cpu")
    corpus.batch = Mock(wraps=corpus.batch)
    text_classify.gradient_reach(make_model(), corpus, torch.arange(1200))
    rows = torch.cat([call.args[0] for call in corpus.batch.call_args_list])
    assert sorted(rows.tolist()) == list(range(0, 1200, 3))  # the real file stands class by class


def test_short_texts_alone_have_no_reach():
    corpus = numbered_corpus([39, 1])
    assert text_classify.gradient_reach(make_model(), corpus, torch.arange(2)) == []


# --- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(run_main, reviews_path):
    """`train(folder, model, options)`: train on the made-up reviews; returns the run's folder."""

    def train(folder, model, options, data=reviews_path):
        options = f"{SMALL} --model {model} {options}".split()
        run_main(text_classify, *options, "--data", data, "--out", folder)
        return folder / f"text_{model}"

    return train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """The folder of `--model all`."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "all", "--epochs 4")
    return folder


@pytest.fixture
def folder(trained):
    """The folder of the LSTM, whose best epoch, the third of four, is not its last."""
    return trained / "text_lstm"


@pytest.fixture
def predict(run_main, capsys):
    """`predict(text, *checkpoints)`: what --predict prints, as a table."""

    def predict(text, *checkpoints):
        capsys.readouterr()
        run_main(text_classify, "--predict", text, "--checkpoint", *checkpoints)
        output = io.StringIO(capsys.readouterr().out)
        return pd.read_csv(output, sep="\t", names=["predicted", "probability", "text"])

    return predict


@pytest.fixture
def predict_lines(predict, monkeypatch):
    """`predict_lines(texts, *checkpoints)`: the same for lines of the standard input."""

    def predict_lines(texts, *checkpoints):
        stdin = io.BytesIO("\n".join(texts).encode("utf-16"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        return predict("-", *checkpoints)

    return predict_lines


@pytest.fixture
def predict_rows(reviews_path, predict_lines):
    """`predict_rows(first, *checkpoints)`: every fifth review, and its label."""

    def predict_rows(first, *checkpoints):
        reviews = pd.read_csv(reviews_path)[first::5]
        table = predict_lines(reviews.review, *checkpoints)
        table["label"] = reviews.cat.array
        return table

    return predict_rows


CLASSES = ["书籍", "平板", "手机", "水果", "洗发水", "热水器", "蒙牛", "衣服", "计算机", "酒店"]


def scores_by_class(table):
    """precision, recall, f1 and support of each class of a table of predictions."""
    support = table.label.value_counts()
    predicted = table.predicted.value_counts()
    hits = table.label[table.label == table.predicted].value_counts()
    scores = pd.DataFrame(index=CLASSES)
    scores["precision"] = hits / predicted
    scores["recall"] = hits / support
    scores["f1"] = 2 * hits / (support + predicted)
    scores["support"] = support
    return scores.fillna(0)  # a class without a hit


def test_the_scores_are_those_of_the_predictions(folder, read_json):
    table = pd.read_csv(folder / "predictions.csv")
    scores = read_json(folder / "metrics.json")["test"]
    expected = scores_by_class(table)
    by_class = pd.DataFrame(scores["per_class"]).T
    pd.testing.assert_frame_equal(by_class, expected, check_dtype=False)
    accuracy = (table.label == table.predicted).mean()
    assert scores["accuracy"] == pytest.approx(accuracy)
    for name in ("precision", "recall", "f1"):
        weighted = np.average(expected[name], weights=expected.support)
        assert scores[f"{name}_macro"] == pytest.approx(expected[name].mean())
        assert scores[f"{name}_weighted"] == pytest.approx(weighted)


def test_the_scores_are_printed(folder, read_json, capsys):
    scores = read_json(folder / "metrics.json")["test"]
    text_classify.print_scores(scores, "title")
    lines = capsys.readouterr().out.splitlines()
    numbers = [f"{scores[f'{name}_macro']:.4f}" for name in ("precision", "recall", "f1")]
    assert lines[1] == "title"
    assert lines[-4].split() == ["macro", "average", *numbers, "30"]
    assert lines[-2] == f"accuracy {scores['accuracy']:.4f}"


def test_the_predictions_are_those_of_the_saved_model_for_the_test_rows(folder, predict_rows):
    table = pd.read_csv(folder / "predictions.csv")
    expected = predict_rows(4, folder / "best.pt")
    pd.testing.assert_frame_equal(table[expected.columns], expected, atol=2e-4)
    assert table.row.tolist() == list(range(5, 151, 5))


def test_the_saved_epoch_has_the_best_validation_score(folder, predict_rows, read_json):
    history = pd.read_csv(folder / "history.csv")
    best = history.validation_f1_macro.argmax()
    table = predict_rows(3, folder / "best.pt")
    f1 = scores_by_class(table).f1.mean()
    assert history.validation_f1_macro[best] == pytest.approx(f1)
    accuracy = (table.label == table.predicted).mean()
    assert history.validation_accuracy[best] == pytest.approx(accuracy)
    assert read_json(folder / "metrics.json")["best_epoch"] == best + 1


@pytest.fixture
def comparison(trained, read_json):
    return read_json(trained / "text_all" / "comparison.json")


def test_the_comparison_repeats_the_results_of_each_run(comparison, trained, read_json):
    table = pd.DataFrame(comparison["rows"])
    assert table.model.tolist() == ["RNN", "GRU", "LSTM", "Bi-LSTM", "mean of all"]
    for i, cell in enumerate(["rnn", "gru", "lstm", "bi_lstm"]):
        metrics = read_json(trained / f"text_{cell}" / "metrics.json")
        assert table.f1_macro[i] == metrics["test"]["f1_macro"]


def test_the_comparisons_last_row_is_the_mean_of_all(comparison, trained, predict_rows):
    table = predict_rows(4, *trained.glob("*/best.pt"))
    f1 = scores_by_class(table).f1.mean()
    assert comparison["rows"][-1]["f1_macro"] == pytest.approx(f1)


def test_the_comparison_has_the_reach_of_each_model_before_and_after_training(comparison):
    reach = comparison["gradient_reach"]
    for title in ["RNN", "GRU", "LSTM", "Bi-LSTM"]:
        assert len(reach[title]) == 40
        assert reach[title] != reach[f"{title}, untrained"]


# --- training -----------------------------------------------------------------------------------


def test_validation_and_test_rows_change_no_weight(train, outcome, reviews_path, tmp_path):
    reviews = pd.read_csv(reviews_path)
    reviews.iloc[3::5] = reviews.iloc[0]
    reviews.iloc[4::5] = reviews.iloc[0]
    changed_path = tmp_path / "changed.csv"
    reviews.to_csv(changed_path)
    _, weights = outcome(train(tmp_path, "rnn", "--epochs 1"))
    _, changed_weights = outcome(train(tmp_path, "rnn", "--epochs 1", data=changed_path))
    assert changed_weights == weights


def test_the_options_are_those_of_the_model(train, tmp_path):
    options = "--epochs 1 --embedding 5 --hidden 3 --pool last --dropout 0.1"
    saved = torch.load(train(tmp_path, "rnn", options) / "best.pt")
    assert saved["weights"]["recurrence.W_xh"].shape == (5, 3)
    assert saved["sizes"]["pool"] == "last"
    assert saved["sizes"]["dropout"] == 0.1


def test_weights_decay_and_gradients_are_clipped(train, tmp_path):
    # Clipped to 1e-12, gradients change nothing; each of 12 steps takes 0.05 * 2 of every weight.
    options = "--epochs 1 --clip 1e-12 --weight-decay 2 --average 0"
    saved = torch.load(train(tmp_path, "rnn", options) / "best.pt")
    torch.manual_seed(0)
    weights = text_classify.build_model(saved).state_dict()
    expected = {name: weight * 0.9**12 for name, weight in weights.items()}
    torch.testing.assert_close(saved["weights"], expected, rtol=0, atol=1e-4)


def test_a_run_stops_after_epochs_without_a_better_score(train, tmp_path):
    folder = train(tmp_path, "rnn", "--epochs 9 --patience 2 --average 0 --lr 1e-12")
    assert len(pd.read_csv(folder / "history.csv")) == 3


def test_weights_that_overflow_end_a_run(train, tmp_path):
    with pytest.raises(UserError, match="the weights of epoch 1 are not finite"):
        train(tmp_path, "rnn", "--lr 1e12 --weight-decay 9")


def test_the_rate_has_fallen_to_a_twentieth_by_the_last_step(train, tmp_path):
    folder = train(tmp_path, "rnn", "--epochs 2 --fall-steps 9999")
    last = torch.load(folder / "last.pt")
    (group,) = last["states"]["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.05 * 0.05)


def test_a_second_run_of_all_removes_the_results_of_all_before_it_trains(
    train, trained, tmp_path, monkeypatch
):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(text_classify, "train", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "all", "")
    assert list(tmp_path.glob("*/*")) == []


def test_a_stopped_and_resumed_run_ends_as_if_left_alone(
    train, outcome, tmp_path, monkeypatch, capsys
):
    options = "--epochs 3 --fall-steps 99"  # the first epoch is the best
    alone = train(tmp_path / "alone", "bi_lstm", options)
    # Two epochs are saved, then the user stops the run while it saves the third.
    effects = [DEFAULT, DEFAULT, KeyboardInterrupt]
    save = Mock(wraps=runs.save_checkpoint, side_effect=effects)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_checkpoint", save)
        train(tmp_path / "stopped", "bi_lstm", options)
    capsys.readouterr()
    resumed = train(tmp_path / "stopped", "bi_lstm", f"{options} --resume")
    assert outcome(resumed) == outcome(alone)
    assert "epoch  2 " not in capsys.readouterr().out


START = """
import pathlib, sys, text_classify
from support import datasets, options
datasets.DATA_DIR = pathlib.Path(sys.argv.pop(1))
options.run_script(text_classify.main)
"""


@pytest.fixture
def start(data_folder, reviews_path, pytestconfig):
    """`start(folder)`: begin or resume a training in a process of its own."""
    options = f"{SMALL} --model gru --epochs 60 --patience 0 --resume".split()
    options += ["--data", reviews_path, "--out"]
    command = [sys.executable, "-c", START, data_folder, *options]
    root = pytestconfig.rootpath
    return lambda out: subprocess.Popen([*command, out], cwd=root, stdout=subprocess.PIPE)


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


def test_a_fifth_cell_is_trained_and_predicts(train, predict, tmp_path, monkeypatch):
    monkeypatch.setitem(CELLS, "elman", CELLS["rnn"])  # under a name without a fast form
    monkeypatch.setitem(GATES, "elman", "h")
    folder = train(tmp_path, "elman", "--epochs 1 --tokens word")
    table = pd.read_csv(folder / "predictions.csv")
    answer = predict(table.text[0], folder / "best.pt")
    assert answer.predicted[0] == table.predicted[0]


# --- prediction and mistakes --------------------------------------------------------------------


def test_many_lines_are_answered_in_their_order(folder, predict_lines):
    texts = [f"第{number}次购买" for number in range(300)]
    table = predict_lines(texts, folder / "best.pt")
    assert table.text.tolist() == texts


def test_a_tab_in_a_text_does_not_begin_another_column(folder, predict):
    answer = predict("很\t好\n", folder / "best.pt")
    assert answer.text[0] == "很 好"


@pytest.fixture
def files(trained, tmp_path, monkeypatch):
    """The files of the working folder: checkpoints that differ in one thing each."""
    monkeypatch.chdir(tmp_path)
    saved = torch.load(trained / "text_rnn" / "best.pt")
    saved["weights"]["recurrence.W_hq"].zero_()  # the logits are b_q
    b_q = saved["weights"]["recurrence.b_q"].zero_()
    torch.save(saved, "unsure.pt")  # each of ten classes has the probability 0.1
    b_q[3] = 99
    torch.save(saved, "sure.pt")
    torch.save({**saved, "classes": list("0123456789")}, "other.pt")
    return sorted(tmp_path.iterdir())


def test_several_checkpoints_average_their_probabilities(files, predict):
    answer = predict("很好", "unsure.pt", "sure.pt")
    assert answer.probability[0] == 0.55


mistakes = {
    "--model cnn": "'cnn'",
    "--data absent.csv --out .": "absent.csv does not exist",
    "--checkpoint sure.pt missing.pt --predict x": "missing.pt is no file",
    "--checkpoint sure.pt other.pt --predict x": "different classes",
}


@pytest.mark.parametrize("line", mistakes)
def test_a_mistake_is_named_and_makes_no_file(line, files, run_main, tmp_path):
    with pytest.raises(UserError, match=mistakes[line]):
        run_main(text_classify, *line.split())
    assert sorted(tmp_path.iterdir()) == files
