"""The state of a run in one HDF5 file: θ, the rule's arrays, the optimiser, the position. Written atomically.

attrs: format="arraytp-checkpoint", version=1
/network/<n>/{weight,bias}
/rule/…                             the rule's arrays by their names
/optimizer  attrs: step, feedback_step
/optimizer/<parameter>/<moment>
/run/state  JSON of the run's position and tables, as bytes

All arrays, /run/state too, have checksums (Fletcher-32), and HDF5's own structures, attributes among them, have others
(its v110 layout).
"""

import json
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from arraytp.backend import Array
from arraytp.errors import UserError
from arraytp.files import write_file
from arraytp.training.experiment import Experiment

FORMAT, VERSION = "arraytp-checkpoint", 1


def write_checkpoint(path: Path, experiment: Experiment, run: Mapping[str, Any]) -> None:
    """Write a checkpoint as `write_file` does.

    Parameters
    ----------
    path : Path
    experiment : Experiment
    run : mapping
        What else is needed to go on, as JSON can hold it (floats exactly).

    Raises
    ------
    OSError
        If the disk is full, say; the former checkpoint is still there.
    """
    backend = experiment.plan.backend
    # In memory first: HDF5 takes the process with it when it cannot write a file to its end.
    image = BytesIO()
    with h5py.File(image, "w", libver=("v110", "v110")) as file:
        # Text of variable length would lie in a heap without a checksum, over whose damage HDF5 can loop for ever.
        file.attrs["format"], file.attrs["version"] = np.bytes_(FORMAT), VERSION
        state = np.frombuffer(json.dumps(run).encode(), np.uint8)
        file.create_dataset("run/state", data=state, fletcher32=True)
        counts = file.create_group("optimizer").attrs
        counts["step"], counts["feedback_step"] = experiment.optimizer_state.step, experiment.feedback_step
        for name, array in _arrays(experiment).items():
            file.create_dataset(name, data=backend.to_host(array), fletcher32=True)
    write_file(path, image.getbuffer())


def read_checkpoint(path: Path, experiment: Experiment) -> dict[str, Any]:
    """Put a checkpoint's arrays into an experiment of the same config; return what was given as `run`.

    Raises
    ------
    UserError
        If the file is missing, damaged, or of another network or rule; names the array.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("version") != VERSION:
                raise UserError(f"{path}: not a checkpoint of this version ({FORMAT} {VERSION}); --fresh starts over")
            found = {name: _dataset(path, file, name, array) for name, array in _arrays(experiment).items()}
            step, feedback_step = (int(file["optimizer"].attrs[name]) for name in ("step", "feedback_step"))
            run: dict[str, Any] = json.loads(bytes(file["run/state"][()]))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no checkpoint to go on from; --fresh starts over") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: the checkpoint cannot be read: {os.strerror(error.errno or 0)}") from error
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{path}: the checkpoint is damaged ({text}); --fresh starts over") from error
    for name, array in _arrays(experiment).items():
        array[...] = experiment.plan.backend.asarray(found[name])
    experiment.optimizer_state.step, experiment.feedback_step = step, feedback_step
    return run


def _arrays(experiment: Experiment) -> dict[str, Array]:
    """Return every array of the state by its name in the file."""
    network = experiment.network
    named: dict[str, Array] = {}
    for n, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        named[f"network/{n}/weight"], named[f"network/{n}/bias"] = weight, bias
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
