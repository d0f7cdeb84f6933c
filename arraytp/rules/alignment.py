"""Alignment losses: FA in which B^n descends a local regulariser R, a sum of named primitives.

    decay  ½‖B‖²                           amp   −tr(x B yᵀ) / rows
    self   −tr(Bᵀ W)                       null  ½‖y Bᵀ‖² / rows

    wm (weight mirror)            R = α amp + β decay
    ia (information alignment)    R = α amp + β decay + γ null
    sa (symmetric alignment)      R = α self + β decay

For every block n = 1 … N−1, x = s^n of the batch and y = f(xW + b), without the pool. `rows` counts the rows of x's
patch matrix, so amp and null are means over samples and positions. B is trained like all learned feedback, by
`arraytp.rules.feedback.train`, K_n steps on every batch before the updates; σ is unused. SA's fixed point is
B = (α/β) W. The rest is FA.
Source: Kunin et al. (2020).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arraytp.backend import Array, array_module
from arraytp.model.blocks import Network
from arraytp.model.passes import At
from arraytp.options import SGD, FeedbackTraining, InitName, NonNegative
from arraytp.rules import weight_mirror
from arraytp.rules.feedback import feedback_products
from arraytp.rules.protocol import Feedback, Iterating, Iteration, Rule, State
from arraytp.rules.weight_mirror import inner, rows

Primitive = Literal["decay", "self", "amp", "null"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The sum of primitives and its coefficients, and how B^n is initialised and trained."""

    name: Literal["alignment"] = "alignment"
    loss: Literal["wm", "ia", "sa"] = "sa"
    alpha: NonNegative = 1.0
    beta: NonNegative = 1.0
    gamma: NonNegative = 0.1
    feedback_init: InitName = "orthogonal"
    feedback: FeedbackTraining = field(default_factory=lambda: FeedbackTraining(iterations=1, optimizer=SGD(lr=0.01)))


def coefficients(options: Options) -> Mapping[Primitive, float]:
    """Return the coefficients of the sum by primitive."""
    if options.loss == "sa":
        return {"self": options.alpha, "decay": options.beta}
    null: dict[Primitive, float] = {"null": options.gamma} if options.loss == "ia" else {}
    return {"amp": options.alpha, "decay": options.beta, **null}


def begin(options: Options, at: At, sigma: float, noises: int) -> Iterating:
    """Return the iteration: it computes R and ∂R/∂B from x and y, which stay the same on a batch."""
    weights, y = coefficients(options), None
    if options.loss != "sa":
        y = at.alone(at.s)

    def iterate(state: State, k: int, with_loss: bool) -> Iteration:
        B = state.weights[at.n]
        loss, gradient = None, at.batch.array("gradient", B.shape)
        gradient[...] = 0
        for name, weight in weights.items():
            # A form of degree d in B has the value ⟨B, gradient⟩ / d.
            degree, part = PRIMITIVES[name](at, B, y)
            # Gradients are summed over ranks: a term that is not a sum over samples is weighted by this rank's share.
            part *= part.dtype.type(weight if name in OF_SAMPLES else weight * at.batch.share)
            if with_loss:
                value = inner(at, B, part) / part.dtype.type(degree)
                loss = value if loss is None else loss + value
            gradient += part
        return Iteration({"weight": gradient}, loss)

    return iterate


def decay(at: At, B: Array, y: Array | None) -> tuple[int, Array]:
    """Return degree and gradient of ½‖B‖²: 2 and B."""
    return 2, _copied(at, B)


def self_(at: At, B: Array, y: Array | None) -> tuple[int, Array]:
    """Return degree and gradient of −tr(BᵀW): 1 and −W."""
    return 1, array_module(B).negative(at.weight, out=at.batch.array("part", B.shape))


def amp(at: At, B: Array, y: Array | None) -> tuple[int, Array]:
    """Return degree and gradient of −tr(x B yᵀ) / rows: 1 and −xᵀy / rows."""
    assert y is not None
    xy, _ = at.outer(at.s, y, "amp")
    xy *= xy.dtype.type(-1 / rows(at))
    return 1, xy


def null(at: At, B: Array, y: Array | None) -> tuple[int, Array]:
    """Return degree and gradient of ½‖yBᵀ‖² / rows: 2 and (yBᵀ)ᵀ y / rows."""
    assert y is not None
    _, back = at.outer(at.s, y, "null", B)
    assert back is not None
    part, _ = at.outer(back, y, "null twice")
    part *= part.dtype.type(1 / rows(at))
    return 2, part


OF_SAMPLES = ("amp", "null")
PRIMITIVES = {"decay": decay, "self": self_, "amp": amp, "null": null}
"""By name: (at, B, y) → degree in B and gradient, which the caller may overwrite."""


def _copied(at: At, array: Array) -> Array:
    copy = at.batch.array("part", array.shape)
    copy[...] = array
    return copy


def feedback_flops(options: Options, network: Network) -> int:
    """Return the FLOPs of the products in feedback training for one sample: y once, xᵀy and null per iteration."""
    products = {"sa": 0, "wm": 1, "ia": 4}[options.loss]
    return feedback_products(options.feedback, network, products) if products else 0


RULE: Rule[Any] = replace(
    weight_mirror.RULE,
    options=Options,
    feedback=Feedback(begin=begin, flops=feedback_flops),
)
