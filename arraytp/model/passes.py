"""One pass of a network over a batch, as learning rules see it, and the primitives that rules are written in.

A rule is given a `Batch` and walks its blocks: `batch.down()` yields an `At` for each, n = N−1 … 0, which knows block
n's arrays by the papers' symbols and has the primitives as methods. An `Engine` computes them:
`arraytp.model.plain` in readable operations on the whole batch, `arraytp.fast.engine` in slices that fit a cache. A
rule does not know which engine computes.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

from arraytp.backend import Array, Backend
from arraytp.model.blocks import Block, Network, Shape
from arraytp.ops.activations import LINEAR, Activation
from arraytp.ops.noise import EPSILON, ETA
from arraytp.ops.solve import Factors, PseudoInverse
from arraytp.options import Unpool
from arraytp.ranks import PARTS, Part, RankSums

T = TypeVar("T")
Gradients = tuple[Array, Array, Array | None]
"""dW and db of a block, and the gradient of its input, None for block 0 or where nothing carries it back."""
Through = Array | Factors | PseudoInverse
"""What carries a gradient back: an array of weight_shape for its transpose, or factors for W⁻¹ or W⁺."""
Begun = dict[tuple[Any, ...], Callable[[], Any]]
"""By the name under which `Batch.once` keeps it: returns the result of what was begun before the pass."""


@dataclass(frozen=True)
class ForwardPass:
    """The results of a forward pass.

    Parameters
    ----------
    s : list of arrays
        s^0 … s^N: s[0] is the input, s[n + 1] what block n hands on, of shape (B, *next_shape), C-contiguous.
    outputs : list of arrays
        outputs[n] is block n's output of shape (B, *out_shape): s[n + 1] itself unless there are auxiliary units.
    index : list of arrays or None
        index[n]: the maxima of block n's pool (`arraytp.ops.pool.max_pool_forward`), None without one.
    """

    s: list[Array]
    outputs: list[Array]
    index: list[Array | None]

    @property
    def logits(self) -> Array:
        """s^N, of shape (B, classes)."""
        return self.s[-1]


@dataclass(frozen=True)
class Batch:
    """One pass over a batch, and ∂L/∂logits: all that a rule's computations start from.

    Parameters
    ----------
    engine : Engine
        Computes the primitives and holds the arrays of their results.
    network : Network
    forward : ForwardPass
        The batch's forward pass with the network's current weights.
    dlogits : array of shape (B, classes)
        ∂L/∂s^N; that of auxiliary units is 0, here as in every block.
    seed : int
        The run's seed; noise is keyed by it.
    number : int
        Number of batches on which feedback was trained before; noise is keyed by it.
    results : str
        Names the arrays that results are written to. The results of a block's primitive are valid until its next call
        under the same name, or the next pass; `feedback`, `feedback_difference` and `carry` share an array.
    part : Part, optional
        Which samples of a batch the arrays hold, if not all. Noise is keyed by a sample's place in the whole batch.
    others : sequence of Batch
        For the first part, the other parts; see `parts_of_batch`.
    leader : weak reference to a Batch, optional
        For the other parts, the first one.
    begun : map of name to () → object
        Computations for `once` that were begun before the pass, by name; calling one returns its result.
    lock : RLock
        Held while the first part computes what all parts need.
    """

    engine: "Engine"
    network: Network
    forward: ForwardPass
    dlogits: Array
    seed: int = 0
    number: int = 0
    results: str = "rule"
    part: Part | None = None
    others: "Sequence[Batch]" = field(default=(), repr=False, compare=False)
    leader: "weakref.ref[Batch] | None" = field(default=None, repr=False, compare=False)
    begun: Begun = field(default_factory=dict, repr=False, compare=False)
    lock: Any = field(default_factory=threading.RLock, repr=False, compare=False)

    def __len__(self) -> int:
        """B, the number of samples on all ranks, over which means are taken."""
        return len(self.dlogits) if self.part is None else self.part.size

    @property
    def first(self) -> int:
        """The place of the first sample in the batch."""
        return 0 if self.part is None else self.part.first

    @property
    def share(self) -> float:
        """The share of these samples in the batch: in sums over ranks, the weight of terms not summed over samples."""
        return 1.0 if self.part is None else self.part.count / self.part.size

    @property
    def every(self) -> "Sequence[Batch]":
        """The parts of the batch that this process computes; without ranks the batch itself."""
        lead = self if self.leader is None else self.leader()
        assert lead is not None
        return lead, *lead.others

    def replaced(self, **changes: Any) -> "Batch":
        """Return the batch with some fields replaced, in all of its parts."""
        return parts_of_batch([replace(each, **changes) for each in self.every])

    def sums(self, name: str, size: int, dtype: Any) -> RankSums:
        """Return a buffer for `size` sums over the samples of all ranks; the same memory for the same name."""
        flat = self.engine.array((self.results, name, "sums"), (-(-size // PARTS) * PARTS,), dtype)
        return RankSums([each.part for each in self.every if each.part is not None], flat, self.engine)

    def summed(self, arrays: Sequence[Sequence[Array]], name: str, flags: int = 0) -> list[Array]:
        """Return the sums over all ranks of arrays that each part in `every` has summed over its own samples.

        Arguments are as for `RankSums.add`. The sums have the first array's dtype; without ranks, they are the arrays
        themselves.
        """
        if self.part is None:
            (own,) = arrays
            return list(own)
        sums = self.sums(name, sum(array.size for array in arrays[0]), arrays[0][0].dtype)
        sums.add(arrays, flags)
        return sums.finished()

    @property
    def logits(self) -> Array:
        """s^N, of shape (B, classes)."""
        return self.forward.logits

    def at(self, n: int) -> "At":
        """Return block n of this pass."""
        return At(self, n)

    def down(self) -> Iterator["At"]:
        """Yield the blocks of this pass, n = N−1 … 0."""
        for n in reversed(range(len(self.network))):
            yield At(self, n)

    def array(self, name: str, shape: Shape) -> Array:
        """Return an uninitialised array of the pass's dtype; the same memory for the same name."""
        return self.engine.array((self.results, name), shape, self.dlogits.dtype)

    def product(self, a: Array, b: Array, name: str) -> Array:
        """Return the matrix product a b in the `array` of that name."""
        return self.engine.product(a, b, self.array(name, (len(a), b.shape[1])))

    def noise(self, name: str, shape: Shape, sigma: float, *key: int) -> Array:
        """Return N(0, σ²) noise, keyed by seed, batch number and `key`, in the `array` of that name."""
        return self.engine.noise(self.array(name, shape), sigma, self.first, self.seed, self.number, *key)

    def in_slices(self, compute: Callable[[slice], None]) -> None:
        """Call `compute` on slices that cover all samples: element-wise work that several threads share."""
        self.engine.in_slices(len(self.dlogits), compute)

    def run_on(self, n: int, s: Array) -> Array:
        """Return the logits that the network computes from s^n = s on; valid until the next call."""
        return self.engine.forward(self.network.rest(n), s, "run on").logits

    @property
    def gram_errors(self) -> "GramErrors":
        """E = WWᵀ − I (or WᵀW − I) of the blocks, computed once for all that need it: inverses and the regulariser."""
        errors: GramErrors = self.once(("gram errors",), lambda lead: lead.engine.gram_errors(lead.network))
        return errors

    @property
    def jacobian_sums(self) -> "Mapping[int, tuple[Array, Array]]":
        """Σ_b J_b J_bᵀ, of shape (C, C), and Σ_b J_b, of shape (C, D), of every hidden s^n; computed once.

        J_b, of shape (C, D), is the Jacobian of sample b's logits with respect to its s^n.
        """
        # Not a cached_property: up to Python 3.11 it would hold a lock shared by all batches during the sum over ranks.
        if "jacobians" not in self._sums:
            own = side_by_side(self.engine, [partial(each.engine.jacobian_sums, each) for each in self.every])
            self._sums["jacobians"] = self._summed_pairs(own, "jacobians")
        return self._sums["jacobians"]

    @cached_property
    def _sums(self) -> "dict[str, Mapping[int, tuple[Array, Array]]]":
        """The sums over samples computed so far, by name."""
        return {}

    def jacobian_overlap(self, n: int, unpool: Unpool) -> tuple[Array, Array]:
        """Return N and M of block n; on several ranks those of all blocks are summed at once."""
        if self.part is None:
            return self.engine.jacobian_overlap(self.at(n), unpool)
        if unpool not in self._sums:
            blocks = range(1, len(self.network))

            def overlaps(part: Batch) -> Mapping[int, tuple[Array, Array]]:
                return {m: part.engine.jacobian_overlap(part.at(m), unpool) for m in blocks}

            own = side_by_side(self.engine, [partial(overlaps, each) for each in self.every])
            self._sums[unpool] = self._summed_pairs(own, unpool)
        return self._sums[unpool][n]

    def _summed_pairs(
        self, own: "Sequence[Mapping[int, tuple[Array, Array]]]", name: str
    ) -> Mapping[int, tuple[Array, Array]]:
        if not own[0]:
            return {}
        summed = iter(self.summed([[array for pair in pairs.values() for array in pair] for pairs in own], name))
        return {n: (next(summed), next(summed)) for n in own[0]}

    @property
    def inverses(self) -> Mapping[int, Factors]:
        """W⁻¹ of every block but the first, by its position, as factors; computed once.

        Raises
        ------
        IllConditionedError
            If a weight matrix cannot be inverted in its dtype; names the block and the condition number.
        """
        inverses: Mapping[int, Factors] = self.once(("inverses", None), lambda lead: lead.engine.inverses(lead))
        return inverses

    def gauss_newton(self, damping: float) -> Mapping[int, Array]:
        """Return J_bᵀ (J_b J_bᵀ + γI)⁻¹ e_b of every hidden s^n, of shape (samples, D), e = ∂L/∂s^N as in `dlogits`.

        Parameters
        ----------
        damping : float
            γ > 0. J_b is as in `jacobian_sums`.
        """
        return self.engine.gauss_newton(self, damping)

    def pseudo_inverses(self, ridge: float = 0.0) -> Mapping[int, PseudoInverse]:
        """Return W⁺ of every block but the first, by its position, as factors; computed once for each r.

        Parameters
        ----------
        ridge : float
            r ≥ 0 of W⁺ = Wᵀ(WWᵀ + rI)⁻¹ = (WᵀW + rI)⁻¹Wᵀ; 0 is the pseudo-inverse.

        Raises
        ------
        IllConditionedError
            If the smaller of WWᵀ + rI and WᵀW + rI cannot be inverted in its dtype; names the block and the number.
        """
        inverses: Mapping[int, PseudoInverse] = self.once(
            ("inverses", ridge), lambda lead: lead.engine.pseudo_inverses(lead, ridge)
        )
        return inverses

    def once(self, name: tuple[Any, ...], compute: "Callable[[Batch], Any]") -> Any:
        """Return what the first part computes for all parts, which may request it concurrently."""
        lead = self.every[0]
        with lead.lock:
            if name not in lead._kept:
                lead._kept[name] = lead.begun[name]() if name in lead.begun else compute(lead)
            return lead._kept[name]

    @cached_property
    def _kept(self) -> dict[tuple[Any, ...], Any]:
        """The results of `once`, by name."""
        return {}

    def afresh(self) -> "Batch":
        """Return the batch without anything computed so far, except factors of weights."""
        other = self.replaced(begun={})
        other._kept.update({name: held for name, held in self._kept.items() if name[0] == "inverses"})
        return other


