"""Figure that explains MTN: a stack, its three unfoldings, their norms and the gradient.

``python docs/figures/mtn.py docs/images/mtn.png`` writes the README's copy. :mod:`mtnrec.mtn`
computes every number in it from one small stack.
"""

import io
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from mtnrec.mtn.polar import PolarFactor, polar_factors
from mtnrec.mtn.unfolding import unfold, unfoldings


class Theme(NamedTuple):
    """Colours of a page."""

    text: str
    faint: str
    page: str


THEMES = {
    "light": Theme("#1f2328", "#6e7781", "#ffffff"),
    "dark": Theme("#d8dee4", "#8b949e", "#131416"),
}
TOWERS = ("#2a78c2", "#e0782f", "#3a9d5d")
NAMES = ("task", "output", "input")
LABELS = ("$T \\times OI$", "$O \\times TI$", "$I \\times TO$")
SHAPE = (3, 4, 6)  # T, O, I
_CELL = 0.115  # inches


def small_stack() -> Tensor:
    """Return a stack ``(T, O, I)`` of three similar towers: a shared rank-2 part plus noise."""
    generator = torch.Generator().manual_seed(1)
    towers, outputs, inputs = SHAPE
    left, _ = torch.linalg.qr(torch.randn(outputs, 2, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(inputs, 2, generator=generator))
    shared = left @ torch.diag(torch.tensor([4.0, 3.0])) @ right.T
    return shared + 0.4 * torch.randn(towers, outputs, inputs, generator=generator)


def draw(theme: Theme) -> Figure:
    """Draw the complete figure."""
    stack = small_stack()
    factors = polar_factors(stack)
    style = {
        "text.color": theme.text,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "font.size": 8.5,
        "svg.hashsalt": "mtn",
        "svg.fonttype": "path",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.2, 4.0), facecolor=theme.page)
        _headings(figure, theme)
        _draw_stack(figure, stack, theme)
        for row, modes in enumerate(unfoldings(3)):
            bottom = 0.665 - 0.26 * row
            _draw_unfolding(figure, stack, modes, row, bottom)
            _draw_spectrum(figure, factors[row], bottom, row, theme)
            _draw_gradient(figure, factors[row], bottom, row, theme)
        norms = [factor.singular_values.sum().item() for factor in factors]
        frobenius = stack.norm().item()
        total = sum(norms) / 3 + frobenius
        terms = " + ".join(f"{norm:.1f}" for norm in norms)
        figure.text(
            0.985,
            0.045,
            f"$R = \\sum_s\\alpha_s\\Vert W_{{(s)}}\\Vert_* + \\Vert W\\Vert_F$ = "
            f"({terms}) / 3 + {frobenius:.1f} = {total:.1f}",
            ha="right",
            fontsize=9.5,
        )
    return figure


def draw_svg(name: str) -> str:
    """Return the figure for a theme as SVG; the text is deterministic."""
    buffer = io.StringIO()
    draw(THEMES[name]).savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _headings(figure: Figure, theme: Theme) -> None:
    for x, title, text in (
        (0.015, "1  Stack", "one layer of the\nthree towers"),
        (0.235, "2  Three unfoldings", "the same weights as matrices"),
        (0.6, "3  Norm", "sum of the singular values"),
        (0.815, "4  Gradient", "pulls each by the same $\\alpha_s$"),
    ):
        figure.text(x, 0.945, title, fontsize=10.5, fontweight="bold")
        figure.text(x, 0.93, text, va="top", color=theme.faint, linespacing=1.25)


def _place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    axes = figure.add_axes((left, bottom, width, height))
    axes.patch.set_alpha(0)
    return axes


def _heat(axes: Axes, matrix: Tensor, left: float, bottom: float, scale: float) -> None:
    rows, columns = matrix.shape
    colours = mpl.colormaps["RdBu_r"](0.5 + matrix.numpy() / (2 * scale))
    for i in range(rows):
        for j in range(columns):
            cell = Rectangle((left + j, bottom + rows - 1 - i), 1, 1, color=colours[i, j], lw=0)
            axes.add_patch(cell)


def _frame(
    axes: Axes, left: float, bottom: float, width: float, height: float, colour: str
) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, fill=False, ec=colour, lw=1.8))


