"""What a learning rule is: a value whose fields say what it can do.

Every rule has options, a state, a FLOP count of its matrix products, and either `updates`, or `targets` and
`local_update`, which updates a block from its target. Loop, optimiser, angles, trace and audit use these
fields, never a rule's name. A rule returns updates and never applies them to θ.
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
    """A rule's own arrays, by the block n that they belong to: B^n, ω^n or Q^n, which reaches s^n, n = 1 … N−1.

    Parameters
    ----------
    weights, biases : map of n to array
        Feedback weights, and biases where the rule has any.
    moments : map of n and "weight" or "bias" to tuple of arrays
        Of the optimiser of what is trained.
    """

    weights: dict[int, Array] = field(default_factory=dict)
    biases: dict[int, Array] = field(default_factory=dict)
    moments: dict[tuple[int, str], tuple[Array, ...]] = field(default_factory=dict)

    def parameters(self) -> dict[str, Array]:
        """Return weights and biases by the names that files have for them: feedback/<n>/<weight or bias>."""
        named = {}
        for n, weight in self.weights.items():
            named[f"feedback/{n}/weight"] = weight
            if n in self.biases:
                named[f"feedback/{n}/bias"] = self.biases[n]
        return named

    def named(self) -> dict[str, Array]:
        """Return every array by the name that files have for it."""
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
    """s^{n+1} shall become t = s^{n+1} + δ; valid until the next target is asked for.

    Parameters
    ----------
    delta : array
        δ, of as many elements as s^{n+1}.
    t : array, optional
        Of the same, where the rule computes t itself and δ from it.
    m : array of shape (B,), optional
        GAIT-prop's factor of every sample.
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
    loss : array of shape (), or None where it was not asked for
    noises : map of name to array
        `epsilon` and `eta`, where there are any.
    """

    gradients: Mapping[str, Array]
    loss: Array | None
    noises: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Descent:
    """What the optimiser of one block's feedback weights does on a batch.

    Parameters
    ----------
    optimizer : SGD or Adam options
        Of the block.
    lr : float
    iterations : int
        K.
    sigma : float
        σ of the noise.
    step : int
        How many iterations were done before.
    workspace : Workspace
    """

    optimizer: SGD | Adam
    lr: float
    iterations: int
    sigma: float
    step: int
    workspace: Workspace


Iterating = Callable[[State, int, bool], Iteration]
"""(state, k, whether the loss is wanted) → the k-th iteration on one block and batch, with the state's present ω."""
Observe = Callable[[int, int, Mapping[str, Array]], None]
"""Is told of every iteration of feedback training: block n, number k, and its arrays, valid during the call only.

`epsilon` and `eta` are the noises, where there are any; `gradient` and `gradient_bias` those of ω and, where it is
trained, of its bias; `loss` is of shape (). A closed form tells once per block, k = 0, what `closed_form` returns.
"""


@dataclass(frozen=True, kw_only=True)
class Feedback(Generic[O]):
    """How a rule trains its feedback weights: `arraytp.rules.feedback.train` is the loop.

    Parameters
    ----------
    begin : (options, at, σ, noises) → Iterating
        Return what does the iterations on a block of a batch; `noises` is how many there will be.
    flops : (options, network) → int
        Operations of the products of training for one sample.
    settings : options → FeedbackTraining
        K, σ and optimiser.
    noises : options → int
        How many noises a step of the optimiser takes the mean gradient of.
    epochs : options → (int, int)
        How many epochs of feedback training alone come first, and after each epoch but the last.
    closed_form : (options, state, at, Descent) → map of str to array, optional
        Do all iterations on a block at once, in place, from the expectation over the noise; return what there is to
        observe, `loss` among it.
    expected : options → bool
        Whether the settings ask for the closed form.
    noise_key : n → int
        The number by which the noise of ω^n's iterations is keyed.
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
        Of a block by its target; for rules without `updates`.
    local_loss : (options, block, s, t) → float, optional
        The loss whose gradient `local_update` is, t constant, for arrays of shape (B, *out_shape); for the audit.
    feedback : Feedback, optional
        For rules that train feedback weights.
    follow : (options, state, batch) → None, optional
        Set feedback weights that follow from θ, in place; on every batch, before its updates.
    shared_decay : options → float, optional
        λ of a rule whose B^n get the very step that the optimiser gives W^n, after both have shrunk by 1 − λ.
    optimum : (options, batch) → map of n to array, optional
        The feedback weights at which the batch's feedback loss is least, where they have a closed form; empty if the
        settings have none.
    pairs : (state, network) → list of (n, feedback weight, forward weight to compare it with or None), optional
    flops : (options, network) → int
        Operations of the products of the updates for one sample.
    check : (options, blocks, dtype, loss reduction) → list of str
        Lines worth knowing before a run; raises UserError for what the rule cannot train.
    compared : options → options
        At which the updates are compared with BP's.
    inverses : (options, batch) → map of n to Factors or PseudoInverse, optional
        What the rule puts in place of the transposed weights of every block but the first; raises IllConditionedError.
    factors : as `inverses`, optional
        As `inverses`, for a rule that solves with the factors itself instead of passing them to `At.backward`.
    by_samples : bool
        Whether a sample's numbers do not depend on others, and what is yielded is summed over samples by `At.backward`
        alone. Exact mode then computes parts of a batch at once, unless the rule trains feedback.
    checks : tuple of Check
        What the audit is to check besides.
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
            If a rule that inverts cannot; names the block.
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
