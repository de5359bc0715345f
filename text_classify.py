"""Ten-way classification of Chinese shopping reviews with a recurrent network written by hand.

    python text_classify.py --model rnn --epochs 20     train one structure, test it
    python text_classify.py --model all                 train all four and compare them
    python text_classify.py --checkpoint runs/text_lstm/best.pt --predict "屏幕清晰，运行流畅"

Rows i = 1..N of the file: i % 5 == 4 validates, i % 5 == 0 tests, the rest trains. The vocabulary
comes from the training rows; the epoch with the best validation macro-F1 is tested, once.
"""

import contextlib
import io
import json
import logging
import sys
from dataclasses import dataclass
from itertools import chain, islice

import jieba
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

import datasets
import plots
import training
from datasets import UserError
from metrics import accuracy, confusion_matrix, precision_recall_f1
from rnn_models import CELLS, POOLS, TextClassifier, init_state
from training import NAMES, Run, number

PAD, UNK = 0, 1
ALONE, FIRST, INSIDE, LAST = 1, 2, 3, 4  # places of a character in its word
BLANKS = "\ufeff \t\r\n\u3000"  # stripped from both ends of a text
PAIR_MIN_FREQ = 20  # pairs of characters are many; rarer ones are UNK
CURVE_ROWS = 5000  # training rows on which the curves' training loss is measured
REACH = 40  # tokens over which the gradient's reach is measured
SCORES = ["accuracy", "precision_macro", "recall_macro", "f1_macro"]
# Chosen on validation rows; 3534 steps are six epochs.
DEFAULTS = {
    "model": "lstm", "epochs": 20, "patience": 3, "batch_size": 64, "hidden": 128, "dropout": 0.4,
    "lr": 4e-3, "descent": 3534, "weight_decay": 0.2, "average": 0.998,
}  # fmt: skip
PRESETS = {"lab": {  # the lab's plain setting
    "tokens": "word", "pool": "last", "epochs": 20, "patience": 0, "lr": 1e-3, "descent": 0,
    "weight_decay": 1e-4, "average": 0.0, "label_smoothing": 0.0, "word_dropout": 0.0,
}}  # fmt: skip


def parse_args(arguments=None):
    """The command line as a namespace."""
    parser = training.make_parser(__doc__, **DEFAULTS)
    add = parser.add_argument
    share = number(float, 0, 0.999)
    add("--preset", choices=PRESETS, help="the lab's plain setting; options given beside it win")
    add("--tokens", choices=["both", "word"], default="both", help="jieba's words, or characters "
        "with their word, their place in it, and the next character")  # fmt: skip
    add("--embedding", type=number(int, 1, 8192), default=128, help="size D of an embedding")
    add("--pool", choices=POOLS, default="max", help="how a text's states become one")
    add("--min-freq", type=number(int, 1, 10**9), default=2, help="rarer tokens are <unk>")
    add("--max-tokens", type=number(int, 1, 10_000), default=256, help="longer texts are cut")
    add("--label-smoothing", type=share, default=0.1, help="target's share spread over all classes")
    add("--word-dropout", type=share, default=0.2, help="share of words hidden in training")
    add("--predict", metavar="TEXT", help="classify this text, with - each line of the input; "
        "--predict=TEXT for a text that begins with -")  # fmt: skip
    return training.parse(parser, arguments, PRESETS)


# --- reviews ------------------------------------------------------------------------------------


@dataclass
class Reviews:
    """The corpus: texts, their labels as numbers of classes, and the rows of each part."""

    texts: list[str]
    labels: np.ndarray  # (N,)
    classes: list[str]
    split: dict[str, torch.Tensor]  # "train", "validation", "test": row numbers from 0 on
    data: dict  # of metrics.json


