"""The data set's shards, the order of an epoch, and augmentation and normalisation pixel by pixel."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from arraytp.audit.check import ROUNDING, Check, Floats, apart, checked, host
from arraytp.audit.setting import Setting
from arraytp.config import Config, Normalize
from arraytp.data import augment, order
from arraytp.data.dataset import Dataset
from arraytp.data.division import VALIDATION, Division, divide, held_out
from arraytp.data.loader import Loader
from arraytp.errors import UserError

# Two orders of more images than this are not the same by chance.
MANY = 20
# How many bytes are read at most to verify checksums, and from how many places in a large split.
MOST_BYTES, PLACES = 1 << 28, 64


def shards(dataset: Dataset) -> Iterator[Check]:
    """Check every range of rows against its checksum; in large sets only ranges spread over all shards."""
    image_bytes = int(np.prod(dataset.shape))
    share = MOST_BYTES // len(dataset.counts)
    for split, count in dataset.counts.items():
        try:
            chunks = dataset.chunks(split)
        except UserError as error:
            yield checked(f"{split}: {error}", "checksums", Dataset.chunks, 1, 0.0)
            continue
        size = image_bytes * max(stop - start for start, stop in chunks)
        number = len(chunks) if count * image_bytes <= share else max(1, min(PLACES, share // size))
        chosen = [chunks[i * len(chunks) // number] for i in range(number)]
        damage = []
        for start, stop in chosen:
            try:
                dataset.read(split, start, stop)
            except UserError as error:
                damage.append(str(error))
        rows = sum(stop - start for start, stop in chosen)
        what = damage[0] if damage else f"damaged ranges in {rows} of {count} rows"
        yield checked(f"{split}: {what}", "checksums", Dataset.read, len(damage), 0.0)


def batches(setting: Setting) -> Iterator[Check]:
    """Check training's first batches and a test batch against pixels read from the shards."""
    yield from _loader(setting, setting.experiment.train_loader, training=True)
    experiment = setting.experiment
    for loader in filter(None, (experiment.validation_loader, experiment.test_loader)):
        yield from _loader(setting, loader, training=False)
    if experiment.validation_loader is not None:
        yield from _division(experiment.validation_loader.dataset, experiment.plan.dataset)


def _division(division: Dataset | Division, dataset: Dataset) -> Iterator[Check]:
    """Check that every training image is either trained on or held out, and that every class has its share held out."""
    assert isinstance(division, Division)
    rows, labels = np.concatenate(list(division.rows.values())), dataset.labels("train")
    error = float((np.sort(rows) != np.arange(len(labels))).sum())
    yield checked("training images that are in none or both parts", "train.validation", divide, error, 0.0)
    held = np.bincount(labels[division.rows[VALIDATION]], minlength=len(dataset.classes))
    share = held.sum() * np.bincount(labels, minlength=len(held)) / len(labels)
    yield checked("images of a class held out, less its share", "n_c/n of them", held_out,
                  float(np.abs(held - share).max()), 1.0)  # fmt: skip


def _loader(setting: Setting, loader: Loader, training: bool) -> Iterator[Check]:
    config, dataset, split = setting.config, loader.dataset, loader.split
    rows = _rows(config, dataset, loader, training, 0)
    with closing(loader.batches(0)) as loaded:
        images, labels = (host(array).copy() for array in next(loaded))
    count = len(labels)
    read = [dataset.read(split, int(row), int(row) + 1) for row in rows[:count]]
    raw, expected_labels = (np.concatenate(parts) for parts in zip(*read, strict=True))
    error = apart(labels, expected_labels)
    yield checked(f"{split}: labels of the first batch", "order of the epoch", Loader.batches, error, 0.0)
    if training:
        ordered = np.sort(rows)
        error = float((ordered != np.arange(loader.count)).sum())
        yield checked(
            f"{split}: rows that an epoch takes not once", "order of the epoch", order.memory_order, error, 0.0
        )
        yield from _another_epoch(config, dataset, loader, rows)
    pixels = raw.astype(np.float64)
    if training and (config.data.flip or config.data.crop_padding):
        draws = augment.draw(config.seed, 0, loader.count, config.data.flip, config.data.crop_padding)
        yield from _draws(config, draws)
        part = draws.part(0, count)
        pixels = np.stack([
            _augmented(image, bool(flip), int(row), int(column), config.data.crop_padding)
            for image, flip, row, column in zip(pixels, *part, strict=True)
        ])  # fmt: skip
        yield from _device_forms(setting, raw, part, pixels)
    mean, std = _statistics(config, setting.experiment.plan.dataset)
    expected = (pixels / 255 - mean) / std
    yield checked(f"{split}: pixels of the first batch", "(x/255 − mean)/std", Loader.batches, apart(images, expected),
                  ROUNDING)  # fmt: skip


