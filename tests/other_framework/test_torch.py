"""A second opinion: PyTorch's autograd, loss, optimisers, pooling and initialisation, in float64."""

import math

import numpy as np
import pytest
from samples import ACTIVATIONS, NAMED, apart, batch, close, named_blocks, random_network, rng
from training import trainer

from arraytp.backend import NUMPY
from arraytp.fast.parallel import Workspace
from arraytp.model.initialise import initial_bias, initial_weight
from arraytp.ops.activations import ACTIVATIONS as VALUES
from arraytp.ops.loss import LOSSES, cross_entropy_backward, cross_entropy_forward
from arraytp.ops.patches import make_window
from arraytp.ops.pool import max_pool_backward, max_pool_forward
from arraytp.optim import apply_updates, init_optimizer, learning_rate
from arraytp.options import SGD, Adam, Cosine, Staircase

torch = pytest.importorskip("torch")
functional = torch.nn.functional

ACTIVATION = {
    "linear": lambda z: z,
    "leaky-relu": lambda z: functional.leaky_relu(z, 0.1),
    "elu": functional.elu,
    "relu": functional.relu,
    "tanh": torch.tanh,
}


def tensor(array, grad=False):
    return torch.tensor(np.ascontiguousarray(array), requires_grad=grad)


def as_torch_weight(block, weight):
    """(k, k, C, O) → (O, C, k, k); (in, out) → (out, in)."""
    return weight.permute(3, 2, 0, 1) if block.kind == "conv" else weight.T


def torch_logits(network, weights, biases, x):
    """Run the network channels first; a dense layer after an image flattens it channels last, as arraytp does."""
    out = tensor(x)
    out = out.permute(0, 3, 1, 2) if out.ndim == 4 else out
    for block, weight, bias in zip(network.blocks, weights, biases, strict=True):
        if block.kind == "conv":
            window = block.window
            out = functional.pad(out, (window.left, window.right, window.top, window.bottom))
            out = functional.conv2d(out, as_torch_weight(block, weight), bias, stride=window.stride)
        else:
            out = out.permute(0, 2, 3, 1).flatten(1) if out.ndim == 4 else out
            out = functional.linear(out, as_torch_weight(block, weight), bias)
        out = ACTIVATION[block.activation.name](out)
        if block.pool is not None:
            out = functional.max_pool2d(out, block.pool.kernel, block.pool.stride, block.pool.top)
    return out


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMED)
def test_bps_updates_match_autograd(name, reduction):
    blocks = named_blocks(name)
    network, (x, labels) = random_network(blocks), batch(blocks, 3)
    loss, updates = trainer(network, "bp", SGD(lr=1), NUMPY, 2).propose(x, labels, reduction)
    weights = [tensor(w, grad=True) for w in network.weights]
    biases = [tensor(b, grad=True) for b in network.biases]
    wanted = functional.cross_entropy(torch_logits(network, weights, biases, x), tensor(labels), reduction=reduction)
    wanted.backward()
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-12)
    for (dweight, dbias), weight, bias in zip(updates, weights, biases, strict=True):
        close(dweight, weight.grad.numpy(), 1e-11)
        close(dbias, bias.grad.numpy(), 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_matches_torchs(reduction):
    logits, labels = 30 * rng(1).standard_normal((9, 7)), rng(2).integers(0, 7, 9)
    loss, cache = cross_entropy_forward(logits, labels, reduction)
    there = tensor(logits, grad=True)
    wanted = functional.cross_entropy(there, tensor(labels), reduction=reduction)
    wanted.backward()
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-13)
    np.testing.assert_allclose(cross_entropy_backward(cache, reduction), there.grad.numpy(), rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_matches_torchs(name, reduction, smoothing):
    """PyTorch's mean squared error also averages over the classes, and lacks the factor ½."""
    logits, labels = 3 * rng(1).standard_normal((9, 7)), rng(2).integers(0, 7, 9)
    forward, backward = LOSSES[name]
    loss, cache = forward(logits, labels, reduction, smoothing)
    there = tensor(logits, grad=True)
    if name == "mse":
        y = (1 - smoothing) * functional.one_hot(tensor(labels), 7).double() + smoothing / 7
        wanted = functional.mse_loss(there, y, reduction=reduction) * (7 / 2 if reduction == "mean" else 1 / 2)
    else:
        wanted = functional.cross_entropy(there, tensor(labels), reduction=reduction, label_smoothing=smoothing)
    wanted.backward()
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-13)
    np.testing.assert_allclose(backward(cache, reduction), there.grad.numpy(), rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_match_torchs(name):
    z, ds = 3 * apart((6, 5), 1), rng(2).standard_normal((6, 5))
    there = tensor(z, grad=True)
    wanted = ACTIVATION[name](there)
    wanted.backward(tensor(ds))
    s = VALUES[name](z)
    np.testing.assert_allclose(s, wanted.detach().numpy(), rtol=1e-14)
    np.testing.assert_allclose(VALUES[name].backward(ds, s), there.grad.numpy(), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 1), (4, 2, 2)])
