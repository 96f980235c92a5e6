"""How the notebooks draw, so that their cells can show the idea and nothing else.

One colour, dash, marker and hatch for each method, divergence and role, in all notebooks: a figure can be read in grey
and by readers who see fewer colours. The functions take numbers and names and draw on an axis, or make a whole figure.
"""

import io

import matplotlib.pyplot as plt
import torch

plt.rcParams.update(
    {
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "figure.max_open_warning": 0,  # a script keeps all its figures
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "hatch.linewidth": 0.6,
    }
)
STYLE = {  # name: colour, dashes, marker, hatch
    "SFT": ("#D55E00", "--", "o", "//"),
    "COSD": ("#0072B2", "-", "s", ""),
    "COSD + anchors": ("#009E73", "-.", "^", ".."),
    "off-policy": ("#CC79A7", ":", "D", "xx"),
    "GKD": ("#E69F00", (0, (5, 1, 1, 1, 1, 1)), "v", "++"),
    "forward KL": ("#0072B2", "-", "s", ""),
    "reverse KL": ("#D55E00", "--", "o", "//"),
    "JSD": ("#009E73", "-.", "^", ".."),
    "sampled token": ("#CC79A7", ":", "D", "xx"),
    "teacher": ("#333333", "-", "s", ""),
    "student": ("#56B4E9", "--", "o", "//"),
}
OTHERS = [  # for what is neither: two or three lines that a legend names
    ("#000000", "-", "s", ""),
    ("#888888", "--", "o", "//"),
    ("#56B4E9", "-.", "^", ".."),
    ("#CC79A7", ":", "D", "xx"),
]


def style(name, i=0):
    """The style of what a label begins with: "teacher P" is drawn as the teacher."""
    known = [key for key in STYLE if name.startswith(key)]
    return STYLE[max(known, key=len)] if known else OTHERS[i % len(OTHERS)]


# ============================================================================= building blocks
def panels(n=1, width=5.5, height=2.7, rows=1, **how):
    """-> n axes in a row, or `rows` × n of them; a single one as itself."""
    _, axes = plt.subplots(rows, n, figsize=(width, height), **how)
    return axes


def label(axis, legend=False, **texts):
    axis.set(**texts)
    if (legend or axis.get_legend()) and axis.get_legend_handles_labels()[1]:
        axis.legend()


def shared_legend(axes):
    axes = list(axes)
    handles = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*handles, loc="outside lower center", ncols=len(handles[1]))


def bars(axis, ticks, named, legend=True, **texts):
    """Groups of bars, one for each tick; `named` is {label: values}."""
    wide = 0.8 / len(named)
    for i, (name, values) in enumerate(named.items()):
        color, _, _, hatch = style(name, i)
        place = torch.arange(len(ticks)) + wide * (i - (len(named) - 1) / 2)
        edge = {"hatch": hatch, "edgecolor": "white", "linewidth": 0}
        values = torch.as_tensor(values, dtype=torch.float64)
        drawn = values.masked_fill(values.isinf(), float("nan"))  # an infinite bar is left out
        axis.bar(place, drawn, 0.95 * wide, color=color, label=name, **edge)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(ticks)), ticks)
    label(axis, legend, **texts)


def lines(axis, x, named, markers=False, scale="linear linear", legend=True, **texts):
    """Lines over x, or over an x of each line's own: `named` is {label: y} or {label: (x, y)}."""
    for i, (name, y) in enumerate(named.items()):
        color, dashes, marker, _ = style(name, i)
        x_of, y = y if isinstance(y, tuple) else (x, y)
        marked = {"marker": marker, "markersize": 4} if markers else {}
        axis.plot(x_of, y, linestyle=dashes, color=color, label=name, **marked)
    xscale, yscale = scale.split()
    label(axis, legend, xscale=xscale, yscale=yscale, **texts)


def level(axis, y, name):
    axis.axhline(y, color="black", linestyle=(0, (1, 2)), linewidth=1, label=name)
    axis.legend()


def table(axis, values, rows, columns, texts=None, top=1.0, cmap="cividis", title="", size=8):
    """A grid of numbers, each in its cell and as a shade from dark (0) to bright (`top`)."""
    axis.imshow(values, cmap=cmap, vmin=0, vmax=top, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            if value == value:  # a missing one is NaN
                text = texts[i][j] if texts else f"{value:.2f}"
                color = "black" if value > 0.55 * top else "white"
                axis.text(j, i, text, ha="center", va="center", fontsize=size, color=color)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9)


