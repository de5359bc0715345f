"""The pictures. Each function writes a PNG file; a picture that fails costs one line, no result."""

import functools
import sys

import numpy as np

from support.files import whole_file

ENGLISH = {
    "书籍": "books", "平板": "tablets", "手机": "phones", "水果": "fruit", "洗发水": "shampoo",
    "热水器": "heaters", "蒙牛": "milk", "衣服": "clothes", "计算机": "computers", "酒店": "hotels",
}  # fmt: skip
CJK_FONTS = [
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "SimHei",
    "Source Han Sans CN", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
]  # fmt: skip


def picture(draw):
    """Turn draw(figure, ...) into a function (path, ...) that writes a PNG file whole."""

    @functools.wraps(draw)
    def write(path, *arguments):
        try:
            from matplotlib.figure import Figure  # takes a second: only where something is drawn

            figure = Figure(layout="constrained")
            draw(figure, *arguments)
            with whole_file(path) as stream:
                figure.savefig(stream, format="png", dpi=88)
        except Exception as error:
            reason = " ".join(str(error).split())
            print(f"picture {path} was not drawn: {reason}", file=sys.stderr)

    return write


def label_font(labels):
    """(labels, font) that show without empty boxes: Chinese if a font has it, English otherwise."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    font = next((name for name in CJK_FONTS if name in installed), None)
    if font is None:
        known = {name: ENGLISH.get(name, name) for name in labels}
        labels = [k if k.isascii() else f"class {i}" for i, k in enumerate(known.values(), 1)]
    return [label.replace("$", r"\$") for label in labels], font


@picture
def draw_curves(figure, panels):
    """Learning curves; panels {title: {label: values, one an epoch}}, side by side."""
    figure.set_size_inches(5.2 * len(panels), 3.8)
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for label, values in curves.items():
            axes.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


@picture
def draw_confusion(figure, matrix, classes, title):
    """A confusion matrix (K, K), coloured by the share of each true class."""
    classes, font = label_font(classes)
    size = min(max(5.5, 0.62 * len(classes)), 19)
    figure.set_size_inches(size + 1, size)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="truth", title=title)
    if len(classes) > 30:  # neither numbers nor names could be read
        return
    for (i, j), count in np.ndenumerate(matrix):
        if count:
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, count, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontfamily=font)
    axes.set_yticks(range(len(classes)), classes, fontfamily=font)


@picture
def draw_gradients(figure, reach, title):
    """How far the loss's gradient reaches back: reach {model: (steps,) relative norms}."""
    figure.set_size_inches(6.5, 4)
    axes = figure.subplots()
    for name, values in reach.items():
        axes.semilogy(range(len(values)), values, label=name)
    axes.set(title=title, xlabel="tokens before the text's end", ylabel="||dL/dH_t|| / at the end")
    axes.grid(alpha=0.3)
    axes.legend()


@picture
def draw_forecasts(figure, windows, band, steps_a_day, title):
    """Forecasts of up to six windows in a grid, degC.

    windows: (known + horizon stamps, truth (known + horizon,), forecast (horizon,)) of each;
    band (2, horizon): what its lower and upper end add to the forecast.
    """
    figure.set_size_inches(10.2, 5.4)
    figure.suptitle(title)
    line, axes_of_all = ".-" if steps_a_day == 1 else "-", figure.subplots(2, 3).flat
    for axes, (index, truth, forecast) in zip(axes_of_all, windows, strict=False):
        future = index[-len(forecast) :]
        error = np.abs(truth[-len(forecast) :] - forecast).mean()
        axes.plot(index, truth, f"C0{line}", linewidth=1, label="truth")
        axes.plot(future, forecast, f"C1{line}", linewidth=1, label="forecast")
        axes.fill_between(future, *(forecast + band), color="C1", alpha=0.2, label="80 %")
        axes.axvline(future[0], color="grey", linewidth=0.8, linestyle="--")
        axes.set_title(f"{future[0]:%Y-%m-%d}: mean error {error:.2f} degC", fontsize=9)
        axes.set_ylabel("T, degC", fontsize=8)
        axes.tick_params(labelsize=7)
        days = index[::steps_a_day]
        axes.set_xticks(days, [f"{day:%d.%m.}" for day in days])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


@picture
def draw_lead_time(figure, hours, errors, title):
    """Mean and median error by hours ahead; errors {name: (n, horizon) absolute errors, degC}."""
    figure.set_size_inches(10.4, 3.8)
    pairs = (("mean", np.mean), ("median", np.median))
    for axes, (label, measure) in zip(figure.subplots(1, 2), pairs, strict=True):
        for name, values in reversed(errors.items()):  # the model, first, is drawn on top
            axes.plot(hours, measure(values, axis=0), ".-", markersize=4, label=name)
        axes.set(title=f"{label} {title}", xlabel="hours ahead", ylabel="degC", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
