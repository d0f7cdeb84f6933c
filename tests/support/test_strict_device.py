"""The double must refuse what a device refuses; a lenient double proves nothing."""

import numpy as np
import pytest
import strict_device as xp
from strict_devicex.scipy.linalg import lu_factor

HOST = np.arange(6.0).reshape(2, 3)


@pytest.fixture
def x():
    return xp.asarray(HOST)


@pytest.mark.parametrize(
    "misuse",
    [
        np.asarray,
        np.array,
        np.exp,
        lambda x: np.add(x, x),
        lambda x: np.add(x, np.float64(1), out=np.zeros((2, 3))),
        lambda x: np.multiply(np.float64(2), x, out=(x,)),
        np.maximum.reduce,
        np.sum,
        lambda x: np.concatenate([x, x]),
        np.linalg.norm,
        lambda x: np.zeros((2, 3)).__setitem__(..., x),
        lambda x: np.zeros((2, 3)).__iadd__(x),
    ],
)
def test_numpy_cannot_be_called_on_a_device_array(x, misuse):
    with pytest.raises(TypeError):
        misuse(x)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda x: x + HOST,
        lambda x: HOST + x,
        lambda x: x * [1, 2, 3],
        lambda x: x @ HOST.T,
        lambda x: HOST.T @ x,
        lambda x: x == HOST,
        lambda x: x.__iadd__(HOST),
        lambda x: xp.maximum(x, HOST),
        lambda x: xp.maximum(x, x, out=np.zeros((2, 3))),
        lambda x: xp.matmul(x, HOST.T),
        lambda x: xp.matmul(x, x.T, out=np.zeros((2, 2))),
        lambda x: xp.where(HOST > 0, x, x),
        lambda x: xp.where(x > 0, x, HOST),
        lambda x: xp.stack([x, HOST]),
        lambda x: xp.take(x, np.array([0])),
        lambda x: xp.dot(x, HOST.T),
        lambda x: xp.copyto(x, HOST),
        lambda x: xp.copyto(x, x, where=HOST > 0),
        lambda x: xp.exp([1.0]),
        lambda x: xp.exp(HOST),
        lambda x: xp.asnumpy(HOST),
        lambda x: x.sum(axis=0, out=np.zeros(3)),
        lambda x: x[np.array([0])],
        lambda x: x[[0]],
        lambda x: x.__setitem__(0, HOST[0]),
        lambda x: x.__setitem__(np.array([0]), 1.0),
        lambda x: x.fill(HOST),
    ],
)
def test_host_arrays_and_lists_cannot_be_mixed_in(x, misuse):
    with pytest.raises(TypeError):
        misuse(x)
    np.testing.assert_array_equal(xp.asnumpy(x), HOST)


@pytest.mark.parametrize(
    ("misuse", "error"),
    [
        (lambda x: xp.exp(x, where=x > 0), TypeError),
        (lambda x: x.sum(where=x > 0), TypeError),
        (lambda x: xp.lib.stride_tricks.as_strided(x, (2,), (8,), writeable=False), TypeError),
        (lambda x: xp.lib.stride_tricks.as_strided(x, (2,), (8,)).fill(0), ValueError),
        (lambda x: x.flags.writeable, AttributeError),
        (lambda x: x.flat, AttributeError),
        (lambda x: x.tobytes(), AttributeError),
        (lambda x: xp.nditer([x]), AttributeError),
        (lambda x: xp.add.at(x, 0, 1), AttributeError),
        (bool, ValueError),
        (float, ValueError),
        (hash, TypeError),
        (memoryview, TypeError),
        (lambda x: xp.ndarray([1.0]), TypeError),
    ],
)
def test_what_is_not_listed_is_missing(x, misuse, error):
    with pytest.raises(error):
        misuse(x)


def test_reductions_and_elements_are_device_arrays_of_shape_nothing(x):
    for zero_dimensional in (x.sum(), x.max(), x[0, 1], (x > 0).any(), xp.linalg.norm(x), x[0, 1] + 1):
        assert isinstance(zero_dimensional, xp.ndarray)
        assert zero_dimensional.shape == ()


def test_elements_are_views(x):
    x[0, 1].fill(9)
    assert float(x[0, 1]) == 9


def test_transfers_copy(x):
    source = HOST.copy()
    there = xp.asarray(source)
    back = xp.asnumpy(there)
    source[...], back[...] = -1, -2
    np.testing.assert_array_equal(xp.asnumpy(there), HOST)


def test_explicit_conversions_work_and_are_counted(x):
    before = xp.reads.total()
    assert (float(x[0, 1]), int(x[0, 2]), bool(x[0, 0] > 0), x[1, 2].item()) == (1.0, 2, False, 5.0)
    assert xp.reads.total() == before + 4
    assert x[x > 2].shape == (3,)
    assert xp.reads.total() == before + 5


def test_what_comes_from_the_host_is_counted(x):
    before = xp.writes.total()
    there = xp.asarray(HOST)
    there.set(HOST)
    assert xp.writes.total() == before + 2
    xp.asarray(there)[...] = xp.full((2, 3), 1.5)
    assert xp.writes.total() == before + 2


def test_numbers_and_numpy_scalars_mix_without_changing_the_dtype():
    x = xp.asarray(np.ones(3, np.float32))
    for result in (x * 2, 2 * x, x * 2.5, np.float32(2) * x, x - np.float32(1), 1 - x):
        assert result.dtype == np.float32
    assert (np.float64(2) * x).dtype == np.float64


def test_a_range_casts_its_start_and_step_as_cupy_does():
    """NumPy casts only the numbers in the range, so that a step of -1 works for uint8."""
    np.testing.assert_array_equal(xp.asnumpy(xp.arange(3, dtype=xp.uint8)), np.arange(3))
    with pytest.raises(OverflowError):
        xp.arange(9, 0, -1, dtype=xp.uint8)


def test_a_singular_matrix_is_warned_of_as_by_cupy(x):
    with pytest.warns(RuntimeWarning, match="Diagonal number 2 is exactly zero"):
        lu_factor(xp.ones((2, 2)), check_finite=False)


def test_empty_memory_shows_when_it_is_read():
    assert bool(xp.isnan(xp.empty((2, 2), np.float32)).all())
    assert int(xp.empty(1, np.uint8)[0]) == 255


def test_results_equal_numpys(x):
    np.testing.assert_array_equal(xp.asnumpy((x[:, ::-1].T @ x + 1) / 2), (HOST[:, ::-1].T @ HOST + 1) / 2)
    np.testing.assert_array_equal(xp.asnumpy(x[xp.asarray([1, 0]), xp.asarray([2, 0])]), HOST[[1, 0], [2, 0]])
    out = xp.empty(2)
    assert x.sum(axis=1, out=out) is out
    np.testing.assert_array_equal(xp.asnumpy(out), HOST.sum(axis=1))
    xp.copyto(x, xp.zeros((2, 3)), where=x > 2)
    np.testing.assert_array_equal(xp.asnumpy(x), np.minimum(HOST, 2) * (HOST <= 2))
    assert float(xp.dot(x[0], x[0])) == 5