def picture(path, height=4.0):
    """A figure that was made by an experiment and is kept with its results."""
    axis = panels(width=11, height=height)
    axis.imshow(plt.imread(path))
    axis.axis("off")
    plt.show()  # before the tables that follow it


def film(frames, milliseconds=1300):
    """Figures -> one moving picture, an animated PNG, which browsers and GitHub play; the figures are closed."""
    from IPython.display import Image, display
    from PIL import Image as Picture

    pictures = []
    for figure in frames:
        figure.savefig(data := io.BytesIO(), format="png", dpi=90)
        plt.close(figure)
        pictures.append(Picture.open(data).convert("RGB"))
    times = [milliseconds] * (len(pictures) - 1) + [3 * milliseconds]
    how = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0}
    pictures[0].save(data := io.BytesIO(), "PNG", **how)
    display(Image(data.getvalue(), format="png"))


# ============================================================================= 01 divergences
def stack(axis, x, lower, upper, names, **texts):
    axis.fill_between(x, lower, color="#BBBBBB", label=names[0], linewidth=0)
    color, _, _, _ = STYLE["forward KL"]
    axis.fill_between(
        x, lower, lower + upper, facecolor=color, hatch="//", edgecolor="white", label=names[1]
    )
    axis.plot(x, lower + upper, color="black", label=names[2])
    label(axis, legend=True, **texts)


def two_word_maps(grid, values):
    """{divergence: its value for every teacher p (rows) and student q (columns)}."""
    axes = panels(len(values), width=9.5, height=3.1, sharey=True)
    for axis, (name, value) in zip(axes, values.items()):
        levels = torch.linspace(0, 2, 41)
        image = axis.contourf(grid, grid, value, levels=levels, cmap="viridis", extend="max")
        marks = {"levels": [0.1, 0.5, 1, 1.5], "colors": "white", "linewidths": 0.8}
        drawn = axis.contour(grid, grid, value, **marks)
        title = f"{name} (at most {value.max():.2f})"
        label(axis, title=title, xlabel="student's probability q", aspect="equal")
    axes[0].set_ylabel("teacher's probability p")
    bar = axes[0].figure.colorbar(image, ax=axes, label="nats", ticks=[0, 0.5, 1, 1.5, 2])
    bar.add_lines(drawn)


def fill_teacher(axis, x, probability):
    axis.fill_between(x, probability, color="#BBBBBB", linewidth=0, label="teacher")


def descents(x, teacher, mu, sigma, landscapes, paths, fits):
    """Above, each divergence over (μ, σ) with its descents; below, the students that they end at."""
    axes = panels(3, rows=2, width=9.5, height=5, height_ratios=[3, 2])
    for (top, bottom), (name, value) in zip(axes.T, landscapes.items()):
        top.contourf(mu, sigma, value.clamp(max=value.quantile(0.9)), levels=25, cmap="viridis")
        fill_teacher(bottom, x, teacher)
        for path, fit, dashes in zip(paths[name], fits[name], ["-", "--"]):
            top.plot(path[:, 0], path[:, 1].exp(), dashes, color="white", linewidth=1.5)
            top.plot(path[0, 0], path[0, 1].exp(), "o", color="white", markersize=4)
            ends = {"color": STYLE[name][0], "markeredgecolor": "white", "markersize": 12}
            top.plot(path[-1, 0], path[-1, 1].exp(), "*", **ends)
            named = "student" if dashes == "-" else "student, other start"
            bottom.plot(x, fit, dashes, color=STYLE[name][0], label=named)
        label(top, title=name, xlabel="student's mean μ, in units of x", yscale="log")
        top.set_yticks([0.5, 1, 2, 4], [0.5, 1, 2, 4])
        top.minorticks_off()
        label(bottom, legend=name == "forward KL", xlabel="x", ylim=(0, 0.09))
    axes[0, 0].set_ylabel("student's width σ, in units of x")
    axes[1, 0].set_ylabel("probability of a bin of x")


def strip(x, teachers, fits, titles):
    """Small multiples: in each panel a teacher (grey) and {divergence: the student that it makes}."""
    axes = panels(len(titles), width=10.5, height=2.2, sharey=True)
    for axis, teacher, students, title in zip(axes, teachers, fits, titles):
        fill_teacher(axis, x, teacher)
        lines(axis, x, students, legend=False, title=title, xlabel="x")
    axes[0].set_ylabel("probability of a bin")
    shared_legend(axes)