def _another_epoch(config: Config, dataset: Dataset | Division, loader: Loader, first: np.ndarray) -> Iterator[Check]:
    """Check that the next epoch has all rows, in another order, and different flips and crops."""
    rows = _rows(config, dataset, loader, True, 1)
    missing = float((np.sort(rows) != np.arange(loader.count)).sum())
    # Two orders of a few images may well be the same.
    same = loader.count > MANY and np.array_equal(rows, first)
    with closing(loader.batches(1)) as loaded:
        labels = host(next(loaded)[1])
    read = [dataset.read(loader.split, int(row), int(row) + 1)[1] for row in rows[: len(labels)]]
    expected = np.concatenate(read)
    yield checked(f"{loader.split}: the next epoch's rows, in another order", "order of the epoch", order.memory_order,
                  missing + same + apart(labels, expected), 0.0)  # fmt: skip
    if loader.count > MANY and (config.data.flip not in (0, 1) or config.data.crop_padding):
        a, b = (
            augment.draw(config.seed, epoch, loader.count, config.data.flip, config.data.crop_padding)
            for epoch in (0, 1)
        )
        repeated = all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))
        yield checked(f"{loader.split}: epochs that share flips and crops", "drawn anew", augment.draw, repeated, 0.0)


def _rows(config: Config, dataset: Dataset | Division, loader: Loader, training: bool, epoch: int) -> np.ndarray:
    """Return the row of every position of an epoch."""
    if not loader.streamed:
        return order.memory_order(loader.count, config.seed, epoch, shuffle=training)
    plan = order.pool_plan(dataset.chunks(loader.split), config.data.pool_images, config.seed, epoch, shuffle=training)
    return plan.arrival_rows()[plan.leaving]


def _augmented(image: Floats, flip: bool, row: int, column: int, padding: int) -> Floats:
    """Return one image, flipped if asked, then padded with replicated edges and cropped to its own size."""
    height, width, _ = image.shape
    flipped = image[:, ::-1] if flip else image
    edged = np.pad(flipped, ((padding, padding), (padding, padding), (0, 0)), mode="edge")
    return edged[row : row + height, column : column + width]


def _draws(config: Config, draws: augment.Draws) -> Iterator[Check]:
    """Check the share of flips and the spread of corners."""
    count, padding, flip = len(draws.flips), config.data.crop_padding, config.data.flip
    bound = 6 / count**0.5
    yield checked("share of images flipped, less the probability", "data.flip", augment.draw,
                  abs(float(draws.flips.mean()) - flip), bound)  # fmt: skip
    corners = np.stack([draws.rows, draws.columns])
    outside = float(((corners < 0) | (corners > 2 * padding)).sum())
    yield checked("corners of crops outside 0 … 2·padding", "data.crop_padding", augment.draw, outside, 0.0)
    if padding:
        error = abs(float(corners.mean()) / padding - 1)
        yield checked("mean corner over the padding, less 1", "data.crop_padding", augment.draw, error, bound)


def _device_forms(setting: Setting, raw: np.ndarray, part: augment.Draws, expected: Floats) -> Iterator[Check]:
    """Check the definitions of flip and crop that run on a device."""
    put = setting.put
    flipped = augment.flip_images(put(raw), put(part.flips))
    padding = setting.config.data.crop_padding
    cropped = augment.crop_images(flipped, put(part.rows), put(part.columns), padding) if padding else flipped
    error = apart(cropped, expected)
    yield checked("flip and crop, pixel by pixel", "edge-padded crop", augment.crop_images, error, 0.0)


def _statistics(config: Config, dataset: Dataset) -> tuple[Floats, Floats]:
    """Return the config's mean and standard deviation per channel."""
    chosen, channels = config.data.normalize, dataset.shape[2]
    if isinstance(chosen, Normalize):
        return np.array(chosen.mean), np.array(chosen.std)
    if chosen == "dataset":
        return np.array(dataset.mean), np.array(dataset.std)
    return np.zeros(channels), np.ones(channels)


CHECKS = (batches,)
