"""Settings as plain frozen dataclasses: what a config file may say about blocks, optimisers and schedules.

The modules that act on them (network, optim) and the config reader share these; nothing here computes.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Discriminator

ActivationName = Literal["linear", "leaky-relu", "elu", "relu", "tanh"]
InitName = Literal["kaiming-uniform", "xavier-normal", "orthogonal"]
Unpool = Literal["overwrite", "accumulate"]
Regularised = Literal["square", "all-but-first"]
Size = Annotated[int, Ge(1)]
Border = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]
PerBlock = Positive | Annotated[tuple[Positive, ...], MinLen(1)]
CountPerBlock = Border | Annotated[tuple[Border, ...], MinLen(1)]
Probability = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Max-pooling; `padding` rows and columns of minus infinity on every side."""

    kernel: Size
    stride: Size
    padding: Border = 0


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A block convolution → activation → [max-pool].

    `padding` is "same" as TensorFlow defines it, or a border width. The last `auxiliary` of all `channels` are kept but
    not passed on to the next block.
    """

    type: Literal["conv"] = "conv"
    channels: Size
    kernel: Size
    stride: Size = 1
    padding: Border | Literal["same"] = 0
    activation: ActivationName = "linear"
    pool: Pool | None = None
    auxiliary: Border = 0


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A block dense → activation. Its input is flattened first.

    The last `auxiliary` of all `units` are kept but not passed on.
    """

    type: Literal["dense"] = "dense"
    units: Size
    activation: ActivationName = "linear"
    auxiliary: Border = 0


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """A named network, or a free-form list of blocks; exactly one of `name` and `blocks`.

    `activation`, where given, replaces the named network's own activation of the hidden blocks. `square` gives every
    block but the first as many auxiliary units as make its weight matrix square.
    """

    name: Literal["fc-shallow", "fc-deep", "lenet", "vgg", "conv-imagenet"] | None = None
    blocks: Annotated[list[Annotated[Conv | Dense, Discriminator("type")]], MinLen(1)] | None = None
    activation: ActivationName | None = None
    init: InitName = "kaiming-uniform"
    square: bool = False


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent: v ← μv + g, θ ← θ − lr·v.

    `orthogonality` λ adds 4λ(WWᵀ − I)W, or 4λW(WᵀW − I) if W has more rows than columns, to g of the blocks that
    `orthogonality_on` names; with `orthogonality_every` n, n times as much at every n-th step and none between.
    `lr` may be a list, one value per block.
    """

    name: Literal["sgd"] = "sgd"
    lr: PerBlock
    momentum: Decay = 0.0
    weight_decay: NonNegative = 0.0
    orthogonality: NonNegative = 0.0
    orthogonality_on: Regularised = "square"
    orthogonality_every: Size = 1


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam in either convention of epsilon: m̂/(√v̂ + ε) (`pytorch`) or lr_t·m/(√v + ε) (`keras`).

    `orthogonality` as for SGD. `lr` and `epsilon` may be lists, one value per block.
    """

    name: Literal["adam"] = "adam"
    lr: PerBlock
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    epsilon: PerBlock = 1e-8
    epsilon_form: Literal["pytorch", "keras"] = "pytorch"
    weight_decay: NonNegative = 0.0
    orthogonality: NonNegative = 0.0
    orthogonality_on: Regularised = "square"
    orthogonality_every: Size = 1


@dataclass(frozen=True, kw_only=True)
class FeedbackTraining:
    """How feedback weights ω are trained on every batch: `iterations` K, noise `sigma` σ, and their own optimiser.

    A list has one value per block with feedback, from block 1 to the output block.
    """

    iterations: CountPerBlock = 10
    sigma: PerBlock = 0.2
    optimizer: Annotated[SGD | Adam, Discriminator("name")] = field(default_factory=lambda: SGD(lr=1e-3, momentum=0.9))


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The learning rate is constant.

    `warmup_steps`, here and in the other schedules: W steps over which the rate rises, lr·t/W at step t = 1 … W.
    """

    name: Literal["constant"] = "constant"
    warmup_steps: Border = 0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Per epoch: eta_min + (lr − eta_min)(1 + cos(π·epoch/t_max))/2; past t_max it rises again."""

    name: Literal["cosine"] = "cosine"
    t_max: Size = 85
    eta_min: NonNegative = 1e-5
    warmup_steps: Border = 0


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """The learning rate is divided by `factor` after each of the given `epochs`."""

    name: Literal["step"] = "step"
    epochs: Annotated[tuple[Size, ...], MinLen(1)]
    factor: Annotated[float, Gt(1)] = 10.0
    warmup_steps: Border = 0

    def __post_init__(self) -> None:
        if list(self.epochs) != sorted(set(self.epochs)):
            raise ValueError(f"needs epochs that increase, such as [30, 60], got {list(self.epochs)} in epochs")
