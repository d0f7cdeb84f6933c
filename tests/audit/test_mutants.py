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
WIDE = (
    "network.blocks=[{type: dense, units: 48, activation: elu}, {type: dense, units: 48, activation: leaky-relu}, "
    "{type: dense, units: 10}]"
)
AUGMENTED = ("data.flip=0.5", "data.crop_padding=2")
SGD = ("optimizer={name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 1e-3}", "schedule={name: cosine}")
# Shipped configs, most of them with small networks: (config, variant, settings).
CONFIGS = {
    "bp": ("quickstart", "bp", (CONV, *AUGMENTED, "train.batch_size=512")),
    "fa": ("quickstart", "fa", (CONV,)),
    "orthogonal": ("quickstart-gait-prop", "fa", (SQUARE,)),
    "dfa": ("quickstart", "dfa", (CONV,)),
    "ldrl": ("quickstart", "ldrl-noise", (CONV, "rule={name: ldrl, output_noise: sampled}", *SGD)),
    "output noise": ("quickstart", "ldrl-noise", (CONV, "rule={name: ldrl, output_noise: expected}", *SGD)),
    "batch": ("quickstart", "ldrl-noise", ("rule={name: ldrl, output_noise: sampled}", "train.batch_size=128")),
    "accumulate": (
        "quickstart",
        "ldrl-noise",
        (CONV, "rule={name: ldrl, output_noise: sampled, unpool: accumulate, divide_by_beta: true}"),
    ),
    "dtp": (
        "quickstart",
        "ldrl-noise",
        (CONV, "rule={name: dtp, feedback: {iterations: 2, optimizer: {name: adam, lr: 1e-3}}}"),
    ),
    "tp": ("quickstart", "ldrl-noise", (CONV, "rule={name: tp, feedback: {iterations: 2}}")),
    "parallel": (
        "quickstart",
        "ldrl-noise",
        (CONV, "rule={name: ldrl-parallel, samples: 3, feedback: {iterations: 2}}"),
    ),
    "expected": ("quickstart", "ldrl-noise", (CONV, "rule={name: ldrl, output_noise: sampled, expected: true}")),
    "drl": ("quickstart", "ldrl-noise", (CONV, "rule={name: drl}")),
    "drl expected": ("quickstart", "ldrl-noise", (CONV, "rule={name: drl, expected: true}")),
    "drl optimum": ("quickstart", "ldrl-noise", (CONV, "rule={name: drl, expected: optimum}")),
    "sign": ("quickstart", "fa", (CONV, "rule={name: sign-symmetry, magnitude: batch}")),
    "kp": ("quickstart", "fa", (CONV, "rule={name: kolen-pollack, decay: 0.1}")),
    "mirror": ("quickstart", "fa", (CONV, "rule={name: weight-mirror}")),
    "ia": ("quickstart", "fa", (CONV, "rule={name: alignment, loss: ia}")),
    "gnt": ("quickstart", "fa", (CONV, "rule={name: gnt}")),
    "ridge": ("quickstart", "fa", (CONV, "rule={name: ridge-tp}")),
    "gp": ("quickstart-gait-prop", "gp", (SQUARE, "rule={name: gait-prop, form: literal}")),
    "pseudo": (
        "quickstart-gait-prop",
        "gp",
        (
            CONV,
            "network.square=false",
            "rule={name: gait-prop, inverse: pseudo}",
            "optimizer.orthogonality_on=all-but-first",
            "optimizer.orthogonality_every=3",
        ),
    ),
    "run": (
        "quickstart",
        "fa",
        (
            CONV,
            "schedule={name: cosine, t_max: 3}",
            "loss={label_smoothing: 0.3}",
            "compare={every: 10, against: [bp, gnt], damping: 7}",
        ),
    ),
    "not rescaled": (
        "quickstart-gait-prop",
        "gp",
        (SQUARE, "rule={name: gait-prop, form: difference, rescale_updates: false}"),
    ),
    "large": ("quickstart-gait-prop", "gp", (WIDE, "rule={name: gait-prop, form: literal}", "train.batch_size=128")),
    "large ridge": ("quickstart", "fa", (WIDE, "rule={name: ridge-tp}", "train.batch_size=128")),
    "lists": (
        "quickstart",
        "ldrl-noise",
        (
            CONV,
            "rule={name: ldrl, output_noise: sampled, expected: true, "
            "feedback: {iterations: [2, 1, 2], sigma: [0.1, 0.2, 0.3], "
            "optimizer: {name: sgd, lr: [1e-3, 2e-3, 3e-3]}}}",
        ),
    ),
    "fixed": ("quickstart", "fa", (CONV, "rule={name: sign-symmetry, magnitude: fixed}")),
    "symmetric": ("quickstart", "ldrl-noise", (CONV, "rule={name: ldrl, feedback_init: symmetric}")),
}


