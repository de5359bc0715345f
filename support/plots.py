"""The pictures. Each function draws on a figure; `save` writes the figure to a PNG file."""

import numpy as np

from support.files import whole_file

ENGLISH = {
    "书籍": "books", "平板": "tablets", "手机": "phones", "水果": "fruit", "洗发水": "shampoo",
    "热水器": "heaters", "蒙牛": "milk", "衣服": "clothes", "计算机": "computers", "酒店": "hotels",
}  # fmt: skip
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "SimHei",
    "Source Han Sans CN", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
)  # fmt: skip


def new_figure(width, height):
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure  # takes half a second: only where something is drawn

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Write a figure as a PNG file, whole."""
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=88)


def label_font(labels):
    """(labels, font) that show without empty boxes: Chinese if a font has it, English otherwise."""
    from matplotlib.font_manager import fontManager

    labels = [label.replace("$", r"\$") for label in labels]
    installed = {font.name for font in fontManager.ttflist}
    for font in CJK_FONTS:
        if font in installed:
            return labels, font
    shown = []
    for number, label in enumerate(labels, 1):
        label = ENGLISH.get(label, label)
        shown.append(label if label.isascii() else f"class {number}")
    return shown, None


def draw_curves(path, panels):
    """Learning curves; panels {title: {label: values, one an epoch}}, side by side."""
    figure = new_figure(5.2 * len(panels), 3.8)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for label, values in curves.items():
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values, "o-", markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)
    return figure


def draw_confusion(path, matrix, classes, title):
    """A confusion matrix (K, K), coloured by the share of each true class."""
    labels, font = label_font(classes)
    size = min(max(5.5, 0.62 * len(classes)), 19)
    figure = new_figure(size + 1, size)
    axes = figure.subplots()
    support = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(support, 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="truth", title=title)
    if len(classes) <= 30:  # of more classes neither numbers nor names could be read
        for (i, j), count in np.ndenumerate(matrix):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, count or "", ha="center", va="center", fontsize=7, color=color)
        places = range(len(classes))
        axes.set_xticks(places, labels, rotation=45, ha="right", fontfamily=font)
        axes.set_yticks(places, labels, fontfamily=font)
    save(figure, path)
    return figure


def draw_gradients(path, reach, title):
    """How far back an input counts: reach {model: (steps,) shares of the gradient's norm}."""
    figure = new_figure(6.5, 4)
    axes = figure.subplots()
    for number, (name, values) in enumerate(reach.items()):
        line = "--" if name.endswith("untrained") else "-"
        axes.semilogy(values, line, color=f"C{number // 2}", label=name)
    axes.set_title(title)
    axes.set_xlabel("tokens before the text's end")
    axes.set_ylabel("share of ||dL/dX_t||")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)
    return figure


def draw_forecasts(path, windows, band, steps_a_day, title):
    """Forecasts of up to six windows in a grid, degC.

    windows: (known + horizon stamps, truth (known + horizon,), forecast (horizon,)) of each;
    band (2, horizon): what its lower and upper end add to the forecast.
    """
    figure = new_figure(10.2, 5.4)
    figure.suptitle(title)
    style = ".-" if steps_a_day == 1 else "-"
    for axes, (index, truth, forecast) in zip(figure.subplots(2, 3).flat, windows, strict=False):
        future = index[-len(forecast) :]
        error = np.abs(truth[-len(forecast) :] - forecast).mean()
        axes.plot(index, truth, style, color="C0", linewidth=1, label="truth")
        axes.plot(future, forecast, style, color="C1", linewidth=1, label="forecast")
        low, high = forecast + band
        axes.fill_between(future, low, high, color="C1", alpha=0.2, label="80 %")
        axes.axvline(future[0], color="grey", linewidth=0.8, linestyle="--")
        axes.set_title(f"{future[0]:%Y-%m-%d}: mean error {error:.2f} degC", fontsize=9)
        axes.set_ylabel("T, degC", fontsize=8)
        axes.tick_params(labelsize=7)
        days = index[::steps_a_day]
        axes.set_xticks(days, [f"{day:%d.%m.}" for day in days])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)  # one is enough, in the last panel
    save(figure, path)
    return figure


def draw_lead_time(path, hours, errors, title):
    """Mean and median error by hours ahead; errors {name: (n, horizon) absolute errors, degC}."""
    figure = new_figure(10.4, 3.8)
    mean_axes, median_axes = figure.subplots(1, 2)
    figure.suptitle(title)
    mean_axes.set_title("mean", fontsize=10)
    median_axes.set_title("median", fontsize=10)
    for name, values in reversed(errors.items()):  # the model, first, is drawn on top
        means = values.mean(axis=0)
        medians = np.median(values, axis=0)
        mean_axes.plot(hours, means, ".-", label=name)
        median_axes.plot(hours, medians, ".-", label=name)
    for axes in (mean_axes, median_axes):
        axes.set_xlabel("hours ahead")
        axes.set_ylabel("degC")
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    median_axes.legend(fontsize=8)  # one legend for both panels
    save(figure, path)
    return figure
