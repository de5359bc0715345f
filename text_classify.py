"""Ten-way classification of Chinese shopping reviews with a recurrent network written by hand.

    python text_classify.py --model rnn --epochs 20     train one structure, test it
    python text_classify.py --model all                 train all four and compare them
    python text_classify.py --checkpoint runs/text_lstm/best.pt --predict "屏幕清晰，运行流畅"

Rows i = 1..N of the file: i % 5 == 4 validates, i % 5 == 0 tests, the rest trains; --split has
another way. The vocabulary comes from the training rows; the epoch with the best validation
macro-F1 is tested, once.
"""

import contextlib
import io
import json
import logging
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jieba
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import support.run as runs
from metrics import accuracy, confusion_matrix, precision_recall_f1
from rnn_models import CELLS, POOLS, Recurrence, grad_clipping, num_directions, pool_states
from support import datasets, options, plots
from support.files import UserError, whole_file, write_csv
from support.options import count, count_or_0, positive, share

PAD = 0  # the id behind a text's end
UNK = 1  # the id of a token that is not in the vocabulary
MIN_FREQ = {"word": 2, "char": 2, "pair": 20}  # rarer tokens are UNK
MAX_TOKENS = 256  # longer texts are truncated
BLANKS = "\ufeff \t\r\n\u3000"  # stripped from both ends of a text; some reviews begin with \ufeff
CURVE_ROWS = 5000  # training rows, at most, on which the curves' training loss is measured
REACH = 40  # tokens over which the gradient's reach is measured
PRESETS = {
    "lab": {  # the plain setting of the lab; the dropout stays
        "tokens": "word",
        "pool": "last",
        "epochs": 20,
        "patience": 0,
        "lr": 1e-3,
        "fall_steps": 0,
        "weight_decay": 1e-4,
        "average": 0.0,
    }
}

TOKENS = ("word", "word+char", "word+char+pair")
SPLIT_HELP = "the assignment's rows, or 70/15/15 %% of each class at random"
TOKENS_HELP = "jieba's words; or characters, each with its word, and with the next character"
PREDICT_HELP = "text to classify; - reads one a line from stdin; --predict=TEXT if it begins with -"


# --- options ------------------------------------------------------------------------------------