def parts_of_batch(batches: Sequence[Batch]) -> Batch:
    """Link the parts of a batch that this process computes; return the first, which leads.

    Each part is computed separately, but the first computes for all what depends on θ alone. Keep a reference to the
    first while another is in use: the others hold only a weak one, so that its results are freed with it.
    """
    others: list[Batch] = []
    first = replace(batches[0], others=others, leader=None)
    others += [replace(batch, others=(), leader=weakref.ref(first)) for batch in batches[1:]]
    return first


def side_by_side(engine: "Engine", works: Sequence[Callable[[], T]]) -> list[T]:
    """Return the results of `works`, one per part of a batch; several run at a time."""
    if len(works) == 1:
        return [works[0]()]
    done: dict[int, T] = {}

    def one(number: int) -> None:
        done[number] = works[number]()

    engine.run([partial(one, number) for number in range(len(works))])
    return [done[number] for number in range(len(works))]


class At:
    """Block n of a pass: its arrays, and the primitives that rules are written in.

    Attributes
    ----------
    batch : Batch
        The pass.
    n : int
    block : Block
        Its fixed properties.
    weight, bias : arrays of shape weight_shape and (O,) or (out,)
        W^n and b^n.
    s : array of shape (B, *in_shape)
        s^n, the block's input; a dense block's may have more axes.
    s_next : array of shape (B, *next_shape)
        s^{n+1}, which the block hands on.
    output : array of shape (B, *out_shape)
        s^{n+1} with the auxiliary units that are not handed on.
    index : array or None
        The maxima of the block's pool.
    """

    def __init__(self, batch: Batch, n: int) -> None:
        network, forward = batch.network, batch.forward
        self.batch, self.n, self.block = batch, n, network.blocks[n]
        self.weight, self.bias = network.weights[n], network.biases[n]
        self.s, self.s_next = forward.s[n], forward.s[n + 1]
        self.output, self.index = forward.outputs[n], forward.index[n]

    def backward(self, ds: Array, through: "Through | None" = None, scale: float | Array | None = None) -> Gradients:
        """Return dW = sᵀ dz, db = Σ dz and ds^n = dz throughᵀ, with dz = D ⊙ unpool(scale · ds).

        Parameters
        ----------
        ds : array of B · size of s^{n+1} elements
            Gradient of s^{n+1}; that of auxiliary units is 0.
        through : array of shape weight_shape, Factors or PseudoInverse of W, optional
            What carries the gradient back to s^n: W itself (BP), a fixed random matrix (FA), W⁻¹ or W⁺ in place of Wᵀ
            (GAIT-prop). Without it, and for block 0, there is no gradient of s^n.
        scale : float or array of shape (B,), optional
            The factor by which ds is first multiplied, as a whole or sample by sample.
        """
        return self.batch.engine.backward(self, ds, through if self.n > 0 else None, scale)

    def carry(self, d: Array, inverse: PseudoInverse) -> Array:
        """Return (unpool d) W⁺, of s^n's shape: without overlaps, the p that minimises ‖p W − unpool d‖² + r ‖p‖².

        For r = 0, it is the minimiser of ‖p W − unpool d‖² with the smallest norm. Overlapping patches add up, and so
        do overlapping windows of the pool.

        Parameters
        ----------
        d : array of B · size of s^{n+1} elements
        inverse : PseudoInverse
            Of W.
        """
        return self.batch.engine.carry(self, d, inverse)

    def feedback(self, omega: Array, bias: Array, t: Array, unpool: Unpool) -> Array:
        """Return G^n(t), of s^n's shape: max-unpool → activation → transposed affine map with ω, plus a bias.

        Parameters
        ----------
        omega, bias : arrays of shape weight_shape and in_shape[-1:]
        t : array of B · size of s^{n+1} elements
        unpool : {"overwrite", "accumulate"}
            See `arraytp.ops.pool.max_unpool`; the maxima are those of the forward pass.
        """
        return self.batch.engine.feedback(self, omega, bias, t, unpool)

    def feedback_difference(self, omega: Array, delta: Array, unpool: Unpool) -> Array:
        """Return G^n(s^{n+1} + δ) − G^n(s^{n+1}), of s^n's shape, exact for small δ; arguments as in `feedback`."""
        return self.batch.engine.feedback_difference(self, omega, delta, unpool)

    def inverse(self, factors: Factors, y: Array) -> Array:
        """Return the input, of s^n's shape, for which the block's output would be y (GP paper, Equation 3).

        Parameters
        ----------
        factors : Factors
            Of W.
        y : array of shape (B, *out_shape)
            Near `self.output`, auxiliary units included, within the activation's range.
        """
        return self.batch.engine.inverse(self, factors, y)

    def alone(self, x: Array) -> Array:
        """Return f(xW + b), of shape (B, *pre_shape): the block alone, without its pool, on x of s^n's shape.

        Valid until the next call.
        """
        network = Network((_without_pool(self.block, self.block.activation),), [self.weight], [self.bias])
        return self.batch.engine.forward(network, x, "alone").outputs[0]

    def outer(self, x: Array, y: Array, name: str, omega: Array | None = None) -> tuple[Array, Array | None]:
        """Return xᵀy, of shape weight_shape, with x as its patch matrix, and yωᵀ, of s^n's shape, where ω is given.

        Parameters
        ----------
        x : array of s^n's shape
        y : array of shape (B, *pre_shape)
        name : str
            Names the arrays of the results, which are valid until the next call with this name.
        omega : array of shape weight_shape, optional
        """
        network = Network((_without_pool(self.block, LINEAR),), [self.weight], [self.bias])
        passed = ForwardPass([x, y], [y], [None])
        at = At(replace(self.batch, network=network, forward=passed, dlogits=y, results=name), 0)
        xy, _, back = self.batch.engine.backward(at, y, omega, None)
        return xy, back

    def iterations(self, unpool: Unpool, training: "NoiseAndProducts") -> "Iterations":
        """Return what iterations of feedback training on this block share; valid until the next call."""
        return self.batch.engine.iterations(self, unpool, training)

    def jacobian_overlap(self, unpool: Unpool) -> tuple[Array, Array]:
        """Return N and M of Theorem 4.2, see `arraytp.model.feedback.jacobian_overlap`."""
        return self.batch.jacobian_overlap(self.n, unpool)


