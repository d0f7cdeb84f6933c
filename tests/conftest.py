"""Where tests compute: on NumPy, on NumPy with read-only arguments, on the strict device double, and on CuPy."""

import os
from dataclasses import dataclass

# Must be set before NumPy and SciPy load. On cores that are busy with other work, a QR on several threads takes twenty
# times as long, because the threads spin while they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
import strict_device
from hypothesis import settings

from arraytp.backend import NUMPY, Backend, array_module, get_backend
from arraytp.errors import UserError
from arraytp.ops.noise import gaussian

# CI draws the same examples every time: a new one that failed there would be due to chance, not to the change.
settings.register_profile("arraytp", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("arraytp")

STRICT = Backend("strict", strict_device)


@dataclass(frozen=True)
class Place:
    """A backend, and how a test hands arrays to it and reads them back."""

    name: str
    backend: Backend
    read_only: bool = False

    def put(self, array):
        """Return a copy of a host array as an argument of the code under test."""
        array = np.array(array)
        if self.read_only:
            array.flags.writeable = False
        return self.backend.asarray(array)

    def get(self, array):
        """Return an array of this place as a host array, after checking that it belongs here."""
        assert type(array).__module__.partition(".")[0] == self.backend.xp.__name__.partition(".")[0]
        return self.backend.to_host(array)


def _cupy():
    try:
        return Place("cupy", get_backend("cupy"))
    except UserError as error:
        pytest.skip(str(error))


_PLACES = {
    "numpy": lambda: Place("numpy", NUMPY),
    "read-only": lambda: Place("read-only", NUMPY, read_only=True),
    "strict": lambda: Place("strict", STRICT),
    "cupy": _cupy,
}


@pytest.fixture(scope="session", params=["numpy", "read-only", "strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def place(request):
    """Every place in turn."""
    return _PLACES[request.param]()


@pytest.fixture(scope="session", params=["numpy", "strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def computer(request):
    """Every backend, for tests that hand over no arrays, which read-only arguments would only repeat."""
    return _PLACES[request.param]()


@pytest.fixture(scope="session", params=["strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request):
    """Every place that is not the host."""
    return _PLACES[request.param]()


@pytest.fixture
def noise_of_the_host(monkeypatch):
    """Make feedback training on a device use the noise that it would draw on the host."""

    def uploaded(out, sigma, *key):
        key = [part if isinstance(part, int) else int(part[0]) for part in key]
        host = gaussian(np.empty(out.shape, out.dtype), sigma, *key)
        out[...] = array_module(out).asarray(host)
        return out

    for user in ("fast.feedback_training", "fast.device", "model.plain"):
        monkeypatch.setattr(f"arraytp.{user}.gaussian", uploaded)