def _inches(figure: Figure, left: float, bottom: float, columns: float, rows: float) -> Axes:
    """Return axes without ticks whose unit is a matrix cell."""
    width, height = figure.get_size_inches()
    axes = _place(figure, left, bottom, columns * _CELL / width, rows * _CELL / height)
    axes.set_xlim(0, columns)
    axes.set_ylim(0, rows)
    axes.axis("off")
    return axes


def _draw_stack(figure: Figure, stack: Tensor, theme: Theme) -> None:
    towers, outputs, inputs = SHAPE
    shift = 2.4
    axes = _inches(figure, 0.02, 0.36, inputs + shift * towers, outputs + shift * towers)
    scale = stack.abs().max().item()
    for tower in reversed(range(towers)):
        left, bottom = shift * tower, shift * tower
        axes.add_patch(Rectangle((left, bottom), inputs, outputs, color=theme.page))
        _heat(axes, stack[tower], left, bottom, scale)
        _frame(axes, left, bottom, inputs, outputs, TOWERS[tower])
    axes.set_clip_on(False)
    axes.text(inputs / 2, -0.35, "inputs $I$", ha="center", va="top")
    axes.text(-0.35, outputs / 2, "outputs $O$", ha="right", va="center", rotation=90)
    axes.text(inputs + 1.9, 0.3, "tasks $T$", rotation=45, ha="left", va="bottom")


def _draw_unfolding(
    figure: Figure, stack: Tensor, modes: tuple[int, ...], row: int, bottom: float
) -> None:
    matrix = unfold(stack, modes)
    rows, columns = matrix.shape
    axes = _inches(figure, 0.235, bottom, columns, rows)
    _heat(axes, matrix, 0, 0, stack.abs().max().item())
    towers = SHAPE[0]
    if modes == (0,):
        for tower in range(towers):
            _frame(axes, 0, towers - 1 - tower, columns, 1, TOWERS[tower])
    else:
        wide = columns / towers
        for tower in range(towers):
            _frame(axes, wide * tower, 0, wide, rows, TOWERS[tower])
    for child in axes.get_children():
        child.set_clip_on(False)
    axes.text(0, rows + 0.5, f"{NAMES[row]}  {LABELS[row]}", va="bottom")


def _spectrum_axes(figure: Figure, left: float, bottom: float, factor: PolarFactor) -> Axes:
    axes = _place(figure, left, bottom, 0.17, 0.15)
    values = factor.singular_values
    axes.set_xlim(-0.7, SHAPE[2] - 0.3)
    axes.set_ylim(0, values[0].item() * 1.08)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _draw_spectrum(
    figure: Figure, factor: PolarFactor, bottom: float, row: int, theme: Theme
) -> None:
    values = factor.singular_values.tolist()
    axes = _spectrum_axes(figure, 0.6, bottom, factor)
    axes.bar(range(len(values)), values, width=0.62, color=theme.faint)
    for index, value in enumerate(values):
        axes.text(index, value, f"{value:.1f}", ha="center", va="bottom", fontsize=6.5)
    axes.set_title(
        f"$\\Vert W_{{(\\mathrm{{{NAMES[row]}}})}}\\Vert_*$ = {sum(values):.1f}",
        loc="right",
        fontsize=8.5,
        pad=3,
    )


def _draw_gradient(
    figure: Figure, factor: PolarFactor, bottom: float, row: int, theme: Theme
) -> None:
    values = factor.singular_values.tolist()
    axes = _spectrum_axes(figure, 0.815, bottom, factor)
    length = 0.16 * values[0]
    for index, value in enumerate(values):
        left = max(value - length, 0.0)
        axes.bar(index, left, width=0.62, color=theme.faint)
        axes.bar(index, value - left, bottom=left, width=0.62, fc="none", ec=theme.faint, ls=":")
        arrow = FancyArrowPatch(
            (index, value),
            (index, left),
            arrowstyle="-|>",
            mutation_scale=7,
            shrinkA=0,
            shrinkB=0,
            color="#c2413a",
        )
        axes.add_patch(arrow)
    if row == 0:
        axes.set_title(
            "$\\alpha_s\\, U V^{\\!\\top}$ + $W/\\Vert W\\Vert_F$", loc="right", fontsize=8.5, pad=3
        )


if __name__ == "__main__":
    draw(THEMES["light"]).savefig(Path(sys.argv[1]), dpi=200)
