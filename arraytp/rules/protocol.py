"""The interface of a learning rule: a value whose fields say what the rule can do.

Every rule has options, a state, a FLOP count of its matrix products, and either `updates`, or `targets` and
`local_update`, which updates a block from its target. The training loop, optimiser, angles, trace and audit
use these fields, never a rule's name. A rule returns updates and never applies them to θ.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from arraytp.backend import Array, Backend
from arraytp.fast.parallel import Workspace
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import At, Batch
from arraytp.ops.solve import Factors, PseudoInverse
from arraytp.options import SGD, Adam, FeedbackTraining


class Options(Protocol):
    """A rule's settings: a frozen dataclass whose `name` is the rule's."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """The rule's name in configs."""


O = TypeVar("O", bound=Any)
Update = tuple[Array, Array]
"""Gradient-like arrays of the shapes of weight and bias: plain SGD does `parameter -= lr * update`."""
Updates = list[Update]
"""The update of every block, block 0 first."""
Check = Callable[[Any], Iterable[Any]]
"""A check of the audit: a function of an `arraytp.audit.setting.Setting` that yields lines."""


@dataclass
class State:
    """A rule's own arrays by block n = 1 … N−1: B^n, ω^n or Q^n, which carries feedback to s^n.

    Parameters
    ----------
    weights, biases : map of n to array
        Feedback weights, and biases where the rule has any.
    moments : map of n and "weight" or "bias" to tuple of arrays
        Moments of the feedback optimiser.
    """

    weights: dict[int, Array] = field(default_factory=dict)
    biases: dict[int, Array] = field(default_factory=dict)
    moments: dict[tuple[int, str], tuple[Array, ...]] = field(default_factory=dict)

    def parameters(self) -> dict[str, Array]:
        """Return weights and biases by their names in files: feedback/<n>/<weight or bias>."""
        named = {}
        for n, weight in self.weights.items():
            named[f"feedback/{n}/weight"] = weight
            if n in self.biases:
                named[f"feedback/{n}/bias"] = self.biases[n]
        return named

    def named(self) -> dict[str, Array]:
        """Return every array by its name in files."""
        return self.parameters() | {
            f"feedback_moments/{n}/{part}/{i}": moment
            for (n, part), moments in self.moments.items()
            for i, moment in enumerate(moments)
        }

    def copy(self) -> "State":
        """Return a state with copies of all arrays."""
        return State(
            {n: weight.copy() for n, weight in self.weights.items()},
            {n: bias.copy() for n, bias in self.biases.items()},
            {key: tuple(moment.copy() for moment in moments) for key, moments in self.moments.items()},
        )


@dataclass(frozen=True)
class Target:
    """The target t = s^{n+1} + δ of a block's output; valid until the next target is requested.

    Parameters
    ----------
    delta : array
        δ, with as many elements as s^{n+1}.
    t : array, optional
        t, with as many elements, where the rule computes t itself and δ from it.
    m : array of shape (B,), optional
        GAIT-prop's factor m of every sample.
    """

    delta: Array
    t: Array | None = None
    m: Array | None = None


@dataclass(frozen=True)
class Iteration:
    """What one iteration of feedback training computes for one block.

    Parameters
    ----------
    gradients : map of "weight" and, where it is trained, "bias" to array
    loss : array of shape (), or None where it was not requested
    noises : map of name to array
        `epsilon` and `eta`, where there are any.
    """

    gradients: Mapping[str, Array]
    loss: Array | None
    noises: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Descent:
    """How one block's feedback weights are optimised on a batch.

    Parameters
    ----------
    optimizer : SGD or Adam options
        The block's.
    lr : float
    iterations : int
        K.
    sigma : float
        σ of the noise.
    step : int
        Number of iterations done on earlier batches.
    workspace : Workspace
    """

    optimizer: SGD | Adam
    lr: float
    iterations: int
    sigma: float
    step: int
    workspace: Workspace


Iterating = Callable[[State, int, bool], Iteration]
"""(state, k, whether the loss is wanted) → the k-th iteration on one block and batch, with the state's current ω."""
Observe = Callable[[int, int, Mapping[str, Array]], None]
"""Called for every iteration of feedback training with block n, number k and the iteration's arrays.

The arrays are valid during the call only. `epsilon` and `eta` are the noises, where there are any; `gradient` and
`gradient_bias` are those of ω and, if trained, of its bias; `loss` has shape (). For a closed form it is called once
per block, with k = 0 and what `closed_form` returns.
"""


