"""Draw angles to BP's updates over the epochs like the DTP paper's Figure 4: one panel per layer, one line per run.

    python docs/results/layer_angles.py OUT.png results/cifar10-ldrl results/cifar10-s-ddtp results/cifar10-p-ddtp

four_panels.py beside it draws Figures 3 to 5 of the GP paper.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from arraytp.report.angles import block_series, common_blocks
from arraytp.report.figures import new_figure, save_figure
from arraytp.report.panels import running_mean
from arraytp.report.reading import read_results
from arraytp.report.style import RC, looks


def drawn(folders: list[Path]) -> Figure:
    """Draw the runs in these folders; steps are converted to epochs, because the runs' batch sizes differ."""
    results = read_results(folders)
    blocks, given = common_blocks(results), looks(results)
    with matplotlib.rc_context(RC):
        figure = new_figure(2.7 * len(blocks), 3.3)
        panels = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
        for n, (axes, block) in enumerate(zip(panels, blocks, strict=True)):
            for result, look in zip(results, given, strict=True):
                steps, angles = block_series(result, n)
                done = result.summary or {"epochs": result.angles["epoch"][-1], "steps": max(steps[-1], 1)}
                epochs = steps * done["epochs"] / done["steps"]
                axes.plot(epochs, angles, color=look.colour, linewidth=0.6, alpha=0.3)
                mean = running_mean(angles, len(angles) // 40, apart=True)
                axes.plot(epochs, mean, color=look.colour, linestyle=look.dash, label=result.label)
            axes.set(title=block, xlabel="epoch")
        panels[0].set(ylabel="angle to BP's update (°)", ylim=(-2, max(98, panels[0].get_ylim()[1])))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    with matplotlib.rc_context(RC):
        save_figure(drawn([Path(folder) for folder in sys.argv[2:]]), Path(sys.argv[1]))