def _without_pool(block: Block, activation: Activation) -> Block:
    """Return the block with this activation, no pool and no auxiliary units, so that it hands on all of f(z)."""
    return replace(block, activation=activation, pool=None, auxiliary=0, out_shape=block.pre_shape)


class GramErrors(Protocol):
    """E^n of a network's matrices: WWᵀ − I, or WᵀW − I of a W with more rows than columns."""

    def of(self, positions: Iterable[int]) -> Mapping[int, Array]:
        """Return E of the blocks at these positions, each computed once."""


@dataclass(frozen=True)
class NoiseAndProducts:
    """The noise and the number of products in iterations of feedback training on a block.

    Parameters
    ----------
    sigma : float
        σ of the noise.
    noises : int
        Number of noises that will be drawn.
    products : int
        Number of products x ⋆ d that `iterate` adds or subtracts.
    output_noise : bool
        Whether there is an η of s^{n+1}'s shape besides ε of s^n's.
    """

    sigma: float
    noises: int
    products: int
    output_noise: bool

    def kinds(self, s: Array, s_next: Array) -> Mapping[str, tuple[int, Array]]:
        """Return, by the name of each noise, its kind, which is part of its key, and an array of its shape."""
        return {"epsilon": (EPSILON, s)} | ({"eta": (ETA, s_next)} if self.output_noise else {})