def word_tables(letters, shown, nonsense):
    axes = panels(len(shown), width=9.5, height=2.7)
    for axis, (name, probability) in zip(axes, shown.items()):
        texts = [[f"{a}{b}\n{p:.2f}" for b, p in zip(letters, row)] for a, row in zip(letters, probability)]  # fmt: skip
        title = f"{name}\nnonsense: {probability[nonsense].sum():.2f}"
        table(axis, probability, "", "", texts, top=0.8, title=title)


def triangles(words, corners, teacher, fine, colours, coarse, steps, scales):
    """Students over three words as points of a triangle: shade = divergence, arrow = a gradient step."""
    axes = panels(len(colours), width=9.5, height=3)
    places = [("right", "top"), ("left", "top"), ("center", "bottom")]
    for axis, (name, shade) in zip(axes, colours.items()):
        if shade.min() < shade.max():  # one that is infinite everywhere has no contours
            axis.tricontourf(*(fine @ corners).T, shade, levels=25, cmap="viridis")
        else:
            axis.fill(*corners.T, color="#FDE725")
        how = {"color": "white", "width": 0.006, "scale": scales[name]}
        axis.quiver(*(coarse @ corners).T, *(steps[name] @ corners).T, **how)
        axis.plot(
            *(teacher @ corners), "*", color="#D55E00", markersize=13, markeredgecolor="white"
        )
        for word, at, (ha, va) in zip(words, corners, places):
            axis.text(*at, word, ha=ha, va=va)
        label(axis, title=name, aspect="equal", xlim=(-0.15, 1.15), ylim=(-0.1, 1))
        axis.axis("off")


def beta_trap(beta, values, ends):
    """The formula over β with the values that GKD puts at its ends; right, the formula divided by its weight."""
    left, right = panels(2, width=8.5, height=2.8)
    lines(left, beta, {"JSD(β), the formula": values})
    divided = {"JSD(β) / β": values / beta, "JSD(β) / (1 − β)": values / (1 - beta)}
    for (at, name), (title, y) in zip(enumerate(ends), divided.items()):
        color, dashes, marker, _ = STYLE[name]
        for axis, text in [(left, f"GKD at β = {at}: {name}"), (right, name)]:
            point = {"color": color, "linestyle": "", "marker": marker, "clip_on": False}
            axis.plot(at, ends[name], label=text, **point)
        right.plot(beta, y, color=color, linestyle=dashes, label=title)
    label(
        left, True, xlabel="β", ylabel="nats", ylim=(0, None), title="the knob jumps at both ends"
    )
    label(
        right,
        True,
        xlabel="β",
        ylabel="nats",
        ylim=(0, None),
        title="divided by its weight, no jump",
    )


def errors(counts, predicted, measured, exact):
    axis = panels(height=2.9)
    lines(axis, counts, predicted, scale="log log")
    for i, values in enumerate(measured.values()):
        color, _, marker, _ = OTHERS[i]
        axis.plot(counts, values, color=color, linestyle="", marker=marker, markersize=4)
    level(axis, exact, "the KL itself")
    label(axis, xlabel="number of tokens averaged over", ylabel="typical error, nats")


def expected_gradients(gradients, exact):
    """Bars: the expected gradient of each estimator; marks: the exact gradients of the two KLs."""
    axes = panels(len(gradients), width=9.5, height=2.6, sharey=True)
    for axis, (name, gradient) in zip(axes, gradients.items()):
        axis.bar(range(4), gradient, 0.75, color="#BBBBBB", label="expected gradient")
        for divergence, marker in [("reverse KL", "o"), ("forward KL", "x")]:
            how = {"markersize": 7, "markeredgewidth": 2, "color": STYLE[divergence][0]}
            axis.plot(range(4), exact[divergence], marker, label=f"∇ {divergence}", **how)
        axis.axhline(0, color="black", linewidth=0.8)
        label(axis, title=f"E[∇ {name}]", xticks=range(4), xlabel="token's logit")
    axes[0].set_ylabel("nats per unit of logit")
    shared_legend(axes)


def histograms(named, bins, **texts):
    axis = panels(width=6, height=2.6)
    for (name, values), hatch, color in zip(named.items(), ["xxx", ""], ["white", "#009E73"]):
        edge = {"edgecolor": "black", "linewidth": 0.4}
        axis.hist(values, bins=bins, label=name, hatch=hatch, color=color, **edge)
    axis.axvline(0, color="black", linewidth=0.8)
    label(axis, legend=True, **texts)


