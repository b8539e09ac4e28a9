"""Draws the figures of docs/concepts.md: `python docs/tools/figures.py` writes docs/figures/*.svg.

What a figure shows is computed with the package's own functions where there is one (criticality, rewards); the numbers
that go in are made up.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ppow_jax", "font.size": 10}
sys.path.insert(0, str(Path(__file__).parents[2]))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

from ppow_jax.objectives.criticality import criticality, window_means  # noqa: E402
from ppow_jax.objectives.rewards import CostModel, speedup_reward  # noqa: E402

GREY, BLUE, GREEN, RED, ORANGE = "#d9dee3", "#9ec5e8", "#a6d8a8", "#f0a8a0", "#f5cf8e"
INK = "#24323d"


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.92, height: float = 0.6) -> None:
    """A token: a rounded box centred at x, with its text."""
    style = "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=style, fc=colour, ec=INK, lw=0.8)
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=9)


def blank(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure without ticks and frame, `width` by `height` inches."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def window() -> Figure:
    """One round: a window of 4 tokens is drafted after the root, two are accepted, the target adds one."""
    figure, axes = blank(8.6, 3.3, (-2.3, 9), (-3.9, 1.3))
    text, drafts = ["A", "rainbow", "forms", "when"], ["sunlight", "meets", "clouds", "and"]
    own = ["sunlight", "meets", "rain", "", ""]
    for x, token in enumerate(text):
        box(axes, x, 0, token, ORANGE if x == 3 else GREY)
    for x, token in enumerate(drafts, 4):
        box(axes, x, 0, token, GREEN if x < 6 else RED)
    for x, token in enumerate(own, 3):
        box(axes, x, -1.7, token or "not used", BLUE if token else "white")
        axes.annotate("", (x, -1.36), (x, -0.34), arrowprops={"arrowstyle": "->", "color": INK, "lw": 0.8})
    for x, token in enumerate([*text, "sunlight", "meets", "rain"]):
        box(axes, x, -3.3, token, GREY if x < 4 else GREEN if x < 6 else BLUE)
    for y, label in ((0, "text and draft"), (-1.7, "the target's\nchoices"), (-3.3, "text after\nthe round")):
        axes.text(-0.75, y, label, ha="right", va="center", color=INK)
    for x, label in ((2, "anchor"), (3, "root")):
        axes.text(x, 0.55, label, ha="center", color=INK, fontsize=9, style="italic")
    axes.annotate("", (3.55, 0.75), (7.45, 0.75), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 0.8})
    axes.text(5.5, 0.9, "window, K = 4", ha="center", color=INK)
    axes.text(5, -2.55, "one pass of the target over K + 1 tokens: 2 accepted, 1 added", ha="center", color=INK)
    return figure


def anchors() -> Figure:
    """The tokens to which the drafted steps of three windows of one row attend."""
    T, K, places = 12, 3, (2, 5, 8)
    figure, axes = blank(8.2, 3.6, (-3.6, T + K + 1.4), (-len(places) * (K + 0.6) - 0.2, 1.6))
    for column in range(T):
        colour = ORANGE if column in places else GREY
        axes.add_patch(Rectangle((column, 0.2), 0.92, 0.7, fc=colour, ec=INK, lw=0.6))
        axes.text(column + 0.46, 0.55, str(column), ha="center", va="center", fontsize=8, color=INK)
    axes.text(-0.3, 0.55, "position", ha="right", va="center", color=INK)
    axes.text(T + 0.6 + (K - 1) / 2, 0.55, "own window", ha="center", va="center", color=INK)
    for w, anchor in enumerate(places):
        for step in range(K):
            y = -(w * (K + 0.6) + step + 1)
            for column in range(T):
                colour = BLUE if column <= anchor else "white"
                axes.add_patch(Rectangle((column, y), 0.92, 0.85, fc=colour, ec=GREY, lw=0.6))
            for column in range(K - 1):  # the key of step 1 is the anchor's
                colour = GREEN if column < step else "white"
                axes.add_patch(Rectangle((T + 0.6 + column, y), 0.92, 0.85, fc=colour, ec=GREY, lw=0.6))
            label = f"anchor {anchor}, step {step + 1}"
            axes.text(-0.3, y + 0.42, label, ha="right", va="center", fontsize=9, color=INK)
    return figure


def tree() -> Figure:
    """A tree of 3 levels: path probabilities, the 7 nodes that are verified, and the path that is accepted."""
    children = (0.6, 0.25, 0.1)
    nodes = [("", 1.0, 0.0)]  # path, probability, place
    for path, probability, place in nodes:
        if len(path) == 3:
            continue
        for i, p in enumerate(children):
            nodes.append((path + str(i), probability * p, place + (i - 1) * 3.0 ** (2 - len(path))))
    chosen = {path for path, *_ in sorted(nodes[1:], key=lambda node: -node[1])[:7]}
    accepted = {"", "0", "01"}
    figure, axes = blank(8.6, 3.4, (-18, 14), (-3.5, 0.5))
    where = {path: place for path, _, place in nodes}
    for path, probability, place in nodes:
        verified = path in chosen or not path
        if path:
            on = path in accepted
            line = {"color": "#2e7d32" if on else INK, "lw": 2.2 if on else 0.7}
            axes.plot([where[path[:-1]], place], [1 - len(path), -len(path)], zorder=0, **line)
        colour = ORANGE if not path else GREEN if path in accepted else BLUE if verified else "white"
        axes.scatter(place, -len(path), s=430 if verified else 120, c=colour, edgecolors=INK, linewidths=0.8)
        if verified:
            label = "root" if not path else f"{probability:.2f}"
            axes.text(place, -len(path), label, ha="center", va="center", fontsize=8, color=INK)
    for level in range(1, 4):
        axes.text(-18, -level, f"level {level}", va="center", color=INK)
    return figure


def adaw() -> Figure:
    """Criticality of 40 answer positions, and the windows that adaptive divergence-aware windowing prefers."""
    rng, n, K, V = np.random.default_rng(3), 40, 4, 49152
    entropy = np.clip(rng.gamma(1.2, 1.6, n), 0.02, 9.5).astype(np.float32)
    divergence = rng.gamma(0.5, 0.5, n).astype(np.float32)
    divergence[[11, 12, 13, 27, 28]] += np.float32(2.4)
    entropy[[11, 12, 27, 28]] = 0.3
    divergence[20:22], entropy[20:22] = 2.6, 8.5
    v = np.asarray(criticality(entropy, divergence, V))
    mean = np.asarray(window_means(v[None], K))[0]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8.2, 3.9), sharex=True, layout="constrained")
    top.bar(range(n), divergence, color=BLUE, edgecolor=INK, lw=0.4, label="KL(P || Q), nats")
    top.step(range(n), 1 - entropy / np.log(V), where="mid", color="#c0392b", lw=1.2, label="C(P) = 1 - H(P) / log |V|")
    top.set_ylim(0, 4)
    top.legend(frameon=False, loc="upper right", fontsize=9)
    bottom.bar(range(n), v, color=GREY, edgecolor=INK, lw=0.4, label="criticality v = C(P) KL(P || Q)")
    bottom.plot(mean, color=INK, lw=1.2, marker=".", label=f"mean over the window, K = {K}: priority of the anchor")
    for anchor in np.argsort(-mean)[:3]:
        bottom.axvspan(anchor - 0.5, anchor + K - 0.5, color=ORANGE, alpha=0.35, lw=0)
    bottom.set_ylim(0, 4)
    bottom.legend(frameon=False, loc="upper right", fontsize=9)
    bottom.set(xlabel="answer position")
    return figure


def rewards() -> Figure:
    """The speedup reward of a window over the number of accepted tokens, for three costs of a draft step."""
    K = 7
    accepted = np.arange(K + 1)
    figure, axes = plt.subplots(figsize=(5.6, 3.1), layout="constrained")
    for gamma, colour in ((0.05, "#1f5f99"), (0.12, "#2e7d32"), (0.3, "#c0392b")):
        reward = np.asarray(speedup_reward(accepted, K, CostModel(gamma)))
        axes.plot(accepted, reward, marker="o", color=colour, label=f"gamma = {gamma}")
    axes.set(xlabel="accepted tokens k", ylabel="k / (k gamma + 1)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


FIGURES = {"window": window, "anchors": anchors, "tree": tree, "adaw": adaw, "rewards": rewards}


def main(directory: Path) -> None:
    """Writes every figure as SVG into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw()
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "figures")