class Samples(Protocol):
    """Some samples of block n in an iteration of feedback training, and the primitives of a rule's `iterate`.

    The caller may overwrite arrays that primitives return until it passes them to `transposed`, `add` or `subtract`; it
    must not overwrite other arrays.
    """

    @property
    def s(self) -> Array:
        """s^n, of shape (samples, *in_shape)."""

    @property
    def s_next(self) -> Array:
        """s^{n+1}, of shape (samples, *out_shape)."""

    @property
    def index(self) -> Array | None:
        """The maxima of its pool."""

    @property
    def a_next(self) -> Array:
        """a(s^{n+1}), of shape (samples, *pre_shape)."""

    def F(self, epsilon: Array) -> tuple[Array, Array | None]:
        """Return F^n(s^n + ε), of shape (samples, *out_shape), and the maxima of its pool."""

    def a(self, t: Array, index: Array | None) -> Array:
        """Return a(t) = f(unpool(t)), the input of G's affine map, of shape (samples, *pre_shape); t is overwritten."""

    def transposed(self, omega: Any, d: Array) -> Array:
        """Return ω ∘ d, the transposed affine map, of shape (samples, *in_shape), for d of shape (samples, *pre_shape).

        `omega` is the argument of `iterate`.
        """

    def add(self, x: Array, d: Array) -> None:
        """Add x ⋆ d, of ω's shape, to the sum over samples: the gradient of ω in ⟨x, ω ∘ d⟩."""

    def subtract(self, x: Array, d: Array) -> None:
        """Subtract x ⋆ d from the sum over samples."""

    def add_bias(self, r: Array) -> None:
        """Add r, of shape (samples, *in_shape), summed over samples and positions, to the sum for G's bias."""

    def square(self, r: Array) -> Array:
        """Return ‖r‖², of shape ()."""


