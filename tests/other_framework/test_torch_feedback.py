"""A second opinion on learned feedback: the losses written with PyTorch's modules, their gradients by autograd."""

import numpy as np
import pytest
from samples import batch, close, named_blocks, random_network, rng

from arraytp.backend import NUMPY
from arraytp.fast.feedback_training import freeze, ldrl_gradient, reconstruction_gradient
from arraytp.fast.parallel import Workspace
from arraytp.fast.passes import forward
from arraytp.ops.noise import gaussian
from arraytp.options import SGD, FeedbackTraining
from arraytp.rules import drl

torch = pytest.importorskip("torch")
functional = torch.nn.functional

SIGMA, KEY, COUNT = 0.3, (7, 3), 3
NAMES = ("lenet", "vgg")


def tensor(array, grad=False):
    return torch.tensor(np.ascontiguousarray(array), requires_grad=grad)


def first(array):
    """Channels first, for images."""
    return array.permute(0, 3, 1, 2) if array.ndim == 4 else array


def block_of(block, weight, bias, x):
    """Return F(x) and the indices of MaxPool2d."""
    if block.kind == "dense":
        z = functional.linear(x.flatten(1), weight.T, bias)
    else:
        z = functional.conv2d(x, weight.permute(3, 2, 0, 1), bias, stride=block.window.stride, padding=block.window.top)
    s = functional.elu(z) if block.activation == "elu" else z
    if block.pool is None:
        return s, None
    return functional.max_pool2d(s, block.pool.kernel, block.pool.stride, block.pool.top, return_indices=True)


def module(block, weight, bias, t, indices):
    """Return G(t): MaxUnpool2d, ELU, ConvTranspose2d or Linear."""
    if indices is not None:
        pool, size = block.pool, block.pre_shape[:2]
        # Channels first in memory, where one thread writes a whole map: else the winner of a pixel is a matter of luck.
        t, indices = t.contiguous(), indices.contiguous()
        t = functional.max_unpool2d(t, indices, pool.kernel, pool.stride, pool.top, output_size=size)
    a = functional.elu(t) if block.activation == "elu" else t
    if block.kind == "dense":
        return functional.linear(a, weight, bias)
    window = block.window
    kernel = weight.permute(3, 2, 0, 1)
    return functional.conv_transpose2d(a, kernel, bias, stride=window.stride, padding=window.top)


def case(name, n):
    """Return what both sides need of block n."""
    blocks = named_blocks(name)
    network, (x, _) = random_network(blocks), batch(blocks, COUNT)
    workspace = Workspace(threads=2)
    passed, block = forward(network, x, workspace), blocks[n]
    omega = 0.1 * rng(1).standard_normal(block.weight_shape), 0.3 * rng(2).standard_normal(block.in_shape[-1])
    s = passed.x[n].reshape(COUNT, *block.in_shape)
    shapes = s.shape, passed.s[n + 1].shape
    epsilon, eta = (gaussian(np.empty(shape), SIGMA, 0, *KEY, n, 0, kind) for kind, shape in enumerate(shapes))
    frozen = freeze(network, passed, n, "overwrite", SIGMA, KEY, 1, workspace)
    theta = tensor(network.weights[n]), tensor(network.biases[n])
    there = [tensor(part, grad=True) for part in omega]
    return block, frozen, workspace, omega, theta, there, *(first(tensor(a)) for a in (s, epsilon, eta))


BLOCKS = [(name, n) for name in NAMES for n in range(1, len(named_blocks(name)))]


@pytest.mark.parametrize(("name", "n"), BLOCKS)
def test_ldrls_gradient_is_autograds(name, n):
    """Unpooling overlapping windows, PyTorch overwrites in row-major order as the authors' code does."""
    block, frozen, workspace, omega, theta, there, s, epsilon, eta = case(name, n)
    clean, indices = block_of(block, *theta, s)
    noisy, noisy_indices = block_of(block, *theta, s + epsilon)
    r = module(block, *there, clean, indices)
    r_epsilon = module(block, *there, noisy, noisy_indices) - r
    r_eta = module(block, *there, clean + eta, indices) - r
    wanted = (-2 * (epsilon * r_epsilon).sum() + (r_eta**2).sum()) / COUNT
    wanted.backward()
    gradient, loss = ldrl_gradient(frozen, omega[0], 0, workspace)
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-10)
    close(gradient, there[0].grad.numpy(), 1e-11)
    np.testing.assert_allclose(there[1].grad.numpy(), 0, atol=1e-12)


@pytest.mark.parametrize(("name", "n"), BLOCKS)
def test_dtps_gradients_are_autograds(name, n):
    block, frozen, workspace, omega, theta, there, s, epsilon, _ = case(name, n)
    noisy, indices = block_of(block, *theta, s + epsilon)
    wanted = ((module(block, *there, noisy, indices) - s - epsilon) ** 2).sum() / COUNT
    wanted.backward()
    dweight, dbias, loss = reconstruction_gradient(frozen, *omega, 0, workspace)
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-12)
    close(dweight, there[0].grad.numpy(), 1e-11)
    close(dbias, there[1].grad.numpy(), 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_drls_gradients_are_autograds(name):
    """One step of plain SGD with rate 1 moves Q by its gradient; the network is run on from s + ε by PyTorch."""
    blocks = named_blocks(name)
    network, (x, _) = random_network(blocks), batch(blocks, COUNT)
    workspace = Workspace(threads=2)
    options = drl.Options(feedback=FeedbackTraining(iterations=1, sigma=SIGMA, optimizer=SGD(lr=1.0)))
    passed = forward(network, x, workspace)
    state = drl.init_state(options, network, 0, NUMPY)
    before = {key: array.copy() for key, array in state.items()}
    losses = drl.train_feedback(options, state, network, passed, *KEY, workspace)
    for n in range(len(blocks) - 1):
        s = tensor(passed.s[n + 1])
        epsilon = tensor(gaussian(np.empty(s.shape), SIGMA, 0, *KEY, n, 0, 0))
        q = tensor(before[f"feedback/{n}/weight"], grad=True)

        def run_on(out, n=n):
            out = first(out)
            for block, w, b in zip(blocks[n + 1 :], network.weights[n + 1 :], network.biases[n + 1 :], strict=True):
                out = out.permute(0, 2, 3, 1) if out.ndim == 4 and block.kind == "dense" else out
                out, _ = block_of(block, tensor(w), tensor(b), out)
            return out

        r = (run_on(s + epsilon) @ q).reshape(s.shape) + s - (run_on(s) @ q).reshape(s.shape)
        wanted = ((r - s - epsilon) ** 2).mean() / SIGMA**2
        wanted.backward()
        assert float(losses[n]) == pytest.approx(wanted.item(), rel=1e-11)
        close(before[f"feedback/{n}/weight"] - state[f"feedback/{n}/weight"], q.grad.numpy(), 1e-10)
