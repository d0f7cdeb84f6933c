"""One-line mistakes that the tests must notice: made in a copy of the package, each must make its tests fail."""

import shutil
import subprocess
import sys

import pytest
from mistakes import ROOT, Mutation, made, name_of, occurrences, package


def _in(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutation]:
    """Return mutations of a file, one of whose `tests` must fail."""
    return [Mutation(file, old, new, tuple(tests.split())) for old, new in changes]


MUTATIONS = [
    *_in(
        "ops/activations.py",
        "ops/test_activations.py",
        ("LEAKY_SLOPE = 0.1", "LEAKY_SLOPE = 0.01"),
        ("u *= z.dtype.type(0.5)", "u *= z.dtype.type(0.25)"),
        ("    u += u\n", "    u += 0\n"),
        ("return (s >= 0)", "return (s > 0)"),
        ("(s > 0).astype(s.dtype)", "(s >= 0).astype(s.dtype)"),
        ("one - s * s", "one - s"),
        ("xp.minimum(s, s.dtype.type(0)) + one", "xp.minimum(s, s.dtype.type(0))"),
    ),
    *_in(
        "ops/conv.py",
        "ops/test_conv.py",
        ("as_matrix(weight) + bias, patches", "as_matrix(weight), patches"),
        ("@ rows, rows.sum(axis=0)", "@ rows, rows.mean(axis=0)"),
        ("border < window.kernel", "border <= window.kernel"),
        ("window.stride == 1 and border", "border"),
        ("weight[::-1].transpose(0, 3, 1, 2)", "weight.transpose(0, 3, 1, 2)"),
    ),
    *_in(
        "ops/dense.py",
        "ops/test_dense.py",
        ("x @ weight + bias", "x @ weight"),
        ("dz.sum(axis=0)", "dz.mean(axis=0)"),
        ("dz @ weight.T", "-dz @ weight.T"),
    ),
    *_in(
        "ops/loss.py",
        "ops/test_loss.py",
        ("logits.max(axis=1, keepdims=True)", "logits.max()"),
        ("loss / loss.dtype.type(len(labels))", "loss / loss.dtype.type(logits.shape[1])"),
        ("labels] -= dlogits", "labels] += dlogits"),
        ("dlogits /= dlogits.dtype.type(len(labels))", "dlogits /= dlogits.dtype.type(1)"),
        ("[None, :] < labels[:, None]", "[None, :] > labels[:, None]"),
        ("(logits > own)", "(logits >= own)"),
    ),
    *_in(
        "ops/patches.py",
        "ops/test_patches.py ops/test_conv.py",
        ("return total // 2, total - total // 2", "return total - total // 2, total // 2"),
        ("-(-size // stride) - 1", "size // stride - 1"),
        ("self.left + self.width + self.right - self.kernel) // self.stride + 1",
         "self.left + self.width + self.right - self.kernel + 1) // self.stride"),
        ("slice(j, j + self.stride", "slice(i, i + self.stride"),
        ("slice(self.left, self.left + self.width)", "slice(self.top, self.top + self.width)"),
        ("fields[:, :, :, i, j]", "fields[:, :, :, j, i]"),
        ("] += fields", "] = fields"),
        ("    bordered.fill(0)\n", ""),
        ("stride * pixel, row, element)", "stride * pixel, pixel, element)"),
        ("top = bottom = left = right = padding", "top = bottom = left = right = 0"),
        ("k - 1 - window.top, k - 1 - window.bottom", "k - 1 - window.bottom, k - 1 - window.top"),
        ("max(0, j - window.left)", "max(0, j - window.right)"),
        ("    out.fill(0)\n", ""),
    ),
    *_in(
        "ops/pool.py",
        "ops/test_pool.py",
        ("xp.arange(k * k, 0, -1, dtype=xp.uint8)", "xp.arange(1, k * k + 1, dtype=xp.uint8)"),
        ("value=-xp.inf", "value=0.0"),
        ("] += dout * chosen", "] = dout * chosen"),
        ("(rows - window.top) * window.width", "rows * window.width"),
        ("window.stride * np.arange(window.out_width)", "np.arange(window.out_width)"),
        ("stride * row, stride * pixel, channel)", "stride * pixel, stride * row, channel)"),
        ("out.fill(0)\n    np.add", "pass\n    np.add"),
    ),
    *_in(
        "network.py",
        "network/test_gradients.py",
        ("activation_backward(df, activation_forward(z, block.activation), block.activation)",
         "activation_backward(df, z, block.activation)"),
        ("df = ds if index is None", "df = -ds if index is None"),
    ),
    *_in(
        "fused.py",
        "network/test_fused.py",
        ("        s += bias\n", "        s += 0\n"),
        ("        z += bias[part]\n", "        z += 0\n"),
        ("lane_weight[number] += share", "lane_weight[number] = share"),
        ("lane_bias[number] += dz_bias", "lane_bias[number] = dz_bias"),
        ("x.dtype, -np.inf)", "x.dtype, 0.0)"),
        ("lanes[:, part].sum(axis=0, out=out[part])", "lanes[:1, part].sum(axis=0, out=out[part])"),
        ("_lane_count(dweight.nbytes))", "workspace.threads)"),
        ("feedback.T, dx.reshape", "feedback.T * 0.5, dx.reshape"),
        ("None if dx is None else dx[part][inner]", "None if dx is None else dx[part][: len(dz[inner])]"),
        ("gradients(x[part][inner],", "gradients(x[part][: len(dz[inner])],"),
        ("dweight[::-1].transpose(1, 2, 0, 3)", "dweight.transpose(1, 2, 0, 3)"),
    ),
    *_in(
        "rules/bp.py",
        "rules/test_rules.py",
        ("network.weights[n] if n > 0", "-network.weights[n] if n > 0"),
        ("return result[::-1]", "return result"),
    ),
    *_in(
        "rules/fa.py",
        "rules/test_rules.py",
        ('state[f"feedback/{n}/weight"] if n > 0', "network.weights[n] if n > 0"),
        ('seed, "feedback", n)', 'seed, "init", n)'),
        ("start=1", "start=0"),
    ),
    *_in(
        "rules/dfa.py",
        "rules/test_rules.py",
        ("if n == last:", "if n == 0:"),
        ('seed, "feedback", n)', "0, \"feedback\", n)"),
        ('product(dlogits, state', 'product(-dlogits, state'),
    ),
    *_in(
        "optim.py",
        "optim/test_optimizers.py",
        ("        v += g\n", "        v += g * number(1 - optimizer.momentum)\n"),
        ("        g = v\n", ""),
        ("        decayed += g\n", "        decayed -= g\n"),
        ("math.sqrt(1 - optimizer.beta2**step)", "1 - optimizer.beta2**step"),
        ("work *= number(1 / correction2)", "work *= number(1)"),
        ("rate = lr * correction2 / correction1", "rate = lr / correction1"),
        ("rate = lr / correction1", "rate = lr"),
        ("    work += number(optimizer.epsilon)\n", ""),
        ("m *= number(optimizer.beta1)", "m *= number(optimizer.beta2)"),
        ("work *= number(1 - optimizer.beta2)", "work *= number(1 - optimizer.beta1)"),
        ("state.step += 1", "state.step += 2"),
        ("epoch / schedule.t_max)) / 2", "epoch / schedule.t_max))"),
        ("math.pi * epoch / schedule.t_max", "math.pi * min(epoch / schedule.t_max, 1)"),
        ("(lr - schedule.eta_min)", "lr"),
    ),
    *_in(
        "rules/gait_prop.py",
        "rules/test_gait_prop.py rules/test_local_losses.py rules/test_rules.py",
        ("number(0.5) * dlogits", "dlogits"),
        ("number(-2) * per_sample", "number(-1) * per_sample"),
        ("if options.rescale_updates:\n            m = m / gamma", "if options.rescale_updates:\n            m = m"),
        ("per_sample(still, t), x, t)", "per_sample(still, t), t, t)"),
        ("        check_range(block, n, y)\n", ""),
        ("e / e.dtype.type(2), block)", "e, block)"),
        ("np.finfo(flat.dtype).tiny", "0"),
        ('options.norm == "l2_squared"', 'options.norm != "l2_squared"'),
        ("np.prod(block.out_shape)", "np.prod(block.passed_shape)"),
        ("number(scale) / norm", "number(scale) * norm"),
        ("per_sample(gamma, a) * derivative * derivative", "per_sample(gamma, a) * derivative"),
        ("(s.dtype.type(1) - epsilon) * a", "s.dtype.type(1) * a"),
        ("(moved < 0) != (a < 0)", "(moved < 0) == (a < 0)"),
        ("e.dtype.type(-2)", "e.dtype.type(2)"),
        ('dtype == "float32"', 'dtype == "float64"'),
        ('carried = block_flops if options.form == "literal"', 'carried = block_flops if options.form != "literal"'),
    ),
    *_in(
        "inverse.py",
        "network/test_inverse.py rules/test_gait_prop.py",
        ("y[part], block.activation) - bias", "y[part], block.activation) + bias"),
        ("out[part] -= others * x[part]", "out[part] += others * x[part]"),
        ("coverage(window, x) - x.dtype.type(1)", "coverage(window, x)"),
        ("if estimate > 1 / np.finfo(dtype).eps", "if estimate > 1 / np.finfo(np.float64).eps"),
        ("dz[:, units:] = 0", "dz[:, units:] = 1"),
        ("<= NEAR_ORTHOGONAL", "<= 50"),
        ("lambda rows: symmetric_solve(factors, rows)", "lambda rows: rows"),
        ("value <= low", "value < low"),
        ("value >= high", "value > high"),
        ("enumerate(blocks[1:], start=1)", "enumerate(blocks[1:], start=0)"),
        ("if block.pool is not None:", "if False:"),
        ('"leaky-relu", "elu", "tanh")', '"leaky-relu", "elu", "relu", "tanh")'),
    ),
    *_in(
        "ops/solve.py",
        "ops/test_solve.py network/test_inverse.py",
        ("x = x + _substitute(factors, y - x @ factors.matrix)", "pass"),
        ("sum(axis=1).max()\n    if xp", "sum(axis=0).max()\n    if xp"),
        ("[rows.start :: order + 1] = 1", "[:: order + 1] = 1"),
        ("[:: order + 1] += 1", "[:: order + 1] -= 0"),
        ("symmetric_solve(factors, y @ factors.matrix.T)", "symmetric_solve(factors, y @ factors.matrix)"),
        ("matrix.T[rows].copy()", "matrix[rows].copy()"),
        ('if reciprocal > 0 else float("inf")', "if reciprocal > 0 else 0.0"),
        ("return norm * growth if", "return growth if"),
        ('return float("nan")', "return 1.0"),
        ("absolute(x).sum(axis=1).max()) / order", "absolute(x).sum(axis=1).max())"),
    ),
    *_in(
        "ops/excess.py",
        "ops/test_excess.py",
        (": n + 1] -= 1", ": n + 1] += 1"),
        ("w[rows.stop :].T, out=out[rows, rows.stop :]", "w[: n - rows.stop].T, out=out[rows, rows.stop :]"),
        ("2 * squares - float(np.dot(diagonal, diagonal))", "2 * squares"),
    ),
    *_in(
        "orthogonality.py",
        "optim/test_orthogonality.py",
        ("4 * strength", "2 * strength"),
        ("rows == columns", "rows >= columns"),
        ("p // 2 not in given", "True"),
        ("total[:, columns] = g[:, columns]", "total[:, columns] = 0"),
    ),
    *_in(
        "optim.py",
        "optim/test_orthogonality.py",
        ("if optimizer.orthogonality:", "if not optimizer.orthogonality:"),
    ),
    *_in(
        "train.py",
        "train/test_loop.py train/test_resume.py",
        ("islice(batches, steps - position.step)", "islice(batches, steps)"),
        ("-(-steps // per_epoch)", "steps // per_epoch"),
        ("self.metrics.rows[: self.position.epoch + 1]", "self.metrics.rows"),
        ("self.position.step > train.steps", "self.position.step < train.steps"),
    ),
    *_in(
        "initialise.py",
        "test_initialise.py rules/test_rules.py",
        ("generator.uniform(-1, 1, shape) / math.sqrt(fan_in)", "generator.uniform(-1, 1, shape) / fan_in"),
        ("math.sqrt(2 / (fan_in + fan_out))", "math.sqrt(2 / fan_in)"),
        ("np.where(np.diag(r) < 0, -1.0, 1.0)", "1.0"),
        ("math.sqrt(fans(shape)[0])", "math.sqrt(fans(shape)[1])"),
        ("stream(seed, purpose, *key, 1)", "stream(seed, purpose, *key, 0)"),
        ("taps * shape[-2], taps * shape[-1]", "shape[-2], shape[-1]"),
    ),
    *_in(
        "compare.py",
        "test_compare.py",
        ("np.clip(float(xp.multiply(u, v).sum()) / norms, -1.0, 1.0)", "float(xp.multiply(u, v).sum()) / norms"),
        ("_norm(u - v), _norm(v)", "_norm(u - v), _norm(u)"),
        ("np.degrees(", "float("),
        ("if not norms > 0", "if norms < 0"),
    ),
    *_in(
        "streams.py",
        "test_streams.py test_initialise.py",
        ('"feedback": 1', '"feedback": 0'),
        ("spawn_key=(_PURPOSES[purpose], *key)", "spawn_key=(_PURPOSES[purpose], len(key))"),
    ),
    *_in(
        "parallel.py",
        "test_parallel.py network/test_memory.py",
        ("flat is None or flat.size < size", "True"),
        ("min(first + length, stop)", "first + length"),
    ),
    *_in(
        "experiment.py",
        "rules/test_training.py",
        ("(rank < 5)", "(rank < 4)"),
        ('summed = loss * len(labels) if reduction == "mean"', 'summed = loss * len(labels) if reduction == "sum"'),
    ),
    *_in(
        "trace.py",
        "cli/test_trace.py test_trace.py",
        ("(step, n, k, NOISES[name])", "(step, n, k, 0)"),
        ("x + delta if target.t is None", "x - delta if target.t is None"),
        ("if not self.not_finite and", "if"),
        ("array.dtype != dtype or shape not in", "shape not in"),
        ("labels.min() < 0", "labels.min() < -1"),
        ('sink.put(f"bp/{n}/{part}", gradient)', 'sink.put(f"bp/{n}/{part}", update)'),
    ),
    *_in("rules/tp.py", "test_trace.py", ("Target(t - passed.s[n + 1], t)", "Target(passed.s[n + 1] - t, t)")),
    *_in("rules/ldrl.py", "test_trace.py", ("omega * m - 2 * theta * n", "omega * m - theta * n")),
    *_in("rules/drl.py", "test_trace.py", ("-2 / averaged", "-1 / averaged"), ("residual -= noise", "pass")),
    *_in(
        "checkpoint.py",
        "rules/test_training.py",
        ("experiment.feedback_step = step, feedback_step", "experiment.feedback_step = 0, feedback_step"),
        ("for i, moment in enumerate(moments):", "for i, moment in enumerate(moments[:1]):"),
    ),
    *_in(
        "data/writer.py",
        "data/test_writer.py",
        ("return skipped + sum(", "return skipped + 0 * sum("),
        ("if finished else np.empty((0, 256)", "if not finished else np.empty((0, 256)"),
        ("return finished[:number]", "return finished"),
        ("and path.name not in keep", ""),
    ),
    *_in(
        "data/journal.py",
        "data/test_writer.py",
        ("self._file.truncate()\n", "pass\n"),
        ("if next(lines, b\"\") == self._head", "if next(lines, b\"\")"),
        ("if line.endswith(b\"\\n\"):", "if line:"),
    ),
    *_in(
        "ops/pool.py",
        "ops/test_pool.py",
        ("for element in reversed(range(k * k)):", "for element in range(k * k):"),
        ("np.clip(position, 0, size - 1, out=position)", "pass"),
        ("out.fill(0)\n    out.reshape", "pass\n    out.reshape"),
    ),
    *_in(
        "ops/activations.py",
        "ops/test_activations.py",
        ("* xp.expm1(-xp.absolute(delta)) * xp.sign(delta)", "* xp.expm1(-xp.absolute(delta))"),
        ("xp.minimum(xp.maximum(s, moved), zero)", "xp.minimum(s, zero)"),
        ("xp.tanh(moved) * xp.tanh(s))", "xp.tanh(s) * xp.tanh(s))"),
        ("(s < zero) & (moved < zero)", "(s < zero)"),
    ),
    *_in(
        "ops/noise.py",
        "ops/test_noise.py",
        ("(first + start) // CHUNK", "start // CHUNK"),
        ('stream(seed, "noise", *key,', 'stream(seed, "noise",'),
        ("    out *= out.dtype.type(sigma)\n", ""),
        ("if first % CHUNK:", "if False:"),
        ('sequence(seed, "noise", *key, first // CHUNK)', 'sequence(seed, "noise", *key)'),
        ('sequence(seed, "noise", *key, first // CHUNK)', 'sequence(seed, "noise", first // CHUNK)'),
    ),
    *_in(
        "feedback.py",
        "feedback/test_modules.py rules/test_target_propagation.py rules/test_drl.py",
        ("dr.reshape(-1, dr.shape[-1]).sum(axis=0)", "dr.reshape(-1, dr.shape[-1]).mean(axis=0)"),
        ("index, unpool)) + bias", "index, unpool))"),
        ("theta.copy()", "theta"),
        ("block.weight_shape[::-1] if block.window is None", "block.weight_shape if block.window is None"),
        ('position = n if "feedback/0/weight" in state else n - 1', "position = n - 1"),
        ("of_block(training.optimizer, position)", "of_block(training.optimizer, 0)"),
        ("OptimizerState(step, moments)", "OptimizerState(0, moments)"),
        ('if reduction != "mean":', "if False:"),
        ("len(values) != len(labels)", "len(values) < len(labels)"),
        ("if block.auxiliary:", "if False:"),
    ),
    *_in(
        "feedback.py",
        "feedback/test_theorems.py",
        ("omega * m - theta * n", "omega * m - 2 * theta * n"),
        ("seen * (owner == number)", "seen"),
        ("xp.ones((1, block.window.height", "2 * xp.ones((1, block.window.height"),
    ),
    *_in(
        "rules/dtp.py",
        "rules/test_target_propagation.py feedback/test_modules.py",
        ("-beta * len(dlogits)", "-beta"),
        ("delta.dtype.type(-1 / scale)", "delta.dtype.type(-2 / scale)"),
        ("options.beta if options.divide_by_beta else 1.0", "1.0"),
        ("(r - s_noisy) * s.dtype.type(2 / len(s))", "(r - s) * s.dtype.type(2 / len(s))"),
        ("step * iterations + k, gradients", "step + k, gradients"),
        ("n, options.unpool, sigma, (seed, step)", "n, options.unpool, sigma, (step, seed)"),
    ),
    *_in(
        "rules/tp.py",
        "rules/test_target_propagation.py",
        ("passed.logits + output_difference", "passed.logits - output_difference"),
    ),
    *_in(
        "rules/ldrl.py",
        "feedback/test_modules.py feedback/test_theorems.py",
        ("-two * epsilon, d1", "two * epsilon, d1"),
        ("two * (r_eta - s), d2", "two * r_eta, d2"),
        ("omega.dtype.type(sigma**2)", "omega.dtype.type(sigma)"),
        ("s_epsilon, index_epsilon) - a(s_next, index)", "s_epsilon, index) - a(s_next, index)"),
    ),
    *_in(
        "rules/ldrl_parallel.py",
        "rules/test_target_propagation.py",
        ("k * options.samples + sample", "k"),
        ("mean /= mean.dtype.type(options.samples)", "pass"),
    ),
    *_in(
        "rules/drl.py",
        "rules/test_drl.py feedback/test_modules.py",
        ("gradient *= 2 * scale", "gradient *= scale"),
        ("np.float64(sigma) ** 2 * noise.size", "np.float64(sigma) * noise.size"),
        ("residual -= noise", "residual += noise"),
        ("- passed.logits\n", "\n"),
        ('if block.kind == "conv" else 1)', 'if block.kind == "dense" else 1)'),
        ("dlogits.dtype.type(-options.eta)", "dlogits.dtype.type(-1)"),
        ("-2 / averaged", "-1 / averaged"),
        ("smallest < 1e-3", "smallest > 1e-3"),
    ),
    *_in(
        "train.py",
        "train/test_feedback_epochs.py",
        ("position.passes + 1, position.feedback_epochs + 1", "position.passes, position.feedback_epochs + 1"),
        ("batches(position.passes, position.feedback_batch)", "batches(position.passes, 0)"),
        ("while position.feedback_epochs < due and position.batch == 0:", "while position.feedback_epochs < due:"),
        ("position.passes + 1, 0\n", "position.passes + 1, position.feedback_epochs\n"),
    ),
    *_in(
        "experiment.py",
        "train/test_feedback_epochs.py",
        ("self.feedback_step += 1", "pass"),
        ("return replace(options, beta=options.compare_beta)", "return options"),
        ("int(between if epoch else first)", "int(first if epoch else between)"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name_of)
def test_each_mutation_changes_one_place(mutation):
    """When the code changes, its mutations have to follow."""
    assert occurrences(mutation) == 1
    assert all((ROOT / "tests" / test).exists() for test in mutation.by)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = package(tmp_path_factory.mktemp("mutated"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "mutations"))
    shutil.copy(ROOT / "setup.cfg", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=name_of)
def test_each_mutation_is_noticed(copy, mutation):
    with made(copy, mutation):
        tests = [f"tests/{test}" for test in mutation.by]
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        found = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    # 1: a test failed; anything else (collection errors, none failed) proves nothing.
    assert found.returncode == 1, found.stdout[-2000:]
