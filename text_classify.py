"""Ten-way classification of Chinese shopping reviews with an RNN, a GRU, an LSTM or a Bi-LSTM written by hand.

    python text_classify.py --model rnn --epochs 20       train one structure, test it, write runs/text_rnn/
    python text_classify.py --model all                   train the four, compare them, write runs/text_all/
    python text_classify.py --checkpoint runs/text_lstm/best.pt --predict "屏幕清晰，运行流畅"

Rows i = 1..N of the file: i % 5 == 4 validates, i % 5 == 0 tests, the rest trains. The vocabulary comes from the
training rows; the epoch with the best validation macro-F1 is tested, once.
"""

import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from torch.nn import functional as F

import datasets
import training
from datasets import UserError
from metrics import accuracy, confusion_matrix, precision_recall_f1
from rnn_models import POOLS, TextClassifier
from tokens import Corpus, build_vocabularies, cached_words, cut_words, encode, vocab_sizes
from training import CELLS, NAMES, number

ENGLISH = {
    "书籍": "books", "平板": "tablets", "手机": "phones", "水果": "fruit", "洗发水": "shampoo",
    "热水器": "heaters", "蒙牛": "milk", "衣服": "clothes", "计算机": "computers", "酒店": "hotels",
}  # fmt: skip
CJK_FONTS = [
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "SimHei",
    "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
]  # fmt: skip
TEST_METRICS = ["accuracy", "precision_macro", "recall_macro", "f1_macro"]


def parse_args(arguments=None):
    """The command line as a namespace."""
    parser = training.Parser(description=__doc__, formatter_class=training.argparse.RawDescriptionHelpFormatter)
    training.add_training_options(
        parser,
        model="lstm",
        epochs=6,
        batch_size=64,
        hidden=128,
        dropout=0.3,
        lr=4e-3,
        schedule="linear",
        average=0.998,
    )
    add = parser.add_argument
    add(
        "--tokens",
        choices=["word", "char", "both"],
        default="both",
        help="jieba's words; characters; or characters with word, place in it, next one (default: %(default)s)",
    )
    add("--embedding", type=number(int, 1), default=128, help="size of a token's embedding (default: %(default)s)")
    add("--pool", choices=POOLS, default="max", help="how a text's states become one (default: %(default)s)")
    add("--min-freq", type=number(int, 1), default=2, help="rarer tokens of the training rows are <unk> (default: 2)")
    add("--max-tokens", type=number(int, 1), default=256, help="longer texts are cut there (default: %(default)s)")
    add(
        "--label-smoothing",
        type=number(float, 0, 1, below=True),
        default=0.1,
        help="share of the target that is spread over all classes (default: %(default)s)",
    )
    add(
        "--word-dropout",
        type=number(float, 0, 1, below=True),
        default=0.2,
        help="share of the words that are <unk> in training; characters stay (default: %(default)s)",
    )
    add("--text-column", default="review", help="column of the texts (default: %(default)s)")
    add("--label-column", default="cat", help="column of the classes (default: %(default)s)")
    add("--predict", metavar="TEXT", help="with --checkpoint: classify this text, or with - each line of the input")
    args = parser.parse_args(arguments)
    if (args.predict is None) != (args.checkpoint is None):
        raise UserError("--predict and --checkpoint belong together; give both, or none to train")
    return args


@torch.no_grad()
def probabilities(model, corpus, rows, batch_size=128):
    """Class probabilities (n, K) of the texts in rows (n,), in their order, on the CPU."""
    model.eval()
    batches = corpus.plan(rows, batch_size, shuffle=False)
    parts = [model(*corpus.batch(batch)[:2]).softmax(dim=1) for batch in batches]
    result = torch.empty(len(corpus.lengths), parts[0].shape[1])
    result[torch.cat(batches)] = torch.cat(parts).cpu()
    return result[rows]


# --- from the file to the results -------------------------------------------------------------------------------------


