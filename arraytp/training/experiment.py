"""Everything a run needs, built from a config; one training step; one evaluation.

config → dataset → loader → (images, labels)
                                 ↓
network θ ───────────────→ forward pass → loss → ∂L/∂logits
   ↑                             ↓                   ↓
   │                    [the rule trains its feedback ω]
   ↑                             ↓                   ↓
optimiser ← updates ← rule(state, network, forward pass, ∂L/∂logits)
"""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np

from arraytp.backend import Array, Backend, array_module
from arraytp.config import Config
from arraytp.data.loader import Loader
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.model.network import ForwardPass, Network, make_network
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward, label_rank
from arraytp.optim import OptimizerState, apply_updates, init_optimizer, learning_rates
from arraytp.rules import RULES, RuleOptions, bp, dtp
from arraytp.rules.protocol import Excess, Observe, State, Target, Updates
from arraytp.training.compare import angle_degrees, relative_distance
from arraytp.training.plan import Plan, make_loader, plan


@dataclass(frozen=True)
class Score:
    """What a batch's logits are worth.

    Parameters
    ----------
    loss : array of shape ()
        By the config's reduction, of the computing backend.
    totals : array of shape (3,), float64
        Loss summed over the samples, and how many labels are the first and among the first five.
    images : int
        B.
    """

    loss: Array
    totals: Array
    images: int


@dataclass(frozen=True)
class Comparison:
    """A rule's weight update of one block against BP's: angle in degrees and relative distance ‖a − b‖/‖b‖."""

    block: int
    angle_deg: float
    distance: float


@dataclass(frozen=True)
class FeedbackComparison:
    """A trained feedback weight against the forward weight that it pairs with; NaN where it pairs with none."""

    block: int
    loss: float
    angle_deg: float
    distance: float


