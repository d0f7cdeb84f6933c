"""Draw runs like Figures 3 to 5 of the GP paper: angles per block (A) and over the steps (B), accuracies (C, D).

    python docs/results/four_panels.py OUT.png results/cifar10-deep-bp results/cifar10-deep-gp results/cifar10-deep-fa

With --top5, the accuracies are top-5, as in Figure 5. The comparison.png that `arraytp report` draws has the same
panels, the one over the steps first and largest.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from arraytp.report import panels
from arraytp.report.angles import common_blocks
from arraytp.report.figures import new_figure, save_figure
from arraytp.report.reading import read_results, splits_of
from arraytp.report.style import RC, looks


def drawn(folders: list[Path], k: int = 1) -> Figure:
    """Draw the runs in these folders, with top-k accuracies."""
    results = read_results(folders)
    given, split = looks(results), splits_of(results)
    with matplotlib.rc_context(RC):
        figure = new_figure(10, 7)
        above, below = figure.subplots(2, 2)
        panels.angle_bars(above[0], results, given, common_blocks(results))
        panels.angle_lines(above[1], results, given)
        below[1].sharey(below[0])
        panels.epoch_lines(below[0], results, given, f"train_top{k}", f"train top-{k} (%)")
        panels.epoch_lines(below[1], results, given, f"{{split}}_top{k}", f"{split} top-{k} (%)")
        titles = [
            "Angle to BP's update per block, mean ± s.d.",
            "Angle to BP's update, mean of the hidden blocks",
            "Training accuracy",
            f"{split} accuracy".capitalize(),
        ]
        for letter, axes, title in zip("ABCD", figure.axes, titles, strict=True):
            axes.set_title(f"$\\bf{{{letter}}}$   {title}")
        handles = [below[0].plot([], [], color=look.colour, linestyle=look.dash)[0] for look in given]
        figure.legend(handles, [result.label for result in results], loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    out, *folders = [Path(argument) for argument in sys.argv[1:] if argument != "--top5"]
    with matplotlib.rc_context(RC):
        save_figure(drawn(folders, 5 if "--top5" in sys.argv else 1), out)