def load_corpus(args):
    """The texts' words, their labels, the split, and what is known of the file. UserError for unfit data."""
    frame, data = datasets.load(datasets.REVIEWS, args.data)
    datasets.check_columns(frame, (args.text_column, args.label_column), data["path"])
    texts = frame[args.text_column].str.strip().str.lstrip("\ufeff").tolist()
    names = frame[args.label_column].str.strip().to_numpy()
    number_of_row = np.arange(1, len(texts) + 1)
    fold = np.select([number_of_row % 5 == 4, number_of_row % 5 == 0], ["validation", "test"], "train")
    usable = np.array([bool(text) and bool(name) for text, name in zip(texts, names, strict=True)], dtype=bool)
    split = {
        part: torch.from_numpy(np.flatnonzero(usable & (fold == part))) for part in ("train", "validation", "test")
    }
    for part, rows in split.items():
        if len(rows) < 5:
            raise UserError(
                f"{data['path']} has {len(rows)} usable {part} rows, at least 5 are needed; name a larger file"
            )
    classes = sorted(set(names[usable]))
    absent = sorted(set(classes) - set(names[split["train"].numpy()]))
    if len(classes) < 2:
        raise UserError(
            f"{data['path']} has one class only, {classes[0]!r}; is --label-column {args.label_column} right?"
        )
    if absent:
        raise UserError(f"class {absent[0]!r} of {data['path']} is in no training row; leave it out or add rows")
    sizes = ", ".join(f"{len(rows)} {part}" for part, rows in split.items())
    print(f"{data['path']}: {len(texts)} rows ({sizes}; {int((~usable).sum())} empty left out), {len(classes)} classes")
    labels = np.searchsorted(classes, np.where(usable, names, classes[0]))
    return SimpleNamespace(
        texts=texts, cuts=cached_words(texts, data["sha256"]), labels=labels, classes=classes, split=split, data=data
    )


def build_model(options, vocabularies, num_classes):
    """The classifier that a dict of options describes."""
    return TextClassifier(
        CELLS[options["model"]],
        vocab_sizes(vocabularies, options["tokens"]),
        options["embedding"],
        options["hidden"],
        num_classes,
        options["pool"],
        options["dropout"],
    )


def train(args, model_name, reviews, corpus, vocabularies, device):
    """Train one structure, test it, write its folder; returns (metrics.json's dict, history, test probabilities)."""
    folder = args.out / f"text_{model_name}"
    lock = training.lock_folder(folder)
    options = {name: getattr(args, name) for name in ("tokens", "embedding", "hidden", "pool", "dropout", "max_tokens")}
    fixed = {"task": "text", "options": {"model": model_name, **options}, "vocabularies": vocabularies,
             "labels": reviews.classes, "source": reviews.data["source"]}  # fmt: skip
    training.seed_all(args.seed)
    model = build_model(fixed["options"], vocabularies, len(reviews.classes)).to(device)
    parameters = sum(param.numel() for param in model.parameters())
    print(f"\n{NAMES[model_name]}: {parameters:,} parameters, {device}", flush=True)

    def loss_of(model, rows):
        tokens, lengths, rows = corpus.batch(rows)
        if "word" in vocabularies:
            words = tokens[:, :, list(vocabularies).index("word")]  # a view: what is written there is read below
            words.masked_fill_(torch.rand(words.shape, device=device) < args.word_dropout, 1)
        loss = F.cross_entropy(model(tokens, lengths), corpus.labels[rows], label_smoothing=args.label_smoothing)
        return loss, len(rows)

    def batches():
        model.train()
        return corpus.plan(reviews.split["train"], args.batch_size, shuffle=True)

    def validate(model):
        rows = reviews.split["validation"]
        scores, truth = probabilities(model, corpus, rows), torch.from_numpy(reviews.labels)[rows]
        matrix = confusion_matrix(truth.numpy(), scores.argmax(1).numpy(), len(reviews.classes))
        loss = F.nll_loss(scores.clamp_min(1e-12).log(), truth).item()
        return {"validation_loss": loss, "validation_accuracy": accuracy(matrix),
                "validation_f1_macro": precision_recall_f1(matrix, "macro")[2]}  # fmt: skip

    history, best_epoch = training.fit(
        model, args, folder, fixed, batches, loss_of, validate, "validation_f1_macro", max, "texts"
    )
    scores = probabilities(model, corpus, reviews.split["test"])
    matrix, test = test_metrics(reviews, scores)
    metrics = {
        "task": "text", "model": model_name, "seed": args.seed, "argv": sys.argv[1:], "device": str(device),
        "torch": torch.__version__, "parameters": parameters, "epochs": args.epochs, "best_epoch": best_epoch,
        "seconds_per_epoch": float(np.mean([record["seconds"] for record in history])), "data": reviews.data,
        "split": {part: len(rows) for part, rows in reviews.split.items()}, "test": test,
    }  # fmt: skip
    training.write_json(folder / "metrics.json", metrics)
    write_predictions(folder / "predictions.csv", reviews, scores)
    stamp = " (bundled sample)" if reviews.data["source"] == "sample" else ""
    training.draw_curves(
        folder / "curves.png",
        {NAMES[model_name]: history},
        {
            f"{NAMES[model_name]}: loss{stamp}": {"train_loss": "o-", "validation_loss": "s-"},
            f"{NAMES[model_name]}: validation{stamp}": {"validation_accuracy": "o-", "validation_f1_macro": "s-"},
        },
    )
    draw_confusion(folder / "confusion.png", matrix, reviews.classes, NAMES[model_name] + stamp)
    print_report(test, f"{NAMES[model_name]}, test rows, epoch {best_epoch}{stamp}")
    print(f"written to {folder}: metrics.json history.csv predictions.csv curves.png confusion.png best.pt last.pt")
    lock.close()
    return metrics, history, scores


