"""What is audited: a config's network, data and rule in float64, on a small batch of its training images.

Two things are changed so that a check can tell right from wrong, but only for the checks of the maths, never where the
run itself is repeated:

- the images are dithered by a tenth of their standard deviation: in areas of one colour the elements of a max-pool's
  window are equal, so that rounding would decide which is the maximum, and with it every derivative;
- the biases, 0 at first with some initialisations, are moved, so that a missing one shows.
"""

from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arraytp.audit.check import host
from arraytp.backend import Array
from arraytp.config import Config
from arraytp.errors import NonFiniteError
from arraytp.fast.device import fast_engine
from arraytp.fast.engine import Fast
from arraytp.fast.graphs import Graphs
from arraytp.fast.parallel import Workspace
from arraytp.model.blocks import Network, block_flops
from arraytp.model.initialise import make_network
from arraytp.model.passes import Batch
from arraytp.model.plain import Plain
from arraytp.ops.loss import loss_and_score
from arraytp.optim import init_optimizer
from arraytp.options import FeedbackTraining, Unpool
from arraytp.rules.protocol import Rule, State, Updates
from arraytp.training.build import build_planned
from arraytp.training.experiment import Experiment
from arraytp.training.plan import Plan

# Where that is cheap, enough samples for two chunks of noise and several samples per lane.
BATCH, SMALL_BATCH, CHEAP_FLOPS = 20, 4, 1e8
# So that an audit of a set of many gigabytes does not read all of it for one batch.
MOST_MEGABYTES, POOL_IMAGES = 512, 256
MOST_ITERATIONS = 2
DITHER, BIAS = 0.1, 0.1


@dataclass
class Setting:
    """What the checks work on; they do not change it.

    The `experiment` is in its initial state; `raw` (B, H, W, C) and `labels` (B,) are its first batch. `images` are
    dithered, `network` has its biases moved, and `batch` is a pass over both by the fast engine, `workspace`, with
    ∂L/∂logits. `batch_size` is the config's own.
    """

    experiment: Experiment
    raw: Array
    labels: Array
    images: Array
    network: Network
    batch: Batch
    workspace: Workspace
    batch_size: int

    @property
    def config(self) -> Config:
        """The config in float64, on a small batch."""
        return self.experiment.config

    @property
    def rule(self) -> Rule[Any]:
        """The rule."""
        return self.experiment.rule

    @property
    def options(self) -> Any:
        """The rule's options, with few iterations of feedback training."""
        return self.config.rule

    @property
    def unpool(self) -> Unpool | None:
        """The options' mode of unpooling; None for a rule that does not unpool."""
        return getattr(self.options, "unpool", None)

    @property
    def plain(self) -> Batch:
        """The same pass, with the plain engine."""
        return replace(self.batch, engine=Plain(self.batch.engine.backend))

    def pass_over(
        self,
        network: Network | None = None,
        images: Array | None = None,
        labels: Array | None = None,
        threads: int | None = None,
    ) -> Batch:
        """Return a pass by a new fast engine; network, images and labels are this setting's if not given."""
        engine = fast_engine(self.workspace.backend, threads)
        network, images = network or self.network, self.images if images is None else images
        forward = engine.forward(network, images)
        dlogits = _gradient(self.config, forward.logits, self.labels if labels is None else labels)
        return Batch(engine, network, forward, dlogits, self.config.seed)

    def propose(self, batch: Batch | None = None, options: Any = None, state: State | None = None) -> Updates:
        """Return the rule's updates as new arrays; by default on this batch, with this setting's options and state."""
        state = self.state() if state is None else state
        return copied(self.rule.propose(options or self.options, state, batch or self.batch))

    def generator(self, *key: int) -> np.random.Generator:
        """Return a random generator for a check."""
        return np.random.default_rng((self.config.seed, *key))

    def normal(self, shape: tuple[int, ...], *key: int) -> Array:
        """Return an array of the backend from N(0, 1)."""
        return self.put(self.generator(*key).standard_normal(shape))

    def put(self, array: NDArray[Any]) -> Array:
        """Return a host array as an array of the backend."""
        return self.experiment.plan.backend.asarray(array)

    def state(self) -> State:
        """Return a copy of the rule's arrays."""
        return self.experiment.rule_state.copy()

    def on_host(self) -> Network:
        """Return `network` with host arrays, for the references."""
        return hosted(self.network)