def read_reviews(args):
    """Read the corpus and split it. Raises UserError for unfit data."""
    frame, data = datasets.load(datasets.REVIEWS, args.data)
    path = data["path"]
    datasets.check_columns(frame, ("review", "cat"), path)
    texts = frame["review"].astype(str).str.strip(BLANKS).tolist()
    names = frame["cat"].astype(str).str.strip().to_numpy(object)
    usable = np.array([text != "" for text in texts], bool) & (names != "")
    i = np.arange(1, len(texts) + 1)
    parts = {"train": ~np.isin(i % 5, (0, 4)), "validation": i % 5 == 4, "test": i % 5 == 0}
    split = {part: torch.from_numpy(np.flatnonzero(usable & own)) for part, own in parts.items()}
    for part, rows in split.items():
        if len(rows) < 5:
            raise UserError(f"{path} has {len(rows)} usable {part} rows, at least 5 are needed")
    classes = sorted(set(names[usable]))
    if len(classes) < 2:
        raise UserError(f"{path} has one class only; name a file with two or more")
    absent = sorted(set(classes) - set(names[split["train"].numpy()]))
    if absent:
        raise UserError(f"class {absent[0]!r} of {path} has no training row; leave it out")
    sizes = ", ".join(f"{len(rows)} {part}" for part, rows in split.items())
    empty = int((~usable).sum())
    print(f"{path}: {len(texts)} rows ({sizes}; {empty} empty left out), {len(classes)} classes")
    labels = pd.Index(classes).get_indexer(names)  # -1: left out
    return Reviews(texts, labels, classes, split, data)


def cut_words(texts):
    """Each text as the list of its words, by jieba in precise mode."""
    jieba.setLogLevel(logging.WARNING)
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
    whole = datasets.whole_file(path, "w", encoding="utf-8")
    with contextlib.suppress(UserError, ValueError), whole as stream:  # it is only a cache
        json.dump(cuts, stream, ensure_ascii=False)
    return cuts


def tokenize(cuts, kind):
    """Tokens of texts cut into words: {aspect: (all tokens,)}, and their number in each text.

    kind: "word" for words, "both" for characters with four aspects: the character, its word, its
    pair with the next character ("\\n" behind a text), its place in the word. Characters are code
    points, a pair is two of them in one number. A text without words becomes one unknown token.
    """
    cuts = [cut or ["\0"] for cut in cuts]
    words = np.array(list(chain.from_iterable(cuts)), dtype=object)
    counts = np.fromiter(map(len, cuts), np.int64)
    if kind == "word":
        return {"word": words}, counts
    lengths = np.fromiter(map(len, words), np.int64)
    ends = np.cumsum(lengths)  # of the words
    text_ends = ends[np.cumsum(counts) - 1]
    chars = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32).astype(np.int64)
    following = np.append(chars[1:], 0)
    following[text_ends - 1] = ord("\n")
    place = np.full(len(chars), INSIDE)
    place[ends - lengths], place[ends - 1] = FIRST, LAST
    place[ends[lengths == 1] - 1] = ALONE
    aspects = {"char": chars, "word": np.repeat(words, lengths), "pair": chars << 32 | following}
    return aspects | {"place": place}, np.diff(text_ends, prepend=0)


def build_vocabularies(tokens, min_freq):
    """The frequent tokens of each aspect, most frequent first; their ids begin at 2.

    tokens: of the training texts, by `tokenize`; rarer ones than min_freq are left out.
    """
    vocabularies = {}
    for aspect, own in tokens.items():
        if aspect == "word" and "place" in tokens:  # count a word once, not at each character
            own = own[tokens["place"] <= FIRST]
        least = max(min_freq, PAIR_MIN_FREQ) if aspect == "pair" else min_freq
        codes, names = pd.factorize(own)  # names in the order of their first appearance
        counts = np.bincount(codes)
        order = np.argsort(-counts, kind="stable")
        vocabularies[aspect] = names[order[counts[order] >= least]].tolist()
    if "place" in tokens:  # a place's id is its own number; ALONE is 1, as UNK
        vocabularies["place"] = [FIRST, INSIDE, LAST]
    return vocabularies


def encode(tokens, vocabularies):
    """The ids of tokens, (all tokens, aspects) int32; UNK for those not in the vocabularies."""
    found = [pd.Index(own).get_indexer(tokens[aspect]) for aspect, own in vocabularies.items()]
    return np.stack([np.where(i < 0, UNK, i + 2) for i in found], axis=1, dtype=np.int32)