def test_metrics(reviews, scores):
    """The confusion matrix of test probabilities (n, K) and the "test" part of metrics.json."""
    truth = reviews.labels[reviews.split["test"].numpy()]
    matrix = confusion_matrix(truth, scores.argmax(1).numpy(), len(reviews.classes))
    test = {"accuracy": accuracy(matrix)}
    for average in ("macro", "weighted"):
        values = precision_recall_f1(matrix, average)
        test |= {f"{name}_{average}": value for name, value in zip(("precision", "recall", "f1"), values, strict=True)}
    columns = zip(reviews.classes, *precision_recall_f1(matrix), matrix.sum(axis=1), strict=True)
    test["per_class"] = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f1), "support": int(support)}
        for label, p, r, f1, support in columns
    }
    return matrix, test


def print_report(test, title):
    """The table of a test on the terminal: each class with its support, the averages, the accuracy."""
    print(f"\n{title}\n{'':12}{'precision':>10}{'recall':>10}{'F1':>10}{'support':>10}")

    def line(name, values, support):
        width = 12 - sum(ord(character) > 0x2E80 for character in name)  # a Chinese character is two columns wide
        print(f"{name:{width}}" + "".join(f"{value:10.4f}" for value in values) + f"{support:10}")

    for label, scores in test["per_class"].items():
        line(label, (scores["precision"], scores["recall"], scores["f1"]), scores["support"])
    total = sum(scores["support"] for scores in test["per_class"].values())
    for average in ("macro", "weighted"):
        line(average, [test[f"{name}_{average}"] for name in ("precision", "recall", "f1")], total)
    print(f"{'accuracy':12}{test['accuracy']:30.4f}{total:10}", flush=True)


def write_predictions(path, reviews, scores):
    """Each test row with its number in the file, truth, prediction, its probability, and the text."""
    best = scores.max(dim=1)
    rows = reviews.split["test"].tolist()
    training.write_csv(
        path,
        ["row", "label", "predicted", "probability", "text"],
        [
            (row + 1, reviews.classes[reviews.labels[row]], reviews.classes[k], f"{p:.4f}", reviews.texts[row])
            for row, k, p in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True)
        ],
    )