def hosted(network: Network) -> Network:
    """Return a network with host arrays."""
    return Network(network.blocks, [host(w) for w in network.weights], [host(b) for b in network.biases])


def copied(updates: Updates) -> Updates:
    """Return copies of updates: a rule's next updates overwrite its last."""
    return [(weight.copy(), bias.copy()) for weight, bias in updates]


def small(config: Config, flops: int, count: int) -> Config:
    """Return the config for an audit: float64, a small batch, few iterations of feedback training.

    `flops` are those of a forward pass of one sample, `count` is the number of training images.
    """
    batch = min(BATCH if BATCH * flops <= CHEAP_FLOPS else SMALL_BATCH, count)
    data = replace(
        config.data,
        in_memory_mb=min(config.data.in_memory_mb, MOST_MEGABYTES),
        pool_images=min(config.data.pool_images, POOL_IMAGES),
    )
    train = replace(config.train, batch_size=batch, exact=False)
    return replace(config, dtype="float64", data=data, rule=_few_iterations(config.rule), train=train)


def _few_iterations(options: Any) -> Any:
    """Return a rule's options with at most `MOST_ITERATIONS` iterations in every setting of feedback training."""
    for field in fields(options):
        training = getattr(options, field.name)
        if isinstance(training, FeedbackTraining):
            k = training.iterations
            few = tuple(min(each, MOST_ITERATIONS) for each in k) if isinstance(k, tuple) else min(k, MOST_ITERATIONS)
            options = replace(options, **{field.name: replace(training, iterations=few)})
    return options


def prepare(planned: Plan) -> Setting:
    """Build the setting of an audit from the plan of the unchanged config.

    UserError if the data is damaged; NonFiniteError if the first batch or a block's output on it is not finite, naming
    the first of these that is not.
    """
    flops = sum(map(block_flops, planned.blocks))
    config = small(planned.config, flops, planned.train_images)
    experiment = build_planned(replace(planned, config=config))
    with closing(experiment.train_loader.batches(0)) as batches:
        raw, labels = (array.copy() for array in next(batches))
    engine = fast_engine(planned.backend)
    _check_finite(experiment, raw, engine)
    generator = np.random.default_rng(config.seed)
    pixels = host(raw)
    spread = float(pixels.std()) or 1.0
    images = planned.backend.asarray(pixels + DITHER * spread * generator.standard_normal(pixels.shape))
    biases = [host(bias) + BIAS * generator.standard_normal(bias.shape) for bias in experiment.network.biases]
    network = Network(planned.blocks, experiment.network.weights, [planned.backend.asarray(bias) for bias in biases])
    forward = engine.forward(network, images)
    batch = Batch(engine, network, forward, _gradient(config, forward.logits, labels), config.seed)
    return Setting(experiment, raw, labels, images, network, batch, engine, planned.config.train.batch_size)


def _gradient(config: Config, logits: Array, labels: Array) -> Array:
    """Return ∂L/∂logits of the config's loss."""
    loss = config.loss
    return loss_and_score(loss.name, logits, labels, loss.reduction, loss.label_smoothing).dlogits


def _check_finite(experiment: Experiment, images: Array, engine: Fast) -> None:
    outputs = engine.forward(experiment.network, images).outputs
    labels = ["input", *(f"output of {block.label}" for block in experiment.network.blocks)]
    for label, values in zip(labels, [images, *outputs], strict=True):
        # Sums of squares must be finite, too.
        if not np.isfinite(np.square(host(values)).sum()):
            raise NonFiniteError(
                f"{experiment.config.name}: not finite on the first batch: {label}; see data.normalize and network.init"
            )


def fresh(setting: Setting, threads: int | None = None) -> Experiment:
    """Return the experiment in its initial state with arrays and threads of its own; loaders are shared."""
    config, plan, rule = setting.config, setting.experiment.plan, setting.rule
    network = make_network(plan.blocks, config.network.init, config.seed, config.dtype, plan.backend)
    engine = fast_engine(plan.backend, threads)
    return replace(
        setting.experiment,
        network=network,
        rule_state=rule.init_state(config.rule, network, config.seed, plan.backend),
        optimizer_state=init_optimizer(config.optimizer, network.parameters()),
        workspace=engine,
        engines=(engine,),
        graphs=Graphs(engine, setting.experiment.graphs.on),
    )