def parse_args(arguments=None):
    """The command line as a namespace. The defaults were chosen on validation rows."""
    parser = options.make_parser(__doc__, CELLS)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="the lab's plain setting; options beside it win")
    add("--text-column", default="review", help="the file's column of texts")
    add("--label-column", default="cat", help="the file's column of classes")
    add("--split", choices=["fifths", "stratified"], default="fifths", help=SPLIT_HELP)
    add("--tokens", choices=TOKENS, default="word+char+pair", help=TOKENS_HELP)
    add("--embedding", type=count, default=128, help="size D of an embedding")
    add("--hidden", type=count, default=128, help="hidden units h of one direction")
    add("--pool", choices=POOLS, default="max", help="how a text's states become one")
    add("--dropout", type=share, default=0.4, help="share of inputs and pooled states set to 0")
    add("--epochs", type=count, default=20, help="passes over the training rows at most")
    add("--patience", type=count_or_0, default=3, help=options.PATIENCE_HELP)
    add("--batch-size", type=count, default=64, help="texts in one step")
    add("--lr", type=positive, default=4e-3, help="learning rate of AdamW")
    add("--fall-steps", type=count_or_0, default=3500, help=options.FALL_HELP)
    add("--weight-decay", type=options.decay, default=0.2, help="weight decay of AdamW")
    add("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    add("--average", type=share, default=0.998, help="decay of the weights' moving average")
    add("--checkpoint", type=Path, nargs="+", help="best.pt of earlier runs, for --predict")
    add("--predict", metavar="TEXT", help=PREDICT_HELP)
    return options.parse(parser, arguments, PRESETS)


# --- reviews ------------------------------------------------------------------------------------


@dataclass
class Reviews:
    """The reviews: texts, their labels as numbers of classes, and the rows of each part."""

    texts: list[str]
    labels: np.ndarray  # (N,), -1 where the class has no usable row
    classes: list[str]
    split: dict[str, torch.Tensor]  # "train", "validation", "test": row numbers from 0 on
    data: dict  # path, sha256, source and rows of the file, for metrics.json


def read_reviews(args):
    """Read the corpus and split it. Raises UserError for unfit data."""
    frame, data = datasets.load(datasets.REVIEWS, args.data)
    path = data["path"]
    datasets.check_columns(frame, [args.text_column, args.label_column], path)
    if args.text_column == args.label_column:
        raise UserError("--text-column and --label-column are the same; name two columns")
    texts = frame[args.text_column].astype(str).str.strip(BLANKS)
    names = frame[args.label_column].astype(str).str.strip()
    is_usable = (texts != "") & (names != "")
    parts = part_of_each_row(names, args.split)
    split = {}
    for part in ("train", "validation", "test"):
        split[part] = torch.from_numpy(np.flatnonzero(is_usable & (parts == part)))
    classes = sorted(set(names[is_usable]))
    untrained = sorted(set(classes) - set(names[is_usable & (parts == "train")]))
    sizes = ", ".join(f"{len(rows)} {part}" for part, rows in split.items())
    if min(len(rows) for rows in split.values()) < 5:
        raise UserError(f"{path} has too few usable rows: {sizes}; at least 5 of each are needed")
    if len(classes) < 2:
        raise UserError(f"{path} has one class only; name a file with two or more")
    if untrained:
        raise UserError(f"class {untrained[0]!r} of {path} has no training row; leave it out")
    empty = len(texts) - is_usable.sum()
    print(f"{path}: {len(texts)} rows ({sizes}; {empty} empty left out), {len(classes)} classes")
    labels = pd.Index(classes).get_indexer(names)
    return Reviews(texts.tolist(), labels, classes, split, data)


def part_of_each_row(names, split):
    """The part of each row of classes (N,): "train", "validation" or "test".

    split "fifths" is the assignment's; "stratified" takes 70, 15 and 15 % of each class at random,
    as published results on this corpus do.
    """
    parts = np.full(len(names), "train", dtype=object)
    if split == "fifths":
        i = np.arange(1, len(names) + 1)
        parts[i % 5 == 4] = "validation"
        parts[i % 5 == 0] = "test"
    else:
        shuffled = pd.Series(np.random.default_rng(42).permutation(len(names)))
        rank = shuffled.groupby(names).rank(pct=True)  # in its class, from above 0 to 1
        parts[rank > 0.7] = "validation"
        parts[rank > 0.85] = "test"
    return parts


def cut_words(texts):
    """Each text as the list of its words, by jieba in precise mode."""
    jieba.setLogLevel(logging.CRITICAL)  # silent, also if its cache cannot be written
    # jieba's cache is kept here: in the system's folder it may be another user's.
    with contextlib.suppress(OSError):
        datasets.DATA_DIR.mkdir(exist_ok=True)
        jieba.dt.tmp_dir = str(datasets.DATA_DIR)
    return [jieba.lcut(text) for text in texts]


def cached_words(texts, sha256):
    """`cut_words` of a file's texts, kept in data/ because cutting takes half a minute."""
    path = datasets.DATA_DIR / f"words_{sha256[:16]}_{jieba.__version__}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or damaged
        cuts = json.loads(path.read_text(encoding="utf-8"))
        if ["".join(cut) for cut in cuts] == texts:
            return cuts
    print("cutting words ...", flush=True)
    cuts = cut_words(texts)
    with contextlib.suppress(UserError):  # it is only a cache
        with whole_file(path, "w", encoding="utf-8") as stream:
            json.dump(cuts, stream, ensure_ascii=False)
    return cuts


# --- words to ids -------------------------------------------------------------------------------


def tokenize(cut, kind):
    """The tokens of a text that is cut into words: {aspect: list of T tokens}.

    kind "word": a token is a word. Otherwise a token is a character, and kind names its aspects,
    which have a vocabulary and an embedding each: "word", the word that it is in; "char", the
    character itself; "pair", it and the next one (at a text's end, itself alone). A text without
    words becomes one unknown token.
    """
    cut = cut or ["\0"]  # in no vocabulary
    if kind == "word":
        return {"word": cut}
    words = []
    for word in cut:
        words += [word] * len(word)  # each of its characters has it
    text = "".join(cut)
    pairs = [text[i : i + 2] for i in range(len(text))]
    tokens = {"word": words, "char": list(text), "pair": pairs}
    return {aspect: tokens[aspect] for aspect in kind.split("+")}


def build_vocabularies(cuts, kind):
    """{aspect: its frequent tokens, most frequent first} of the training texts; ids begin at 2."""
    counts = {aspect: Counter() for aspect in kind.split("+")}
    for cut in cuts:
        tokens = tokenize(cut, kind)
        tokens["word"] = cut  # a word counts once, however long it is
        for aspect, counter in counts.items():
            counter.update(tokens[aspect])
    vocabularies = {}
    for aspect, counter in counts.items():
        frequent = [token for token, n in counter.most_common() if n >= MIN_FREQ[aspect]]
        vocabularies[aspect] = frequent
    return vocabularies


def encode(cuts, kind, vocabularies):
    """The ids of texts that are cut into words: for each text a tensor (T, aspects) of int32.

    A token that is not in its vocabulary is UNK.
    """
    id_of = {}
    for aspect, vocabulary in vocabularies.items():
        id_of[aspect] = {token: number for number, token in enumerate(vocabulary, start=UNK + 1)}
    ids = []
    for cut in cuts:
        columns = []
        for aspect, tokens in tokenize(cut, kind).items():
            columns.append([id_of[aspect].get(token, UNK) for token in tokens])
        ids.append(torch.from_numpy(np.array(columns, dtype=np.int32).T))
    return ids


class Corpus:
    """The ids of all texts, and the batches made of them."""

    def __init__(self, ids, labels, device):
        """ids: of each text, (T, aspects), from `encode`; labels: (texts,)."""
        self.ids = [text[:MAX_TOKENS] for text in ids]
        self.lengths = torch.tensor([len(text) for text in self.ids])
        self.labels = torch.from_numpy(labels)
        self.device = device

    def by_length(self, rows, batch_size):
        """Rows (n,) as batches of texts of similar length, so that little padding is computed."""
        return rows[torch.argsort(self.lengths[rows], stable=True)].split(batch_size)

    def shuffled(self, rows, batch_size):
        """Batches for training: sorted within random blocks of fifty batches, in random order."""
        batches = []
        for block in rows[torch.randperm(len(rows))].split(50 * batch_size):
            batches += self.by_length(block, batch_size)
        return [batches[i] for i in torch.randperm(len(batches)).tolist()]

    def batch(self, rows):
        """tokens (T, B, aspects), padded to the longest, lengths (B,) and labels (B,)."""
        ids = [self.ids[row] for row in rows.tolist()]
        tokens = pad_sequence(ids, padding_value=PAD)
        batch = (tokens, self.lengths[rows], self.labels[rows])
        # non_blocking: a GPU's earlier steps are not waited for.
        return [tensor.to(self.device, non_blocking=True) for tensor in batch]


def make_corpus(args, reviews, device):
    """The vocabularies of the training texts, and the corpus of all texts."""
    cuts = cached_words(reviews.texts, reviews.data["sha256"])
    train_cuts = [cuts[row] for row in reviews.split["train"].tolist()]
    vocabularies = build_vocabularies(train_cuts, args.tokens)
    ids = encode(cuts, args.tokens, vocabularies)
    return vocabularies, Corpus(ids, reviews.labels, device)


# --- the model ----------------------------------------------------------------------------------


class TextClassifier(nn.Module):
    """Embeddings, recurrence, pooling over time, linear layer: the logits of a text's classes."""

    def __init__(self, cell, vocab_sizes, num_inputs, num_hiddens, num_classes, pool, dropout):
        """vocab_sizes: a size for each aspect of a token (word, character, pair).

        num_inputs: D, an embedding's size; num_hiddens: h; dropout: share of the embedded inputs
        and of the pooled states set to zero in training. Raises ValueError for an unknown cell.
        """
        super().__init__()
        self.pool = pool
        self.embeddings = nn.ModuleList()
        for size in vocab_sizes:
            embedding = nn.Embedding(size, num_inputs)
            nn.init.normal_(embedding.weight, std=len(vocab_sizes) ** -0.5)  # the sum: variance 1
            self.embeddings.append(embedding)
        self.dropout = nn.Dropout(dropout)
        self.recurrence = Recurrence(cell, num_inputs, num_hiddens, num_classes)

    def embed(self, tokens):
        """Inputs of the recurrence (T, B, D): the sum over aspects of tokens (T, B, aspects)."""
        aspects = zip(self.embeddings, tokens.unbind(2), strict=True)
        inputs = sum(embedding(ids) for embedding, ids in aspects)  # (T, B, D)
        # One dropout mask for all steps of a text (Gal and Ghahramani 2016).
        mask = self.dropout(torch.ones_like(inputs[:1]))  # (1, B, D)
        return inputs * mask

    def classify(self, inputs, lengths):
        """Logits (B, K) of embedded inputs (T, B, D) of lengths (B,)."""
        states = self.recurrence(inputs, lengths)  # (T, B, h), of "bi_lstm" (T, B, 2h)
        is_bidirectional = num_directions(self.recurrence.cell) == 2
        pooled = pool_states(states, lengths, self.pool, is_bidirectional)  # (B, h or 2h)
        return self.recurrence.output(self.dropout(pooled))

    def forward(self, tokens, lengths):
        """Logits (B, K) of tokens (T, B, aspects), padded on the right, of lengths (B,) >= 1."""
        return self.classify(self.embed(tokens), lengths)


def build_model(config):
    """The untrained classifier of a checkpoint's config."""
    return TextClassifier(config["model"], **config["sizes"])


# --- training -----------------------------------------------------------------------------------


def make_config(args, cell, reviews, vocabularies):
    """What best.pt holds beside the weights."""
    sizes = {
        "vocab_sizes": [len(vocabulary) + UNK + 1 for vocabulary in vocabularies.values()],
        "num_inputs": args.embedding,
        "num_hiddens": args.hidden,
        "num_classes": len(reviews.classes),
        "pool": args.pool,
        "dropout": args.dropout,
    }
    return {
        "task": "text",
        "model": cell,
        "sizes": sizes,
        "tokens": args.tokens,
        "vocabularies": vocabularies,
        "classes": reviews.classes,
        "sha256": reviews.data["sha256"],
    }


def train(args, config, reviews, corpus):
    """Train one structure; returns its run, and the model with the best epoch's weights."""
    train_rows = reviews.split["train"]
    batches_an_epoch = math.ceil(len(train_rows) / args.batch_size)
    num_steps = args.epochs * (batches_an_epoch // runs.world_size())

    torch.manual_seed(args.seed)
    model = build_model(config).to(corpus.device)
    curve_rows = train_rows[:: len(train_rows) // CURVE_ROWS + 1]  # every n-th
    optimizer = AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = LambdaLR(optimizer, runs.rise_and_fall(min(args.fall_steps, num_steps)))
    # Validation, test and best.pt use the moving average of the weights.
    average = runs.MovingAverage(model, args.average)
    parallel_model = DistributedDataParallel(model) if runs.world_size() > 1 else model
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    run = runs.start(args, config, stateful)

    for epoch in run.epochs(args.epochs, args.patience):
        model.train()
        for rows in run.progress(corpus.shuffled(train_rows, args.batch_size)):
            tokens, lengths, labels = corpus.batch(rows)
            logits = parallel_model(tokens, lengths)  # (B, K)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()  # back-propagation through time
            grad_clipping(model.parameters(), args.clip)
            optimizer.step()
            schedule.step()  # the next step's rate
            average.update(model)
        runs.check_finite(model, epoch)
        # The epoch with the best validation macro-F1 is the one that is tested.
        scores = validate(average.module, corpus, reviews, curve_rows)
        run.end_epoch(scores, score=scores["validation_f1_macro"])

    model.load_state_dict(run.best["weights"])  # the moving average after the best epoch
    return run, model


@torch.no_grad()
def probabilities(model, corpus, rows):
    """Class probabilities (n, K) of the texts in rows (n,), in their order, on the CPU."""
    model.eval()
    by_row = torch.empty(len(corpus.ids), len(model.recurrence.b_q))  # (texts, K)
    for batch in corpus.by_length(rows, 128):
        tokens, lengths, _ = corpus.batch(batch)
        by_row[batch] = model(tokens, lengths).softmax(dim=1).cpu()
    return by_row[rows]


def validate(model, corpus, reviews, curve_rows):
    """Scores of an epoch: on validation rows and, for the curves, on some training rows.

    The cross-entropies are without dropout, so that they compare.
    """
    scores = {}
    for part, rows in (("train", curve_rows), ("validation", reviews.split["validation"])):
        p = probabilities(model, corpus, rows)
        truth = corpus.labels[rows]
        matrix = confusion_matrix(truth, p.argmax(dim=1), num_classes=len(reviews.classes))
        log_p = p.clamp_min(1e-12).log()
        scores[f"{part}_loss"] = F.nll_loss(log_p, truth).item()
        scores[f"{part}_accuracy"] = accuracy(matrix)
        if part == "validation":
            _, _, scores["validation_f1_macro"] = precision_recall_f1(matrix, "macro")
    return scores


# --- the test -----------------------------------------------------------------------------------


def test(run, model, reviews, corpus):
    """Test a trained structure, write its results; returns its metrics and probabilities."""
    run.save_best()
    p = probabilities(model, corpus, reviews.split["test"])
    matrix, scores = test_scores(reviews, p)
    split = {part: len(rows) for part, rows in reviews.split.items()}
    metrics = run.write_metrics(reviews.data, split, scores)
    write_predictions(run.folder / "predictions.csv", reviews, p)

    title = f"{runs.title_of(metrics['model'])}{runs.sample_note(reviews.data)}"
    print_scores(scores, f"{title}, test rows, epoch {metrics['best_epoch']}")
    history = pd.DataFrame(run.history)
    losses = {"train": history["train_loss"], "validation": history["validation_loss"]}
    accuracies = {"train": history["train_accuracy"], "validation": history["validation_accuracy"]}
    panels = {f"{title}: cross-entropy, no dropout": losses, f"{title}: accuracy": accuracies}
    plots.draw_curves(run.folder / "curves.png", panels)
    plots.draw_confusion(run.folder / "confusion.png", matrix, reviews.classes, title)
    print(f"results in {run.folder}: open curves.png and confusion.png; classify a text with")
    print(f'  python text_classify.py --checkpoint "{run.folder}/best.pt" --predict "..."')
    return metrics, p


def test_scores(reviews, p):
    """The confusion matrix (K, K) of test probabilities (n, K), and "test" of metrics.json."""
    truth = reviews.labels[reviews.split["test"]]
    matrix = confusion_matrix(truth, p.argmax(dim=1), num_classes=len(reviews.classes))
    scores = {"accuracy": accuracy(matrix)}
    for average in ("macro", "weighted"):
        precision, recall, f1 = precision_recall_f1(matrix, average)
        scores[f"precision_{average}"] = precision
        scores[f"recall_{average}"] = recall
        scores[f"f1_{average}"] = f1
    precision, recall, f1 = precision_recall_f1(matrix)
    support = matrix.sum(axis=1)
    table = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    scores["per_class"] = pd.DataFrame(table, index=reviews.classes).to_dict("index")
    return matrix, scores


def print_scores(scores, title):
    """Print precision, recall, F1 and support of each class and of their averages."""
    rows = dict(scores["per_class"])
    support = sum(row["support"] for row in rows.values())
    for average in ("macro", "weighted"):
        row = {name: scores[f"{name}_{average}"] for name in ("precision", "recall", "f1")}
        rows[f"{average} average"] = {**row, "support": support}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    with pd.option_context("display.unicode.east_asian_width", True):
        print(f"\n{title}\n{frame.to_string(float_format='{:.4f}'.format)}")
    print(f"accuracy {scores['accuracy']:.4f}\n")


def write_predictions(path, reviews, p):
    """Write each test row's number in the file, truth, prediction, its probability, and text."""
    rows = reviews.split["test"].numpy()
    highest, predicted = p.max(dim=1)
    classes = np.array(reviews.classes, dtype=object)
    table = {
        "row": rows + 1,
        "label": classes[reviews.labels[rows]],
        "predicted": classes[predicted.numpy()],
        "probability": highest.numpy().round(4),
        "text": [reviews.texts[row] for row in rows],
    }
    write_csv(path, pd.DataFrame(table))


# --- comparison ---------------------------------------------------------------------------------


def gradient_reach(model, corpus, rows):
    """How far back an input counts: the gradient's norm ||dL/dX_t|| of the embedded input at each
    distance 0..REACH-1 from a text's end, as a share of the sum of these norms.

    The mean over up to 512 texts of at least REACH tokens in rows; [] if no text is long enough.
    """
    model.eval()
    rows = rows[corpus.lengths[rows] >= REACH]
    if len(rows) == 0:
        return []
    rows = rows[:: len(rows) // 512 + 1]  # every n-th: the file stands class by class
    shares = []
    for batch in corpus.by_length(rows, 64):
        tokens, lengths, labels = corpus.batch(batch)
        inputs = model.embed(tokens).detach().requires_grad_()  # (T, B, D)
        loss = F.cross_entropy(model.classify(inputs, lengths), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, inputs)
        distances = torch.arange(REACH, device=corpus.device)[:, None]
        norms = gradient.norm(dim=2).gather(0, lengths - 1 - distances)  # (REACH, B)
        shares.append(norms / norms.sum(dim=0).clamp_min(1e-30))
    return torch.cat(shares, dim=1).mean(dim=1).tolist()


def reach_before_and_after(seed, model, config, corpus, rows):
    """{title: gradient_reach} of a trained model and of the weights that training began with."""
    torch.manual_seed(seed)
    fresh = build_model(config).to(corpus.device)
    title = runs.title_of(config["model"])
    return {
        title: gradient_reach(model, corpus, rows),
        f"{title}, untrained": gradient_reach(fresh, corpus, rows),
    }


def compare(args, reviews, results, reach):
    """The structures side by side, and the mean of their probabilities: text_all/.

    results: (content of metrics.json, test probabilities (n, K)) of each structure.
    """
    shown_scores = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
    rows = []
    for metrics, _ in results:
        row = {"model": runs.title_of(metrics["model"])}
        for name in shown_scores:
            row[name] = metrics["test"][name]
        for name in ("parameters", "seconds_per_epoch", "best_epoch"):
            row[name] = metrics[name]
        rows.append(row)
    mean_p = torch.stack([p for _, p in results]).mean(dim=0)
    _, scores = test_scores(reviews, mean_p)
    mean_row = {"model": "mean of all"}
    for name in shown_scores:
        mean_row[name] = scores[name]
    mean_row["parameters"] = sum(row["parameters"] for row in rows)
    suffix = runs.sample_note(reviews.data)
    print(f"\nTest rows{suffix}; precision, recall and F1 are macro averages.")
    panels = {
        f"Validation cross-entropy{suffix}": "validation_loss",
        "Validation macro-F1": "validation_f1_macro",
    }
    content = {
        "argv": sys.argv[1:],
        "seed": args.seed,
        "data": reviews.data,
        "rows": [*rows, mean_row],
        "gradient_reach": reach,
    }
    cells = [metrics["model"] for metrics, _ in results]
    runs.write_comparison(args.out, "text", cells, content, panels)
    if any(reach.values()):  # if some texts were long enough
        title = f"--pool {args.pool}, validation texts{suffix}"
        plots.draw_gradients(args.out / "text_all" / "gradients.png", reach, title)


# --- prediction ---------------------------------------------------------------------------------


def on_one_line(text):
    """A text without tabs and line ends."""
    return " ".join(text.split())


def predict(args, device):
    """Print label, probability and text of one text, or of each line of the standard input."""
    classifiers = []
    for path in args.checkpoint:
        config = runs.load_checkpoint(path, "text")
        model = build_model(config).to(device)
        runs.load_weights(model, config["weights"], path)
        classifiers.append((model, config))
    classes = classifiers[0][1]["classes"]
    if any(config["classes"] != classes for _, config in classifiers):
        raise UserError("the checkpoints have different classes; name models of the same data")
    texts = read_lines() if args.predict == "-" else [args.predict]
    for first in range(0, len(texts), 256):
        batch = [text.strip(BLANKS) for text in texts[first : first + 256]]
        cuts = cut_words(batch)
        p = [classify_cuts(cuts, model, config, device) for model, config in classifiers]
        highest, predicted = torch.stack(p).mean(dim=0).max(dim=1)
        for text, probability, k in zip(batch, highest.tolist(), predicted.tolist(), strict=True):
            print(on_one_line(classes[k]), f"{probability:.4f}", on_one_line(text), sep="\t")


def read_lines():
    """The lines of the standard input. Raises UserError for what is no text."""
    try:
        return list(io.StringIO(datasets.decode(sys.stdin.buffer.read())))  # at line feeds only
    except UnicodeDecodeError as error:
        raise UserError("the input is no UTF-8, UTF-16 or GB18030; save it as UTF-8") from error


def classify_cuts(cuts, model, config, device):
    """The probabilities (n, K) that a saved model gives to texts cut into words."""
    ids = encode(cuts, config["tokens"], config["vocabularies"])
    labels = np.zeros(len(cuts), np.int64)  # not known
    corpus = Corpus(ids, labels, device)
    return probabilities(model, corpus, torch.arange(len(cuts)))


# --- from arguments to results ------------------------------------------------------------------


def main():
    """Train what --model names, test it, and compare all; or predict with a saved model."""
    args = parse_args()
    device = options.pick_device(args.device)
    if args.predict is not None:
        predict(args, device)
        return
    runs.join_processes(device)

    reviews = read_reviews(args)
    options.check_folder(args.out)
    runs.check_same_data(reviews.data)
    vocabularies, corpus = make_corpus(args, reviews, device)

    cells = list(CELLS) if args.model == "all" else [args.model]
    if not args.resume:
        # All before the first training, so that a later --resume finds nothing of an earlier run.
        names = ["all", *cells]  # a comparison with what is replaced would be wrong
        runs.remove_results(args.out / f"text_{name}" for name in names)
    results = []
    reach = {}
    for cell in cells:
        config = make_config(args, cell, reviews, vocabularies)
        run, model = train(args, config, reviews, corpus)
        if runs.is_first():
            results.append(test(run, model, reviews, corpus))
            if args.model == "all":
                rows = reviews.split["validation"]
                reach.update(reach_before_and_after(args.seed, model, config, corpus, rows))
    if args.model == "all" and runs.is_first():
        compare(args, reviews, results, reach)


if __name__ == "__main__":
    options.run_script(main)
