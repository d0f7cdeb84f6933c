"""The state of a run in one HDF5 file: θ, the rule's arrays, the optimiser, the position. Written atomically.

attrs: format="arraytp-checkpoint", version=2
/network/<n>/{weight,bias}
/rule/…                             the rule's arrays by their names
/optimizer  attrs: step, feedback_step
/optimizer/<parameter>/<moment>
/run/state  JSON of the run's position and tables, as bytes
/run/owner  JSON of the run's config (as YAML text) and the digest of its data set, as bytes

All arrays, including those under /run, have Fletcher-32 checksums. HDF5's own structures, including attributes, have
the checksums of its v110 layout.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from arraytp.backend import Array
from arraytp.config import Config, dump_config, load_one
from arraytp.config.difference import FREE_IN_A_STUDY, FREE_ON_RESUME, config_of, first_difference
from arraytp.disk import refuse_special, telling_damage
from arraytp.errors import UserError
from arraytp.files import write_file
from arraytp.training.experiment import Experiment
from arraytp.training.plan import Plan

FORMAT, VERSION = "arraytp-checkpoint", 2
# Version 1 has the same layout, but numbers direct feedback weights (rules dfa, drl) from 0.
READABLE = (1, VERSION)


def write_checkpoint(path: Path, experiment: Experiment, run: Mapping[str, Any]) -> None:
    """Write a checkpoint with `write_file`; `run` is the rest of the state needed to resume, serialisable as JSON."""
    backend = experiment.plan.backend
    # Build the file in memory first: HDF5 can crash the process if it cannot write a file to its end.
    image = BytesIO()
    with h5py.File(image, "w", libver=("v110", "v110")) as file:
        # Variable-length text would be stored in a heap without a checksum; if that is damaged, HDF5 can loop forever.
        file.attrs["format"], file.attrs["version"] = np.bytes_(FORMAT), VERSION
        _put_json(file, "run/state", run)
        plan = experiment.plan
        _put_json(file, "run/owner", {"config": dump_config(experiment.config), "data": plan.dataset.digest})
        counts = file.create_group("optimizer").attrs
        counts["step"], counts["feedback_step"] = experiment.optimizer_state.step, experiment.feedback_step
        for name, array in _arrays(experiment).items():
            file.create_dataset(name, data=backend.to_host(array), fletcher32=True)
    write_file(path, image.getbuffer())


def read_checkpoint(path: Path, experiment: Experiment) -> dict[str, Any]:
    """Load a checkpoint's arrays into an experiment of the same config; return the `run` that was stored with them.

    Raises UserError if the file is missing or damaged, or if it belongs to another network or rule; in the
    latter case, the message names the array.
    """
    with _opened(path) as file:
        arrays = {name: _dataset(path, file, name, array) for name, array in _arrays(experiment).items()}
        step, feedback_step = (int(file["optimizer"].attrs[name]) for name in ("step", "feedback_step"))
        run: dict[str, Any] = _get_json(file, "run/state")
    for name, array in _arrays(experiment).items():
        array[...] = experiment.plan.backend.asarray(arrays[name])
    experiment.optimizer_state.step, experiment.feedback_step = step, feedback_step
    return run


def share_state(experiment: Experiment, run: Any) -> Any:
    """Broadcast the first rank's arrays and counts to all ranks; return its `run`."""
    if experiment.ranks.size == 1:
        return run
    backend, arrays = experiment.plan.backend, _arrays(experiment)
    values = [backend.to_host(array) for array in arrays.values()]
    counts = experiment.optimizer_state.step, experiment.feedback_step
    values, counts, run = experiment.ranks.broadcast((values, counts, run))
    experiment.optimizer_state.step, experiment.feedback_step = counts
    for array, value in zip(arrays.values(), values, strict=True):
        array[...] = backend.asarray(value)
    return run


def read_owner(folder: Path) -> tuple[Config, str]:
    """Return the config of a folder's results and the digest of their data, "" if it is not recorded.

    The checkpoint takes precedence over the config.yml beside it, which anyone may edit. Raises UserError as
    `read_checkpoint` does, and also for a config that this version of arraytp does not know.
    """
    path = folder / "checkpoint.h5"
    if path.exists():
        with _opened(path) as file:
            # Checkpoints of the first versions do not record their owner.
            if "run/owner" in file:
                owner = _get_json(file, "run/owner")
                return config_of(str(owner["config"]), f"{path}: its config"), str(owner["data"])
    try:
        return load_one(folder / "config.yml"), ""
    except UserError as error:
        first, remedy = str(error).splitlines()[0], "--fresh starts over, --out selects another folder"
        if any(folder.glob("seed-*/summary.json")):
            remedy = "delete it, and --resume goes on, since every finished seed of a study has its config"
        raise UserError(f"{first}; {remedy}") from error


def check_owner(folder: Path, plan: Plan) -> None:
    """Refuse to continue a run with another config or other data; data that have only moved count as the same.

    The UserError names the first key that differs and both values.
    """
    stored, digest = read_owner(folder)
    free = FREE_ON_RESUME if plan.config.study is None else FREE_IN_A_STUDY
    difference = first_difference(stored, plan.config, (*free, *(["data.dataset"] if digest else [])))
    if not difference and digest not in ("", plan.dataset.digest):
        difference = (
            f"data.dataset {stored.data.dataset} held other images or labels there than {plan.config.data.dataset} here"
        )
    if difference:
        raise UserError(
            f"{folder}: holds a run of another config ({difference}); --fresh starts over, --out selects another folder"
        )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open a checkpoint for reading; messages suggest starting over for damage, not for operating-system errors."""
    refuse_special(path)
    if not path.exists():
        raise UserError(f"{path}: there is no checkpoint to continue from; --fresh starts over")
    fresh = "the checkpoint is damaged ({}); --fresh starts over"
    # Files are only ever replaced as a whole, so no lock is needed, and network file systems often have none.
    with telling_damage(path, "the checkpoint cannot be read: {}", fresh), h5py.File(path, locking=False) as file:
        if file.attrs.get("version") not in READABLE:
            raise UserError(f"{path}: not a checkpoint of this version ({FORMAT} {VERSION}); --fresh starts over")
        if file.attrs["version"] == 1 and "rule/feedback/0" in file:
            raise UserError(
                f"{path}: is of version 1, in which the feedback of rules dfa and drl has other numbers; --fresh "
                "starts over"
            )
        yield file


def _put_json(file: h5py.File, name: str, content: Any) -> None:
    file.create_dataset(name, data=np.frombuffer(json.dumps(content).encode(), np.uint8), fletcher32=True)


def _get_json(file: h5py.File, name: str) -> Any:
    return json.loads(bytes(file[name][()]))


def _arrays(experiment: Experiment) -> dict[str, Array]:
    """Return every array of the state by its name in the file."""
    named = experiment.network.named("network")
    for name, array in experiment.rule_state.named().items():
        named[f"rule/{name}"] = array
    for p, moments in enumerate(experiment.optimizer_state.moments):
        for i, moment in enumerate(moments):
            named[f"optimizer/{p}/{i}"] = moment
    return named


def _dataset(path: Path, file: h5py.File, name: str, like: Array) -> np.ndarray[Any, Any]:
    if name not in file:
        raise UserError(f"{path}: has no array {name}; it belongs to another network or rule, --fresh starts over")
    array = np.asarray(file[name][()])
    if array.shape != like.shape or array.dtype != like.dtype:
        raise UserError(
            f"{path}: array {name} is {array.dtype}{list(array.shape)}, expected {like.dtype}{list(like.shape)}; "
            "it belongs to another network or rule, --fresh starts over"
        )
    return array
