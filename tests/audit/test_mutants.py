"""Deliberately broken operations, rules and files: `arraytp audit` of a shipped config must fail on each."""

import os
import subprocess
import sys

import pytest
from mistakes import ROOT, Mutation, made, name_of, occurrences, package

CONV = (
    "network.blocks=[{type: conv, channels: 3, kernel: 3, padding: 1, activation: elu, "
    "pool: {kernel: 3, stride: 2, padding: 1}}, {type: conv, channels: 4, kernel: 3, padding: same, stride: 2, "
    "activation: elu}, {type: dense, units: 8, activation: tanh}, {type: dense, units: 10}]"
)
SQUARE = (
    "network.blocks=[{type: conv, channels: 2, kernel: 9, stride: 4, padding: same, activation: leaky-relu}, "
    "{type: conv, channels: 3, kernel: 3, stride: 2, padding: same, activation: leaky-relu}, "
    "{type: dense, units: 30, activation: leaky-relu}, {type: dense, units: 10}]"
)
AUGMENTED = ("data.flip=0.5", "data.crop_padding=2")
SGD = ("optimizer={name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 1e-3}", "schedule={name: cosine}")
# Shipped configs, their networks made small: config, variant, settings.
CONFIGS = {
    "bp": ("quickstart", "bp", (CONV, *AUGMENTED, "train.batch_size=512")),
    "fa": ("quickstart", "fa", (CONV,)),
    "orthogonal": ("quickstart-gait-prop", "fa", (SQUARE,)),
    "dfa": ("quickstart", "dfa", (CONV,)),
    "ldrl": ("quickstart", "ldrl", (CONV, *SGD)),
    "accumulate": ("quickstart", "ldrl", (CONV, "rule={name: ldrl, unpool: accumulate, divide_by_beta: true}")),
    "dtp": (
        "quickstart",
        "ldrl",
        (CONV, "rule={name: dtp, feedback: {iterations: 2, optimizer: {name: adam, lr: 1e-3}}}"),
    ),
    "tp": ("quickstart", "ldrl", (CONV, "rule={name: tp, feedback: {iterations: 2}}")),
    "parallel": ("quickstart", "ldrl", (CONV, "rule={name: ldrl-parallel, samples: 3, feedback: {iterations: 2}}")),
    "expected": ("quickstart", "ldrl", (CONV, "rule={name: ldrl, expected: true}")),
    "drl": ("quickstart", "ldrl", (CONV, "rule={name: drl}")),
    "gp": ("quickstart-gait-prop", "gp", (SQUARE, "rule={name: gait-prop, form: literal}")),
}


def _on(config: str, file: str, *changes: tuple[str, str]) -> list[Mutation]:
    """Return mutations of a file that the audit of a config must notice."""
    return [Mutation(file, old, new, (config,)) for old, new in changes]