# ============================================================================= 02 the model
def attention_maps(weights):
    """(layers, heads, T, T): who looks (rows) at whom (columns)."""
    layers, heads = weights.shape[:2]
    axes = panels(heads, rows=layers, width=8, height=6.3, sharex=True, sharey=True)
    for layer, head in torch.cartesian_prod(torch.arange(layers), torch.arange(heads)).tolist():
        axis = axes[layer, head]
        axis.imshow(weights[layer, head].sqrt(), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"block {layer}, head {head}", fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0, 0].figure.supxlabel("position that is looked at", fontsize=9)
    shade = "position that looks (shade: square root of the attention weight)"
    axes[0, 0].figure.supylabel(shade, fontsize=9)


def looks_and_losses(tokens, looks, lost, letter):
    """Above: where the heads of the last token look. Below: what replacing each token does to the answer."""
    top, bottom = panels(rows=2, width=9.5, height=3.8, sharex=True, height_ratios=[3, 2])
    image = top.imshow(looks, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    top.set_yticks([1.5, 5.5, 9.5], ["block 0", "block 1", "block 2"])
    top.hlines([3.5, 7.5], -0.5, len(tokens) - 0.5, color="white", linewidth=1)
    top.set_title("where the assistant header's 12 heads look")
    top.figure.colorbar(image, ax=top, label="attention weight")
    bottom.bar(range(len(tokens)), lost, color="#333333")
    bottom.set_xticks(range(len(tokens)), tokens, rotation=90)
    title = f"probability of “{letter}” that is lost when this token becomes a z"
    label(bottom, title=title, ylim=(0, 1), ylabel="probability lost")
    for axis in (top, bottom):
        axis.tick_params(axis="x", length=0)


def sampled(panels_of):
    """{title: (measured shares, expected shares)}."""
    axes = panels(len(panels_of), width=9.5, height=2.5, sharey=True)
    for axis, (title, (measured, expected)) in zip(axes, panels_of.items()):
        axis.bar(range(len(measured)), measured, color="#888888", label="drawn")
        axis.plot(range(len(expected)), expected, "o", color="black", ms=4, label="expected")
        label(axis, title=title, xlabel="token", xticks=range(0, 10, 3))
    axes[0].set_ylabel("share of draws")
    shared_legend(axes)


def meanings(words_and_shares, p, names, example):
    """Left: how often each answer is given to one prompt. Right: each meaning's probability, a dot for every word."""
    left, right = panels(2, width=10, height=2.8, width_ratios=[3, 2])
    bars(left, *words_and_shares, ylabel="share of 400 answers")
    level(left, 0.2, "the formula: each of the five meanings ⅕")
    left.set_title(f"answers to “{example} zorp” without context")
    for i in range(len(names)):
        spread = i + 0.3 * (torch.rand(len(p), generator=torch.Generator().manual_seed(i)) - 0.5)
        right.plot(spread, p[:, i], ".", color="#888888", markersize=2)
        right.plot([i - 0.3, i + 0.3], [p[:, i].mean()] * 2, color="black", linewidth=2)
    right.axhline(0.2, color="black", linestyle=(0, (1, 2)), linewidth=1)
    right.set_xticks(range(len(names)), names)
    label(right, ylabel="probability", title=f"all {len(p)} words (bars: their mean)")


# ============================================================================= 03 four contexts
def spell(text):
    return text.replace(" ", "·").replace("assistant", "asst").strip("<|>")


def rollout(axis, title, tokens, student, teacher, divergence):
    """A rollout as a table: both probabilities of every sampled token, and the divergence where it stands."""
    values = torch.stack([student, teacher, divergence])
    shades = torch.stack([student, teacher, divergence / 4])
    texts = [[f"{value:.2f}" for value in row] for row in values.tolist()]
    names = ["student Q(y)", "teacher P(y)", "KL(P‖Q), nats"]
    table(axis, shades, names, [spell(token) for token in tokens], texts, size=7.5)
    axis.tick_params(labeltop=True, labelbottom=False)
    axis.set(xlim=(-0.5, 8.5))
    axis.set_title(title, loc="left", fontsize=9, pad=4)


def rollout_film(prompt, tokens, choices, student, teacher, divergence):
    """The rollout token by token. `choices[t]`: the names of some tokens; student, teacher: their probabilities."""
    frames = []
    for t in range(len(tokens)):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3))
        bars(left, [spell(c) for c in choices[t]], {"teacher": teacher[t], "student": student[t]})
        label(left, ylabel="probability", ylim=(0, 1.05))
        written = "".join(spell(token) for token in tokens[:t])
        left.set_title(f"next token: the student draws “{spell(tokens[t])}”")
        figure.suptitle(f"{prompt} → {written} …")
        bars(right, [spell(c) for c in tokens], {"forward KL": divergence * (torch.arange(len(tokens)) <= t)}, legend=False)  # fmt: skip
        label(right, ylabel="KL(P‖Q), nats", ylim=(0, 1.1 * divergence.max().item()))
        right.set_title("what each position teaches")
        frames.append(figure)
    film(frames)