@dataclass
class Experiment:
    """A network that learns from a data set by a rule.

    Its state is in `network`, `rule_state`, `optimizer_state`; every array can be read and replaced between steps.

    Parameters
    ----------
    plan : Plan
    network : Network
    rule : module
        See `arraytp.rules.protocol`.
    rule_state : State
    optimizer_state : OptimizerState
    workspace : Workspace
    train_loader, test_loader : Loader
    feedback_step : int
        On how many batches feedback was trained; noise is keyed by it.
    passed, dlogits, updates : ForwardPass, array, Updates; None before the first step
        Of the last step: forward pass, ∂L/∂logits and what the rule made of them; valid until the next step or score.
    excess : Excess
        WWᵀ − I of the weights that `updates` belong to, computed with them; empty for rules that invert no weights.
    feedback_losses : list of arrays of shape (), or None for no iterations
        Of the last step, per block with feedback; empty for rules without trained feedback.
    proposed : bool
        Whether `updates` wait to be applied.
    """

    plan: Plan
    network: Network
    rule: ModuleType
    rule_state: State
    optimizer_state: OptimizerState
    workspace: Workspace
    train_loader: Loader
    test_loader: Loader
    feedback_step: int = 0
    passed: ForwardPass | None = None
    dlogits: Array | None = None
    updates: Updates | None = None
    excess: Excess = field(default_factory=dict)
    feedback_losses: list[Array | None] = field(default_factory=list)
    proposed: bool = False

    @property
    def config(self) -> Config:
        """The settings of this run."""
        return self.plan.config

    def step(self, images: Array, labels: Array, epoch: int = 0) -> Score:
        """Train on one batch.

        Parameters
        ----------
        images : array of shape (B, H, W, C) and the config's dtype
            As the loader gives them.
        labels : array of int64 of shape (B,)
        epoch : int
            Counted from 0; the learning rate's schedule goes by it.

        Returns
        -------
        Score
            Of the batch before the update.

        Raises
        ------
        ValueError
            If a label is none of the classes; on a device that is not looked at, since the host would have to wait.
        """
        score = self.propose(images, labels)
        self.apply(epoch)
        return score

    def propose(self, images: Array, labels: Array) -> Score:
        """Compute the rule's updates for a batch into `updates`, leaving θ as it is; raises as `step`.

        Rules with trained feedback train it first.
        """
        score = self.run_forward(images, labels)
        self.train_feedback()
        self.propose_updates()
        return score

    def run_forward(self, images: Array, labels: Array) -> Score:
        """Run the network on a batch, for `train_feedback` and `propose_updates`."""
        self.updates, self.proposed = None, False
        if self.plan.backend.on_host:
            _check_labels(labels, len(self.plan.dataset.classes))
        reduction = self.config.loss.reduction
        self.passed = forward(self.network, images, self.workspace)
        loss, cache = cross_entropy_forward(self.passed.logits, labels, reduction)
        self.dlogits = cross_entropy_backward(cache, reduction)
        return _score(loss, self.passed.logits, labels, reduction)

    def train_feedback(self, options: RuleOptions | None = None, observe: Observe | None = None) -> None:
        """Let the rule train its feedback weights, if it has any, on the batch of the last forward pass; θ stays.

        `options` may stand in for those of the config; `observe` is told of every iteration.
        """
        if not self.trains_feedback:
            return
        self.feedback_losses = self.rule.train_feedback(
            options or self.config.rule,
            self.rule_state,
            self.network,
            self.passed,
            self.config.seed,
            self.feedback_step,
            self.workspace,
            observe,
        )
        self.feedback_step += 1

    def propose_updates(self) -> None:
        """Compute the rule's updates for the batch of the last forward pass into `updates`."""
        if hasattr(self.rule, "excess"):
            self.excess = self.rule.excess(self.network, self.workspace)
        self.updates = self._updates(self.config.rule)
        self.proposed = True

    def _updates(self, options: RuleOptions) -> Updates:
        shared = {"excess": self.excess} if self.excess else {}
        found: Updates = self.rule.updates(
            options, self.rule_state, self.network, self.passed, self.dlogits, self.workspace, **shared
        )
        return found

    def targets(self) -> Iterator[Target]:
        """Yield the rule's targets for the batch of the last forward pass, from the last block to the first, if any."""
        if hasattr(self.rule, "targets"):
            yield from self.rule.targets(
                self.config.rule, self.rule_state, self.network, self.passed, self.dlogits, self.workspace
            )

    def exact_updates(self) -> Updates:
        """Return BP's updates for the batch of the last forward pass."""
        assert self.passed is not None
        return bp.updates(bp.Options(), {}, self.network, self.passed, self.dlogits, self.workspace)

    def compare(self) -> list[Comparison]:
        """Measure the proposed weight updates against BP's on the same weights and batch, block by block.

        Rules with targets are measured at their `compare_beta`.

        Raises
        ------
        RuntimeError
            Unless `propose` was the last thing done.
        """
        if not self.proposed or self.passed is None or self.updates is None:
            raise RuntimeError("compare needs updates that are not applied yet: call propose first")
        options = compared_options(self.config.rule)
        own = self.updates if options == self.config.rule else self._updates(options)
        exact = self.exact_updates()
        found = [
            Comparison(n, angle_degrees(mine[0], reference[0]), relative_distance(mine[0], reference[0]))
            for n, (mine, reference) in enumerate(zip(own, exact, strict=True))
        ]
        if own is not self.updates:
            # They share their buffers.
            self.updates = self._updates(self.config.rule)
        return found

    @property
    def trains_feedback(self) -> bool:
        """Whether the rule trains feedback weights."""
        return hasattr(self.rule, "train_feedback")

    def feedback_epochs(self, epoch: int) -> int:
        """Return how many epochs of feedback training alone come before an epoch, counted from 0."""
        if not hasattr(self.rule, "feedback_epochs"):
            return 0
        first, between = self.rule.feedback_epochs(self.config.rule)
        return int(between if epoch else first)

    def feedback_pairs(self) -> list[tuple[int, Array, Array | None]]:
        """Return index, trained feedback weight, and forward weight to compare it with, of every block that has one."""
        found = self.rule.feedback_pairs(self.rule_state, self.network) if self.trains_feedback else []
        return list(found)

    def compare_feedback(self) -> list[FeedbackComparison]:
        """Measure every trained feedback weight against its forward weight; empty for rules that train none."""
        pairs = self.feedback_pairs()
        losses = self.feedback_losses or [None] * len(pairs)
        return [
            FeedbackComparison(n, math.nan if loss is None else float(loss), *_aligned(omega, theta))
            for (n, omega, theta), loss in zip(pairs, losses, strict=True)
        ]

    def apply(self, epoch: int = 0) -> None:
        """Let the optimiser apply the proposed updates, once, to the θ that they were proposed for.

        The optimiser's regulariser is added to `updates` in place.

        Raises
        ------
        RuntimeError
            Unless `propose` was the last thing done, `compare` aside.
        ValueError
            If a parameter was replaced by an array that the optimiser cannot write to.
        """
        if not self.proposed or self.updates is None:
            raise RuntimeError("apply needs updates that are not applied yet: call propose first")
        self.proposed = False
        apply_updates(
            self.config.optimizer,
            learning_rates(self.config.schedule, self.config.optimizer.lr, epoch),
            self.optimizer_state,
            parameters(self.network),
            [array for pair in self.updates for array in pair],
            self.workspace,
            self.excess,
        )

    def evaluate(self) -> Iterator[Score]:
        """Score the test split, batch by batch."""
        with closing(self.test_loader.batches(0)) as batches:
            for images, labels in batches:
                yield self.score(images, labels)

    def score(self, images: Array, labels: Array) -> Score:
        """Score a batch without learning from it; what the last step left is gone, since its buffers serve again."""
        self.passed = self.dlogits = self.updates = None
        self.proposed = False
        reduction = self.config.loss.reduction
        logits = forward(self.network, images, self.workspace).logits
        loss, _ = cross_entropy_forward(logits, labels, reduction)
        return _score(loss, logits, labels, reduction)