class Corpus:
    """All tokens of all texts on the device, and the batches made of them there."""

    def __init__(self, ids, counts, labels, max_tokens, device):
        """ids (all tokens, aspects) of `encode`, counts (texts,) of `tokenize`, labels (texts,)."""
        self.device = device
        self.lengths = torch.from_numpy(np.minimum(counts, max_tokens))  # on the CPU, for planning
        self.ids = torch.from_numpy(ids).to(device)
        self.firsts = torch.from_numpy(np.cumsum(counts) - counts).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def by_length(self, rows, batch_size):
        """Rows (n,) as batches of texts of similar length, so that little padding is computed."""
        return rows[torch.argsort(self.lengths[rows], stable=True)].split(batch_size)

    def shuffled(self, rows, batch_size):
        """The same with chance: sorted within pools of fifty batches, batches in random order."""
        pools = rows[torch.randperm(len(rows))].split(50 * batch_size)
        batches = [batch for pool in pools for batch in self.by_length(pool, batch_size)]
        return [batches[i] for i in torch.randperm(len(batches)).tolist()]

    def batch(self, rows):
        """tokens (T, B, aspects), padded with 0 to the longest, lengths (B,) and labels (B,)."""
        lengths = self.lengths[rows]
        steps = torch.arange(int(lengths.max()), device=self.device)[:, None]  # (T, 1)
        rows, lengths = rows.to(self.device), lengths.to(self.device)
        padding = steps >= lengths  # (T, B)
        index = torch.where(padding, 0, self.firsts[rows] + steps)  # (T, B)
        tokens = self.ids[index].masked_fill(padding[:, :, None], PAD)
        return tokens, lengths, self.labels[rows]


# --- training and testing -----------------------------------------------------------------------


def build_model(options, vocabularies, num_classes):
    """The classifier of a checkpoint's options."""
    return TextClassifier(
        training.CELL_OF[options["model"]], [len(tokens) + 2 for tokens in vocabularies.values()],
        options["embedding"], options["hidden"], num_classes,
        options["pool"], options["dropout"], options["loops"],
    )  # fmt: skip


@torch.no_grad()
def probabilities(model, corpus, rows):
    """Class probabilities (n, K) of the texts in rows (n,), in their order, on the CPU."""
    model.eval()
    order = corpus.by_length(rows, 128)
    p = torch.cat([model(*corpus.batch(batch)[:2]).softmax(dim=1).cpu() for batch in order])
    by_row = torch.empty(len(corpus.lengths), p.shape[1])
    by_row[torch.cat(order)] = p
    return by_row[rows]


def validate(model, corpus, reviews, train_rows):
    """Scores of an epoch: on validation rows and, for the curves, on some training rows.

    The cross-entropies are without label smoothing and dropout, so that they compare.
    """

    def score(rows):
        p, truth = probabilities(model, corpus, rows), torch.from_numpy(reviews.labels)[rows]
        matrix = confusion_matrix(truth.numpy(), p.argmax(1).numpy(), len(reviews.classes))
        loss = F.nll_loss(p.clamp_min(1e-12).log(), truth).item()
        return loss, accuracy(matrix), precision_recall_f1(matrix, "macro")[2]

    train_loss, train_accuracy, _ = score(train_rows)
    loss, share, f1 = score(reviews.split["validation"])
    return {"train_loss": train_loss, "validation_loss": loss, "train_accuracy": train_accuracy,
            "validation_accuracy": share, "validation_f1_macro": f1}  # fmt: skip


def train(args, name, reviews, corpus, vocabularies):
    """Train one structure; returns its run, whose model has the best epoch's weights."""
    kept = ("tokens", "embedding", "hidden", "pool", "dropout", "loops", "max_tokens")
    config = {
        "task": "text", "options": {"model": name} | {key: getattr(args, key) for key in kept},
        "vocabularies": vocabularies,
        "labels": reviews.classes, "sha256": reviews.data["sha256"],
    }  # fmt: skip
    torch.manual_seed(args.seed)
    model = build_model(config["options"], vocabularies, len(reviews.classes)).to(corpus.device)
    run = Run(args, args.out / f"text_{name}", config, model)
    some_rows = reviews.split["train"][torch.randperm(len(reviews.split["train"]))[:CURVE_ROWS]]
    word_column = list(vocabularies).index("word")

    for _ in run.epochs():
        model.train()
        for rows in run.progress(corpus.shuffled(reviews.split["train"], args.batch_size)):
            tokens, lengths, labels = corpus.batch(rows)
            words = tokens[:, :, word_column]  # a view of the tokens; padding is not read
            words[torch.rand(words.shape, device=words.device) < args.word_dropout] = UNK
            logits = model(tokens, lengths)  # (B, K)
            run.step(F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing))
        scores = validate(run.averaged, corpus, reviews, some_rows) if training.is_first() else None
        run.finish_epoch(scores, monitor="validation_f1_macro", mode="max")
    run.load_best()
    return run