# The ones that every run of the tests makes: a sign, a factor, a crop, a transposed kernel, swapped noise.
FEW = [
    *_on("bp", "data/prepare.py", ("draws.rows - self.padding", "draws.rows - self.padding + 1")),
    *_on("ldrl", "fused_feedback.py", ("EPSILON, ETA = 0, 1", "EPSILON, ETA = 1, 0")),
    *_on("gp", "inverse.py", ("out[part] -= others * x[part]", "out[part] += others * x[part]")),
]
MUTANTS = [
    *_on(
        "bp",
        "ops/activations.py",
        ("u *= z.dtype.type(0.5)", "u *= z.dtype.type(0.25)"),
        ("xp.minimum(s, s.dtype.type(0)) + one", "xp.minimum(s, s.dtype.type(0))"),
        ("one - s * s", "one - s"),
        ("xp.tanh(moved) * xp.tanh(s))", "xp.tanh(s) * xp.tanh(s))"),
    ),
    *_on(
        "bp",
        "ops/conv.py",
        ("as_matrix(weight) + bias, patches", "as_matrix(weight), patches"),
        ("@ rows, rows.sum(axis=0)", "@ rows, 2 * rows.sum(axis=0)"),
        ("dz @ as_matrix(weight).T", "-dz @ as_matrix(weight).T"),
        ("weight[::-1].transpose(0, 3, 1, 2)", "weight.transpose(0, 3, 1, 2)"),
    ),
    *_on(
        "bp",
        "ops/dense.py",
        ("x @ weight + bias", "x @ weight"),
        ("return x.T @ dz", "return 2 * x.T @ dz"),
        ("dz @ weight.T", "-dz @ weight.T"),
    ),
    *_on(
        "bp",
        "ops/loss.py",
        ("labels] -= dlogits", "labels] += dlogits"),
        ("dlogits /= dlogits.dtype.type(len(labels))", "dlogits /= dlogits.dtype.type(1)"),
        ("loss / loss.dtype.type(len(labels))", "loss / loss.dtype.type(logits.shape[1])"),
        ("(logits > own)", "(logits < own)"),
    ),
    *_on(
        "bp",
        "ops/patches.py",
        ("return total // 2, total - total // 2", "return total - total // 2, total // 2"),
        ("fields[:, :, :, i, j]", "fields[:, :, :, j, i]"),
        ("] += fields", "] = fields"),
        ("slice(i, i + self.stride", "slice(j, j + self.stride"),
        ("stride * pixel, row, element)", "stride * pixel, pixel, element)"),
        ("k - 1 - window.top, k - 1 - window.bottom", "k - window.top, k - 2 - window.bottom"),
        ("shift = window.left - j", "shift = window.left - j + 1"),
    ),
    *_on(
        "bp",
        "ops/pool.py",
        ("xp.arange(k * k, 0, -1, dtype=xp.uint8)", "xp.arange(1, k * k + 1, dtype=xp.uint8)"),
        ("] += dout * chosen", "] = dout * chosen"),
        ("(rows - window.top) * window.width", "rows * window.width"),
    ),
    *_on(
        "bp",
        "network.py",
        ("activation_backward(df, activation_forward(z, block.activation), block.activation)", "df"),
        ("df = ds if index is None", "df = -ds if index is None"),
    ),
    *_on(
        "bp",
        "fused.py",
        ("        s += bias\n", "        s += 0\n"),
        ("lane_weight[number] += share", "lane_weight[number] = share"),
        ("feedback.T, dx.reshape", "feedback.T * 0.5, dx.reshape"),
        ("dweight[::-1].transpose(1, 2, 0, 3)", "dweight.transpose(1, 2, 0, 3)"),
        ("lanes[:, part].sum(axis=0, out=out[part])", "lanes[:1, part].sum(axis=0, out=out[part])"),
    ),
    *_on("bp", "rules/bp.py", ("network.weights[n] if n > 0", "-network.weights[n] if n > 0")),
    *_on(
        "fa",
        "rules/fa.py",
        ('state[f"feedback/{n}/weight"] if n > 0', "network.weights[n] if n > 0"),
    ),
    *_on("orthogonal", "rules/fa.py", ('seed, "feedback", n)', 'seed, "init", n)')),
    *_on("dfa", "rules/dfa.py", ("product(dlogits, state", "product(-dlogits, state"), ("if n == last:", "if n == 0:")),
    *_on(
        "bp",
        "optim.py",
        ("math.sqrt(1 - optimizer.beta2**step)", "1 - optimizer.beta2**step"),
        ("rate = lr / correction1", "rate = lr"),
        ("work *= number(1 - optimizer.beta2)", "work *= number(1 - optimizer.beta1)"),
        ("    work += number(optimizer.epsilon)\n", ""),
        ("state.step += 1", "state.step += 2"),
    ),
    *_on(
        "ldrl",
        "optim.py",
        ("        decayed += g\n", "        decayed -= g\n"),
        ("        v += g\n", "        v += g * number(1 - optimizer.momentum)\n"),
        ("epoch / schedule.t_max)) / 2", "epoch / schedule.t_max))"),
        ("math.pi * epoch / schedule.t_max", "math.pi * min(epoch / schedule.t_max, 1)"),
    ),
    *_on(
        "gp",
        "optim.py",
        ("rate = lr * correction2 / correction1", "rate = lr / correction1"),
    ),
    *_on("gp", "orthogonality.py", ("4 * strength", "2 * strength")),
    *_on("gp", "ops/excess.py", (": n + 1] -= 1", ": n + 1] += 1")),
    *_on(
        "gp",
        "rules/gait_prop.py",
        ("number(0.5) * dlogits", "dlogits"),
        ("number(-2) * per_sample", "number(-1) * per_sample"),
        ("if options.rescale_updates:\n            m = m / gamma", "if options.rescale_updates:\n            m = m"),
        ("per_sample(gamma, a) * derivative * derivative", "per_sample(gamma, a) * derivative"),
        ("number(scale) / norm", "number(scale) * norm"),
        ("np.prod(block.out_shape)", "np.prod(block.passed_shape)"),
    ),
    *_on(
        "gp",
        "inverse.py",
        ("y[part], block.activation) - bias", "y[part], block.activation) + bias"),
        ("coverage(window, x) - x.dtype.type(1)", "coverage(window, x)"),
        ("dz[:, units:] = 0", "dz[:, units:] = 1"),
    ),
    *_on("gp", "ops/solve.py", ("[rows.start :: order + 1] = 1", "[rows.start :: order + 1] = 2"),
         ("return x.T\n", "return -x.T\n"), ("y @ factors.matrix.T)", "y @ factors.matrix)")),
    *_on("gp", "ops/activations.py", ("s.dtype.type(1 / LEAKY_SLOPE)", "s.dtype.type(2 / LEAKY_SLOPE)"),
         ("LEAKY_SLOPE = 0.1", "LEAKY_SLOPE = 0.01")),
    *_on(
        "ldrl",
        "ops/noise.py",
        ("    out *= out.dtype.type(sigma)\n", ""),
        ("(first + start) // CHUNK", "start // CHUNK"),
        ('stream(seed, "noise", *key,', 'stream(seed, "noise",'),
    ),
    *_on(
        "ldrl",
        "fused_feedback.py",
        ("xp.subtract(frozen.a[part], d1, out=d1)", "xp.subtract(d1, frozen.a[part], out=d1)"),
        ("omega.dtype.type(2 / batch), out=gradient)", "omega.dtype.type(1 / batch), out=gradient)"),
        ("both *= omega.dtype.type(2 / batch)", "both *= omega.dtype.type(1 / batch)"),
        ("partial(_draw, array[part], frozen.sigma, part.start", "partial(_draw, array[part], frozen.sigma, 0"),
        ("d2 -= frozen.a[part]", "d2 += frozen.a[part]"),
    ),
    *_on("dtp", "fused_feedback.py", ("        r -= epsilon[part]\n", ""), ("        r += bias\n", "")),
    *_on(
        "ldrl",
        "feedback.py",
        ("omega * m - theta * n", "omega * m - 2 * theta * n"),
        ("xp.ones((1, block.window.height", "2 * xp.ones((1, block.window.height"),
        ("OptimizerState(step, moments)", "OptimizerState(step, [])"),
        ("of_block(training.optimizer, position), at_block(training.optimizer.lr, position)",
         "of_block(training.optimizer, position), at_block(training.optimizer.lr, 0)"),
    ),
    *_on("accumulate", "rules/dtp.py", ("options.beta if options.divide_by_beta else 1.0", "1.0")),
    *_on("accumulate", "ops/pool.py", ('if mode == "accumulate":', 'if mode == "overwrite":')),
    *_on(
        "ldrl",
        "rules/dtp.py",
        ("-beta * len(dlogits)", "-beta"),
        ("delta.dtype.type(-1 / scale)", "delta.dtype.type(-2 / scale)"),
    ),
    *_on(
        "dtp",
        "rules/dtp.py",
        ("(r - s_noisy) * s.dtype.type(2 / len(s))", "(r - s) * s.dtype.type(2 / len(s))"),
        ("step * iterations + k, gradients", "step + k, gradients"),
        ("n, options.unpool, sigma, (seed, step)", "n, options.unpool, sigma, (step, seed)"),
    ),
    *_on("tp", "rules/tp.py", ("passed.logits + output_difference", "passed.logits - output_difference")),
    *_on("expected", "rules/ldrl.py", ("omega.dtype.type(sigma**2)", "omega.dtype.type(sigma)"),
         ("omega * m - 2 * theta * n", "omega * m - theta * n")),
    *_on(
        "ldrl",
        "rules/ldrl.py",
        ("-two * epsilon, d1", "two * epsilon, d1"),
        ("s_epsilon, index_epsilon) - a(s_next, index)", "s_next, index) - a(s_epsilon, index_epsilon)"),
    ),
    *_on(
        "parallel",
        "rules/ldrl_parallel.py",
        ("k * options.samples + sample", "k"),
        ("mean /= mean.dtype.type(options.samples)", "pass"),
    ),
    *_on(
        "drl",
        "rules/drl.py",
        ("gradient *= 2 * scale", "gradient *= scale"),
        ("residual -= noise", "residual += noise"),
        ('if block.kind == "conv" else 1)', 'if block.kind == "dense" else 1)'),
        ("dlogits.dtype.type(-options.eta)", "dlogits.dtype.type(-1)"),
    ),
    *_on(
        "bp",
        "data/augment.py",
        ("images[:, :, ::-1, :]", "images[:, ::-1, :, :]"),
        ("+ rows[:, None] - padding", "+ rows[:, None] - padding + 1"),
        ("1 / (255 * np.asarray(std, np.float64))", "1 / (256 * np.asarray(std, np.float64))"),
        ("generator.random(count) < flip", "generator.random(count) > 1.5 * flip"),
    ),
    *_on(
        "bp",
        "data/prepare.py",
        ("taken[:, :, ::-1, channel]", "taken[:, ::-1, :, channel]"),
        ("np.add(lines, self.shift,", "np.subtract(lines, self.shift,"),
        ("(np.flatnonzero(moved == -step), 0,", "(np.flatnonzero(moved == -step), 1,"),
    ),
    *_on("bp", "data/order.py", (".permutation(count) if shuffle", ".integers(0, count, count) if shuffle")),
    *_on(
        "ldrl",
        "checkpoint.py",
        ("experiment.feedback_step = step, feedback_step", "experiment.feedback_step = 0, feedback_step"),
        ("for i, moment in enumerate(moments):", "for i, moment in enumerate(moments[:0]):"),
        ('named[f"rule/{name}"] = array', 'named[f"rule/{name}"] = array.copy()'),
    ),
    *_on(
        "bp",
        "initialise.py",
        ("generator.uniform(-1, 1, shape) / math.sqrt(fan_in)", "generator.uniform(-1, 1, shape) / fan_in"),
    ),
]  # fmt: skip
ALL = FEW + MUTANTS