def compared_options(options: RuleOptions) -> RuleOptions:
    """Return the options at which a rule's updates are compared with BP's: those of target rules at `compare_beta`."""
    if isinstance(options, dtp.Options):
        return replace(options, beta=options.compare_beta)
    return options


def build(config: Config, backend: Backend | None = None) -> Experiment:
    """Build an experiment in its initial state.

    Parameters
    ----------
    config : Config
    backend : Backend, optional
        Instead of the one that the config names.

    Raises
    ------
    UserError
        As `plan`; also if the data is damaged.
    """
    return build_planned(plan(config, backend))


def build_planned(planned: Plan) -> Experiment:
    """Build the experiment of a plan; as `build`."""
    config, backend = planned.config, planned.backend
    network = make_network(planned.blocks, config.network.init, config.seed, config.dtype, backend)
    rule = RULES[config.rule.name]
    return Experiment(
        plan=planned,
        network=network,
        rule=rule,
        rule_state=rule.init_state(config.rule, network, config.seed, backend),
        optimizer_state=init_optimizer(config.optimizer, parameters(network)),
        workspace=Workspace(backend),
        train_loader=make_loader(planned, "train", config.train.batch_size, training=True),
        test_loader=make_loader(planned, planned.test_split, config.train.eval_batch_size, training=False),
    )


def parameters(network: Network) -> list[Array]:
    """Return weight and bias of every block, in the order of `Updates`."""
    return [array for pair in zip(network.weights, network.biases, strict=True) for array in pair]


def _aligned(omega: Array, theta: Array | None) -> tuple[float, float]:
    """Return angle in degrees and relative distance of a feedback weight to a forward weight."""
    if theta is None:
        return math.nan, math.nan
    return angle_degrees(omega, theta), relative_distance(omega, theta)


def _check_labels(labels: Array, classes: int) -> None:
    """Refuse labels that NumPy would take for places from the end, or fail at somewhere inside."""
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if bad.size:
        raise ValueError(f"label {labels[bad[0]]} of sample {bad[0]}: expected one of 0 to {classes - 1}")


def _score(loss: Array, logits: Array, labels: Array, reduction: str) -> Score:
    xp = array_module(logits)
    rank = label_rank(logits, labels)
    summed = loss * len(labels) if reduction == "mean" else loss
    return Score(
        loss,
        xp.stack([xp.asarray(part, dtype=xp.float64) for part in (summed, (rank < 1).sum(), (rank < 5).sum())]),
        len(labels),
    )