def _on(config: str, file: str, *changes: tuple[str, str]) -> list[Mutation]:
    """Return mutations of a file that the audit of a config must notice."""
    return [Mutation(file, old, new, (config,)) for old, new in changes]


# Tested in every run: a shifted crop, swapped noise, a wrong sign.
FEW = [
    *_on("bp", "data/prepare.py", ("draws.rows - self.padding", "draws.rows - self.padding + 1")),
    *_on("ldrl", "ops/noise.py", ("EPSILON, ETA = 0, 1", "EPSILON, ETA = 1, 0")),
    *_on("gp", "fast/inverse.py", ("out[part] -= others * x[part]", "out[part] += others * x[part]")),
]
MUTANTS = [
    *_on(
        "bp",
        "ops/activations.py",
        ("u *= z.dtype.type(0.5)", "u *= z.dtype.type(0.25)"),
        ("minimum(s, s.dtype.type(0)) + s.dtype.type(1)", "minimum(s, s.dtype.type(0))"),
        ("return s.dtype.type(1) - s * s", "return s.dtype.type(1) - s"),
        ("xp.tanh(s + delta) * xp.tanh(s))", "xp.tanh(s) * xp.tanh(s))"),
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
        ("labels] -= number(1 - smoothing)", "labels] += number(1 - smoothing)"),
        ("total /= total.dtype.type(len(labels))", "total /= total.dtype.type(1)"),
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
        ("(xp.uint8(k * k) - xp.arange(k * k, dtype=xp.uint8))", "xp.arange(1, k * k + 1, dtype=xp.uint8)"),
        ("] += dout * chosen", "] = dout * chosen"),
        ("(rows - window.top) * window.width", "rows * window.width"),
    ),
    *_on(
        "bp",
        "model/plain.py",
        ("dz = block.activation.backward(df, block.activation(z))", "dz = df"),
        ("df = ds if index is None", "df = -ds if index is None"),
    ),
    *_on(
        "bp",
        "fast/passes.py",
        ("        s += bias\n", "        s += 0\n"),
        ("lane_weight[number] += share", "lane_weight[number] = share"),
        ("through.T, dx.reshape", "through.T * 0.5, dx.reshape"),
        ("lane_weight[:, part].sum,", "lane_weight[:1, part].sum,"),
    ),
    *_on("bp", "fast/products.py", ("weight[::-1].transpose(1, 2, 0, 3)", "weight.transpose(1, 2, 0, 3)")),
    *_on("bp", "rules/bp.py", ("through=at.weight", "through=-at.weight")),
    *_on("fa", "rules/fa.py", ("through=B.get(at.n)", "through=at.weight")),
    *_on("orthogonal", "rules/fa.py", ('seed, "feedback", n)', 'seed, "init", n)')),
    *_on("dfa", "rules/dfa.py", ("product(e, B", "product(-e, B"), ("if at.n + 1 in B", "if at.n + 2 in B")),
    *_on(
        "bp",
        "optim.py",
        ("math.sqrt(1 - optimizer.beta2**step)", "1 - optimizer.beta2**step"),
        ("return 1 / correction2, lr / correction1", "return 1 / correction2, lr"),
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
        ("return 1.0, lr * correction2 / correction1", "return 1.0, lr / correction1"),
    ),
    *_on("gp", "fast/orthogonality.py", ("4 * strength", "2 * strength")),
    *_on("gp", "ops/excess.py", (": n + 1] -= 1", ": n + 1] += 1")),
    *_on(
        "gp",
        "rules/gait_prop.py",
        ("number(0.5) * batch.dlogits", "batch.dlogits"),
        ("number(-2) * m", "number(-1) * m"),
        ("if options.rescale_updates:\n            m = m / gamma", "if options.rescale_updates:\n            m = m"),
        ("epsilon * d * d", "epsilon * d"),
        ("number(scale) / norm", "number(scale) * norm"),
        ("np.prod(block.out_shape)", "np.prod(block.next_shape)"),
    ),
    *_on(
        "gp",
        "fast/inverse.py",
        ("f_inverse(y[part]) - at.bias", "f_inverse(y[part]) + at.bias"),
        ("coverage(window, x) - x.dtype.type(1)", "coverage(window, x)"),
        ("dz[:, units:] = 0", "dz[:, units:] = 1"),
    ),
    *_on(
        "pseudo",
        "fast/inverse.py",
        ("return gram_solve(inverse, rows)", "return rows"),
        ("product(workspace, dz, matrix.T, dx)", "product(workspace, dz, matrix.T * 2, dx)"),
    ),
    *_on("pseudo", "fast/factors.py", ("self._triangle(n), ridge or 0)", "self._triangle(n), 0.1)")),
    *_on(
        "sign",
        "rules/sign_symmetry.py",
        ("copysign(B, W, out=B)", "copysign(B, -W, out=B)"),
        ("scale(B.shape), 0,", "2 * scale(B.shape), 0,"),
    ),
    *_on("kp", "optim.py", ("type(1 - twin[1])", "type(1 - 2 * twin[1])")),
    *_on("mirror", "rules/weight_mirror.py", ("type(-1 / rows(at))", "type(1 / rows(at))"),
         ("y = at.alone(x)", "y = at.alone(at.s)")),
    *_on("ia", "rules/alignment.py", ("weight if name in OF_SAMPLES", "2 * weight if name in OF_SAMPLES"),
         ('at.outer(back, y, "null twice")', 'at.outer(back, -y, "null twice")')),
    *_on(
        "gnt",
        "rules/gnt.py",
        ("dtype.type(-options.beta * len(batch))", "dtype.type(-options.beta)"),
        ("batch.gauss_newton(options.damping)", "batch.gauss_newton(2 * options.damping)"),
    ),
    *_on(
        "ridge",
        "rules/ridge_tp.py",
        ("pseudo_inverses(options.ridge)", "pseudo_inverses()"),
        ("f.inverse_difference(s, change)", "f.inverse_difference(s, -change)"),
    ),
    *_on(
        "pseudo",
        "fast/orthogonality.py",
        ("range(1, len(blocks))", "range(2, len(blocks))"),
        ("(step + 1) % every", "step % every"),
        ("else every * optimizer", "else optimizer"),
    ),
    *_on("gp", "ops/solve.py", ("[rows.start :: order + 1] = 1", "[rows.start :: order + 1] = 2"),
         ("return x.T\n", "return -x.T\n"), ("product(y, factors.matrix.T)", "product(y, factors.matrix)")),
    *_on("gp", "ops/activations.py", ("s * s.dtype.type(1 / LEAKY_SLOPE)", "s * s.dtype.type(2 / LEAKY_SLOPE)"),
         ("LEAKY_SLOPE = 0.1", "LEAKY_SLOPE = 0.01")),
    *_on(
        "ldrl",
        "ops/noise.py",
        ("    out *= out.dtype.type(sigma)\n", ""),
        ("divmod(first + part.start, CHUNK)", "divmod(part.start, CHUNK)"),
        ('stream(seed, "noise", number, *key,', 'stream(seed, "noise", number,'),
    ),
    *_on(
        "ldrl",
        "fast/feedback_training.py",
        ("(2 / self._batch), out=folded)", "(1 / self._batch), out=folded)"),
        ("(2 / self._batch), out=d)", "(1 / self._batch), out=d)"),
        ("sigma, first + part.start, *key)", "sigma, 0, *key)"),
        ("xp.add if sign > 0 else", "xp.subtract if sign > 0 else"),
        ("returned.sum() / scalar(len(self.at.batch))", "returned.sum()"),
    ),
    *_on(
        "dtp",
        "fast/feedback_training.py",
        ("biases.sum(axis=0) * scalar(2 /", "biases.sum(axis=0) * scalar(1 /"),
        ("at.batch.seed, at.batch.number, at.n", "at.batch.number, at.batch.seed, at.n"),
    ),
    # These need batches of several slices per lane, as in a run.
    *_on(
        "batch",
        "fast/feedback_training.py",
        ("else xp.subtract)", "else xp.add)"),
        ("returned[number] += iterate(", "returned[number] = iterate("),
    ),
    *_on("ldrl", "model/plain.py", ("omega.dtype.type(2 / batch)", "omega.dtype.type(1 / batch)")),
    *_on(
        "ldrl",
        "model/feedback.py",
        ("xp.ones((1, block.window.height", "2 * xp.ones((1, block.window.height"),
        ("block.activation.difference(u, du)", "-block.activation.difference(u, du)"),
    ),
    *_on("ldrl", "fast/overlaps.py", ("xp.ones((1, window.height", "2 * xp.ones((1, window.height")),
    *_on(
        "ldrl",
        "rules/feedback.py",
        ("[state.moments[n, part] for part in gradients]",
         "[tuple(m.copy() for m in state.moments[n, part]) for part in gradients]"),
        ("at_block(training.optimizer.lr, n - 1)", "at_block(training.optimizer.lr, 0)"),
    ),
    *_on(
        "dtp",
        "rules/feedback.py",
        ("sigma, number * iterations, workspace", "sigma, number, workspace"),
        ("OptimizerState(descent.step + k,", "OptimizerState(descent.step,"),
    ),
    *_on("accumulate", "rules/dtp.py", ("options.beta if options.divide_by_beta else 1.0", "1.0")),
    *_on("accumulate", "ops/pool.py", ('if mode == "accumulate":', 'if mode == "overwrite":')),
    *_on(
        "ldrl",
        "rules/dtp.py",
        ("-beta * len(batch)", "-beta"),
        ("scale=-1 / (len", "scale=-2 / (len"),
    ),
    *_on(
        "dtp",
        "rules/dtp.py",
        ("    r -= epsilon  #", "    #"),
        ("    r += bias  #", "    #"),
        ("at.add(r, a)", "at.subtract(r, a)"),
        ("delta = at.feedback_difference(", "delta = -at.feedback_difference("),
    ),
    *_on("tp", "rules/tp.py", ("batch.logits + dtp.output_difference", "batch.logits - dtp.output_difference")),
    *_on("output noise", "rules/ldrl.py", ("a = (M * (2 * sigma**2", "a = (M * (2 * sigma"),
         ("gradient += share", "gradient -= share")),
    *_on("expected", "rules/ldrl.py", ("scale = 2 * descent.sigma**2", "scale = 2 * descent.sigma"),
         ("a[..., 0, :]).sum() / 2", "a[..., 0, :]).sum()")),
    *_on(
        "expected",
        "rules/collapse.py",
        ("-lr * momentum, lr * b", "lr * momentum, lr * b"),
        ("v += p_vt * fixed", "v -= p_vt * fixed"),
        ("power = matrix if power is None else power @ matrix", "power = matrix"),
    ),
    *_on(
        "ldrl",
        "rules/ldrl.py",
        ("at.subtract(epsilon, d1)  # −ε ⋆ d1\n    d2", "at.add(epsilon, d1)\n    d2"),
        ("d1 -= at.a_next  # a(F(s + ε)) − a(s')\n    at.subtract(epsilon, d1)  # −ε ⋆ d1\n    d2",
         "d1 += at.a_next\n    at.subtract(epsilon, d1)\n    d2"),
        ("d2 -= at.a_next", "d2 += at.a_next"),
        ("(sums.weight * omega).sum() - sums.returned", "(sums.weight * omega).sum() + sums.returned"),
        ("gradient -= at.weight * b", "gradient += at.weight * b"),
    ),
    *_on(
        "parallel",
        "rules/feedback.py",
        ("range(k * noises, (k + 1) * noises)", "range(0, noises)"),
        ("gradient / gradient.dtype.type(len(noises))", "gradient"),
    ),
    *_on(
        "drl",
        "rules/drl.py",
        ("gradient *= 2 * scale", "gradient *= scale"),
        ("residual -= noise", "residual += noise"),
        ('if block.kind == "conv" else 1)', 'if block.kind == "dense" else 1)'),
        ("dlogits.dtype.type(-options.eta)", "dlogits.dtype.type(-1)"),
    ),
    *_on("drl expected", "rules/drl.py", ("gradient -= J", "gradient += J"), (") * (scale / 2) + 1", ") * scale + 1")),
    *_on("drl expected", "fast/jacobians.py", ("df *= block.activation", "df /= block.activation"),
         ("j.sum(axis=1)", "j.mean(axis=1)")),
    *_on("drl optimum", "rules/drl.py", ("* u.T) @ J", "* u.T) @ -J")),
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
        "training/checkpoint.py",
        ("experiment.feedback_step = step, feedback_step", "experiment.feedback_step = 0, feedback_step"),
        ("for i, moment in enumerate(moments):", "for i, moment in enumerate(moments[:0]):"),
        ('named[f"rule/{name}"] = array', 'named[f"rule/{name}"] = array.copy()'),
    ),
    *_on(
        "bp",
        "model/initialise.py",
        ("generator.uniform(-1, 1, shape) / math.sqrt(fan_in)", "generator.uniform(-1, 1, shape) / fan_in"),
        ("1).uniform(-1, 1, shape[-1])", "1).uniform(-1, 1, shape[-1]) * 0"),
    ),
    *_on(
        "run",
        "training/experiment.py",
        ("optimizer.lr, epoch, state.step)", "optimizer.lr, 0, state.step)"),
        ("gnt.Options(damping=self.config.compare.damping)", "gnt.Options()"),
    ),
    *_on("run", "training/step.py", ("settings.label_smoothing", "0.0")),
    *_on("run", "training/compare.py", ("math.degrees(2 * math.atan2", "math.degrees(math.atan2")),
    *_on(
        "ldrl",
        "training/experiment.py",
        ("number = self.feedback_step\n", "number = 0\n"),
        ("            if rule.feedback is None:\n", "            if True:\n"),
    ),
    *_on("ldrl", "rules/dtp.py", ("replace(options, beta=options.compare_beta)", "replace(options, beta=0.4)")),
    *_on("bp", "ops/loss.py", ("sums = loss * size if mean else loss", "sums = loss")),
    *_on(
        "not rescaled",
        "rules/gait_prop.py",
        ("e_before *= per_sample", "e_before /= per_sample"),
        ("at.block, half=True)", "at.block, half=False)"),
        ("e.dtype.type(-2) * per_sample", "e.dtype.type(-8) * per_sample"),
        ("        if options.rescale_updates:\n            m = m / gamma\n", "        m = m / gamma\n"),
    ),
    *_on("large", "fast/inverse.py", ("else matrix_product(z, ", "else -matrix_product(z, ")),
    *_on("large ridge", "fast/inverse.py", ("return transposed(workspace, at,", "return -transposed(workspace, at,")),
    *_on(
        "lists",
        "rules/feedback.py",
        (", at_block(training.sigma, n - 1)", ", at_block(training.sigma, 0)"),
        ("lr, sigma = at_block(training.optimizer.lr, n - 1)", "lr, sigma = at_block(training.optimizer.lr, 0)"),
        ("iterations, optimizer = int(at_block(training.iterations, n - 1))", "iterations, optimizer = 1"),
    ),
    *_on("parallel", "rules/ldrl_parallel.py", ("noises=lambda options: options.samples", "noises=lambda options: 1")),
    *_on("fixed", "rules/sign_symmetry.py", ("R = initial_weight(", "R = 10 * initial_weight(")),
    *_on("fa", "rules/fa.py", ("drawn = initial_weight(", "drawn = 10 * initial_weight(")),
    *_on("symmetric", "rules/feedback.py", ("weight, bias = theta.copy()", "weight, bias = -theta")),
    *_on("gp", "ops/solve.py", ("np.float64(1 / float(reciprocal)", "np.float64(1e9 / float(reciprocal)")),
    *_on("bp", "data/order.py", ('"shuffle", epoch).permutation(count)', '"shuffle", 0).permutation(count)')),
]  # fmt: skip
ALL = FEW + MUTANTS


def test_there_are_many_mutants_and_each_changes_one_place():
    """When the code changes, the mutants must be updated."""
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
        outcome = _audit(folder, *mutation.by)
    assert outcome.returncode == 1, outcome.stderr[-2000:]
    assert "Traceback" not in outcome.stderr
    assert [line for line in outcome.stdout.splitlines() if line.endswith("FAIL")]


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
    outcome = _audit(copy, config)
    said = [line for line in outcome.stderr.splitlines() if not line.startswith("arraytp: note: ")]
    assert (outcome.returncode, said) == (0, []), outcome.stdout
