"""Every number of one training step in one HDF5 file; docs/trace.md has the layout.

Arrays are written as they are computed, so that memory holds one step's buffers and no more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from arraytp.backend import Array, Backend
from arraytp.config import dump_config
from arraytp.disk import real, refuse_special, system_words, telling_damage
from arraytp.errors import Interrupted, UserError
from arraytp.files import check_output, replacing
from arraytp.model.plain import block_forward, pad_auxiliary
from arraytp.ops.noise import EPSILON, ETA
from arraytp.rules.protocol import Updates
from arraytp.signals import StopRequest
from arraytp.training import checkpoint
from arraytp.training.compare import angle_degrees, relative_distance
from arraytp.training.experiment import Experiment
from arraytp.training.step import Step

FORMAT, VERSION = "arraytp-trace", 2
# The noises of an iteration, and the last number of their keys.
NOISES = {"epsilon": EPSILON, "eta": ETA}


@dataclass
class Sink:
    """An open trace file; `not_finite` names the first array with NaN or infinity in it, or is ""."""

    file: h5py.File
    backend: Backend
    stop: StopRequest
    not_finite: str = field(default="")

    def put(self, name: str, array: Array) -> None:
        """Write an array of the backend, or a number; Interrupted if a stop was requested."""
        if self.stop.requested:
            raise Interrupted("arraytp: interrupted; no trace is written", self.stop.signal)
        values = self.backend.to_host(self.backend.xp.asarray(array))
        if not self.not_finite and not np.isfinite(values).all():
            self.not_finite = name
        self.file.create_dataset(name, data=values)

    def describe(self, group: str, attributes: Mapping[str, Any]) -> None:
        """Set attributes of a group, creating it if needed."""
        self.file.require_group(group).attrs.update(attributes)


def write_trace(
    path: Path,
    experiment: Experiment,
    images: Array,
    labels: Array,
    noise: bool = True,
    stop: StopRequest | None = None,
) -> str:
    """Train on one batch and write every number of it; an existing file is replaced when the new one is complete.

    The experiment must be in its initial state, apart from its weights, and has done one step afterwards. Images are
    (B, H, W, C) or (B, D) of the config's dtype, labels (B,) int64. Without `noise`, only the keys of the noises of
    feedback training are written. `stop` is checked before each array.

    Returns the name of the first array with NaN or infinity in it, or "". Raises NonFiniteError if the rule cannot go
    on, Interrupted if a stop was requested, and OSError if the file cannot be written; in each case no new file is
    left, and an existing one stays as it was.
    """
    # Through a Python file: HDF5's own can crash the process when the disk is full.
    with replacing(real(path)) as raw, h5py.File(raw, "w") as file:
        sink = Sink(file, experiment.plan.backend, stop or StopRequest())
        with experiment.steady():
            _step(sink, experiment, images, labels, noise)
    return sink.not_finite


def _step(sink: Sink, experiment: Experiment, images: Array, labels: Array, noise: bool) -> None:
    config = experiment.config
    sink.describe(
        "/",
        {
            "format": FORMAT,
            "version": VERSION,
            "config": dump_config(config),
            "rule": config.rule.name,
            "dtype": config.dtype,
            "backend": config.backend,
            "seed": config.seed,
        },
    )
    sink.put("input/x", images)
    sink.put("input/y", labels)
    _put_weights(sink, "weights", experiment)
    step = experiment.forward(images, labels)
    _put_activations(sink, step)
    sink.describe("activations", {"loss": float(step.score.loss)})
    trained = experiment.rule.feedback
    put = None
    if trained is not None:
        put = partial(_put_iteration, sink, experiment.feedback_step, trained.noise_key, noise)
    experiment.train_feedback(step, observe=put)
    _put_targets(sink, experiment, step)
    experiment.apply(step, _put_updates(sink, experiment, step))
    _put_weights(sink, "weights_after", experiment)


def _put_weights(sink: Sink, group: str, experiment: Experiment) -> None:
    for name, array in _weights(experiment).items():
        sink.put(f"{group}/{name}", array)


def _weights(experiment: Experiment) -> dict[str, Array]:
    """Return θ and the rule's feedback weights by their names within a group of weights."""
    return experiment.network.named("forward") | experiment.rule_state.parameters()


def _put_activations(sink: Sink, step: Step) -> None:
    for at in reversed(list(step.batch.down())):
        # The fast forward pass does not store z.
        z, *_ = block_forward(at.block, at.weight, at.bias, at.s)
        sink.put(f"activations/{at.n}/pre", z)
        sink.put(f"activations/{at.n}/out", at.output)


def _put_iteration(
    sink: Sink, step: int, key: Callable[[int], int], noise: bool, n: int, k: int, arrays: Mapping[str, Array]
) -> None:
    group = f"feedback_training/{n}/{k}"
    for name, array in arrays.items():
        if name in NOISES:
            sink.describe(group, {f"{name}_key": (step, key(n), k, NOISES[name])})
        if noise or name not in NOISES:
            sink.put(f"{group}/{name}", array)


def _put_targets(sink: Sink, experiment: Experiment, step: Step) -> None:
    """Write the rule's targets, if it has any; auxiliary units have t = s."""
    for at, target in zip(step.batch.down(), experiment.targets(step), strict=False):
        s, t = at.s_next, at.output.copy()
        delta = target.delta.reshape(s.shape)
        t[..., : s.shape[-1]] = s + delta if target.t is None else target.t.reshape(s.shape)
        sink.put(f"targets/{at.n}/target", t)
        sink.put(f"targets/{at.n}/delta", pad_auxiliary(at.block, delta))
        if target.m is not None:
            sink.put(f"targets/{at.n}/scale", target.m)