@dataclass(frozen=True, kw_only=True)
class Feedback(Generic[O]):
    """How a rule trains its feedback weights in the loop `arraytp.rules.feedback.train`.

    Parameters
    ----------
    begin : (options, at, σ, noises) → Iterating
        Return the function that does the iterations on a block; `noises` is the number of noises to be drawn.
    flops : (options, network) → int
        FLOPs of the matrix products in feedback training for one sample.
    settings : options → FeedbackTraining
        K, σ and optimiser.
    noises : options → int
        Number of noises over which each optimiser step averages the gradient.
    epochs : options → (int, int)
        Number of feedback-only epochs at the start, and after each epoch but the last.
    closed_form : (options, state, at, Descent) → map of str to array, optional
        Do all iterations on a block at once, in place, using the expectation over the noise; return the arrays to
        observe, including `loss`.
    expected : options → bool
        Whether the settings ask for the closed form.
    noise_key : n → int
        The block number that keys the noise of ω^n's iterations.
    """

    begin: Callable[[O, At, float, int], Iterating]
    flops: Callable[[O, Network], int]
    settings: Callable[[O], FeedbackTraining] = lambda options: options.feedback
    noises: Callable[[O], int] = lambda options: 1
    epochs: Callable[[O], tuple[int, int]] = lambda options: (0, 0)
    closed_form: "Callable[[O, State, At, Descent], Mapping[str, Array]] | None" = None
    expected: Callable[[O], bool] = lambda options: False
    noise_key: Callable[[int], int] = lambda n: n


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[O]):
    """A learning rule.

    Parameters
    ----------
    options : type
        Frozen dataclass of the rule's settings, with `name`.
    init_state : (options, network, seed, backend) → State
    updates : (options, state, batch) → iterator of Update, optional
        From the last block to the first.
    targets : (options, state, batch) → iterator of Target, optional
        From the last block to the first.
    local_update : (options, at, target) → Update, optional
        The update of a block given its target; for rules without `updates`.
    local_loss : (options, block, s, t) → float, optional
        The loss whose gradient, with t constant, `local_update` is; for arrays of shape (B, *out_shape); for the audit.
    feedback : Feedback, optional
        For rules that train feedback weights.
    follow : (options, state, batch) → None, optional
        Set feedback weights that depend on θ, in place, on every batch before its updates.
    shared_decay : options → float, optional
        λ of a rule whose B^n takes the same optimiser step as W^n, after both are multiplied by 1 − λ.
    optimum : (options, batch) → map of n to array, optional
        The feedback weights that minimise the batch's feedback loss; empty if they have no closed form under these
        settings.
    pairs : (state, network) → list of (n, feedback weight, forward weight to compare it with or None), optional
    flops : (options, network) → int
        FLOPs of the matrix products in the updates for one sample.
    check : (options, blocks, dtype, loss reduction) → list of str
        Notes for the user before a run; raises UserError for what the rule cannot train.
    compared : options → options
        The options with which updates are compared with BP's.
    inverses : (options, batch) → map of n to Factors or PseudoInverse, optional
        What the rule uses in place of the transposed weights of every block but the first; raises IllConditionedError.
    factors : as `inverses`, optional
        As `inverses`, for a rule that solves with the factors itself instead of passing them to `At.backward`.
    by_samples : bool
        Whether each sample's values are independent of the other samples, and only `At.backward` sums the yielded
        updates over samples. Exact mode then computes parts of a batch at once, if all blocks are dense and the rule
        trains no feedback.
    checks : tuple of Check
        Additional checks for the audit.
    """

    options: type[O]
    init_state: Callable[[O, Network, int, Backend], State] = lambda options, network, seed, backend: State()
    updates: Callable[[O, State, Batch], Iterator[Update]] | None = None
    targets: Callable[[O, State, Batch], Iterator[Target]] | None = None
    local_update: Callable[[O, At, Target], Update] | None = None
    local_loss: Callable[[O, Block, Array, Array], float] | None = None
    feedback: Feedback[O] | None = None
    follow: Callable[[O, State, Batch], None] | None = None
    shared_decay: Callable[[O], float] | None = None
    optimum: Callable[[O, Batch], Mapping[int, Array]] | None = None
    pairs: Callable[[State, Network], list[tuple[int, Array, Array | None]]] = lambda state, network: []
    flops: Callable[[O, Network], int]
    check: Callable[[O, tuple[Block, ...], str, str], list[str]] = lambda options, blocks, dtype, reduction: []
    compared: Callable[[O], O] = lambda options: options
    inverses: Callable[[O, Batch], Mapping[int, Factors | PseudoInverse]] | None = None
    factors: Callable[[O, Batch], Mapping[int, Factors | PseudoInverse]] | None = None
    by_samples: bool = False
    checks: tuple[Check, ...] = ()

    @property
    def inverts(self) -> bool:
        """Whether the rule inverts the weights of every block but the first."""
        return self.inverses is not None

    @property
    def name(self) -> str:
        """The rule's name in configs."""
        return str(self.options.__dataclass_fields__["name"].default)

    def propose(self, options: O, state: State, batch: Batch) -> Updates:
        """Return the update of every block, block 0 first; valid as long as the batch's results.

        Raises
        ------
        NonFiniteError
            If a rule needs an inverse that cannot be computed; names the block, except for Gauss-Newton targets.
        """
        return list(self.descend(options, state, batch))[::-1]

    def descend(self, options: O, state: State, batch: Batch) -> Iterator[Update]:
        """Yield the updates of `propose`, from the last block to the first."""
        if self.updates is not None:
            yield from self.updates(options, state, batch)
            return
        assert self.targets is not None
        assert self.local_update is not None
        for at, target in zip(batch.down(), self.targets(options, state, batch), strict=True):
            yield self.local_update(options, at, target)
