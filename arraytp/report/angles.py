"""Angles of a rule's updates to BP's and GNT's, summarised over a run; undefined ones are counted, never filled in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arraytp.report.reading import Result, numbered_blocks
from arraytp.report.seeds import deviation

SHOWN_AS_ZERO = 0.05


@dataclass(frozen=True)
class Reference:
    """A rule that updates are compared with: its short name, and the column of angles.csv."""

    name: str
    column: str


BP, GNT = Reference("BP", "angle_deg"), Reference("GNT", "gnt_angle_deg")


def references(results: Sequence[Result]) -> list[Reference]:
    """Return the references that any of the runs was compared with."""
    return [BP, GNT] if any(result.against_gnt for result in results) else [BP]


@dataclass(frozen=True)
class BlockAngle:
    """One block's angles over a run, in degrees: mean and standard deviation of the defined ones, NaN without any.

    Of the `measured` angles, `undefined` are NaN: an update that is zero or not finite has no direction.
    """

    mean: float
    deviation: float
    measured: int
    undefined: int


def block_angles(result: Result, reference: Reference = BP) -> list[BlockAngle]:
    """Return the summary of every block, from the input's on; with several seeds, that of their means."""
    if result.seeds:
        # A seed that was stopped early may have measured no block yet, or not all.
        each = [angles for run in result.seeds if (angles := block_angles(run, reference))]
        return [_over_seeds(angles) for angles in zip(*each, strict=False)]
    block, angle = result.angles["block"], result.angles[reference.column]
    return [_summary(angle[block == n]) for n in range(len(result.blocks))]


def _summary(angles: NDArray[np.float64]) -> BlockAngle:
    defined = angles[~np.isnan(angles)]
    mean, deviation = (float(defined.mean()), float(defined.std())) if defined.size else (np.nan, np.nan)
    return BlockAngle(mean, deviation, angles.size, angles.size - defined.size)


def _over_seeds(angles: Sequence[BlockAngle]) -> BlockAngle:
    means = np.array([angle.mean for angle in angles if not math.isnan(angle.mean)])
    counts = sum(angle.measured for angle in angles), sum(angle.undefined for angle in angles)
    mean, spread = (float(means.mean()), float(deviation(means))) if means.size else (math.nan, math.nan)
    return BlockAngle(mean, spread, *counts)


def block_series(
    result: Result, block: int, reference: Reference = BP
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps at which a block was measured and its angles there in degrees, shape (measurements,) each."""
    rows = result.angles["block"] == block
    return result.angles["step"][rows], result.angles[reference.column][rows]


def hidden_mean(result: Result, reference: Reference = BP) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps and the mean angle in degrees of the hidden blocks, or of the only block.

    The output block is left out because most rules give it BP's own update. At a step where one of the
    blocks has no angle, the mean is NaN.
    """
    hidden = max(len(result.blocks) - 1, 1)
    rows = result.angles["block"] < hidden
    steps, place, count = np.unique(result.angles["step"][rows], return_inverse=True, return_counts=True)
    return steps, np.bincount(place, result.angles[reference.column][rows], minlength=len(steps)) / count


def has_angles(result: Result, reference: Reference = BP) -> bool:
    """Tell whether there are angles to show: any measured or, for BP against itself, any above rounding error."""
    angles = result.angles[reference.column]
    if reference is GNT:
        return angles.size > 0 and result.against_gnt
    return angles.size > 0 and (result.rule != "bp" or bool((~(angles < SHOWN_AS_ZERO)).any()))


def common_blocks(results: Sequence[Result]) -> list[str]:
    """Return the `common_labels` of runs."""
    return common_labels([result.blocks for result in results])


def common_labels(networks: Sequence[list[str]]) -> list[str]:
    """Return block labels for a comparison: the networks' own if they agree, otherwise `block n` for all."""
    count = max(map(len, networks), default=0)
    named = [labels for labels in networks if labels != numbered_blocks(len(labels))]
    longest = max(named, key=len, default=[])
    agree = len(longest) == count and all(labels == longest[: len(labels)] for labels in named)
    return longest if agree else numbered_blocks(count)
