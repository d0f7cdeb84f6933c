"""Everything a run needs: its state, the training step and the evaluation.

config → dataset → loader → (images, labels)
                                 ↓
network θ ───────────────→ forward pass → loss → ∂L/∂logits      forward: a Step
   ↑                             ↓                   ↓
   │                    [the rule trains its feedback ω]         train_feedback(step)
   ↑                             ↓                   ↓
optimiser ← updates ← rule(options, state, batch)                updates(step), apply(step, updates)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from arraytp import optim
from arraytp.backend import Array, array_module
from arraytp.config import Config
from arraytp.data.loader import Loader
from arraytp.fast.factors import begin
from arraytp.fast.graphs import Graphs, arrays_of
from arraytp.fast.orthogonality import add_orthogonality, regularised, strength_at
from arraytp.fast.parallel import Workspace, one_blas_thread
from arraytp.model.blocks import Network
from arraytp.model.passes import Batch, Begun, Engine, ForwardPass, parts_of_batch, side_by_side
from arraytp.model.plain import Plain
from arraytp.ranks import ALONE, Part, Ranks, parts_of
from arraytp.rules import bp, feedback, gnt
from arraytp.rules.protocol import Observe, Rule, State, Target, Update, Updates
from arraytp.training.compare import Comparison, FeedbackComparison, angle_degrees, relative_distance
from arraytp.training.plan import Plan
from arraytp.training.step import (
    Score,
    Step,
    check_labels,
    samples_of,
    scores_of,
    summed_scores,
    summed_updates,
    updates_of,
)


@dataclass
class Experiment:
    """A network that learns from a data set by a rule.

    Its state is in `network`, `rule_state`, `optimizer_state`; every array can be read and replaced between steps.

    Parameters
    ----------
    plan : Plan
    network : Network
    rule : Rule
    rule_state : State
    optimizer_state : OptimizerState
    workspace : Workspace
    engines : tuple of Engine
        Compute the passes and the rule's primitives: fast engines on the threads of `workspace`, or plain ones. There
        is one for the whole batch or this rank's part of it; in exact mode, unless `together`, one for each part.
    train_loader, test_loader : Loader
    validation_loader : Loader or None
        Of the images that `train.validation` holds out.
    graphs : Graphs
        Captures parts of a step on a device.
    feedback_step : int
        The number of batches that feedback was trained on; noise is keyed by it.
    ranks : Ranks
        The processes that share every batch; the loaders yield this rank's part.
    together : bool
        Whether exact mode computes all of a rank's parts at once, bit for bit as each part alone.
    stop_agreed : bool
        Whether any rank wanted to stop at the last sum over ranks.
    """

    plan: Plan
    network: Network
    rule: Rule[Any]
    rule_state: State
    optimizer_state: optim.OptimizerState
    workspace: Workspace
    engines: tuple[Engine, ...]
    train_loader: Loader
    test_loader: Loader
    validation_loader: Loader | None
    graphs: Graphs
    feedback_step: int = 0
    ranks: Ranks = ALONE
    together: bool = False
    stop_agreed: bool = False

    @property
    def exact(self) -> bool:
        """Whether each of a batch's 8 parts is computed alone, so that no bit depends on the number of ranks."""
        return self.config.train.exact

    @property
    def engine(self) -> Engine:
        """The first of the engines."""
        return self.engines[0]

    @property
    def config(self) -> Config:
        """The settings of this run."""
        return self.plan.config

    @property
    def length(self) -> tuple[int, int]:
        """The number of steps of the whole training, and of epochs, the last of which may be cut short."""
        train, per_epoch = self.config.train, self.train_loader.steps_per_epoch
        whole = train.epochs * per_epoch
        steps = whole if train.steps is None else min(train.steps, whole)
        return steps, -(-steps // per_epoch)

    def step(self, images: Array, labels: Array, epoch: int = 0, size: int | None = None) -> Score:
        """Train on one batch.

        Parameters
        ----------
        images : array of shape (B, H, W, C) and the config's dtype
            As the loader gives them.
        labels : array of int64 of shape (B,)
        epoch : int
            Counted from 0; determines the scheduled learning rate.
        size : int, optional
            On several ranks, the number of images in the whole batch; `images` is this rank's part of it.

        Returns
        -------
        Score
            Of the batch before the update.

        Raises
        ------
        ValueError
            If a label is not one of the classes; not checked on a device, because the host would have to wait.
        NonFiniteError
            As `train_feedback` and `updates`.
        """
        with self.steady():
            step = self.forward(images, labels, size)
            self.train_feedback(step)
            self.apply(step, self.updates(step), epoch)
        return step.score

    def steady(self) -> AbstractContextManager[None]:
        """Return a context in which no bit depends on the number of threads, even for work outside of tasks.

        The plain engine is exempt: it has no tasks and keeps BLAS's threads, except in exact mode.
        """
        return nullcontext() if isinstance(self.engine, Plain) and not self.exact else one_blas_thread()

    def forward(self, images: Array, labels: Array, size: int | None = None) -> Step:
        """Run the network on a batch, or on this rank's part of a batch of `size` images; raises as `step`."""
        return self._forward(images, labels, size, begin(self.workspace, self.network))

    def _forward(self, images: Array, labels: Array, size: int | None, begun: Begun | None = None) -> Step:
        if self.plan.backend.on_host:
            check_labels(labels, len(self.plan.dataset.classes))
        parts, images, labels = self._parts(len(labels), size), self._in_place(images), self._in_place(labels)
        if parts[0] is not None and parts[0].together:
            self.workspace.part_rows = parts[0].rows

        def work() -> tuple[list[tuple[ForwardPass, Array, list[Score]]], Score]:
            samples = [samples_of(part, parts, images, labels) for part in parts]
            computing = zip(self.engines, parts, samples, strict=True)
            passes = side_by_side(self.engine, [partial(self._pass, *each) for each in computing])
            return passes, summed_scores([score for *_, scores in passes for score in scores])

        passes, score = self.graphs.run("forward", [images, *self.network.parameters()], work, tuple(parts))
        batches = [
            Batch(engine, self.network, forward, dlogits, self.config.seed, part=part)
            for engine, part, (forward, dlogits, _) in zip(self.engines, parts, passes, strict=True)
        ]
        if begun:
            batches[0] = replace(batches[0], begun=begun)
        # A copy, because the scores of several steps are read at once.
        score = replace(score, totals=score.totals.copy())
        return Step(parts_of_batch(batches), score, [own.totals for *_, scores in passes for own in scores])

    def _pass(
        self, engine: Engine, part: Part | None, samples: tuple[Array, Array]
    ) -> tuple[ForwardPass, Array, list[Score]]:
        """Run the network on one part of a batch or several together; return ∂L/∂logits and each part's score, too."""
        images, labels = samples
        forward = engine.forward(self.network, images)
        return forward, *scores_of(self.config.loss, part, forward.logits, labels)

    def _in_place(self, array: Array) -> Array:
        """Return an array of the loader; with graphs, copied to the fixed memory that they read from."""
        if not self.graphs.on:
            return array
        held = self.workspace.of("batch").array(array.ndim, array.shape, array.dtype)
        held[...] = array
        return held

    def _parts(self, count: int, size: int | None) -> Sequence[Part | None]:
        """Return the parts that this rank computes of a batch of `size` images, `count` of which it has."""
        if self.ranks.size == 1 and not self.exact:
            return [None]
        if self.ranks.size == 1:
            size = count
        if size is None:
            raise ValueError("on several ranks, give the size of the whole batch")
        return parts_of(self.ranks, size, self.exact, self.together)

    def train_feedback(self, step: Step, options: Any = None, observe: Observe | None = None) -> list[Array | None]:
        """Train the rule's feedback weights on a batch, or set those that follow from θ; θ does not change.

        `options` overrides the rule's options in the config; `observe` is called for every iteration.

        Returns
        -------
        list of arrays of shape (), or None for no iterations
            The loss of the last iteration, per block with feedback; empty for rules without trained feedback.

        Raises
        ------
        NonFiniteError
            If the iterations of a closed form diverge; names the block.
        """
        rule, options = self.rule, options or self.config.rule
        if rule.feedback is None and rule.follow is None:
            return []
        number = self.feedback_step
        self.feedback_step += 1

        def work() -> list[Array | None]:
            batch = step.batch.replaced(number=number)
            if rule.follow is not None:
                rule.follow(options, self.rule_state, batch)
            if rule.feedback is None:
                return []
            return feedback.train(rule.feedback, options, self.rule_state, batch, self.workspace, observe)

        if observe is not None or options is not self.config.rule or not self.graphs.takes("feedback training"):
            return work()
        self.workspace.number("step", number, np.uint64)
        return self.graphs.run("feedback training", self._arrays(step.batch), work, step.batch.part)

    def _arrays(self, batch: Batch) -> list[Array]:
        """Return what a rule reads and writes besides the workspace's buffers: ∂L/∂logits, θ, and its own state."""
        dlogits = [each.dlogits for each in batch.every]
        return [*dlogits, *self.network.parameters(), *self.rule_state.named().values()]

    def updates(self, step: Step, stop: Callable[[], bool] = lambda: False) -> Updates:
        """Return the rule's update of every block without changing θ; errors as in `Rule.propose`.

        On several ranks the updates, the step's score and the ranks' wishes to stop are summed over all ranks; `stop`
        returns this rank's wish.
        """
        batch, part = step.batch, step.batch.part
        others: list[list[Array]] = [[] for _ in step.totals]
        if part is not None:
            stops = self.workspace.number("stop", float(stop()), np.float64)
            others = [[totals, stops] for totals in step.totals]
        summing = partial(summed_updates, descend=self._descend, others=others, flags=1)
        if self.graphs.takes("updates"):
            # A graph computes all that the rule asks for except the factors, even if it was computed before.
            arrays = [*self._arrays(batch), *self._inverses(batch), *chain(*others)]
            updates, summed = self.graphs.run("updates", arrays, lambda: summing(batch.afresh()), part)
        else:
            updates, summed = summing(batch)
        if part is not None:
            totals, stopping = summed
            step.score.totals[...] = totals
            self.stop_agreed = float(stopping[0]) > 0
        return updates

    def _inverses(self, batch: Batch) -> list[Array]:
        """Return the arrays of the rule's weight factors, which the batch then keeps; on a device, the host waits."""
        compute = self.rule.inverses or self.rule.factors
        made = {} if compute is None else compute(self.config.rule, batch)
        return [array for factors in made.values() for array in arrays_of(factors)]

    def _descend(self, batch: Batch) -> Iterator[Update]:
        # Compute the factors with all threads, before the parts of a batch ask for them side by side.
        self._inverses(batch)
        return self.rule.descend(self.config.rule, self.rule_state, batch)

    def agree_to_stop(self, stop: Callable[[], bool]) -> None:
        """Set `stop_agreed` to whether any rank wants to stop, for steps whose sums do not include it."""
        if self.ranks.size > 1:
            stopping = np.full(1, float(stop()))
            self.ranks.sum(stopping)
            self.stop_agreed = bool(stopping[0] > 0)

    def targets(self, step: Step) -> Iterator[Target]:
        """Yield the rule's targets, from the last block's output to the first's, if it has any."""
        if self.rule.targets is not None:
            yield from self.rule.targets(self.config.rule, self.rule_state, step.batch)

    def exact_updates(self, step: Step) -> Updates:
        """Return BP's updates."""
        return updates_of(step.batch.replaced(results="exact"), partial(bp.RULE.descend, bp.Options(), State()))

    @property
    def against_gnt(self) -> bool:
        """Whether updates are also compared with those by Gauss-Newton targets."""
        return "gnt" in self.config.compare.against

    def compare(self, step: Step, updates: Updates) -> list[Comparison]:
        """Compare the rule's weight updates with BP's, and with GNT's if asked for, on the same weights and batch.

        A rule can choose other options for the comparison (`Rule.compared`), such as a small β; `updates` stay as they
        are.
        """
        own, options = updates, self.rule.compared(self.config.rule)
        if options != self.config.rule:
            own = updates_of(
                step.batch.replaced(results="compared"), partial(self.rule.descend, options, self.rule_state)
            )
        comparisons = [
            Comparison(n, angle_degrees(weight, exact), relative_distance(weight, exact))
            for n, ((weight, _), (exact, _)) in enumerate(zip(own, self.exact_updates(step), strict=True))
        ]
        if self.against_gnt:
            damped = partial(gnt.RULE.descend, gnt.Options(damping=self.config.compare.damping), State())
            gauss_newton = updates_of(step.batch.replaced(results="gauss-newton"), damped)
            comparisons = [
                each._replace(gnt_angle_deg=angle_degrees(own[each.block][0], gauss_newton[each.block][0]))
                for each in comparisons
            ]
        return comparisons

    def feedback_pairs(self) -> list[tuple[int, Array, Array | None]]:
        """Return n, feedback weight, and forward weight to compare it with, of every block that has one."""
        return self.rule.pairs(self.rule_state, self.network)

    def compare_feedback(self, losses: list[Array | None], step: Step | None = None) -> list[FeedbackComparison]:
        """Compare every feedback weight with its forward weight; empty for rules whose weights pair with none.

        `losses` are those that `train_feedback` returned, or empty. Given a step, feedback weights are also compared
        with the optimum of its batch's feedback loss, for rules that can compute it.
        """
        pairs, optimum = self.feedback_pairs(), self.rule.optimum
        found = [
            FeedbackComparison.of(n, loss, omega, theta)
            for (n, omega, theta), loss in zip(pairs, losses or [None] * len(pairs), strict=True)
        ]
        if optimum is None or step is None:
            return found
        best = optimum(self.config.rule, step.batch)
        distances = [relative_distance(omega, best[n]) if n in best else math.nan for n, omega, _ in pairs]
        return [each._replace(optimum_distance=far) for each, far in zip(found, distances, strict=True)]

    def apply(self, step: Step, updates: Updates, epoch: int = 0) -> None:
        """Let the optimiser apply updates to the θ that the step's forward pass used, and to θ's `optim.Twins`.

        The optimiser's regulariser is added to the updates in place.

        Raises
        ------
        ValueError
            If a parameter was replaced by an array that the optimiser cannot write to.
        """
        optimizer, parameters = self.config.optimizer, self.network.parameters()
        gradients = [array for pair in updates for array in pair]
        optim.check_gradients(parameters, gradients)
        strength, on = strength_at(optimizer, self.optimizer_state.step), optimizer.orthogonality_on
        weights, errors = [weight for weight, _ in updates], step.batch.gram_errors
        blocks = regularised(self.network.blocks, on) if strength else []
        # Compute E (`Batch.gram_errors`) here, so that the optimiser's graph never does, even if no rule asked for it.
        excesses = errors.of(blocks)

        def regularise() -> None:
            if strength:
                add_orthogonality(strength, self.network, weights, errors, self.workspace, on)

        state, graphs = self.optimizer_state, self.graphs
        rates = optim.learning_rates(self.config.schedule, optimizer.lr, epoch, state.step)
        decay = None if self.rule.shared_decay is None else self.rule.shared_decay(self.config.rule)
        twins = None if decay is None else optim.Twins(self.rule_state.weights, decay)
        if not graphs.takes("optimiser"):
            regularise()
            optim.apply_updates(optimizer, rates, state, parameters, gradients, self.workspace, twins)
            return
        t, names = state.step + 1, range(len(self.network)) if isinstance(rates, list) else [0] * len(self.network)
        sizes = [
            [self.workspace.number(("size", name, i), size, parameters[0].dtype) for i, size in enumerate(of_block)]
            for name, of_block in zip(names, optim.step_sizes(optimizer, rates, t, len(self.network)), strict=True)
        ]

        def work() -> None:
            regularise()
            optim.apply_updates(optimizer, rates, state, parameters, gradients, self.workspace, twins, sizes)

        moments = [array for held in state.moments for array in held]
        own = [] if twins is None else self.rule_state.weights.values()
        graphs.run("optimiser", [*parameters, *gradients, *moments, *own, *excesses.values()], work)
        state.step = t

    def evaluate(self, loader: Loader | None = None, stop: Callable[[], bool] = lambda: False) -> Iterator[Score]:
        """Score the images of a loader, by default of the test split, batch by batch.

        `stop` tells whether this rank wants to stop, as in `updates`.
        """
        loader = loader or self.test_loader
        with closing(loader.batches(0)) as batches:
            for size, (images, labels) in zip(loader.sizes(), batches, strict=True):
                yield self.score(images, labels, size, stop)

    def score(
        self, images: Array, labels: Array, size: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> Score:
        """Score a batch without learning from it; arrays of earlier steps are overwritten."""
        step = self._forward(images, labels, size)
        if step.batch.part is not None:
            stops = array_module(step.score.totals).full(1, float(stop()))
            totals, stopping = step.batch.summed([[totals, stops] for totals in step.totals], "scores", flags=1)
            step.score.totals[...] = totals
            self.stop_agreed = bool(stopping[0] > 0)
        return step.score