def _put_updates(sink: Sink, experiment: Experiment, step: Step) -> Updates:
    """Write the updates at the training β, BP's, and the angle and distance between them; return the former."""
    updates = experiment.updates(step)
    # The rule alignment has a beta, too, which scales a primitive.
    beta = getattr(experiment.config.rule, "beta", None) if experiment.rule.targets is not None else None
    sink.describe("updates", {} if beta is None else {"beta": beta})
    for n, (own, exact) in enumerate(zip(updates, experiment.exact_updates(step), strict=True)):
        for part, update, gradient in zip(("weight", "bias"), own, exact, strict=True):
            sink.put(f"updates/forward/{n}/{part}", update)
            sink.put(f"bp/{n}/{part}", gradient)
        angle, distance = angle_degrees(own[0], exact[0]), relative_distance(own[0], exact[0])
        sink.describe(f"updates/forward/{n}", {"angle_deg": angle, "distance": distance})
    return updates


def check_replaceable(path: Path) -> None:
    """Refuse a path in a missing folder, or of an existing file that is not a trace."""
    check_output(
        "--out", path, "trace.h5", lambda: path.is_file() and _is_trace(path), "a trace; only traces are overwritten"
    )


def _is_trace(path: Path) -> bool:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return isinstance(said := file.attrs.get("format"), str) and said == FORMAT
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if words := system_words(error):
            raise UserError(f"--out {path}: exists and cannot be read: {words}") from error
        return False


def read_weights(path: Path, experiment: Experiment) -> None:
    """Load the weights of a checkpoint, or those under `weights` of a trace or a file laid out like one.

    Raises UserError if the file cannot be read or has more blocks, or if an array is missing or of another shape or
    dtype; in the latter case, the message names the array and what is needed.
    """
    named = _weights(experiment)
    groups = _weight_groups(path)
    _refuse_more_blocks(path, groups.values(), experiment)
    arrays = {}
    for name, array in named.items():
        kind, _, rest = name.partition("/")
        arrays[name] = _read(path, f"{groups[kind]}/{rest}", array.shape, str(array.dtype))
    for name, array in named.items():
        array[...] = experiment.plan.backend.asarray(arrays[name])


def _weight_groups(path: Path) -> dict[str, str]:
    """Return the groups of a file that hold θ and the rule's feedback weights."""
    with _readable(path) as file:
        if file.attrs.get("format") == np.bytes_(checkpoint.FORMAT):
            return {"forward": "network", "feedback": "rule/feedback"}
    return {"forward": "weights/forward", "feedback": "weights/feedback"}


def _refuse_more_blocks(path: Path, groups: Iterable[str], experiment: Experiment) -> None:
    """Refuse weights of a network with more blocks: its first blocks alone are another network."""
    blocks = experiment.network.blocks
    with _readable(path) as file:
        for group in groups:
            for n in sorted(file.get(group, {}), key=lambda name: (len(name), name)):
                if n.isdecimal() and int(n) >= len(blocks):
                    raise UserError(
                        f"{path}: has {group}/{n}, but this config's network has the {len(blocks)} blocks 0 to "
                        f"{len(blocks) - 1}; give weights of the same network"
                    )


def read_batch(path: Path, experiment: Experiment) -> tuple[Array, Array]:
    """Return images and labels under `input` of a trace, or of a file laid out like one; errors as `read_weights`."""
    plan = experiment.plan
    shape = plan.dataset.shape
    flat = plan.blocks[0].in_shape
    images = _read(path, "input/x", None, experiment.config.dtype)
    if images.size == 0 or images.shape[1:] not in (shape, flat):
        also = "" if flat == shape else f" or [B, {flat[0]}]"
        needed = f"[B, {', '.join(map(str, shape))}]{also}, B at least 1"
        raise UserError(f"{path}: input/x is {list(images.shape)}; this config needs {needed}")
    labels = _read(path, "input/y", images.shape[:1], "int64")
    classes = len(plan.dataset.classes)
    if labels.min() < 0 or labels.max() >= classes:
        wrong = next(label for label in labels.tolist() if not 0 <= label < classes)
        raise UserError(f"{path}: input/y holds {wrong}; needs labels from 0 to {classes - 1}")
    return plan.backend.asarray(images), plan.backend.asarray(labels)


def _read(path: Path, name: str, shape: tuple[int, ...] | None, dtype: str) -> np.ndarray[Any, Any]:
    """Return one array of a file; UserError unless it has the dtype and, if given, the shape."""
    with _readable(path) as file:
        item = file.get(name)
        array = np.asarray(item[()]) if isinstance(item, h5py.Dataset) else None
    needed = dtype + ("" if shape is None else f"{list(shape)}")
    if array is None:
        raise UserError(f"{path}: has no array {name}, needed as {needed}")
    if array.dtype != dtype or shape not in (None, array.shape):
        raise UserError(f"{path}: {name} is {array.dtype}{list(array.shape)}; this config needs {needed}")
    return array


@contextmanager
def _readable(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; errors of reading it become UserErrors."""
    refuse_special(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    damaged = telling_damage(path, "cannot be read: {}", "cannot be read as HDF5: {}")
    with damaged, h5py.File(path, "r", locking=False) as file:
        yield file
