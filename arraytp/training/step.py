"""The forward pass and score of a step, and the sums of scores and updates over the parts of a batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.config.schema import Loss
from arraytp.model.passes import Batch, side_by_side
from arraytp.ops.loss import loss_and_score
from arraytp.ranks import Part
from arraytp.rules.protocol import Update, Updates


@dataclass(frozen=True)
class Score:
    """Loss and accuracy of a batch.

    Parameters
    ----------
    loss : array of shape ()
        Reduced as in the config; an array of the computing backend.
    totals : array of shape (3,), float64
        Loss summed over the samples, and the numbers of labels that are ranked first and among the first five.
    images : int
        B of the whole batch.
    """

    loss: Array
    totals: Array
    images: int


@dataclass(frozen=True)
class Step:
    """A forward pass over a batch and its loss: what feedback training, updates and angles start from.

    Its arrays, and those of the updates computed from it, are valid until the next forward pass or score.

    Parameters
    ----------
    batch : Batch
        On several ranks this rank's part; in exact mode the first of its parts, which knows the others.
    score : Score
        Of the batch before the update; on several ranks of this rank's samples, until `Experiment.updates` sums it.
    totals : list of arrays of shape (3,)
        `Score.totals` of each of `batch.every`; for parts computed together, of each of `Part.rows`.
    """

    batch: Batch
    score: Score
    totals: list[Array]


def check_labels(labels: Array, classes: int) -> None:
    """Raise ValueError for labels outside 0 … classes − 1; with −1 NumPy would index from the end."""
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if bad.size:
        raise ValueError(f"label {labels[bad[0]]} of sample {bad[0]}: expected one of 0 to {classes - 1}")


def samples_of(part: Part | None, parts: Sequence[Part | None], images: Array, labels: Array) -> tuple[Array, Array]:
    """Select a part's images and labels from those of this rank; a blank image if the part is empty."""
    if part is None or parts[0] is None:
        return images, labels
    if part.empty:
        xp = array_module(images)
        return xp.zeros((1, *images.shape[1:]), images.dtype), xp.zeros(1, labels.dtype)
    own = slice(part.first - parts[0].first, part.first - parts[0].first + part.count)
    return images[own], labels[own]


def scores_of(settings: Loss, part: Part | None, logits: Array, labels: Array) -> tuple[Array, list[Score]]:
    """Return ∂L/∂logits and the score of the samples of a part, or of each part computed together."""
    share, size = (1.0, len(labels)) if part is None else (part.count / part.size, part.size)
    if part is None or not part.together:
        dlogits, score = _score(settings, logits, labels, share, size)
        return dlogits, [score]
    scored = [_score(settings, logits[each], labels[each], (each.stop - each.start) / size, size) for each in part.rows]
    return np.concatenate([dlogits for dlogits, _ in scored]), [score for _, score in scored]


def _score(settings: Loss, logits: Array, labels: Array, share: float, size: int) -> tuple[Array, Score]:
    """Return ∂L/∂logits and the score of samples that are the fraction `share` of a batch of `size`."""
    if not len(labels):
        return logits, Score(logits.sum(), np.zeros(3), size)
    loss, dlogits, totals = loss_and_score(
        settings.name, logits, labels, settings.reduction, settings.label_smoothing, share, size
    )
    return dlogits, Score(loss, totals, size)


def summed_scores(scores: Sequence[Score]) -> Score:
    """Return the sum of the scores of all parts."""
    first, *others = scores
    loss, totals = first.loss, first.totals
    for other in others:
        loss, totals = loss + other.loss, totals + other.totals
    return Score(loss, totals, first.images)


def updates_of(batch: Batch, descend: Callable[[Batch], Iterator[Update]]) -> Updates:
    """Return the update of every block, block 0 first, summed over all samples."""
    return summed_updates(batch, descend, [[] for _ in batch.every])[0]


def summed_updates(
    batch: Batch,
    descend: Callable[[Batch], Iterator[Update]],
    others: Sequence[Sequence[Array]],
    flags: int = 0,
) -> tuple[Updates, list[Array]]:
    """Return the updates, block 0 first, and `others`, both summed over all samples as in `RankSums.add`."""
    if batch.part is None:
        return list(descend(batch))[::-1], []
    parameters = batch.network.parameters()
    size = sum(array.size for array in [*parameters, *others[0]])
    sums, walks = batch.sums("updates", size, parameters[0].dtype), [descend(each) for each in batch.every]
    for _ in batch.network.blocks:
        sums.add(side_by_side(batch.engine, [partial(next, walk) for walk in walks]))
    sums.add(others, flags)
    summed, blocks = sums.finished(), len(batch.network)
    pairs = list(zip(summed[: 2 * blocks : 2], summed[1 : 2 * blocks : 2], strict=True))
    return pairs[::-1], summed[2 * blocks :]
