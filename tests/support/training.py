"""A pass over a batch, and a training step, made of arraytp's parts without config, data set or loop."""

from dataclasses import dataclass
from typing import Any

from arraytp.backend import NUMPY, Backend
from arraytp.fast.device import fast_engine
from arraytp.fast.engine import Fast
from arraytp.fast.orthogonality import add_orthogonality, strength_at
from arraytp.fast.parallel import Workspace
from arraytp.model.blocks import Network
from arraytp.model.passes import Batch, Engine
from arraytp.model.plain import Plain
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward
from arraytp.optim import OptimizerOptions, OptimizerState, Twins, apply_updates, init_optimizer
from arraytp.rules import RULES
from arraytp.rules.feedback import train
from arraytp.rules.protocol import Rule, State


def fast(backend: Backend = NUMPY, threads: int = 2) -> Fast:
    """Return the fast engine on a workspace of its own."""
    return fast_engine(backend, threads)


def plain(backend: Backend = NUMPY) -> Plain:
    return Plain(backend)


def pass_of(network, x, dlogits=None, engine: Engine | None = None, seed=0, number=0) -> Batch:
    """Run the network on a batch; without `dlogits`, which feedback training does not need, the logits stand in."""
    engine = engine or fast()
    forward = engine.forward(network, x)
    return Batch(engine, network, forward, forward.logits if dlogits is None else dlogits, seed, number)


def copies(updates):
    """Return copies of updates."""
    return [(weight.copy(), bias.copy()) for weight, bias in updates]


@dataclass
class Trainer:
    """What a step needs; `step` trains, `propose` returns loss and updates only."""

    network: Network
    rule: Rule[Any]
    options: Any
    state: State
    optimizer: OptimizerOptions
    optimizer_state: OptimizerState
    engine: Engine
    workspace: Workspace
    seed: int = 0
    number: int = 0

    def forward(self, x, labels, reduction="mean"):
        """Return the loss and the pass."""
        forward = self.engine.forward(self.network, x)
        loss, cache = cross_entropy_forward(forward.logits, labels, reduction)
        dlogits = cross_entropy_backward(cache, reduction)
        return loss, Batch(self.engine, self.network, forward, dlogits, self.seed, self.number)

    def propose(self, x, labels, reduction="mean"):
        loss, batch = self.forward(x, labels, reduction)
        return loss, self.rule.propose(self.options, self.state, batch)

    def train_feedback(self, batch, observe=None):
        """Let the rule train its feedback, if it has any; return the losses."""
        self.number += 1
        if self.rule.follow is not None:
            self.rule.follow(self.options, self.state, batch)
        if self.rule.feedback is None:
            return []
        return train(self.rule.feedback, self.options, self.state, batch, self.workspace, observe)

    def step(self, x, labels, reduction="mean"):
        loss, batch = self.forward(x, labels, reduction)
        self.train_feedback(batch)
        self.apply(batch, self.rule.propose(self.options, self.state, batch))
        return loss

    def apply(self, batch, updates):
        optimizer, gradients = self.optimizer, [array for pair in updates for array in pair]
        if strength := strength_at(optimizer, self.optimizer_state.step):
            weights, errors = [weight for weight, _ in updates], batch.gram_errors
            add_orthogonality(strength, self.network, weights, errors, self.workspace, optimizer.orthogonality_on)
        twins = self.rule.shared_decay and Twins(self.state.weights, self.rule.shared_decay(self.options))
        parameters = self.network.parameters()
        apply_updates(optimizer, optimizer.lr, self.optimizer_state, parameters, gradients, self.workspace, twins)


def trainer(network, rule, optimizer, backend: Backend = NUMPY, threads=1, seed=0, engine=None, **options):
    """Return a trainer by the rule of this name, with the fast engine unless another one is given."""
    rule = RULES[rule]
    settings, workspace = rule.options(**options), fast_engine(backend, threads)
    state = rule.init_state(settings, network, seed, backend)
    optimizer_state = init_optimizer(optimizer, network.parameters())
    return Trainer(network, rule, settings, state, optimizer, optimizer_state, engine or workspace, workspace, seed)
