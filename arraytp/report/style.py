"""The look of figures: each rule has the same colour in all of them, distinguishable by colour-blind readers too."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from arraytp.report.reading import Result

RULE_COLOURS = {
    "bp": "#000000",
    "fa": "#0072b2",
    "sign-symmetry": "#56b4e9",
    "kolen-pollack": "#332288",
    "weight-mirror": "#6699cc",
    "alignment": "#999933",
    "dfa": "#d55e00",
    "gait-prop": "#e69f00",
    "tp": "#aa4499",
    "dtp": "#882255",
    "ldrl": "#009e73",
    "ldrl-parallel": "#44aa99",
    "drl": "#cc79a7",
    "ridge-tp": "#cc6677",
    "gnt": "#117733",
}
OTHER_COLOUR = "#777777"
NOTE_COLOUR = "#666666"
RC = matplotlib.rc_params_from_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_PALEST = 0.55

Dash = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Look:
    """Colour and line style of one run."""

    colour: str
    dash: Dash = "-"


def looks(results: Sequence[Result]) -> list[Look]:
    """Return the look of every run: its rule's colour; runs of one rule differ in shade and dashes.

    If all runs have the same rule, colours distinguish the runs instead, from dark to light in their order.
    """
    if len({result.rule for result in results}) == 1 and len(results) > 1:
        return [Look(colour, _DASHES[n % len(_DASHES)]) for n, colour in enumerate(shades(len(results)))]
    counts, seen = Counter(result.rule for result in results), Counter[str]()
    given = []
    for result in results:
        place = seen[result.rule]
        paleness = _PALEST * place / max(counts[result.rule] - 1, 1)
        given.append(Look(_pale(rule_colour(result), paleness), _DASHES[place % len(_DASHES)]))
        seen[result.rule] += 1
    return given


def rule_colour(result: Result) -> str:
    """Return the colour of a run's rule."""
    return RULE_COLOURS.get(result.rule, OTHER_COLOUR)


def shades(count: int) -> list[str]:
    """Return ordered colours from dark to light."""
    map_ = matplotlib.colormaps["viridis"]
    return [to_hex(map_(0.88 * n / max(count - 1, 1))) for n in range(count)]


def _pale(colour: str, amount: float) -> str:
    red, green, blue = (part + (1 - part) * amount for part in to_rgb(colour))
    return to_hex((red, green, blue))


def wrapped(label: str, width: int = 46) -> str:
    """Break a long label into lines; nothing is cut off."""
    return textwrap.fill(label, width)


def literal(label: str) -> str:
    """Escape the dollar signs of a label, so that Matplotlib draws them and does not take them for mathematics."""
    return label.replace("$", r"\$")


def legend_columns(labels: Sequence[str], width: int) -> int:
    """Return how many legend columns fit into `width` characters, evened out over the rows."""
    longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    fitting = max(width // (longest + 6), 1)
    rows = -(-len(labels) // fitting)
    return -(-len(labels) // rows) if rows else 1


def note(axes: Axes, text: str) -> None:
    """Write in the middle of empty axes why they are empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=NOTE_COLOUR)
    axes.set_axis_off()