def draw_confusion(path, matrix, classes, title):
    """The confusion matrix, coloured by the share of each true class. Names are never drawn as empty boxes."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    font = next((name for name in CJK_FONTS if name in installed), None)
    if font is None and not all(name.isascii() for name in classes):
        classes = [ENGLISH.get(name, name if name.isascii() else f"class {i}") for i, name in enumerate(classes, 1)]
    size = max(5.5, 0.62 * len(classes))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the true class", shrink=0.8)
    for (i, j), count in np.ndenumerate(matrix):
        if count:
            axes.text(
                j, i, count, ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 0.5 else "black"
            )
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right", fontfamily=font)
    axes.set_yticks(ticks, classes, fontfamily=font)
    axes.set(xlabel="predicted", ylabel="truth", title=title)
    training.save_figure(path, figure)


def compare(args, reviews, results):
    """The four structures side by side, and the mean of their probabilities as a fifth: text_all/comparison.*"""
    folder = args.out / "text_all"
    rows = []
    for name, (metrics, history, _) in results.items():
        best = max(record["validation_f1_macro"] for record in history)
        reached = next(record["epoch"] for record in history if record["validation_f1_macro"] >= 0.95 * best)
        rows.append({"model": NAMES[name], **{key: metrics["test"][key] for key in TEST_METRICS},
                     "parameters": metrics["parameters"], "seconds_per_epoch": metrics["seconds_per_epoch"],
                     "best_epoch": metrics["best_epoch"], "epochs_to_95_percent": reached})  # fmt: skip
    _, test = test_metrics(reviews, torch.stack([scores for *_, scores in results.values()]).mean(dim=0))
    rows.append({"model": "mean of the four", **{key: test[key] for key in TEST_METRICS},
                 "parameters": sum(row["parameters"] for row in rows)})  # fmt: skip
    header = ["model", "accuracy", "precision", "recall", "F1", "parameters", "s/epoch", "best epoch", "epochs to 95 %"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = [f"{value:.4f}" for value in list(row.values())[1:5]] + [f"{row['parameters']:,}"]
        cells += (
            [f"{row['seconds_per_epoch']:.1f}", str(row["best_epoch"]), str(row["epochs_to_95_percent"])]
            if len(row) > 6
            else ["", "", ""]
        )
        lines.append("| " + " | ".join([row["model"], *cells]) + " |")
    training.write_comparison(
        folder,
        "Test rows; precision, recall and F1 are macro averages.",
        "\n".join(lines),
        {"argv": sys.argv[1:], "seed": args.seed, "data": reviews.data, "rows": rows},
        {NAMES[name]: history for name, (_, history, _) in results.items()},
        {"training loss": {"train_loss": "o-"}, "validation macro-F1": {"validation_f1_macro": "o-"}},
        reviews.data["source"] == "sample",
    )


def predict(args, device):
    """Label, probability and text of one text, or of each line of the standard input, as they come."""
    schema = {"options": dict, "vocabularies": dict, "labels": list, "weights": dict}
    saved = training.load_checkpoint(args.checkpoint, "text", schema)
    model = training.load_model(
        lambda saved: build_model(saved["options"], saved["vocabularies"], len(saved["labels"])), saved, args.checkpoint
    ).to(device)
    if args.predict == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    lines = (line.rstrip("\r\n") for line in sys.stdin) if args.predict == "-" else iter([args.predict])
    lines = (line.encode("utf-8", "replace").decode("utf-8") for line in lines)  # lone surrogates cannot be printed
    while texts := list(islice(lines, 256)):
        ids, counts = encode(
            cut_words(text.strip() for text in texts), saved["options"]["tokens"], saved["vocabularies"]
        )
        corpus = Corpus(ids, counts, None, saved["options"]["max_tokens"], device)
        best = probabilities(model, corpus, torch.arange(len(texts))).max(dim=1)
        for text, probability, k in zip(texts, best.values.tolist(), best.indices.tolist(), strict=True):
            printable = "".join(character if character.isprintable() else " " for character in text)
            print(saved["labels"][k], f"{probability:.4f}", " ".join(printable.split()), sep="\t")
        sys.stdout.flush()


def main():
    """From arguments to results."""
    args = parse_args()
    device = training.pick_device(args.device)
    if args.predict is not None:
        predict(args, device)
        return
    reviews = load_corpus(args)
    vocabularies = build_vocabularies(
        [reviews.cuts[i] for i in reviews.split["train"].tolist()], args.tokens, args.min_freq
    )
    ids, counts = encode(reviews.cuts, args.tokens, vocabularies)
    corpus = Corpus(ids, counts, reviews.labels, args.max_tokens, device)
    del reviews.cuts  # millions of strings that nothing needs any more
    names = list(CELLS) if args.model == "all" else [args.model]
    results = {name: train(args, name, reviews, corpus, vocabularies, device) for name in names}
    if args.model == "all":
        compare(args, reviews, results)


if __name__ == "__main__":
    training.run(main)