def test(run, reviews, corpus):
    """Test a trained structure, write its results; returns its metrics and probabilities."""
    p = probabilities(run.model, corpus, reviews.split["test"])
    matrix, scores = test_scores(reviews, p)
    split = {part: len(rows) for part, rows in reviews.split.items()}
    metrics = run.write_metrics(reviews.data, split, scores)
    write_predictions(run.folder / "predictions.csv", reviews, p)
    title = f"{NAMES[run.name]}{training.stamp(reviews.data)}"
    print_scores(scores, f"{title}, test rows, epoch {run.best['epoch']}")
    history = pd.DataFrame(run.history)
    plots.draw_curves(run.folder / "curves.png", {
        f"{title}: {what}": {part: history[f"{part}_{key}"] for part in ("train", "validation")}
        for what, key in (("cross-entropy, no dropout", "loss"), ("accuracy", "accuracy"))
    })  # fmt: skip
    plots.draw_confusion(run.folder / "confusion.png", matrix, reviews.classes, title)
    print(f"results in {run.folder}: open curves.png and confusion.png; classify a text with")
    print(f'  python text_classify.py --checkpoint "{run.folder}/best.pt" --predict "..."')
    return metrics, p


def test_scores(reviews, p):
    """The confusion matrix (K, K) of test probabilities (n, K), and "test" of metrics.json."""
    truth = reviews.labels[reviews.split["test"].numpy()]
    matrix = confusion_matrix(truth, p.argmax(1).numpy(), len(reviews.classes))
    scores = {"accuracy": accuracy(matrix)}
    names = ("precision", "recall", "f1")
    for average in ("macro", "weighted"):
        values = precision_recall_f1(matrix, average)
        scores |= {f"{name}_{average}": x for name, x in zip(names, values, strict=True)}
    table = pd.DataFrame(np.stack(precision_recall_f1(matrix), axis=1), reviews.classes, names)
    scores["per_class"] = table.assign(support=matrix.sum(axis=1)).to_dict("index")
    return matrix, scores


def print_scores(scores, title):
    """Print precision, recall, F1 and support of each class and of their averages."""
    frame = pd.DataFrame.from_dict(scores["per_class"], orient="index")
    support = frame["support"].sum()
    for average in ("macro", "weighted"):
        values = [scores[f"{name}_{average}"] for name in ("precision", "recall", "f1")]
        frame.loc[f"{average} average"] = [*values, support]
    with pd.option_context("display.unicode.east_asian_width", True):
        print(f"\n{title}\n{frame.to_string(float_format='{:.4f}'.format)}")
    print(f"accuracy {scores['accuracy']:.4f}\n")


def write_predictions(path, reviews, p):
    """Write each test row's number in the file, truth, prediction, its probability, and text."""
    rows, best = reviews.split["test"].numpy(), p.max(dim=1)
    classes = np.array(reviews.classes, dtype=object)
    training.write_csv(path, pd.DataFrame({
        "row": rows + 1, "label": classes[reviews.labels[rows]],
        "predicted": classes[best.indices.numpy()], "probability": best.values.numpy().round(4),
        "text": [reviews.texts[i] for i in rows],
    }))  # fmt: skip


# --- comparison ---------------------------------------------------------------------------------


def gradient_reach(model, corpus, rows):
    """For each distance 0..REACH-1 from a text's end the mean of ||dL/dH_t||, divided by that at
    distance 0, over texts of at least REACH tokens in rows; [] if none is long enough.

    H_t: the forward direction's states. Calling the cell for one step at a time makes each H_t a
    tensor of its own, whose gradient holds what comes from all later steps and from the pooling.
    """
    model.eval()
    rows = rows[corpus.lengths[rows] >= REACH][:512]
    if not len(rows):
        return []
    recurrence, total = model.recurrence, torch.zeros(REACH)
    cell, h = recurrence.cell.removeprefix("bi_"), recurrence.num_hiddens
    identity = [torch.eye(h, device=corpus.device), torch.zeros(h, device=corpus.device)]
    params = [*recurrence.directions()[0], *identity]
    for batch in corpus.by_length(rows, 64):
        tokens, lengths, labels = corpus.batch(batch)
        inputs = model.embed(tokens).detach()  # (T, B, D)
        state, H = init_state(cell, len(batch), h, corpus.device), []
        for X in inputs:
            _, state = CELLS[cell](X[None], state, params)
            H.append(state[0])
            state[0].retain_grad()
        backward = recurrence(inputs, lengths)[:, :, h:]  # nothing unless "bi_lstm"
        states = torch.cat([torch.stack(H), backward], dim=2)
        F.cross_entropy(model.classify(states, lengths), labels, reduction="sum").backward()
        norms = torch.stack([H_t.grad.norm(dim=1) for H_t in H])  # (T, B)
        back = lengths - 1 - torch.arange(REACH, device=corpus.device)[:, None]  # (REACH, B)
        total += norms.gather(0, back).sum(dim=1).cpu()
        model.zero_grad()
    return (total / total[0].clamp_min(1e-30)).tolist()


