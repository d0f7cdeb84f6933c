"""What is audited: a config's network, data and rule in float64, on a small batch of its training images.

Two things are changed so that a check can tell right from wrong, and only in what the checks of the math compute with,
never where the run itself is repeated:

- the images are dithered by a tenth of their spread: in areas of one colour the elements of a max-pool's window are
  equal, and which of them is the maximum, and with it every derivative, would be a matter of rounding;
- the biases, 0 at first with some initialisations, are moved, so that losing one shows.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arraytp.audit.check import host
from arraytp.backend import Array
from arraytp.config import Config
from arraytp.errors import NonFiniteError
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.model.network import ForwardPass, Network, block_flops, make_network
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward
from arraytp.optim import init_optimizer
from arraytp.rules.protocol import State
from arraytp.training.experiment import Experiment, build_planned, parameters
from arraytp.training.plan import Plan

# Two chunks of noise and several samples a lane where that is cheap.
BATCH, SMALL_BATCH, CHEAP_FLOPS = 20, 4, 1e8
# So that an audit of a set of many gigabytes does not read all of it for one batch.
MOST_MEGABYTES, POOL_IMAGES = 512, 256
MOST_ITERATIONS = 2
DITHER, BIAS = 0.1, 0.1


@dataclass
class Setting:
    """What checks work on; nothing of it is changed by them.

    Parameters
    ----------
    experiment : Experiment
        In its initial state.
    raw : array of shape (B, H, W, C)
        The first batch as the network sees it.
    labels : array of int64 of shape (B,)
    images : array like `raw`
        Dithered.
    network : Network
        The experiment's, its biases moved.
    passed, dlogits : ForwardPass, array
        Of `network` on `images`.
    workspace : Workspace
    batch_size : int
        Of the config as it is.
    """

    experiment: Experiment
    raw: Array
    labels: Array
    images: Array
    network: Network
    passed: ForwardPass
    dlogits: Array
    workspace: Workspace
    batch_size: int

    @property
    def config(self) -> Config:
        """The config in float64, on a small batch."""
        return self.experiment.config

    @property
    def options(self) -> Any:
        """The rule's options, few iterations of feedback training."""
        return self.config.rule

    def generator(self, *key: int) -> np.random.Generator:
        """Return random numbers for a check."""
        return np.random.default_rng((self.config.seed, *key))

    def normal(self, shape: tuple[int, ...], *key: int) -> Array:
        """Return an array of the backend from N(0, 1)."""
        return self.put(self.generator(*key).standard_normal(shape))

    def put(self, array: NDArray[Any]) -> Array:
        """Return a host array as one of the backend."""
        return self.experiment.plan.backend.asarray(array)

    def state(self) -> State:
        """Return a copy of the rule's arrays."""
        return {name: array.copy() for name, array in self.experiment.rule_state.items()}

    def on_host(self) -> Network:
        """Return `network` with arrays of the host, for the references."""
        return hosted(self.network)


def hosted(network: Network) -> Network:
    """Return a network with arrays of the host."""
    return Network(network.blocks, [host(w) for w in network.weights], [host(b) for b in network.biases])


def small(config: Config, flops: int, count: int) -> Config:
    """Return a config as it is audited: float64, a small batch, few iterations of feedback training.

    `flops` is of a forward pass of one sample, `count` the number of training images.
    """
    batch = min(BATCH if BATCH * flops <= CHEAP_FLOPS else SMALL_BATCH, count)
    data = replace(
        config.data,
        in_memory_mb=min(config.data.in_memory_mb, MOST_MEGABYTES),
        pool_images=min(config.data.pool_images, POOL_IMAGES),
    )
    rule: Any = config.rule
    if hasattr(rule, "feedback"):
        k = rule.feedback.iterations
        few = tuple(min(each, MOST_ITERATIONS) for each in k) if isinstance(k, tuple) else min(k, MOST_ITERATIONS)
        rule = replace(rule, feedback=replace(rule.feedback, iterations=few))
    train = replace(config.train, batch_size=batch)
    return replace(config, dtype="float64", data=data, rule=rule, train=train)


def prepare(planned: Plan) -> Setting:
    """Build what is audited.

    Parameters
    ----------
    planned : Plan
        Of the config as it is.

    Raises
    ------
    UserError
        If the data is damaged.
    NonFiniteError
        If the network's output on its first batch is not finite; names the first block.
    """
    flops = sum(map(block_flops, planned.blocks))
    config = small(planned.config, flops, planned.dataset.counts["train"])
    experiment = build_planned(replace(planned, config=config))
    with closing(experiment.train_loader.batches(0)) as batches:
        raw, labels = (array.copy() for array in next(batches))
    workspace = Workspace(planned.backend)
    _check_finite(experiment, raw, workspace)
    generator = np.random.default_rng(config.seed)
    pixels = host(raw)
    spread = float(pixels.std()) or 1.0
    images = planned.backend.asarray(pixels + DITHER * spread * generator.standard_normal(pixels.shape))
    biases = [host(bias) + BIAS * generator.standard_normal(bias.shape) for bias in experiment.network.biases]
    network = Network(planned.blocks, experiment.network.weights, [planned.backend.asarray(bias) for bias in biases])
    passed = forward(network, images, workspace)
    _, cache = cross_entropy_forward(passed.logits, labels, config.loss.reduction)
    dlogits = cross_entropy_backward(cache, config.loss.reduction)
    batch_size = planned.config.train.batch_size
    return Setting(experiment, raw, labels, images, network, passed, dlogits, workspace, batch_size)


def _check_finite(experiment: Experiment, images: Array, workspace: Workspace) -> None:
    passed = forward(experiment.network, images, workspace)
    labels = ["input", *(f"output of {block.label}" for block in experiment.network.blocks)]
    for label, s in zip(labels, passed.s, strict=True):
        # Sums of squares shall be finite, too.
        if not np.isfinite(np.square(host(s)).sum()):
            raise NonFiniteError(
                f"{experiment.config.name}: not finite on the first batch: {label}; see data.normalize and network.init"
            )


def fresh(setting: Setting, threads: int | None = None) -> Experiment:
    """Return the experiment in its initial state with arrays and threads of its own; loaders are shared."""
    config, plan = setting.config, setting.experiment.plan
    network = make_network(plan.blocks, config.network.init, config.seed, config.dtype, plan.backend)
    rule = setting.experiment.rule
    return replace(
        setting.experiment,
        network=network,
        rule_state=rule.init_state(config.rule, network, config.seed, plan.backend),
        optimizer_state=init_optimizer(config.optimizer, parameters(network)),
        workspace=Workspace(plan.backend, threads),
    )
