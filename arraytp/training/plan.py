"""Checks of a config before anything is computed: whether it fits its data set, network and backend."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arraytp.backend import Backend, get_backend
from arraytp.config import Config, Normalize
from arraytp.config.problems import LARGEST_INTEGER
from arraytp.data.dataset import Dataset, open_dataset
from arraytp.data.division import Division
from arraytp.data.loader import Loader
from arraytp.errors import UserError
from arraytp.fast.orthogonality import regularised
from arraytp.launcher import local_rank
from arraytp.model.architectures import plan_network
from arraytp.model.blocks import Block, show_shape
from arraytp.options import Cosine, Staircase
from arraytp.rules import RULES, gnt

TEST_SPLITS = ("test", "val")
# In image sides. A wider border gives crops of nothing but edge pixels and, in the end, exceeds the memory.
MOST_CROP_PADDING = 10


@dataclass(frozen=True)
class Plan:
    """A config that fits its data set, network and backend; `notes` are remarks on its rule and schedule."""

    config: Config
    backend: Backend
    dataset: Dataset
    blocks: tuple[Block, ...]
    test_split: str
    notes: tuple[str, ...] = ()

    @property
    def train_images(self) -> int:
        """The number of images that are trained on."""
        return self.dataset.counts["train"] - self.config.train.validation


def plan_variant(path: Path, variant: str, config: Config) -> Plan:
    """Return the plan of a config that was read from a file; its errors name file and variant."""
    try:
        return plan(config)
    except UserError as error:
        raise UserError(f"{path}{f' (variant {variant})' if variant else ''}: {error}") from error


def plan(config: Config, backend: Backend | None = None) -> Plan:
    """Check a config against its data set, network and backend; UserError if one is unavailable or does not fit."""
    try:
        dataset = open_dataset(config.data.dataset)
    except UserError as error:
        raise UserError(f"data.dataset: {error}") from error
    counts = dataset.counts
    test_split = next((split for split in TEST_SPLITS if split in counts), None)
    if "train" not in counts or test_split is None:
        raise UserError(
            f"data.dataset {config.data.dataset}: has the splits {', '.join(counts)}; needs train and one of "
            f"{', '.join(TEST_SPLITS)}"
        )
    if isinstance(config.data.normalize, Normalize) and len(config.data.normalize.mean) != dataset.shape[2]:
        raise UserError(
            f"data.normalize: {len(config.data.normalize.mean)} values of mean and std, but the images of "
            f"{dataset.name} need {dataset.shape[2]}, one per channel"
        )
    if config.data.normalize == "dataset" and min(dataset.std) <= 0:
        raise UserError(
            f"data.normalize: dataset, but the train images of {dataset.name} have the standard deviations "
            f"{list(dataset.std)}: a channel is the same in all of them; give a mean and std, or none"
        )
    if config.train.validation >= counts["train"]:
        raise UserError(
            f"train.validation: {config.train.validation}, but the train split of {config.data.dataset} has "
            f"{counts['train']} images, and at least one must remain for training; at most {counts['train'] - 1}"
        )
    widest = MOST_CROP_PADDING * max(dataset.shape[:2])
    if config.data.crop_padding > widest:
        raise UserError(
            f"data.crop_padding: {config.data.crop_padding} around images of {show_shape(dataset.shape)}; "
            f"at most {widest}"
        )
    for key, section in (
        ("data.normalize", config.data.normalize),
        ("rule", config.rule),
        ("loss", config.loss),
        ("optimizer", config.optimizer),
        ("schedule", config.schedule),
        ("compare", config.compare),
    ):
        if not isinstance(section, str):
            _check_numbers(asdict(section), key, config)
    blocks = plan_network(config.network, dataset.shape, len(dataset.classes))
    if config.optimizer.orthogonality and not regularised(blocks, config.optimizer.orthogonality_on):
        raise UserError(
            f"optimizer.orthogonality: {config.optimizer.orthogonality:g}, but "
            + (
                f"the network has one block, {blocks[0].label}, whose matrix is not square; set it to 0"
                if len(blocks) == 1
                else "no weight matrix of this network is square; set it to 0, or network.square: true, or "
                "orthogonality_on: all-but-first for semi-orthogonal ones"
            )
        )
    if config.optimizer.orthogonality_every > 1 and not config.optimizer.orthogonality:
        raise UserError(
            f"optimizer.orthogonality_every: {config.optimizer.orthogonality_every}, but optimizer.orthogonality is 0; "
            "give λ there, or leave this out"
        )
    notes = (
        *RULES[config.rule.name].check(config.rule, blocks, config.dtype, config.loss.reduction),
        *_schedule_notes(config, -(-(counts["train"] - config.train.validation) // config.train.batch_size)),
    )
    if "gnt" in config.compare.against:
        gnt.check_jacobians("compare.against: gnt", blocks)
    if "bp" not in config.compare.against:
        raise UserError(f"compare.against: {list(config.compare.against)}: must contain bp, and may contain gnt")
    _check_lists(config, blocks)
    _check_tf32(config)
    _check_study(config, blocks, counts["train"] - config.train.validation)
    return Plan(
        config, backend or get_backend(config.backend, config.device, local_rank()), dataset, blocks, test_split, notes
    )


def _schedule_notes(config: Config, per_epoch: int) -> list[str]:
    """Return remarks on a cosine schedule that raises the rate, and on settings that take effect only after the end.

    That is the end of all epochs: a user who sets `train.steps` knows that the run ends early.
    """
    schedule, optimizer, epochs = config.schedule, config.optimizer, config.train.epochs
    rates, steps, notes = optimizer.lr if isinstance(optimizer.lr, tuple) else (optimizer.lr,), epochs * per_epoch, []
    if isinstance(schedule, Cosine) and min(rates) < schedule.eta_min:
        notes.append(
            f"schedule.eta_min: {schedule.eta_min:g} is above optimizer.lr {min(rates):g}, so that the rate "
            "rises; set it to at most that"
        )
    # Without epochs, as in studies of feedback, nothing is trained.
    if epochs and schedule.warmup_steps > steps:
        notes.append(
            f"schedule.warmup_steps: {schedule.warmup_steps}, but train.epochs {epochs} is {steps} steps, so that the "
            "rate never reaches optimizer.lr"
        )
    if epochs and isinstance(schedule, Staircase) and max(schedule.epochs) >= epochs:
        notes.append(f"schedule.epochs: {max(schedule.epochs)} is not reached with train.epochs {epochs}")
    if epochs and optimizer.orthogonality and optimizer.orthogonality_every > steps:
        notes.append(
            f"optimizer.orthogonality_every: {optimizer.orthogonality_every}, but train.epochs {epochs} is {steps} "
            "steps, so that the regulariser never acts"
        )
    return notes


def _check_numbers(value: Any, key: str, config: Config) -> None:
    """Refuse numbers that become 0 or infinite in the dtype of the computation."""
    dtype = config.dtype
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, f"{key}.{name}", config)
    elif isinstance(value, tuple):
        for position, inner in enumerate(value):
            _check_numbers(inner, f"{key}.{position}", config)
    elif isinstance(value, float) and value:
        limits = np.finfo(dtype)
        if abs(value) > float(limits.max):
            raise UserError(f"{key}: {value:g} is infinite in {dtype}; at most {limits.max:.1e}")
        # CuPy's kernels flush subnormal numbers of single precision to 0.
        flushed = config.backend == "cupy" and dtype == "float32"
        if abs(value) < float(limits.tiny if flushed else limits.smallest_subnormal):
            place = f"{dtype} on a GPU" if flushed else dtype
            raise UserError(f"{key}: {value:g} is 0 in {place}; use at least {limits.tiny:.1e}")


def _check_tf32(config: Config) -> None:
    """Refuse TF32 where it does not apply, or where it would spoil an inverse."""
    if not config.tf32:
        return
    if config.backend != "cupy" or config.dtype != "float32":
        raise UserError(
            f"tf32: true: is for products of backend cupy in float32, not {config.backend} in {config.dtype}; "
            "leave it out, or use --backend cupy --dtype float32"
        )
    rule = RULES[config.rule.name]
    if rule.inverts or rule.factors is not None:
        raise UserError(
            f"tf32: true: rule {config.rule.name} inverts weights by their products, for which 11 bits are too few; "
            "leave it out"
        )


def _check_lists(config: Config, blocks: tuple[Block, ...]) -> None:
    """Refuse lists of the optimiser that do not have one value per block."""
    for key in ("lr", "epsilon"):
        values = getattr(config.optimizer, key, None)
        if isinstance(values, tuple) and len(values) != len(blocks):
            raise UserError(
                f"optimizer.{key}: {len(values)} values {list(values)}; needs one number, or a list of {len(blocks)}, "
                f"one per block: {', '.join(block.label for block in blocks)}"
            )


def check_seeds(given: str, first: int, count: int) -> None:
    """Refuse `count` seeds from `first` on if they go beyond the largest; `given` is how messages call their source."""
    if first + count - 1 > LARGEST_INTEGER:
        raise UserError(f"{given}: from seed {first} on goes beyond the largest seed, {LARGEST_INTEGER}")


def _check_study(config: Config, blocks: tuple[Block, ...], images: int) -> None:
    """Refuse a study that has nothing to measure, is exact, or takes a batch larger than the train split."""
    if config.study is None:
        return
    check_seeds(f"study.seeds: {config.study.seeds}", config.seed, config.study.seeds)
    if config.train.exact:
        raise UserError("train.exact: true: a study takes its batch as a whole; leave it out")
    if config.study.kind == "drift":
        _check_drift(config, blocks)
        return
    if RULES[config.rule.name].feedback is None:
        trained = ", ".join(name for name, rule in RULES.items() if rule.feedback is not None)
        raise UserError(f"study: rule {config.rule.name} trains no feedback weights; use one of {trained}")
    if len(blocks) < 2:
        raise UserError(
            f"study: the network has one block, {blocks[0].label}, and so no feedback; it needs at least two"
        )
    if config.train.batch_size > images:
        raise UserError(
            f"train.batch_size: {config.train.batch_size}, but the train split of {config.data.dataset} has {images} "
            f"images to train on, and a study takes one batch; at most {images}"
        )


def _check_drift(config: Config, blocks: tuple[Block, ...]) -> None:
    """Refuse a study of drift if no weights are inverted, nothing is compared or trained, or it runs on a device."""
    if not RULES[config.rule.name].inverts:
        inverting = ", ".join(name for name, rule in RULES.items() if rule.inverts)
        raise UserError(f"study.kind: drift: rule {config.rule.name} inverts no weights; use {inverting}")
    if not config.compare.every:
        raise UserError("compare.every: 0: a study of drift measures at such steps; use at least 1")
    if "gnt" in config.compare.against:
        raise UserError("compare.against: gnt: a study of drift measures angles to bp alone; leave it out")
    if not config.train.epochs:
        raise UserError("train.epochs: 0: a study of drift trains; use at least 1")
    if len(blocks) < 2:
        raise UserError(
            f"study.kind: drift: the network has one block, {blocks[0].label}, and none is inverted; it needs at least "
            "two"
        )
    if config.backend != "numpy":
        raise UserError(f"study.kind: drift: is for backend numpy, not {config.backend}")


def make_loader(
    planned: Plan,
    source: Dataset | Division,
    split: str,
    batch_size: int,
    training: bool,
    share: tuple[int, int] = (0, 1),
) -> Loader:
    """Return the loader of a split of the data set or of its division, or of one rank's share of the split.

    Flip and crop are for training only.
    """
    data, config, dataset = planned.config.data, planned.config, planned.dataset
    mean, std = None, None
    if isinstance(data.normalize, Normalize):
        mean, std = data.normalize.mean, data.normalize.std
    elif data.normalize == "dataset":
        mean, std = dataset.mean, dataset.std
    return Loader(
        source,
        split,
        batch_size,
        seed=config.seed,
        shuffle=training,
        mean=mean,
        std=std,
        flip=data.flip if training else 0.0,
        crop_padding=data.crop_padding if training else 0,
        dtype=config.dtype,
        in_memory_bytes=data.in_memory_mb * 2**20,
        pool_images=data.pool_images,
        share=share,
        backend=planned.backend,
    )
