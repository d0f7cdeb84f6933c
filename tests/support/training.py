"""A training step out of the parts of arraytp, without config, data set or loop."""

from dataclasses import dataclass

from arraytp.backend import Backend
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.model.network import Network
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward
from arraytp.optim import OptimizerOptions, OptimizerState, apply_updates, init_optimizer
from arraytp.rules import RULES
from arraytp.rules.protocol import State


@dataclass
class Trainer:
    """What a step needs; `step` trains, `propose` returns loss and updates only."""

    network: Network
    rule: str
    options: object
    state: State
    optimizer: OptimizerOptions
    optimizer_state: OptimizerState
    workspace: Workspace

    def propose(self, x, labels, reduction="mean"):
        passed = forward(self.network, x, self.workspace)
        loss, cache = cross_entropy_forward(passed.logits, labels, reduction)
        dlogits = cross_entropy_backward(cache, reduction)
        found = RULES[self.rule].updates(self.options, self.state, self.network, passed, dlogits, self.workspace)
        return loss, found

    def step(self, x, labels):
        loss, found = self.propose(x, labels)
        gradients = [array for pair in found for array in pair]
        optimizer = self.optimizer
        apply_updates(
            optimizer, optimizer.lr, self.optimizer_state, parameters(self.network), gradients, self.workspace
        )
        return loss


def parameters(network):
    return [array for pair in zip(network.weights, network.biases, strict=True) for array in pair]


def trainer(network, rule, optimizer, backend: Backend, threads=1, seed=0, **options):
    settings = RULES[rule].Options(**options)
    state = RULES[rule].init_state(settings, network, seed, backend)
    return Trainer(
        network,
        rule,
        settings,
        state,
        optimizer,
        init_optimizer(optimizer, parameters(network)),
        Workspace(backend, threads),
    )
