"""The sections of a config: what each key may hold, and its default."""

import unicodedata
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, Discriminator, Field

from arraytp.options import (
    SGD,
    Adam,
    Border,
    Constant,
    Cosine,
    Decay,
    NetworkOptions,
    Positive,
    Probability,
    Size,
    Staircase,
)
from arraytp.rules import RuleOptions, bp

# File systems allow 255 bytes.
LONGEST_NAME = 200
STRICT = {"extra": "forbid", "strict": True}


def _checked_name(name: str) -> str:
    """Refuse a name that a result folder cannot have."""
    if name.startswith(".") or any(sign in "/\\" or unicodedata.category(sign) == "Cc" for sign in name):
        raise ValueError("must be usable as a folder's name: no slashes or control characters, no dot in front")
    if not name.strip():
        raise ValueError("must be usable as a folder's name: more than blanks")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"must be usable as a folder's name: at most {LONGEST_NAME} bytes long")
    return name


def _checked_network(network: NetworkOptions) -> NetworkOptions:
    """Refuse a network that is described twice or not at all."""
    if network.name is None and network.blocks is None:
        raise ValueError("needs one of the keys name and blocks, for example name: lenet")
    if network.name is not None and network.blocks is not None:
        raise ValueError("has both name and blocks; keep one of them")
    if network.blocks is not None and network.activation is not None:
        raise ValueError("has both blocks and activation; with blocks, give each block its own activation")
    return network


@dataclass(frozen=True, kw_only=True)
class Normalize:
    """Statistics per channel, in units where a pixel lies in [0, 1]: x ← (x/255 - mean)/std."""

    mean: Annotated[tuple[float, ...], MinLen(1)]
    std: Annotated[tuple[Positive, ...], MinLen(1)]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"needs one mean and one std per channel, got {len(self.mean)} in mean and {len(self.std)} in std"
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images, and what happens to them before they reach the network."""

    dataset: Annotated[str, MinLen(1), Field(examples=["fashion-mnist-10k"])]
    normalize: Literal["dataset", "none"] | Normalize = "dataset"
    flip: Probability = 0.0
    crop_padding: Border = 0
    in_memory_mb: Border = 4096
    pool_images: Size = 16384


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of the logits, and how the losses of a batch's samples are reduced to one number."""

    name: Literal["cross-entropy", "mse"] = "cross-entropy"
    reduction: Literal["mean", "sum"] = "mean"
    label_smoothing: Decay = 0.0


@dataclass(frozen=True, kw_only=True)
class Train:
    """Training length, batch sizes and images held out; without `validation`, the test split is evaluated instead.

    With `score_train`, each epoch ends by scoring all training images, instead of averaging over the epoch's batches.
    """

    epochs: Annotated[Border, Field(examples=[10])]
    batch_size: Annotated[Size, Field(examples=[128])]
    steps: Size | None = None
    eval_batch_size: Size = 256
    validation: Border = 0
    score_train: bool = False
    checkpoint_minutes: Positive = 2.0
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Compare:
    """How often, in steps, the rule's update is compared with backpropagation's; 0 is never.

    `against` may also name Gauss-Newton targets (rule gnt), with this `damping`.
    """

    every: Border = 100
    against: tuple[Literal["bp", "gnt"], ...] = ("bp",)
    damping: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study instead of a run, of `seeds` seeds: feedback on one batch, θ frozen, or drift of θ from orthogonality.

    See `arraytp.training.study` and `arraytp.training.drift`; `rounds` and `biases` are for feedback.
    """

    kind: Literal["feedback", "drift"] = "feedback"
    seeds: Size = 5
    rounds: Border = 100
    biases: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, every setting filled in. `arraytp.config.load_config` and `parse_config` make and check it."""

    name: Annotated[str, MinLen(1), AfterValidator(_checked_name)]
    seed: Border = 0
    backend: Literal["numpy", "cupy"] = "numpy"
    device: Border | None = None
    cuda_graphs: bool = True
    tf32: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    data: Data
    network: Annotated[NetworkOptions, AfterValidator(_checked_network), Field(examples=[{"name": "lenet"}])]
    rule: Annotated[RuleOptions, Discriminator("name")] = field(default_factory=bp.Options)
    loss: Loss = Loss()
    optimizer: Annotated[SGD | Adam, Discriminator("name")]
    schedule: Annotated[Constant | Cosine | Staircase, Discriminator("name")] = field(default_factory=Constant)
    train: Train
    compare: Compare = Compare()
    study: Study | None = None

    # Applies to the sections, too: unknown keys and text for numbers are errors.
    __pydantic_config__ = STRICT
