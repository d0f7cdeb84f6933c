"""A second opinion on learned feedback: the losses written with PyTorch's modules, their gradients by autograd."""

import numpy as np
import pytest
from feedback_blocks import iteration
from samples import batch, close, named_blocks, random_network, rng
from training import pass_of

torch = pytest.importorskip("torch")
functional = torch.nn.functional

SIGMA, KEY, COUNT = 0.3, {"seed": 7, "number": 3}, 3
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
    s = functional.elu(z) if block.activation.name == "elu" else z
    if block.pool is None:
        return s, None
    return functional.max_pool2d(s, block.pool.kernel, block.pool.stride, block.pool.top, return_indices=True)


def module(block, weight, bias, t, indices):
    """Return G(t): MaxUnpool2d, ELU, ConvTranspose2d or Linear."""
    if indices is not None:
        pool, size = block.pool, block.pre_shape[:2]
        # Channels first in memory, so that one thread writes a whole map: else it is undefined which window comes last.
        t, indices = t.contiguous(), indices.contiguous()
        t = functional.max_unpool2d(t, indices, pool.kernel, pool.stride, pool.top, output_size=size)
    a = functional.elu(t) if block.activation.name == "elu" else t
    if block.kind == "dense":
        return functional.linear(a, weight, bias)
    window = block.window
    kernel = weight.permute(3, 2, 0, 1)
    return functional.conv_transpose2d(a, kernel, bias, stride=window.stride, padding=window.top)


def case(rule, name, n):
    """Return block n, an iteration of a rule on it, and as tensors θ, ω with its bias, s^n and the noises."""
    blocks = named_blocks(name)
    network, (x, _) = random_network(blocks), batch(blocks, COUNT)
    at, block = pass_of(network, x, **KEY).at(n), blocks[n]
    omega = 0.1 * rng(1).standard_normal(block.weight_shape), 0.3 * rng(2).standard_normal(block.in_shape[-1])
    done = iteration(rule, at, omega, SIGMA)
    s = first(tensor(at.s.reshape(COUNT, *block.in_shape)))
    noises = {name: first(tensor(noise)) for name, noise in done.noises.items()}
    theta = tensor(network.weights[n]), tensor(network.biases[n])
    return block, done, theta, [tensor(part, grad=True) for part in omega], s, noises


BLOCKS = [(name, n) for name in NAMES for n in range(1, len(named_blocks(name)))]


@pytest.mark.parametrize(("name", "n"), BLOCKS)
def test_ldrls_gradient_matches_autograd(name, n):
    """When it unpools overlapping windows, PyTorch overwrites in row-major order, as the authors' code does."""
    block, done, theta, omega, s, noises = case("ldrl", name, n)
    epsilon, eta = noises["epsilon"], noises["eta"]
    clean, indices = block_of(block, *theta, s)
    noisy, noisy_indices = block_of(block, *theta, s + epsilon)
    r = module(block, *omega, clean, indices)
    r_epsilon = module(block, *omega, noisy, noisy_indices) - r
    r_eta = module(block, *omega, clean + eta, indices) - r
    wanted = (-2 * (epsilon * r_epsilon).sum() + (r_eta**2).sum()) / COUNT
    wanted.backward()
    assert float(done.loss) == pytest.approx(wanted.item(), rel=1e-10)
    close(done.gradients["weight"], omega[0].grad.numpy(), 1e-11)
    np.testing.assert_allclose(omega[1].grad.numpy(), 0, atol=1e-12)


@pytest.mark.parametrize(("name", "n"), BLOCKS)
def test_dtps_gradients_match_autograd(name, n):
    block, done, theta, omega, s, noises = case("dtp", name, n)
    epsilon = noises["epsilon"]
    noisy, indices = block_of(block, *theta, s + epsilon)
    wanted = ((module(block, *omega, noisy, indices) - s - epsilon) ** 2).sum() / COUNT
    wanted.backward()
    assert float(done.loss) == pytest.approx(wanted.item(), rel=1e-12)
    close(done.gradients["weight"], omega[0].grad.numpy(), 1e-11)
    close(done.gradients["bias"], omega[1].grad.numpy(), 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_drls_gradients_match_autograd(name):
    """PyTorch computes the logits from s^n + ε."""
    blocks = named_blocks(name)
    network, (x, _) = random_network(blocks), batch(blocks, COUNT)
    one = pass_of(network, x, **KEY)
    for n in range(1, len(blocks)):
        host = rng(n).standard_normal((one.logits.shape[1], one.at(n).s[0].size))
        done = iteration("drl", one.at(n), (host, None), SIGMA)
        s, epsilon, q = tensor(one.at(n).s), tensor(done.noises["epsilon"]), tensor(host, grad=True)

        def run_on(out, n=n):
            out = first(out)
            for block, w, b in zip(blocks[n:], network.weights[n:], network.biases[n:], strict=True):
                out = out.permute(0, 2, 3, 1) if out.ndim == 4 and block.kind == "dense" else out
                out, _ = block_of(block, tensor(w), tensor(b), out)
            return out

        r = (run_on(s + epsilon) @ q).reshape(s.shape) + s - (run_on(s) @ q).reshape(s.shape)
        wanted = ((r - s - epsilon) ** 2).mean() / SIGMA**2
        wanted.backward()
        assert float(done.loss) == pytest.approx(wanted.item(), rel=1e-11)
        close(done.gradients["weight"], q.grad.numpy(), 1e-10)