Iterate = Callable[[Samples, Any, Array | None, Array, Array], Array]
"""(samples, ω, G's bias, ε, η) → array of shape (): one iteration of feedback training on some samples.

It adds each sample's contribution to the gradient sums, and returns a further term to be summed. η is ε if the rule has
no output noise.
"""


@dataclass(frozen=True)
class Sums:
    """The result of an iteration: 2/B times the sums for weight and bias (if any), 1/B times what `iterate` returned.

    The arrays are valid until the next iteration.
    """

    weight: Array
    bias: Array | None
    returned: Array


class Iterations(Protocol):
    """What all iterations on one block and batch share: θ ∘ s, a(s^{n+1}), the noise."""

    def noise(self, k: int) -> dict[str, Array]:
        """Return the k-th noise: `epsilon` of s^n's shape and, where asked for, `eta` of s^{n+1}'s."""

    def sums(self, iterate: Iterate, k: int, omega: Array, bias: Array | None = None) -> Sums:
        """Run an iteration with the k-th noise over all samples."""


class Engine(Protocol):
    """Computes the primitives, which `Batch` and `At` define."""

    backend: Backend

    def beside(self) -> "Engine":
        """Return an engine for one of several parts of a batch: on the same threads, with its own result arrays."""

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run tasks, several at a time."""

    def array(self, name: object, shape: Shape, dtype: Any) -> Array:
        """See `Batch.array`."""

    def product(self, a: Array, b: Array, out: Array) -> Array:
        """Write the matrix product a b to `out` and return it."""

    def in_slices(self, count: int, compute: Callable[[slice], None]) -> None:
        """See `Batch.in_slices`."""

    def between(self, work: Callable[[], object]) -> object:
        """Do work that involves all ranks, which a device's graph cannot capture (`arraytp.fast.graphs`)."""

    def noise(self, out: Array, sigma: float, first: int, *key: int) -> Array:
        """Fill an array with N(0, σ²) noise from sample `first` on and return it; see `arraytp.ops.noise.gaussian`."""

    def forward(self, network: Network, x: Array, name: str = "forward") -> ForwardPass:
        """Run the network on a batch; arrays of the result are valid until the next call with this name."""

    def backward(self, at: At, ds: Array, through: Through | None, scale: float | Array | None) -> Gradients:
        """See `At.backward`."""

    def carry(self, at: At, d: Array, inverse: PseudoInverse) -> Array:
        """See `At.carry`."""

    def feedback(self, at: At, omega: Array, bias: Array, t: Array, unpool: Unpool) -> Array:
        """See `At.feedback`."""

    def feedback_difference(self, at: At, omega: Array, delta: Array, unpool: Unpool) -> Array:
        """See `At.feedback_difference`."""

    def iterations(self, at: At, unpool: Unpool, training: NoiseAndProducts) -> Iterations:
        """See `At.iterations`."""

    def jacobian_overlap(self, at: At, unpool: Unpool) -> tuple[Array, Array]:
        """See `At.jacobian_overlap`."""

    def jacobian_sums(self, batch: Batch) -> Mapping[int, tuple[Array, Array]]:
        """See `Batch.jacobian_sums`."""

    def gauss_newton(self, batch: Batch, damping: float) -> Mapping[int, Array]:
        """See `Batch.gauss_newton`."""

    def gram_errors(self, network: Network) -> GramErrors:
        """See `Batch.gram_errors`."""

    def inverses(self, batch: Batch) -> Mapping[int, Factors]:
        """See `Batch.inverses`."""

    def pseudo_inverses(self, batch: Batch, ridge: float) -> Mapping[int, PseudoInverse]:
        """See `Batch.pseudo_inverses`."""

    def inverse(self, at: At, factors: Factors, y: Array) -> Array:
        """See `At.inverse`."""