def shift(rows, lengths, names):
    """Token boxes with an arrow from the position that predicts to the token that is predicted."""
    fill = {"prompt": "#DDDDDD", "completion": "#F5C99B", "end": "#D55E00", "padding": "white"}
    hatch = {"prompt": "", "completion": "", "end": "", "padding": ".."}
    arrow = {"arrowstyle": "->", "color": "black", "connectionstyle": "arc3,rad=-0.6"}
    axis, width = panels(width=9.5, height=2.9), max(map(len, rows))
    for b, (tokens, length) in enumerate(zip(rows, lengths)):
        for t in range(width):
            kind = "prompt" if t < length else "completion"
            if t >= len(tokens) - 1:
                kind = "end" if t == len(tokens) - 1 else "padding"
            box = {"facecolor": fill[kind], "hatch": hatch[kind], "edgecolor": "#999999"}
            axis.add_patch(plt.Rectangle((t - 0.48, b - 0.2), 0.96, 0.5, **box))
            text = spell(tokens[t]) if t < len(tokens) else ""
            axis.text(t, b + 0.05, text, ha="center", va="center", fontsize=7)
            if kind in ("completion", "end"):
                axis.annotate("", (t, b - 0.22), (t - 1, b - 0.22), arrowprops=arrow)
    axis.set(xlim=(-0.6, width - 0.4), ylim=(2.5, -0.7), xticks=range(width), yticks=[])
    axis.set_xlabel("position in the sequence")
    axis.spines[:].set_visible(False)
    boxes = [plt.Rectangle((0, 0), 1, 1, facecolor=fill[k], hatch=hatch[k], edgecolor="#999999") for k in fill]  # fmt: skip
    axis.figure.legend(boxes, names, loc="outside lower center", ncols=4)


def teachers(curves):
    """{kind of teacher: (steps, 2)}: KL to its teacher, KL to the base with C."""
    axes = panels(len(curves), width=9.5, height=2.7, sharey=True)
    for axis, (kind, curve) in zip(axes, curves.items()):
        both = {"to its own teacher": curve[:, 0], "to the base with C": curve[:, 1]}
        lines(axis, range(len(curve)), both, legend=False)
        label(axis, title=f"{kind} teacher", xlabel="step", yscale="log")
    axes[0].set_ylabel("KL(student‖…), nats per token")
    shared_legend(axes)


# ============================================================================= 04, 05, 06
def curves(steps, named, units):
    """One panel for each quantity: `named` is {method: {quantity: values}}, `units` is {quantity: unit}."""
    axes = panels(len(units), width=11, height=2.6)
    for axis, (title, unit) in zip(axes, units.items()):
        values = {method: of[title] for method, of in named.items()}
        lines(axis, steps, values, markers=True, legend=False)
        label(axis, title=title, ylabel=unit, xlabel="training step")
        if unit.startswith("share"):
            axis.set_ylim(-0.05, 1.05)
    shared_legend(axes)


def scatter(x, y, **texts):
    axis = panels(width=4.5, height=2.8)
    axis.plot(x, y, ".", color="#333333", markersize=2)
    label(axis, **texts)


def masks(visible):
    """{name: (T, T)}: who sees (rows) whom (columns)."""
    axes = panels(len(visible), width=5.5, height=2.5)
    for axis, (name, seen) in zip(axes, visible.items()):
        axis.imshow(seen, cmap="Greys", vmin=0, vmax=1.6)
        label(axis, title=name, xticks=range(7), yticks=range(7), xlabel="token that is seen")
        axis.set_xticklabels("xxxxyyy")
        axis.set_yticklabels("xxxxyyy")
    axes[0].set_ylabel("token that looks")