def test_pooling_breaks_ties_and_pads_as_torch_does(kernel, stride, padding):
    """Many equal and only negative numbers: the first maximum wins, the border never does."""
    s = rng(kernel).integers(-3, 0, (2, 7, 6, 3)).astype(float)
    window = make_window(7, 6, kernel, stride, padding)
    out, index = max_pool_forward(s, window)
    there = tensor(s.transpose(0, 3, 1, 2), grad=True)
    wanted = functional.max_pool2d(there, kernel, stride, padding)
    np.testing.assert_array_equal(out, wanted.detach().numpy().transpose(0, 2, 3, 1))
    dout = rng(9).standard_normal(out.shape)
    wanted.backward(tensor(dout.transpose(0, 3, 1, 2)))
    found = max_pool_backward(dout, index, window)
    np.testing.assert_allclose(found, there.grad.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-14)


def trajectories(optimizer, make, steps=12):
    """Return parameters after some steps by arraytp and by PyTorch, with gradients that depend on the parameters."""
    start, centre = rng(1).standard_normal((4, 3)), rng(2).standard_normal((4, 3))
    theta, there = start.copy(), tensor(start, grad=True)
    state, twin = init_optimizer(optimizer, [theta]), make([there])
    for _ in range(steps):
        apply_updates(optimizer, optimizer.lr, state, [theta], [np.sin(theta - centre)], Workspace(threads=1))
        twin.zero_grad()
        (-torch.cos(there - tensor(centre))).sum().backward()
        twin.step()
    return theta, there.detach().numpy()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_matches_torchs(momentum, weight_decay):
    numbers = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    np.testing.assert_allclose(*trajectories(SGD(**numbers), lambda p: torch.optim.SGD(p, **numbers)), rtol=1e-12)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_matches_torchs(epsilon, weight_decay):
    mine = Adam(lr=0.1, beta1=0.8, beta2=0.99, epsilon=epsilon, weight_decay=weight_decay)
    found, wanted = trajectories(
        mine,
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.99), eps=epsilon, weight_decay=weight_decay, foreach=False),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_the_two_conventions_of_adam_are_one_with_a_rescaled_epsilon():
    """Keras' ε acts as PyTorch's ε/√(1 − β2^t): at t = 1 the two can be made equal."""
    beta2, epsilon = 0.99, 1e-2
    keras = trajectories(
        Adam(lr=0.1, beta2=beta2, epsilon=epsilon, epsilon_form="keras"),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, beta2), eps=epsilon / math.sqrt(1 - beta2), foreach=False),
        steps=1,
    )
    np.testing.assert_allclose(*keras, rtol=1e-12)


def test_the_cosine_schedule_is_torchs():
    """Up to t_max, where PyTorch's closed form and its recursion agree."""
    twin = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(twin, T_max=85, eta_min=1e-5)
    for epoch in range(90):
        assert learning_rate(Cosine(), 0.04, epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        twin.step()
        schedule.step()


def test_the_step_schedule_is_torchs():
    twin = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.04)
    schedule = torch.optim.lr_scheduler.MultiStepLR(twin, milestones=[3, 5, 6], gamma=0.2)
    for epoch in range(9):
        mine = learning_rate(Staircase(epochs=(3, 5, 6), factor=5), 0.04, epoch)
        assert mine == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        twin.step()
        schedule.step()


@pytest.mark.parametrize(
    ("shape", "layer"),
    [((5, 5, 8, 16), lambda: torch.nn.Conv2d(8, 16, 5)), ((300, 70), lambda: torch.nn.Linear(300, 70))],
)
def test_kaiming_uniform_has_the_bounds_of_torchs_layers(shape, layer):
    """In both, the largest of `count` numbers is below the bound 1/√fan_in by a relative distance of about 1/count."""
    torch.manual_seed(0)
    twin = layer()
    weight, bias = (draw("kaiming-uniform", shape, 0, "init", 0) for draw in (initial_weight, initial_bias))
    bound = 1 / math.sqrt(np.prod(shape[:-1]))
    for mine, theirs in ((weight, twin.weight), (bias, twin.bias)):
        margin = 12 / mine.size
        for drawn in (mine, theirs.detach().numpy()):
            assert bound * (1 - margin) < np.abs(drawn).max() <= bound * (1 + 1e-6)
        assert mine.std() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(mine.size))
