"""A trace is sufficient: PyTorch's autograd recomputes every number of a step from the file alone, in float64.

No code of arraytp computes here. A block's layer is read from the config text in the file, its arrays by name. Each
number is recomputed from those before it, and ω and θ are followed from their first to their last value.
"""

import h5py
import numpy as np
import pytest
from ruamel.yaml import YAML
from samples import close

from arraytp.config import parse_config
from arraytp.data.writer import Description, writing
from arraytp.training.build import build
from arraytp.training.trace import write_trace

torch = pytest.importorskip("torch")
functional = torch.nn.functional
torch.set_num_threads(1)

TOLERANCE = 1e-9
CONV = [
    {"type": "conv", "channels": 4, "kernel": 3, "padding": 1, "activation": "elu",
     "pool": {"kernel": 3, "stride": 2, "padding": 1}},
    {"type": "conv", "channels": 5, "kernel": 3, "padding": "same", "stride": 2, "activation": "leaky-relu"},
    {"type": "conv", "channels": 3, "kernel": 2, "padding": 1, "activation": "tanh",
     "pool": {"kernel": 2, "stride": 1}},
    {"type": "dense", "units": 6, "activation": "elu"},
    {"type": "dense", "units": 3},
]  # fmt: skip
DENSE = [
    {"type": "dense", "units": 7, "activation": "elu"},
    {"type": "dense", "units": 5, "activation": "tanh"},
    {"type": "dense", "units": 3},
]
SQUARE = [
    {"type": "conv", "channels": 2, "kernel": 3, "padding": "same", "activation": "leaky-relu"},
    {"type": "conv", "channels": 3, "kernel": 3, "padding": "same", "stride": 2, "activation": "elu"},
    {"type": "dense", "units": 8, "activation": "leaky-relu"},
    {"type": "dense", "units": 3},
]
SGD = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
ADAM = {"name": "adam", "lr": 1e-3, "weight_decay": 1e-3}
TRAINED = {"iterations": 3, "sigma": 0.1, "optimizer": SGD}
RULES = {
    "bp": ({"name": "bp"}, (CONV, DENSE)),
    "fa": ({"name": "fa"}, (CONV, DENSE)),
    "dfa": ({"name": "dfa"}, (CONV, DENSE)),
    "sign-symmetry": ({"name": "sign-symmetry"}, (CONV, DENSE)),
    "sign-symmetry batch": ({"name": "sign-symmetry", "magnitude": "batch"}, (CONV,)),
    "sign-symmetry fixed": ({"name": "sign-symmetry", "magnitude": "fixed"}, (CONV,)),
    "kolen-pollack": ({"name": "kolen-pollack", "decay": 0.1}, (CONV, DENSE)),
    "weight-mirror": ({"name": "weight-mirror", "feedback": TRAINED}, (CONV, DENSE)),
    "alignment sa": ({"name": "alignment", "alpha": 0.6, "feedback": TRAINED | {"optimizer": ADAM}}, (CONV,)),
    "alignment ia": ({"name": "alignment", "loss": "ia", "gamma": 0.3, "feedback": TRAINED}, (CONV, DENSE)),
    "gait-prop literal": ({"name": "gait-prop", "eta": 1e-2}, (SQUARE,)),
    "gait-prop vanilla": ({"name": "gait-prop", "normalise": False, "gamma": 0.1}, (SQUARE,)),
    "gait-prop not rescaled": (
        {"name": "gait-prop", "eta": 1e-2, "norm": "l2_squared", "scale_by_sqrt_dim": False, "rescale_updates": False},
        (SQUARE,),
    ),
    "gait-prop difference": ({"name": "gait-prop", "form": "difference"}, (SQUARE,)),
    "gait-prop difference not rescaled": (
        {"name": "gait-prop", "form": "difference", "normalise": False, "rescale_updates": False}, (SQUARE,)
    ),
    "gait-prop pseudo": ({"name": "gait-prop", "inverse": "pseudo"}, (CONV, DENSE)),
    "gait-prop pseudo not rescaled": (
        {"name": "gait-prop", "inverse": "pseudo", "rescale_updates": False}, (CONV,)
    ),
    "gnt": ({"name": "gnt", "damping": 0.1}, (CONV, DENSE)),
    "ridge-tp": ({"name": "ridge-tp", "ridge": 0.2, "clip": 0.1}, (CONV, DENSE)),
    "ridge-tp linearised": (
        {"name": "ridge-tp", "activation": "linearised", "divide_by_beta": True, "clip": 0.3}, (CONV, DENSE)
    ),
    "tp": ({"name": "tp", "feedback": TRAINED}, (CONV, DENSE)),
    "dtp": ({"name": "dtp", "feedback": TRAINED}, (CONV, DENSE)),
    "dtp divided": (
        {"name": "dtp", "beta": 0.1, "divide_by_beta": True, "unpool": "accumulate",
         "feedback": TRAINED | {"optimizer": ADAM}},
        (CONV,),
    ),
    "ldrl": ({"name": "ldrl", "feedback": TRAINED}, (CONV, DENSE)),
    "ldrl accumulated": ({"name": "ldrl", "unpool": "accumulate", "feedback": TRAINED | {"optimizer": ADAM}}, (CONV,)),
    "ldrl expected": ({"name": "ldrl", "expected": True, "feedback": TRAINED}, (CONV, DENSE)),
    "ldrl-parallel": ({"name": "ldrl-parallel", "samples": 2, "feedback": TRAINED}, (CONV, DENSE)),
    "ldrl expected adam": (
        {"name": "ldrl", "expected": True, "unpool": "accumulate", "feedback": TRAINED | {"optimizer": ADAM}}, (CONV,)
    ),
    "ldrl-parallel expected": ({"name": "ldrl-parallel", "expected": True, "feedback": TRAINED}, (DENSE,)),
    "drl": ({"name": "drl", "feedback": TRAINED | {"optimizer": ADAM}}, (CONV, DENSE)),
    "drl control": (
        {"name": "drl", "loss": "reconstruction", "feedback": TRAINED | {"optimizer": ADAM}}, (CONV, DENSE)
    ),
    "drl rhl": ({"name": "drl", "hidden": 7, "eta": 0.5, "feedback": TRAINED}, (CONV, DENSE)),
    "drl expected": ({"name": "drl", "expected": True, "feedback": TRAINED | {"optimizer": ADAM}}, (CONV, DENSE)),
    "drl optimum": ({"name": "drl", "expected": "optimum", "feedback": TRAINED}, (CONV, DENSE)),
}  # fmt: skip
FEEDBACK_ALIGNMENT = ("fa", "sign-symmetry", "kolen-pollack", "weight-mirror", "alignment")
CASES = [
    pytest.param(rule, layers, id=f"{name}-{len(layers)}") for name, (rule, nets) in RULES.items() for layers in nets
]
ACTIVATION = {
    "linear": lambda z: z,
    "leaky-relu": lambda z: functional.leaky_relu(z, 0.1),
    "elu": functional.elu,
    "relu": functional.relu,
    "tanh": torch.tanh,
}
INVERSE = {
    "linear": lambda s: s,
    "leaky-relu": lambda s: torch.where(s < 0, s / 0.1, s),
    "elu": lambda s: torch.where(s < 0, torch.log1p(s.clamp(max=0)), s),
    "tanh": torch.atanh,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Images of shape (7, 6, 2) in 3 classes."""
    folder = tmp_path_factory.mktemp("images") / "data"
    generator = np.random.default_rng(5)
    with writing(folder, Description("tiny", (7, 6, 2), ("a", "b", "c"))) as writer:
        for split, count in (("train", 40), ("test", 5)):
            images = generator.integers(0, 256, (count, 7, 6, 2), dtype=np.uint8)
            writer.add(split, images, generator.integers(0, 3, count))
    return folder


def config(dataset, rule, layers, dtype="float64", **sections):
    square = rule["name"] == "gait-prop" and rule.get("inverse") != "pseudo"
    optimizer = SGD
    if rule["name"] == "gait-prop":
        on = "square" if square else "all-but-first"
        optimizer = ADAM | {"epsilon_form": "keras", "orthogonality": 0.1, "orthogonality_on": on}
    return parse_config({
        "name": "traced",
        "seed": 3,
        "dtype": dtype,
        "data": {"dataset": str(dataset), "flip": 0.5},
        "network": {"blocks": layers, "square": square, "init": "orthogonal" if square else "kaiming-uniform"},
        "rule": rule,
        "optimizer": optimizer,
        "train": {"epochs": 1, "batch_size": 4 if rule.get("expected") else 18},
    } | sections).variants[""]  # fmt: skip


def traced(path, experiment, noise=True):
    images, labels = next(experiment.train_loader.batches(0))
    return write_trace(path, experiment, images, labels, noise)


class Trace:
    """What a file holds: arrays as tensors, attributes, the config as nested maps."""

    def __init__(self, path):
        self.arrays, self.attrs = {}, {}
        with h5py.File(path) as file:
            self.attrs[""] = dict(file.attrs)
            file.visititems(self._take)
        self.config = YAML(typ="safe").load(self.attrs[""]["config"])
        self.rule, self.blocks = self.config["rule"], self.config["network"]["blocks"]
        self.x = self["input/x"]
        self.batch = len(self.x)

    def _take(self, name, item):
        self.attrs[name] = dict(item.attrs)
        if isinstance(item, h5py.Dataset):
            self.arrays[name] = torch.tensor(item[()])

    def __getitem__(self, name):
        return self.arrays[name]

    def weights(self, kind, n, group="weights"):
        """Return weight and bias; the bias is None if there is none."""
        return self[f"{group}/{kind}/{n}/weight"], self.arrays.get(f"{group}/{kind}/{n}/bias")

    def passed(self, n):
        """Return s^n without auxiliary units, whose number the config in the file gives for every block."""
        if n == 0:
            return self.x
        block = self.blocks[n - 1]
        count = block.get("channels", block.get("units")) - block["auxiliary"]
        return self[f"activations/{n - 1}/out"][..., :count]

    def input(self, n):
        """Return block n's input, flat for a dense one."""
        x = self.passed(n)
        return x.flatten(1) if self.blocks[n]["type"] == "dense" else x


def check(actual, wanted):
    close(actual.numpy(), wanted.detach().reshape(actual.shape).numpy(), TOLERANCE)


def affine(block, x, weight, bias=0):
    if block["type"] == "dense":
        return x.flatten(1) @ weight + bias
    k, stride, padding = block["kernel"], block["stride"], block["padding"]
    border = []
    for size in (x.shape[2], x.shape[1]):
        total = max((-(-size // stride) - 1) * stride + k - size, 0) if padding == "same" else 2 * padding
        border += [total // 2, total - total // 2]
    image = functional.pad(x.permute(0, 3, 1, 2), border)
    return functional.conv2d(image, weight.permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1) + bias


def transposed(block, a, weight, like):
    """Return ω ∘ a, the adjoint of the affine map, by autograd; it can be differentiated once more."""
    x = torch.zeros_like(like).requires_grad_()
    return torch.autograd.grad((affine(block, x, weight) * a).sum(), x, create_graph=True)[0]


def forward(block, x, weight, bias):
    """Return z, s^{n+1}, and the positions of the maxima in the image of z."""
    z = affine(block, x, weight, bias)
    return z, *pooled(block, ACTIVATION[block["activation"]](z))


def pooled(block, s):
    if "pool" not in block:
        return s, None
    pool = block["pool"]
    out, index = functional.max_pool2d(
        s.permute(0, 3, 1, 2), pool["kernel"], pool["stride"], pool["padding"], return_indices=True
    )
    return out.permute(0, 2, 3, 1), index


def unpool(t, index, like, mode):
    """Put values at the maxima; where several windows share a pixel, the last value counts, or the sum."""
    if index is None:
        return t
    flat, places = t.permute(0, 3, 1, 2).flatten(2), index.flatten(2)
    size = like.shape[1] * like.shape[2]
    if mode == "accumulate":
        u = torch.zeros(*flat.shape[:2], size, dtype=flat.dtype).scatter_add(2, places, flat)
    else:
        owner = torch.full((*flat.shape[:2], size), -1)
        for j in range(flat.shape[2]):
            owner.scatter_(2, places[:, :, j : j + 1], j)
        u = torch.where(owner >= 0, flat.gather(2, owner.clamp(min=0)), 0.0)
    return u.unflatten(2, like.shape[1:3]).permute(0, 2, 3, 1)


def feedback(trace, n, omega, t, index):
    """Return G^n(t)."""
    block, z = trace.blocks[n], trace[f"activations/{n}/pre"]
    t = t.reshape(trace[f"activations/{n}/out"].shape)
    a = ACTIVATION[block["activation"]](unpool(t, index, z, trace.rule["unpool"]))
    return transposed(block, a, omega[0], trace.input(n)) + omega[1]


def reconstruction_loss(trace, n, omega, noise):
    s = trace.input(n) + noise["epsilon"]
    _, s_next, index = forward(trace.blocks[n], s, *trace.weights("forward", n))
    return ((s - feedback(trace, n, omega, s_next, index)) ** 2).sum() / trace.batch


def difference_loss(trace, n, omega, noise):
    s, theta = trace.input(n), trace.weights("forward", n)
    _, s_next, index = forward(trace.blocks[n], s, *theta)
    _, s_noisy, index_noisy = forward(trace.blocks[n], s + noise["epsilon"], *theta)
    there = feedback(trace, n, omega, s_next, index)
    r_epsilon = feedback(trace, n, omega, s_noisy, index_noisy) - there
    r_eta = feedback(trace, n, omega, s_next + noise["eta"], index) - there
    return (-2 * noise["epsilon"] * r_epsilon + r_eta**2).sum() / trace.batch


def expected_loss(trace, n, omega):
    """Return σ²/B Σ (−2 ⟨∂Fᵀ, ∂G⟩ + ‖∂G‖²), with Jacobians of the whole batch, block-diagonal in the samples."""
    s, theta = trace.input(n), trace.weights("forward", n)
    _, s_next, index = forward(trace.blocks[n], s, *theta)
    df = torch.autograd.functional.jacobian(lambda x: forward(trace.blocks[n], x, *theta)[1], s)
    dg = torch.autograd.functional.jacobian(
        lambda t: feedback(trace, n, omega, t, index), s_next.detach(), create_graph=True
    )
    df, dg = df.reshape(s_next.numel(), s.numel()), dg.reshape(s.numel(), s_next.numel())
    return sigma(trace, n - 1) ** 2 / trace.batch * (-2 * (df.T * dg).sum() + (dg**2).sum())


def run_on(trace, n, s):
    """Return the logits computed from s^n."""
    for m in range(n, len(trace.blocks)):
        s = forward(trace.blocks[m], s, *trace.weights("forward", m))[1]
    return s


def direct_loss(trace, n, omega, noise):
    logits = run_on(trace, n, trace.passed(n) + noise["epsilon"])
    if trace.rule["loss"] == "reconstruction":
        return ((phi(trace, logits) @ omega[0] - (trace.passed(n) + noise["epsilon"]).flatten(1)) ** 2).mean()
    difference = phi(trace, logits) - phi(trace, trace.passed(len(trace.blocks)))
    return ((difference @ omega[0] - noise["epsilon"].flatten(1)) ** 2).mean() / sigma(trace, n - 1) ** 2


def phi(trace, logits):
    """Return the input of direct feedback: the logits, or tanh(logits R)."""
    return torch.tanh(logits @ trace["weights/feedback/0/weight"]) if trace.rule["hidden"] else logits


def jacobians(trace, n):
    """Return ∂ logits / ∂ s^n of every sample, (B, C, D)."""
    full = torch.autograd.functional.jacobian(lambda s: run_on(trace, n, s).sum(0), trace.passed(n))
    return full.flatten(2).transpose(0, 1)


def expected_direct_loss(trace, n, omega):
    """Return ‖J_bᵀ Q − I‖² averaged over batch and units: the mean of the loss over small noise, in the limit."""
    residual = jacobians(trace, n).transpose(1, 2) @ omega[0] - torch.eye(omega[0].shape[1], dtype=omega[0].dtype)
    return (residual**2).sum() / trace.batch / omega[0].shape[1]


def sigma(trace, position):
    value = trace.rule["feedback"]["sigma"]
    return value[position] if isinstance(value, list) else value


def optimised(optimizer, parameter, gradients, extra=lambda w: 0.0):
    """Return a parameter after one step per gradient; `extra` is what a regulariser adds to the gradient."""
    w, v, u = parameter.clone(), torch.zeros_like(parameter), torch.zeros_like(parameter)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + extra(w) + optimizer["weight_decay"] * w
        if optimizer["name"] == "sgd":
            v = optimizer["momentum"] * v + g
            w = w - optimizer["lr"] * v
            continue
        b1, b2, epsilon = optimizer["beta1"], optimizer["beta2"], optimizer["epsilon"]
        v, u = b1 * v + (1 - b1) * g, b2 * u + (1 - b2) * g**2
        c1, c2 = 1 - b1**t, (1 - b2**t) ** 0.5
        if optimizer["epsilon_form"] == "pytorch":
            w = w - optimizer["lr"] * (v / c1) / (u.sqrt() / c2 + epsilon)
        else:
            w = w - optimizer["lr"] * c2 / c1 * v / (u.sqrt() + epsilon)
    return w


def orthogonality(trace, weight, n):
    """Return the regulariser's gradient by autograd, where it acts on the weight's matrix."""
    strength, on = (trace.config["optimizer"][key] for key in ("orthogonality", "orthogonality_on"))
    matrix = weight.reshape(-1, weight.shape[-1]).clone().requires_grad_()
    regularised = n > 0 if on == "all-but-first" else matrix.shape[0] == matrix.shape[1]
    if weight.ndim == 1 or not regularised or not strength:
        return 0.0
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    excess = gram - torch.eye(len(gram), dtype=matrix.dtype)
    return torch.autograd.grad(strength * (excess**2).sum(), matrix)[0].reshape(weight.shape)


def output_gradient(trace):
    """Return ∂L/∂logits of the config's loss."""
    logits, options = trace.passed(len(trace.blocks)).clone().requires_grad_(), trace.config["loss"]
    e, labels, classes = options["label_smoothing"], trace["input/y"], logits.shape[1]
    if options["name"] == "mse":
        y = (1 - e) * functional.one_hot(labels, classes).to(logits.dtype) + e / classes
        share = 2 * len(labels) if options["reduction"] == "mean" else 2
        loss = functional.mse_loss(logits, y, reduction="sum") / share
    else:
        loss = functional.cross_entropy(logits, labels, reduction=options["reduction"], label_smoothing=e)
    assert trace.attrs["activations"]["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    return torch.autograd.grad(loss, logits)[0]


def local_gradients(trace, n, ds):
    """Return the gradients of block n's weight and bias: of Σ ds ⊙ s^{n+1} without auxiliary units, ds constant."""
    weight, bias = (parameter.clone().requires_grad_() for parameter in trace.weights("forward", n))
    _, s, _ = forward(trace.blocks[n], trace.input(n), weight, bias)
    wanted = trace.passed(n + 1)
    return torch.autograd.grad((s[..., : wanted.shape[-1]] * ds.reshape(wanted.shape)).sum(), (weight, bias))


def carried(trace, n, ds, carrier):
    """Return ds of block n's input: through pool and activation by autograd, then by the adjoint of `carrier`."""
    block, z = trace.blocks[n], trace[f"activations/{n}/pre"].clone().requires_grad_()
    s, _ = pooled(block, ACTIVATION[block["activation"]](z))
    units = trace.passed(n + 1).shape[-1]
    dz = torch.autograd.grad((s[..., :units] * ds.reshape(s[..., :units].shape)).sum(), z)[0]
    return transposed(block, dz, carrier, trace.input(n)).detach()


def chained(trace, carriers):
    """Return the updates of BP's recursion with these carriers in place of W."""
    ds, found = output_gradient(trace), []
    for n in reversed(range(len(trace.blocks))):
        found.append(local_gradients(trace, n, ds))
        ds = carried(trace, n, ds, carriers[n]) if n > 0 else None
    return found[::-1]


def gait_inverse(trace, n, rows):
    """Return rows · W⁻¹, in the shape of the block's input: patches are added up where they came from."""
    block, (weight, _) = trace.blocks[n], trace.weights("forward", n)
    matrix = weight.reshape(-1, weight.shape[-1])
    patches = torch.linalg.solve(matrix.T, rows.reshape(-1, len(matrix)).T).T
    one_hot = torch.eye(len(matrix), dtype=matrix.dtype).reshape(weight.shape)
    return transposed(block, patches.reshape(trace[f"activations/{n}/pre"].shape), one_hot, trace.input(n)).detach()


def gait_gamma(trace, n, delta):
    rule, size = trace.rule, trace[f"activations/{n}/out"][0].numel()
    if not rule["normalise"]:
        return torch.full((trace.batch,), rule["gamma"], dtype=delta.dtype)
    norm = delta.flatten(1).norm(dim=1) ** (2 if rule["norm"] == "l2_squared" else 1)
    return rule["eta"] * (size**0.5 if rule["scale_by_sqrt_dim"] else 1) / norm


def slopes(trace, n):
    """Return D = f'(z) of all units of block n, which has no pool."""
    z = trace[f"activations/{n}/pre"].clone().requires_grad_()
    return torch.autograd.grad(ACTIVATION[trace.blocks[n]["activation"]](z).sum(), z)[0]


def per_sample(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1))


def gait_targets(trace):
    """Yield δ of what every block passes on, and m, from the last block to the first."""
    e = output_gradient(trace)
    t, m = trace.passed(len(trace.blocks)) - e / 2, torch.ones(trace.batch, dtype=e.dtype)
    for n in reversed(range(len(trace.blocks))):
        block, a, s = trace.blocks[n], trace.passed(n + 1), trace[f"activations/{n}/out"]
        delta = (t - a) if trace.rule["form"] == "literal" else e.reshape(a.shape) / (-2 * per_sample(m, a))
        yield delta, m
        if n == 0:
            return
        gamma, d = gait_gamma(trace, n, delta), slopes(trace, n)
        padded = torch.zeros_like(s)
        padded[..., : a.shape[-1]] = delta
        y = s + per_sample(gamma, s) * d**2 * padded
        ones = torch.ones_like(s)
        windows = transposed(block, ones, torch.ones_like(trace.weights("forward", n)[0]), trace.input(n))
        others = (windows / ones.shape[-1] - 1).detach() * trace.input(n) if block["type"] == "conv" else 0.0
        z = INVERSE[block["activation"]](y) - trace.weights("forward", n)[1]
        t = (gait_inverse(trace, n, z) - others).reshape(trace.passed(n).shape)
        padded[..., : a.shape[-1]] = e.reshape(a.shape)
        e = gait_inverse(trace, n, d * padded)
        if trace.rule["rescale_updates"]:
            m = m / gamma
        else:
            e = e * per_sample(gamma, e)


def pseudo_targets(trace):
    """Yield δ of every block and m, by GAIT-prop's difference form with the pseudo-inverse of any W."""
    e, m = output_gradient(trace), torch.ones(trace.batch, dtype=trace.x.dtype)
    for n in reversed(range(len(trace.blocks))):
        s, (weight, _) = trace[f"activations/{n}/out"], trace.weights("forward", n)
        delta = e.reshape(s.shape) / (-2 * per_sample(m, s))
        yield delta, m
        if n == 0:
            return
        pseudo_inverse = torch.linalg.pinv(weight.reshape(-1, weight.shape[-1]))
        e = carried(trace, n, e, pseudo_inverse.T.reshape(weight.shape))
        gamma = gait_gamma(trace, n, delta)
        m, e = (m / gamma, e) if trace.rule["rescale_updates"] else (m, e * per_sample(gamma, e))


def gauss_newton_targets(trace):
    """Yield δ of every block's output, from the Jacobians of the logits."""
    e, last = trace.batch * output_gradient(trace), len(trace.blocks) - 1
    for n in reversed(range(last + 1)):
        if n == last:
            yield -trace.rule["beta"] * e, None
            continue
        each = jacobians(trace, n + 1)
        gram = each @ each.transpose(1, 2) + trace.rule["damping"] * torch.eye(e.shape[1], dtype=e.dtype)
        delta = each.transpose(1, 2) @ torch.linalg.solve(gram, e[:, :, None])
        yield -trace.rule["beta"] * delta.reshape(trace[f"activations/{n}/out"].shape), None


def ridge_targets(trace):
    """Yield δ of every block's output; the ridge inverse solves a least-squares problem with Wᵀ stacked on √r I."""
    rule, f_range = trace.rule, {"tanh": (-1, 1), "elu": (-1, float("inf"))}
    delta = -rule["beta"] * trace.batch * output_gradient(trace)
    for n in reversed(range(len(trace.blocks))):
        s, (weight, _), block = trace[f"activations/{n}/out"], trace.weights("forward", n), trace.blocks[n]
        yield delta.reshape(s.shape), None
        if n == 0:
            return
        low, high = f_range.get(block["activation"], (-float("inf"), float("inf")))
        inside, t = (x.clamp(low + rule["clip"], high - rule["clip"]) for x in (s, s + delta.reshape(s.shape)))
        if rule["activation"] == "inverse":
            d = INVERSE[block["activation"]](t) - INVERSE[block["activation"]](inside)
        else:
            z = INVERSE[block["activation"]](inside).requires_grad_()
            d = delta.reshape(s.shape) / torch.autograd.grad(ACTIVATION[block["activation"]](z).sum(), z)[0]
        _, _, index = forward(block, trace.input(n), weight, 0)
        d = unpool(d.detach(), index, trace[f"activations/{n}/pre"], "accumulate")
        matrix = weight.reshape(-1, weight.shape[-1])
        stacked = torch.cat([matrix.T, rule["ridge"] ** 0.5 * torch.eye(len(matrix), dtype=d.dtype)])
        wanted = torch.cat([torch.eye(matrix.shape[1], dtype=d.dtype), torch.zeros(*matrix.shape, dtype=d.dtype)])
        ridge_inverse = torch.linalg.lstsq(stacked, wanted, driver="gelsd")[0]
        delta = transposed(block, d, ridge_inverse.reshape(weight.shape), trace.input(n)).detach()


def learned_targets(trace):
    """Yield δ of every block by TP's, DTP's or DRL's targets, with the feedback weights after their training."""
    step, last = trace.rule.get("beta", trace.rule.get("eta")), len(trace.blocks) - 1
    scale = 1 if trace.rule["name"] == "drl" else trace.batch
    output = delta = -step * scale * output_gradient(trace)
    for n in reversed(range(last + 1)):
        s = trace[f"activations/{n}/out"]
        if trace.rule["name"] == "drl" and n < last:
            logits = trace.passed(last + 1)
            change = phi(trace, logits + output) - phi(trace, logits) if trace.rule["hidden"] else output
            delta = change @ trace[f"weights_after/feedback/{n + 1}/weight"]
        yield delta.reshape(s.shape), None
        if trace.rule["name"] == "drl" or n == 0:
            continue
        omega = trace.weights("feedback", n, "weights_after")
        _, _, index = forward(trace.blocks[n], trace.input(n), *trace.weights("forward", n))
        t = feedback(trace, n, omega, s + delta.reshape(s.shape), index)
        minus = trace.input(n) if trace.rule["name"] == "tp" else feedback(trace, n, omega, s, index)
        delta = (t - minus).detach()


def updates_by_targets(trace):
    """Return the gradients of the local losses, whose targets are in the file."""
    found = []
    for n, block in enumerate(trace.blocks):
        delta = trace[f"targets/{n}/delta"][..., : trace.passed(n + 1).shape[-1]]
        rule = trace.rule
        if rule["name"] == "gait-prop":
            ds = -2 * per_sample(trace[f"targets/{n}/scale"], delta) * delta
        elif rule["name"] == "drl":
            ds = -2 * delta / (delta.numel() if block["type"] == "conv" else trace.batch)
        else:
            ds = -delta / trace.batch / (rule["beta"] if rule["divide_by_beta"] else 1)
        found.append(local_gradients(trace, n, ds))
    return found


def updates_of(trace):
    last, forwards = len(trace.blocks) - 1, [trace.weights("forward", n)[0] for n in range(len(trace.blocks))]
    if trace.rule["name"] == "bp":
        return chained(trace, forwards)
    if trace.rule["name"] in FEEDBACK_ALIGNMENT:
        place = "weights" if trace.rule["name"] in ("fa", "kolen-pollack") else "weights_after"
        return chained(trace, [None] + [trace[f"{place}/feedback/{n}/weight"] for n in range(1, last + 1)])
    if trace.rule["name"] == "dfa":
        e = output_gradient(trace)
        directs = [e @ trace[f"weights/feedback/{n}/weight"] for n in range(1, last + 1)]
        return [local_gradients(trace, n, ds) for n, ds in enumerate([*directs, e])]
    return updates_by_targets(trace)


def check_activations(trace):
    for n, block in enumerate(trace.blocks):
        z, s, _ = forward(block, trace.input(n), *trace.weights("forward", n))
        check(trace[f"activations/{n}/pre"], z)
        check(trace[f"activations/{n}/out"], s)


def signed(trace):
    """Check B's signs after the step has set them, and its magnitudes before and after."""
    for n in range(1, len(trace.blocks)):
        weight, _ = trace.weights("forward", n)
        before, after = (trace[f"{place}/feedback/{n}/weight"] for place in ("weights", "weights_after"))
        assert torch.equal(torch.sign(after), torch.sign(weight))
        assert torch.equal(after.abs(), before.abs()) == (trace.rule["magnitude"] != "batch")
        if trace.rule["magnitude"] == "unit":
            taps = weight[..., 0, 0].numel()
            check(after.abs(), torch.full_like(after, (2 / taps / sum(weight.shape[-2:])) ** 0.5))


def response(trace, n, x):
    """Return f(xW + b) of block n, without its pool."""
    block = {key: value for key, value in trace.blocks[n].items() if key != "pool"}
    return forward(block, x, *trace.weights("forward", n))[1]


def mirrored(trace, n, omega, noise):
    """Return −⟨x, yBᵀ⟩ over the rows of x's patches, which is −tr(Bᵀ xᵀy) / rows."""
    x = noise["epsilon"].reshape(trace.input(n).shape)
    y = response(trace, n, x)
    return -(x * transposed(trace.blocks[n], y, omega[0], x)).sum() / (y.numel() / y.shape[-1])


def regularised(trace, n, omega, noise):
    """Return the sum of primitives of the alignment losses."""
    (B, _), rule, x = omega, trace.rule, trace.input(n)
    decay = rule["beta"] * (B**2).sum() / 2
    if rule["loss"] == "sa":
        return decay - rule["alpha"] * (B * trace.weights("forward", n)[0]).sum()
    y = response(trace, n, x)
    back, rows = transposed(trace.blocks[n], y, B, x), y.numel() / y.shape[-1]
    null = rule["gamma"] * (back**2).sum() / 2 / rows if rule["loss"] == "ia" else 0.0
    return decay - rule["alpha"] * (x * back).sum() / rows + null


LOSSES = {"weight-mirror": mirrored, "alignment": regularised, "tp": reconstruction_loss,
          "dtp": reconstruction_loss, "ldrl": difference_loss, "ldrl-parallel": difference_loss,
          "drl": direct_loss}  # fmt: skip


def check_feedback_training(trace):
    """Follow ω from before to after the step; return how many gradients were checked."""
    rule, checked = trace.rule, 0
    if rule.get("expected"):
        return sum(check_closed_form(trace, n) for n in range(1, len(trace.blocks)))
    loss_of = LOSSES.get(rule["name"])
    names = sorted({int(name.split("/")[2]) for name in trace.arrays if name.startswith("weights/feedback/")} - {0})
    for n in names:
        start, count = trace.weights("feedback", n), 0
        parts = ("gradient", "gradient_bias") if rule["name"] in ("tp", "dtp") else ("gradient",)
        gradients = {part: [] for part in parts}
        while f"feedback_training/{n}/{count}/gradient" in trace.arrays:
            omega = [None if p is None else p.clone().requires_grad_() for p in present(trace, start, gradients)]
            group = f"feedback_training/{n}/{count}"
            noise = {name: trace[f"{group}/{name}"] for name in ("epsilon", "eta") if f"{group}/{name}" in trace.arrays}
            loss = loss_of(trace, n, omega, noise)
            check(trace[f"{group}/loss"], loss)
            wanted = torch.autograd.grad(loss, omega[: len(parts)])
            for part, gradient in zip(parts, wanted, strict=True):
                check(trace[f"{group}/{part}"], gradient)
                gradients[part].append(trace[f"{group}/{part}"])
            count += 1
        checked += count
        for part, after in zip(("weight", "bias"), present(trace, start, gradients), strict=True):
            if after is not None:
                check(trace[f"weights_after/feedback/{n}/{part}"], after)
    return checked


def check_closed_form(trace, n):
    """Do all iterations on block n by autograd's gradients of the expected loss; return 1."""
    direct, group = trace.rule["name"] == "drl", f"feedback_training/{n}/0"
    loss_of = expected_direct_loss if direct else expected_loss
    assert f"{group}/epsilon" not in trace.arrays
    start, bias = trace.weights("feedback", n)
    after, gradients, w = trace[f"weights_after/feedback/{n}/weight"], [], start

    def gradient_at(w):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(loss_of(trace, n, (w, bias)), w)[0]

    if direct:
        each = jacobians(trace, n)
        check(trace[f"{group}/A"], (each @ each.transpose(1, 2)).sum(0))
        check(trace[f"{group}/J"], each.sum(0))
    else:
        scale = 2 * sigma(trace, n - 1) ** 2 / trace.batch
        theta = trace.weights("forward", n)[0]
        check(scale * (start * trace[f"{group}/M"] - theta * trace[f"{group}/N"]), gradient_at(start))
    if trace.rule["expected"] == "optimum":
        # The least-squares solution of least norm, whose gradient is 0 up to rounding.
        check(after, torch.linalg.lstsq(each.transpose(1, 2).flatten(0, 1), stacked_identity(each), driver="gelsd")[0])
        assert gradient_at(after).abs().max() < 1e-9 * gradient_at(start).abs().max()
    else:
        for _ in range(trace.rule["feedback"]["iterations"]):
            gradients.append(gradient_at(w))
            w = optimised(trace.rule["feedback"]["optimizer"], start, gradients)
        check(after, w)
    check(trace[f"{group}/loss"], loss_of(trace, n, (after, bias)))
    if bias is not None:
        check(trace[f"weights_after/feedback/{n}/bias"], bias)
    return 1


def stacked_identity(each):
    return torch.eye(each.shape[2], dtype=each.dtype).repeat(len(each), 1)


def present(trace, start, gradients):
    """Return weight and bias of G after these gradients; `samples` gradients make one step of ldrl-parallel."""
    samples, result = trace.rule.get("samples", 1), []
    for part, parameter in zip(("gradient", "gradient_bias"), start, strict=True):
        found = gradients.get(part, [])
        steps = [sum(found[i : i + samples]) / samples for i in range(0, len(found) - samples + 1, samples)]
        result.append(optimised(trace.rule["feedback"]["optimizer"], parameter, steps) if steps else parameter)
    return result


def check_targets(trace):
    exact = pseudo_targets if trace.rule.get("inverse") == "pseudo" else gait_targets
    recursions = {"gait-prop": exact, "ridge-tp": ridge_targets, "gnt": gauss_newton_targets}
    found = recursions.get(trace.rule["name"], learned_targets)(trace)
    for n, (delta, m) in zip(reversed(range(len(trace.blocks))), found, strict=True):
        out, units = trace[f"activations/{n}/out"], delta.shape[-1]
        check(trace[f"targets/{n}/delta"][..., :units], delta)
        assert not trace[f"targets/{n}/delta"][..., units:].any()
        check(trace[f"targets/{n}/target"], out + trace[f"targets/{n}/delta"])
        assert (m is not None) == (f"targets/{n}/scale" in trace.arrays)
        if m is not None:
            check(trace[f"targets/{n}/scale"], m)


def check_updates(trace):
    exact = chained(trace, [trace.weights("forward", n)[0] for n in range(len(trace.blocks))])
    for n, (mine, reference) in enumerate(zip(updates_of(trace), exact, strict=True)):
        for i, part in enumerate(("weight", "bias")):
            check(trace[f"updates/forward/{n}/{part}"], mine[i])
            check(trace[f"bp/{n}/{part}"], reference[i])
            before = trace[f"weights/forward/{n}/{part}"]
            after = optimised(trace.config["optimizer"], before, [mine[i]], lambda w, n=n: orthogonality(trace, w, n))
            if trace.rule["name"] == "kolen-pollack" and n and part == "weight":
                B, kept = trace[f"weights/feedback/{n}/weight"], 1 - trace.rule["decay"]
                check(trace[f"weights_after/feedback/{n}/weight"], kept * B - (before - after))
                after = kept * before - (before - after)
            check(trace[f"weights_after/forward/{n}/{part}"], after)
        a, b, attrs = mine[0].flatten(), reference[0].flatten(), trace.attrs[f"updates/forward/{n}"]
        cosine = float(a @ b / a.norm() / b.norm())
        assert np.cos(np.radians(attrs["angle_deg"])) == pytest.approx(cosine, abs=TOLERANCE)
        assert attrs["distance"] == pytest.approx(float((a - b).norm() / b.norm()), rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize(("rule", "layers"), CASES)
def test_every_number_of_a_step_can_be_recomputed_from_the_file_alone(dataset, tmp_path, rule, layers):
    assert traced(tmp_path / "t.h5", build(config(dataset, rule, layers))) == ""
    trace = Trace(tmp_path / "t.h5")
    assert trace.attrs[""]["version"] == 2
    check_activations(trace)
    trained = len(layers) - 1 if "feedback" in rule else 0
    if rule["name"] == "sign-symmetry":
        signed(trace)
    iterations = trained * (1 if rule.get("expected") else 3 * trace.rule.get("samples", 1))
    if rule["name"] not in ("sign-symmetry", "kolen-pollack"):
        assert check_feedback_training(trace) == iterations
    without = ("bp", "dfa", *FEEDBACK_ALIGNMENT)
    assert any(name.startswith("targets/") for name in trace.arrays) == (rule["name"] not in without)
    if "targets" in trace.attrs:
        check_targets(trace)
    check_updates(trace)


@pytest.mark.parametrize("rule", ["bp", "gait-prop literal", "tp", "ldrl", "drl"])
@pytest.mark.parametrize("loss", [{"name": "mse"}, {"label_smoothing": 0.1}, {"name": "mse", "label_smoothing": 0.2}])
def test_every_kind_of_rule_starts_from_the_gradient_of_the_configs_loss(dataset, tmp_path, rule, loss):
    """Check output targets and updates; the first step of the warm-up has a fifth of the full rate."""
    options, (layers, *_) = RULES[rule]
    sections = {"loss": loss, "schedule": {"name": "step", "epochs": [1], "warmup_steps": 5}}
    assert traced(tmp_path / "t.h5", build(config(dataset, options, layers, **sections))) == ""
    trace = Trace(tmp_path / "t.h5")
    trace.config["optimizer"]["lr"] /= 5
    check_activations(trace)
    if "targets" in trace.attrs:
        check_targets(trace)
    check_updates(trace)