def compare(args, reviews, results, reach):
    """The four structures side by side, and the mean of their probabilities: text_all/."""
    rows, kept = [], (*SCORES, "parameters", "seconds_per_epoch", "best_epoch")
    for metrics, _ in results:
        own = metrics | metrics["test"]
        rows.append({"model": NAMES[own["model"]]} | {key: own[key] for key in kept})
    _, scores = test_scores(reviews, torch.stack([p for _, p in results]).mean(dim=0))
    mean = {"model": "mean of the four"} | {key: scores[key] for key in SCORES}
    rows.append(mean | {"parameters": sum(row["parameters"] for row in rows)})
    content = {"argv": sys.argv[1:], "seed": args.seed, "data": reviews.data,
               "rows": rows, "gradient_reach": reach}  # fmt: skip
    stamp = training.stamp(reviews.data)
    note = f"Test rows{stamp}; precision, recall and F1 are macro averages."
    panels = {f"Validation cross-entropy{stamp}": "validation_loss",
              "Validation macro-F1": "validation_f1_macro"}  # fmt: skip
    training.write_comparison(args.out, "text", rows, content, note, panels)
    title = f"--pool {args.pool}, validation texts{stamp}"
    plots.draw_gradients(args.out / "text_all" / "gradients.png", reach, title)


# --- prediction ---------------------------------------------------------------------------------


def decode(line):
    """A line of input as text: UTF-8 with or without BOM, otherwise GB18030."""
    with contextlib.suppress(UnicodeDecodeError):
        return line.decode("utf-8-sig")
    return line.decode("gb18030", "replace")


def on_one_line(text):
    """A text without tabs, line feeds and what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def predict(args, device):
    """Print label, probability and text of one text, or of each line of the standard input."""
    saved = training.load_checkpoint(args.checkpoint, "text")
    with training.refuse_damaged(args.checkpoint):
        vocabularies, max_tokens = saved["vocabularies"], saved["options"]["max_tokens"]
        labels = [on_one_line(label) for label in saved["labels"]]
        model = build_model(saved["options"], vocabularies, len(labels)).to(device)
        model.load_state_dict(saved["weights"])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    given = [args.predict.encode("utf-8", "surrogateescape")]
    lines = iter(sys.stdin.buffer if args.predict == "-" else given)
    while part := list(islice(lines, 256)):
        texts = [decode(line).strip(BLANKS) for line in part]
        tokens, counts = tokenize(cut_words(texts), saved["options"]["tokens"])
        ids = encode(tokens, vocabularies)
        corpus = Corpus(ids, counts, np.zeros(len(texts), np.int64), max_tokens, device)
        best = probabilities(model, corpus, torch.arange(len(texts))).max(dim=1)
        for text, p, k in zip(texts, best.values.tolist(), best.indices.tolist(), strict=True):
            print(labels[k], f"{p:.4f}", on_one_line(text), sep="\t")


def train_and_test(args, device):
    """Train what --model names, test it, and compare all four."""
    reviews = read_reviews(args)
    cuts = cached_words(reviews.texts, reviews.data["sha256"])
    tokens, counts = tokenize(cuts, args.tokens)
    of_train = np.repeat(np.isin(np.arange(len(counts)), reviews.split["train"]), counts)
    train_tokens = {aspect: own[of_train] for aspect, own in tokens.items()}
    vocabularies = build_vocabularies(train_tokens, args.min_freq)
    ids = encode(tokens, vocabularies)
    corpus = Corpus(ids, counts, reviews.labels, args.max_tokens, device)
    del cuts, tokens, train_tokens  # millions of strings
    results, reach = [], {}
    for name in training.structures(args, "text"):
        run = train(args, name, reviews, corpus, vocabularies)
        if training.is_first():
            results.append(test(run, reviews, corpus))
            if args.model == "all":
                reach[NAMES[name]] = gradient_reach(run.model, corpus, reviews.split["validation"])
    if args.model == "all" and training.is_first():
        compare(args, reviews, results, reach)


def main():
    """From arguments to results."""
    training.start(parse_args(), predict, train_and_test)


if __name__ == "__main__":
    training.run_script(main)