def test_there_are_many_mutants_and_each_changes_one_place():
    """When the code changes, they have to follow."""
    assert len(ALL) >= 45
    assert [name_of(mutation) for mutation in ALL if occurrences(mutation) != 1] == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return package(tmp_path_factory.mktemp("mutated"))


def _audit(folder, config):
    name, variant, settings = CONFIGS[config]
    words = ["audit", str(ROOT / "runs" / f"{name}.yml"), "--variant", variant]
    words += [word for setting in settings for word in ("--set", setting)]
    program = "import sys; from arraytp.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-B", "-c", program, *words], cwd=folder, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(folder)})  # fmt: skip


def _is_caught(folder, mutation):
    with made(folder, mutation):
        found = _audit(folder, *mutation.by)
    assert found.returncode == 1, found.stderr[-2000:]
    assert "Traceback" not in found.stderr
    assert [line for line in found.stdout.splitlines() if line.endswith("FAIL")]


@pytest.mark.parametrize("mutation", FEW, ids=name_of)
def test_a_few_mutants_are_caught(copy, mutation):
    _is_caught(copy, mutation)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTANTS, ids=name_of)
def test_every_mutant_is_caught(copy, mutation):
    _is_caught(copy, mutation)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_without_a_mistake_these_audits_pass(copy, config):
    found = _audit(copy, config)
    assert (found.returncode, found.stderr) == (0, "")
