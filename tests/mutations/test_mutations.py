"""One-line mistakes that the tests must notice: made in a copy of the package, each must make its tests fail.

All of them take an hour: `pytest -m slow tests/mutations`. Every other run makes a few, other ones each day.
"""

import datetime
import os
import random
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
        ("s.dtype.type(1) - s * s", "s.dtype.type(1) - s"),
        ("minimum(s, s.dtype.type(0)) + s.dtype.type(1)", "minimum(s, s.dtype.type(0))"),
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
        ("labels] -= number(1 - smoothing)", "labels] += number(1 - smoothing)"),
        ("array -= number(smoothing / array.shape[1])", "array -= number(smoothing)"),
        ("number(smoothing / logits.shape[1]) *", "number(smoothing) *"),
        ("logits.dtype.type(0.5)", "logits.dtype.type(1)"),
        ("total /= total.dtype.type(len(labels))", "total /= total.dtype.type(1)"),
        ("[None, :] < labels[:, None]", "[None, :] > labels[:, None]"),
        ("(logits > own)", "(logits >= own)"),
        ("(rank < 5)", "(rank < 4)"),
        ("loss * size if mean", "loss if mean"),
        ("array * array.dtype.type(share)", "array * array.dtype.type(1)"),
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
        ("(xp.uint8(k * k) - xp.arange(k * k, dtype=xp.uint8))", "xp.arange(1, k * k + 1, dtype=xp.uint8)"),
        ("value=-xp.inf", "value=0.0"),
        ("] += dout * chosen", "] = dout * chosen"),
        ("(rows - window.top) * window.width", "rows * window.width"),
        ("window.stride * np.arange(window.out_width)", "np.arange(window.out_width)"),
        ("stride * row, stride * pixel, channel)", "stride * pixel, stride * row, channel)"),
        ("out.fill(0)\n    np.add", "pass\n    np.add"),
    ),
    *_in(
        "optim.py",
        "test_optim.py",
        ("        v += g\n", "        v += g * number(1 - optimizer.momentum)\n"),
        ("        g = v\n", ""),
        ("        decayed += g\n", "        decayed -= g\n"),
        ("math.sqrt(1 - optimizer.beta2**step)", "1 - optimizer.beta2**step"),
        ("work *= number(scale)", "work *= number(1)"),
        ("return 1.0, lr * correction2 / correction1", "return 1.0, lr / correction1"),
        ("return 1 / correction2, lr / correction1", "return 1 / correction2, lr"),
        ("    work += number(optimizer.epsilon)\n", ""),
        ("m *= number(optimizer.beta1)", "m *= number(optimizer.beta2)"),
        ("work *= number(1 - optimizer.beta2)", "work *= number(1 - optimizer.beta1)"),
        ("state.step += 1", "state.step += 2"),
        ("epoch / schedule.t_max)) / 2", "epoch / schedule.t_max))"),
        ("math.pi * epoch / schedule.t_max", "math.pi * min(epoch / schedule.t_max, 1)"),
        ("(lr - schedule.eta_min)", "lr"),
        ("epoch >= end", "epoch > end"),
        ("lr * (step + 1) / schedule.warmup_steps", "lr * step / schedule.warmup_steps"),
    ),
    *_in(
        "ops/solve.py",
        "ops/test_solve.py fast/test_inverse.py",
        ("x = x + _substitute(factors, y - matrix_product(x, factors.matrix))", "pass"),
        ("sum(axis=1).max()\n    if xp", "sum(axis=0).max()\n    if xp"),
        ("[rows.start :: order + 1] = 1", "[:: order + 1] = 1"),
        ("[:: order + 1] += 1 + ridge", "[:: order + 1] += 1"),
        ("+= ridge", "+= 0"),
        ("inverse.matrix if is_tall(inverse.matrix) else inverse.matrix.T", "inverse.matrix.T"),
        ("product(y, factors.matrix.T)", "product(y, factors.matrix)"),
        ("matrix.T[rows].copy()", "matrix[rows].copy()"),
        ('if reciprocal > 0 else "inf"', "if reciprocal > 0 else 0.0"),
        ("number = factors.norm * xp.where", "number = xp.where"),
        ('return np.float64("nan")', "return np.float64(1)"),
        ("dtype.type(2 / (3 * order))", "dtype.type(2 * order)"),
    ),
    *_in(
        "ops/excess.py",
        "ops/test_excess.py",
        (": n + 1] -= 1", ": n + 1] += 1"),
        ("w[rows.stop :].T, out=out[rows, rows.stop :]", "w[: n - rows.stop].T, out=out[rows, rows.stop :]"),
        ("2 * float(squares) - float(np.dot(diagonal, diagonal))", "2 * float(squares)"),
        ('blas("symm", "L", "L", n, length, float(factor)', 'blas("symm", "L", "L", n, length, 1.0'),
    ),
    *_in(
        "training/loop.py",
        "training/test_loop.py training/test_resume.py",
        ("islice(sized, min(steps - position.step, per_epoch))", "islice(sized, per_epoch)"),
        ("self.metrics.rows[: self.position.epoch + 1]", "self.metrics.rows"),
        ("self.position.step > train.steps", "self.position.step < train.steps"),
    ),
    *_in(
        "model/initialise.py",
        "model/test_initialise.py rules/test_rules.py",
        ("generator.uniform(-1, 1, shape) / math.sqrt(fan_in)", "generator.uniform(-1, 1, shape) / fan_in"),
        ("math.sqrt(2 / (fan_in + fan_out))", "math.sqrt(2 / fan_in)"),
        ("np.where(np.diag(r) < 0, -1.0, 1.0)", "1.0"),
        ("math.sqrt(fans(shape)[0])", "math.sqrt(fans(shape)[1])"),
        ("stream(seed, purpose, *key, 1)", "stream(seed, purpose, *key, 0)"),
        ("taps * shape[-2], taps * shape[-1]", "shape[-2], shape[-1]"),
    ),
    *_in(
        "training/compare.py",
        "training/test_compare.py",
        ("v /= norms[1]", "v /= norms[0]"),
        ("_norm(u - v), _norm(u + v)", "_norm(u + v), _norm(u - v)"),
        ("_norm(u - v), _norm(v)", "_norm(u - v), _norm(u)"),
        ("math.degrees(2 * math.atan2", "(2 * math.atan2"),
        ("all(norm > 0", "any(norm > 0"),
    ),
    *_in(
        "streams.py",
        "test_streams.py model/test_initialise.py",
        ('"feedback": 1', '"feedback": 0'),
        ("spawn_key=(_PURPOSES[purpose], *key)", "spawn_key=(_PURPOSES[purpose], len(key))"),
    ),
    *_in(
        "training/checkpoint.py",
        "rules/test_training.py",
        ("experiment.feedback_step = step, feedback_step", "experiment.feedback_step = 0, feedback_step"),
        ("for i, moment in enumerate(moments):", "for i, moment in enumerate(moments[:1]):"),
    ),
    *_in(
        "data/writer.py",
        "data/test_writer.py",
        ("return skipped + sum(", "return skipped + 0 * sum("),
        ("finished[-1].sums if finished", "finished[-1].sums if not finished"),
        ("self._sums.plus(sums)", "sums"),
        ("self._filling, self._stored = self._stored, self._filling", "pass"),
        ("return finished[:number]", "return finished"),
        ("and path.name not in keep", ""),
    ),
    *_in(
        "data/journal.py",
        "data/test_writer.py",
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
        ("xp.minimum(xp.maximum(s, s + delta), s.dtype.type(0))", "xp.minimum(s, s.dtype.type(0))"),
        ("xp.tanh(s + delta) * xp.tanh(s))", "xp.tanh(s) * xp.tanh(s))"),
        ("(s < zero) & (shifted < zero)", "(s < zero)"),
        ("maximum(z, -bias, out=z)", "maximum(z, bias, out=z)"),
        ("s * s.dtype.type(1 / LEAKY_SLOPE)", "s * s.dtype.type(2 / LEAKY_SLOPE)"),
        ("xp.log1p(s) - xp.log1p(-s)", "xp.log1p(s) + xp.log1p(-s)"),
        ("s * (s + delta))", "s * s)"),
        ("xp.log1p(xp.where(quotient > -one, quotient, s.dtype.type(0)))", "quotient"),
        ("delta * s.dtype.type(1 / LEAKY_SLOPE)", "delta * s.dtype.type(LEAKY_SLOPE)"),
    ),
    *_in(
        "ops/noise.py",
        "ops/test_noise.py",
        ("divmod(first + part.start, CHUNK)", "divmod(part.start, CHUNK)"),
        ('stream(seed, "noise", number, *key,', 'stream(seed, "noise", number,'),
        ("    out *= out.dtype.type(sigma)\n", ""),
        ("generator.standard_normal(before *", "generator.standard_normal(0 *"),
        ("counter_key(seed, *key), first * (out.size // len(out))", "counter_key(seed, *key)"),
        ('sequence(seed, "noise", *key).generate', 'sequence(seed, "noise").generate'),
    ),
    *_in(
        "ranks.py",
        "training/test_ranks.py",
        ("each if of_rank or not part.empty else None for", "each for"),
        ("return self._bounds[0]", "return 0"),
        ("zip(parts[::2], parts[1::2], strict=True)", "zip(parts[: len(parts) // 2], parts[len(parts) // 2 :])"),
        ("        self._begun = self._end\n", ""),
    ),
    *_in(
        "fast/graphs.py",
        "fast/test_graphs.py",
        ("key = part, samples, *", "key = part, *"),
        ("[self._stream.end_capture().launch, work]", "[work, self._stream.end_capture().launch]"),
    ),
    *_in(
        "fast/parallel.py",
        "fast/test_parallel.py",
        ("Buffers(self.backend, self.shared.made), 1", "Buffers(self.backend), 1"),
        ("        self._beside.append(other.shared)\n", ""),
        ("self._held.array(name", "self.shared.array(name"),
    ),
    *_in("fast/dealing.py", "training/test_ranks.py", ("workspace.ranks.broadcast(numbers)", "numbers")),
    *_in(
        "fast/inverse.py",
        "training/test_ranks.py",
        ("if len(at.batch.every) == 1:", "if True:"),
        ("part.together else len(at.s)", "False else len(at.s)"),
    ),
    *_in(
        "fast/products.py",
        "training/test_ranks.py",
        ("if not np.array_equal(together, alone):", "if False:"),
        ("max(1, COMPARED // math.prod(layouts[-1][0]))", "1"),
        ("np.add(terms[::2], terms[1::2], out=terms[::2])", "terms[::2] += terms[::-2]"),
    ),
    *_in("commands/together.py", "training/test_ranks.py", ("        ranks.gather(None)\n", "")),
    *_in("training/study.py", "training/test_ranks.py", ("study.seeds, ranks.size)", "study.seeds, 1)")),
    *_in("data/dataset.py", "data/test_loader.py", ("> rows_per_range(int(np.prod(self.shape)))", "> 10**9")),
    *_in("data/pool.py", "data/test_pool.py", ("self._arrivals[part]] = rows", "self._arrivals[part]] = rows[::-1]")),
    *_in("data/order.py", "data/test_order.py", ("content[places] = np.arange(start, stop)", "pass")),
    *_in(
        "model/passes.py",
        "training/test_ranks.py",
        ("if self.part is None else self.part.size", ""),
        ("return 0 if self.part is None else self.part.first", "return 0"),
    ),
    *_in(
        "training/loop.py",
        "training/test_feedback_epochs.py",
        ("position.passes + 1, position.feedback_epochs + 1", "position.passes, position.feedback_epochs + 1"),
        ("batches(position.passes, position.feedback_batch)", "batches(position.passes, 0)"),
        ("position.passes + 1, 0\n", "position.passes + 1, position.feedback_epochs\n"),
        ("due, save = between if position.epoch else first", "due, save = first if position.epoch else between"),
        ("if not is_finite(omega)", "if not omega.size"),
        ("between = self.position.batch == 0 and (", "between = False and ("),
    ),
    *_in(
        "model/plain.py",
        "model/test_gradients.py fast/test_passes.py",
        ("block.activation.backward(df, block.activation(z))", "block.activation.backward(df, z)"),
        ("df = ds if index is None", "df = -ds if index is None"),
    ),
    *_in(
        "model/plain.py",
        "rules/test_both_engines.py",
        ("(ds.dtype.type(scale) if isinstance(scale, float)", "(ds.dtype.type(2) if isinstance(scale, float)"),
        ("dtype.type(2 / batch)\n", "dtype.type(1 / batch)\n"),
        ("self._weight = self._weight - feedback.outer", "self._weight = self._weight + feedback.outer"),
        ("self._bias = self._bias + r", "self._bias = self._bias - r"),
        ("self.s + epsilon)\n", "self.s - epsilon)\n"),
        ("slice(0, len(through.matrix))).T.reshape", "slice(0, len(through.matrix))).reshape"),
        ("gram - array_module(gram).eye(len(gram), dtype=gram.dtype)", "gram"),
        ("- (n_x - x.dtype.type(1)) * x", "- n_x * x"),
    ),
    *_in(
        "fast/passes.py",
        "fast/test_passes.py",
        ("        s += bias\n", "        s += 0\n"),
        ("            block.activation.tie(z, bias)\n", ""),
        ("        z += bias[part]\n", "        z += 0\n"),
        ("lane_weight[number] += share", "lane_weight[number] = share"),
        ("lane_bias[number] += own", "lane_bias[number] = own"),
        ("lane_weight[:, part].sum,", "lane_weight[:1, part].sum,"),
        ("_product_tasks(dz, through.T, dx.reshape", "_product_tasks(dz, through.T * 0.5, dx.reshape"),
        ("out=dx[part][inner]", "out=dx[part][: len(dz[inner])]"),
        ("products.rows(x[part][inner], scratch).T", "products.rows(x[part][: len(dz[inner])], scratch).T"),
        ("dweight[..., units.stop :] = 0", "dweight[..., units.stop :] = 1"),
        ("output[..., : s_next.shape[-1]]", "output[..., -s_next.shape[-1] :]"),
    ),
    *_in(
        "fast/passes.py",
        "rules/test_both_engines.py",
        ("isinstance(scale, float) else scale[part]", "isinstance(scale, float) else scale[: len(ds)]"),
        ("    out *= ds.dtype.type(scale) if", "    out *= -ds.dtype.type(scale) if"),
    ),
    *_in(
        "fast/parallel.py",
        "fast/test_passes.py",
        ("even_slices(batch, max(2,", "even_slices(batch - 1, max(2,"),
        ("even_slices(count, min(TILES", "even_slices(count - count // TILE_WIDTH, min(TILES"),
    ),
    *_in(
        "fast/products.py",
        "fast/test_passes.py fast/test_feedback_training.py",
        ("weight[::-1].transpose(1, 2, 0, 3)", "weight.transpose(1, 2, 0, 3)"),
        ("out.reshape(len(rows), -1))\n        out += base", "out.reshape(len(rows), -1))"),
        ("        out[...] = base\n", "        out[...] = 0\n"),
        ("border(own, x, window, 0.0)", "border(own, x, window, 1.0)"),
        ("x.dtype, 0.0)\n        return row_patches", "x.dtype, 1.0)\n        return row_patches"),
        ("d.dtype, 0.0)\n        return stack_rows", "d.dtype, 1.0)\n        return stack_rows"),
    ),
    *_in("fast/passes.py", "fast/test_passes.py", ("border(own, z, window, -np.inf)", "border(own, z, window, 0.0)")),
    *_in(
        "fast/modules.py",
        "fast/test_feedback_training.py",
        ('mode == "accumulate" and', 'mode == "overwrite" and'),
    ),
    *_in(
        "fast/feedback_training.py",
        "fast/test_feedback_training.py",
        ("        s += shared.at.bias\n", "        s += 0\n"),
        ("xp.add if sign > 0 else xp.subtract", "xp.add"),
        ("        self._totals.fill(0)\n", ""),
        ("stacked.dtype.type(sign), out=", "stacked.dtype.type(1), out="),
        ("array_module(d).multiply(d, d.dtype.type(2 / self._batch), out=d)", "pass"),
        ("out.dtype.type(2 / self._batch), out=folded)", "out.dtype.type(1 / self._batch), out=folded)"),
        ("biases.sum(axis=0) * scalar(2", "biases.sum(axis=0) * scalar(1"),
        ("sigma, first + part.start, *key)", "sigma, 0, *key)"),
        ("at.batch.seed, at.batch.number, at.n", "at.batch.number, at.batch.seed, at.n"),
        ("or self._rows[1] != self.taken", ""),
        ("if other % 2 != k % 2", "if True"),
        ("returned.sum() / scalar(len(self.at.batch))", "returned.sum()"),
        ("if self._stack is None or self._stack[0] is not d:", "if self._stack is None:"),
    ),
    *_in(
        "fast/modules.py",
        "fast/test_feedback_training.py rules/test_target_propagation.py",
        ("[...] += bias", "[...] += 0"),
        ("delta[part]), where, out", "s[part]), where, out"),
        ("block.activation(t, out=t)\n", "pass\n"),
    ),
    *_in(
        "fast/inverse.py",
        "fast/test_inverse.py rules/test_gait_prop.py",
        ("f_inverse(y[part]) - at.bias", "f_inverse(y[part]) + at.bias"),
        ("out[part] -= others * x[part]", "out[part] += others * x[part]"),
        ("coverage(window, x) - x.dtype.type(1)", "coverage(window, x)"),
        ("dz[:, units:] = 0", "dz[:, units:] = 1"),
        ("lambda rows: symmetric_solve(factors, rows)", "lambda rows: rows"),
    ),
    *_in(
        "fast/factors.py",
        "fast/test_inverse.py rules/test_gait_prop.py",
        ("<= NEAR_ORTHOGONAL", "<= 50"),
        ("if chosen != self._near:", "if False:"),
    ),
    *_in(
        "fast/factors.py",
        "rules/test_gait_prop_pseudo.py",
        ("factor_gram(w, ridge, room)", "factor_gram(w, 0, room)"),
        ("self._triangle(n), ridge or 0)", "self._triangle(n), 0)"),
    ),
    *_in(
        "fast/inverse.py",
        "rules/test_gait_prop_pseudo.py",
        ("return gram_solve(inverse, rows)", "return rows"),
        ("formed = rows if is_tall(matrix) else", "formed = rows if not is_tall(matrix) else"),
        ("product(workspace, dz, matrix.T, dx)", "product(workspace, dz, matrix.T * 2, dx)"),
    ),
    *_in(
        "model/inverse.py",
        "fast/test_inverse.py rules/test_gait_prop.py",
        ("most = 1 / np.finfo(dtype).eps", "most = 1 / np.finfo(np.float64).eps"),
        ("value <= low", "value < low"),
        ("value >= high", "value > high"),
        ("enumerate(blocks[1:], start=1)", "enumerate(blocks[1:], start=0)"),
        ("if block.pool is not None:", "if False:"),
        ("if block.activation.inverse is None:", "if False:"),
        ("if not block.is_square:", "if False:"),
    ),
    *_in(
        "fast/orthogonality.py",
        "fast/test_orthogonality.py",
        ("4 * strength", "2 * strength"),
        ("if block.is_square]", "if not block.is_square]"),
        ("range(1, len(blocks))", "range(len(blocks))"),
        ("            if n not in self._computed:\n", "            if True:\n"),
    ),
    *_in(
        "fast/orthogonality.py",
        "training/test_experiment.py",
        ("(step + 1) % every", "step % every"),
        ("else every * optimizer", "else optimizer"),
    ),
    *_in(
        "fast/overlaps.py",
        "fast/test_closed_forms.py",
        ("* _kept(maxima, len(s) * pixels, scratch.of(OWNER))", ""),
        ("slope = _slope(block, u[maxima])", "slope = _slope(block, s)"),
        ("np.remainder(maxima, pixels, out=maxima)", "np.minimum(maxima, pixels - 1, out=maxima)"),
    ),
    *_in(
        "fast/jacobians.py",
        "fast/test_closed_forms.py",
        ("grams[n][number] += matrix_product", "grams[n][number] = matrix_product"),
        ("sums[n][number] += j.sum(axis=1)", "sums[n][number] += j.mean(axis=1)"),
        ("df *= block.activation.derivative(s)", "pass"),
        ("ds[:, samples.start - part.start : samples.stop - part.start]", "ds[:, : samples.stop - samples.start]"),
        ("_down(walk[1:], j, samples, scratch)", "_down(walk[1:], j, part, scratch)"),
        ("key=(OWNER, at.n)", "key=OWNER"),
        ("changes[n][samples] = ", "changes[n][part] = "),
    ),
    *_in(
        "fast/parallel.py",
        "fast/test_buffers.py rules/test_memory.py",
        ("if key not in self._flat or self._flat[key].size < size", "if True"),
        ("return self._owned[owner]", "return self"),
    ),
    *_in(
        "fast/parallel.py",
        "fast/test_parallel.py",
        ("min(first + length, stop)", "first + length"),
    ),
    *_in(
        "rules/bp.py",
        "rules/test_rules.py",
        ("through=at.weight)", "through=-at.weight)"),
    ),
    *_in(
        "rules/fa.py",
        "rules/test_rules.py",
        ("through=B.get(at.n))", "through=at.weight)"),
        ('seed, "feedback", n)', 'seed, "init", n)'),
        ("start=1", "start=0"),
    ),
    *_in(
        "rules/dfa.py",
        "rules/test_rules.py",
        ("if at.n + 1 in B", "if at.n in B"),
        ("batch.product(e, B", "batch.product(-e, B"),
    ),
    *_in(
        "rules/protocol.py",
        "rules/test_rules.py rules/test_gait_prop.py",
        ("list(self.descend(options, state, batch))[::-1]", "list(self.descend(options, state, batch))"),
    ),
    *_in(
        "rules/sign_symmetry.py",
        "rules/test_alignment_rules.py",
        ("math.sqrt(2 / sum", "math.sqrt(1 / sum"),
        ("array_module(W).copysign(B, W, out=B)", "pass"),
        ("0, batch.seed, batch.number, n)", "0, batch.seed, 0, n)"),
    ),
    *_in(
        "rules/kolen_pollack.py",
        "rules/test_alignment_rules.py",
        ("return options.decay", "return 2 * options.decay"),
        (", shared_decay=shared_decay)", ")"),
    ),
    *_in(
        "rules/weight_mirror.py",
        "rules/test_alignment_rules.py",
        ("type(-1 / rows(at))", "type(1 / rows(at))"),
        ("y = at.alone(x)", "y = at.alone(at.s)"),
        ("math.prod(at.block.pre_shape[:-1])", "1"),
    ),
    *_in(
        "rules/alignment.py",
        "rules/test_alignment_rules.py",
        ("weight if name in OF_SAMPLES", "1 if name in OF_SAMPLES"),
        ("negative(at.weight, out", "positive(at.weight, out"),
        ("xy *= xy.dtype.type(-1 / rows(at))", "xy *= xy.dtype.type(1 / rows(at))"),
        ('at.outer(at.s, y, "null", B)', 'at.outer(at.s, y, "null", at.weight)'),
        ("part.dtype.type(degree)", "part.dtype.type(1)"),
    ),
    *_in(
        "rules/drl.py",
        "rules/test_drl.py training/test_feedback_table.py",
        ("q[...] = least(A, J)", "q[...] = J"),
        ('options.loss != "difference" or options.hidden', 'options.loss != "difference"'),
    ),
    *_in(
        "rules/gnt.py",
        "rules/test_gnt.py",
        ("dtype.type(-options.beta * len(batch))", "dtype.type(-options.beta)"),
        ("batch.gauss_newton(options.damping)", "batch.gauss_newton(1.0)"),
        ("if classes > MOST_CLASSES:", "if False:"),
    ),
    *_in(
        "ops/solve.py",
        "rules/test_gnt.py",
        (":: e.shape[1] + 1] += damping", ":: e.shape[1] + 1] -= damping"),
    ),
    *_in(
        "training/experiment.py",
        "rules/test_gnt.py",
        ("gnt.Options(damping=self.config.compare.damping)", "gnt.Options()"),
    ),
    *_in(
        "rules/ridge_tp.py",
        "rules/test_ridge_tp.py",
        ("pseudo_inverses(options.ridge)", "pseudo_inverses()"),
        ('if options.activation == "inverse":', 'if options.activation != "inverse":'),
        ("delta[part] / f.derivative(s)", "delta[part] * f.derivative(s)"),
        ("low + options.clip", "low"),
        ("s.astype(np.float64, copy=False), delta", "s, delta"),
        ("s_inside == s", "s_inside != s"),
        ("if block.activation.inverse is None:", "if False:"),
    ),
    *_in(
        "fast/inverse.py",
        "rules/test_ridge_tp.py",
        ("pool_adjoint(block, d[part]", "pool_adjoint(block, 2 * d[part]"),
        ("    if not is_tall(matrix):\n        _solve_rows(workspace, solve, dx)\n", ""),
    ),
    *_in(
        "rules/gait_prop.py",
        "rules/test_gait_prop_pseudo.py",
        ('if options.inverse == "exact" else batch.pseudo', 'if options.inverse == "pseudo" else batch.pseudo'),
        ('if self.inverse == "exact" else "difference"', 'if self.inverse == "pseudo" else "difference"'),
    ),
    *_in(
        "rules/gait_prop.py",
        "rules/test_gait_prop.py rules/test_local_losses.py rules/test_both_engines.py",
        ("number(0.5) * batch.dlogits", "batch.dlogits"),
        ("scale=number(-2) * m", "scale=number(-1) * m"),
        ("            m = m / gamma\n", "            m = m\n"),
        ("xp.copyto(t, at.s, where=per_sample(on_target, t))", "pass"),
        ("        check_range(at.block, at.n, y)\n", ""),
        ("perturbation(options, e, at.block, half=True)", "perturbation(options, e, at.block)"),
        ('options.norm == "l2_squared"', 'options.norm != "l2_squared"'),
        ("np.prod(block.out_shape)", "np.prod(block.next_shape)"),
        ("number(scale) / norm", "number(scale) * norm"),
        ("epsilon = epsilon * d * d", "epsilon = epsilon * d"),
        ("(one - epsilon) * a", "one * a"),
        ("(y < 0) != (at.s_next < 0)", "(y < 0) == (at.s_next < 0)"),
        ("(e.dtype.type(-2) * per_sample", "(e.dtype.type(2) * per_sample"),
        ('dtype == "float32"', 'dtype == "float64"'),
        ('carried = block_flops if options.form == "literal"', 'carried = block_flops if options.form != "literal"'),
        ("through=carriers.get(at.n))", "through=at.weight)"),
    ),
    *_in(
        "ops/norms.py",
        "rules/test_gait_prop.py ops/test_norms.py",
        ("np.finfo(rows.dtype).tiny", "0"),
        ("safe * xp.sqrt", "xp.sqrt"),
        ("part / safe[:, None]", "part"),
    ),
    *_in(
        "rules/dtp.py",
        "rules/test_target_propagation.py model/test_feedback.py",
        ("-beta * len(batch)", "-beta"),
        ("scale=-1 / (len(at.batch)", "scale=-2 / (len(at.batch)"),
        ("return options.beta if options.divide_by_beta else 1.0", "return 1.0"),
        ("    r -= epsilon  # r", "    r += epsilon  # r"),
        ("    r += bias  # r", "    r += 0  # r"),
        ("    at.add(r, a)\n", "    at.subtract(r, a)\n"),
        ("(2 * len(s) * _divisor(options))", "(len(s) * _divisor(options))"),
    ),
    *_in(
        "rules/tp.py",
        "rules/test_target_propagation.py other_framework/test_trace.py",
        ("batch.logits + dtp.output_difference", "batch.logits - dtp.output_difference"),
        ("yield Target(delta, t)", "yield Target(delta, t + delta)"),
    ),
    *_in(
        "rules/ldrl.py",
        "model/test_feedback.py rules/test_theorems.py rules/test_pinned.py",
        ("at.subtract(epsilon, d1)  # −ε ⋆ d1\n    d2", "at.add(epsilon, d1)\n    d2"),
        ("d2 -= at.a_next", "d2 += at.a_next"),
        ("at.a(at.s_next + eta, at.index)", "at.a(at.s_next - eta, at.index)"),
        ("scale = 2 * descent.sigma**2", "scale = 2 * descent.sigma"),
        ("(squares * a[..., 0, :]).sum() / 2", "(squares * a[..., 0, :]).sum()"),
        ("gradient -= at.weight * b.astype", "gradient += at.weight * b.astype"),
        ("- sums.returned if", "+ sums.returned if"),
    ),
    *_in(
        "rules/ldrl.py",
        "rules/test_closed_form.py",
        ("a = (M * (2 * sigma**2", "a = (M * (sigma**2"),
        ("gradient += share", "pass"),
        ("share / 2", "share"),
        ("    return array_module(d1).zeros", "    at.add(epsilon, d1)\n    return array_module(d1).zeros"),
    ),
    *_in(
        "rules/collapse.py",
        "rules/test_pinned.py rules/test_theorems.py",
        ("c = a + optimizer.weight_decay", "c = a"),
        ("-lr * momentum, lr * b", "-lr, lr * b"),
        ("= c, momentum, -b", "= c, momentum, b"),
        ("v += p_vt * fixed", "pass"),
        ("power @ matrix", "power"),
    ),
    *_in(
        "rules/ldrl_parallel.py",
        "rules/test_target_propagation.py",
        ("noises=lambda options: options.samples", "noises=lambda options: 1"),
    ),
    *_in(
        "rules/drl.py",
        "rules/test_drl.py model/test_feedback.py rules/test_both_engines.py other_framework/test_trace.py",
        ("gradient *= 2 * scale", "gradient *= scale"),
        ("variance = np.float64(sigma) ** 2", "variance = np.float64(sigma)"),
        ("noise = s_epsilon.reshape(noise.shape)", "noise = at.s.reshape(noise.shape)"),
        ("difference(matrix_product(batch.logits, R), matrix_product(delta, R))", "__call__(matrix_product(delta, R))"),
        ("return TANH(matrix_product(logits, state.weights[0]))", "return (matrix_product(logits, state.weights[0]))"),
        ("residual -= noise", "residual += noise"),
        ("y_epsilon - batch.logits)", "y_epsilon)"),
        ('if block.kind == "conv" else 1)', 'if block.kind == "dense" else 1)'),
        ("dlogits.dtype.type(-options.eta)", "dlogits.dtype.type(-1)"),
        ("-2 / averaged", "-1 / averaged"),
        ("smallest < 1e-3", "smallest > 1e-3"),
        ("    return n - 1\n", "    return n\n"),
        ("if at.n + 1 in Q", "if at.n in Q"),
        ("            gradient -= J\n", "            gradient += J\n"),
        ("(scale / 2) + 1\n", "(scale / 2)\n"),
    ),
    *_in(
        "model/feedback.py",
        "model/test_feedback.py rules/test_theorems.py",
        ("index, unpool)) + bias", "index, unpool))"),
        ("seen * (owner == number)", "seen"),
        ("xp.ones((1, block.window.height", "2 * xp.ones((1, block.window.height"),
    ),
    *_in(
        "rules/feedback.py",
        "rules/test_target_propagation.py rules/test_drl.py rules/test_pinned.py",
        ("theta.copy()", "theta"),
        ("block.weight_shape[::-1] if block.window is None", "block.weight_shape if block.window is None"),
        ("of_block(training.optimizer, n - 1)\n", "of_block(training.optimizer, 0)\n"),
        ("at_block(training.optimizer.lr, n - 1), at_block(training.sigma, n - 1)",
         "at_block(training.optimizer.lr, n - 1), at_block(training.sigma, 0)"),
        ("OptimizerState(descent.step + k,", "OptimizerState(k,"),
        ("sigma, number * iterations, workspace)", "sigma, number, workspace)"),
        ('if reduction != "mean":', "if False:"),
        ("len(values) != len(labels)", "len(values) < len(labels)"),
        ("if block.auxiliary:", "if False:"),
        ("gradient / gradient.dtype.type(len(noises))", "gradient"),
        ("total[part] = gradient.copy()", "total[part] = gradient"),
        ('seed, "feedback", n - 1)', 'seed, "feedback", n)'),
    ),
    *_in(
        "training/experiment.py",
        "training/test_experiment.py",
        ("updates, self.rule.compared(self.config.rule)", "updates, self.config.rule"),
        ('step.batch.replaced(results="compared")', "step.batch"),
    ),
    *_in(
        "training/experiment.py",
        "training/test_feedback_epochs.py training/test_loop.py",
        ("self.feedback_step += 1", "pass"),
        ("number = self.feedback_step", "number = 0"),
        ("-(-steps // per_epoch)", "steps // per_epoch"),
    ),
    *_in(
        "training/trace.py",
        "cli/test_trace.py other_framework/test_trace.py",
        ("(step, key(n), k, NOISES[name])", "(step, key(n), k, 0)"),
        ("s + delta if target.t is None", "s - delta if target.t is None"),
        ("if not self.not_finite and", "if"),
        ("array.dtype != dtype or shape not in", "shape not in"),
        ("labels.min() < 0", "labels.min() < -1"),
        ('sink.put(f"bp/{n}/{part}", gradient)', 'sink.put(f"bp/{n}/{part}", update)'),
    ),
    *_in(
        "files.py",
        "training/test_checkpoint.py",
        ("        partial.replace(path)\n", "        path.write_bytes(partial.read_bytes()[:-1])\n"),
        ("            os.fsync(file.fileno())\n", ""),
        ("partial.unlink(missing_ok=True)\n            raise", "raise"),
    ),
    *_in(
        "training/study.py",
        "cli/test_study.py",
        ("            bias.fill(0)\n", "            pass\n"),
        ("seed=planned.config.seed + n", "seed=n"),
        ("angles.rows[-len(experiment.network.blocks) :]", "angles.rows[: len(experiment.network.blocks)]"),
        ("    if digest != planned.dataset.digest:", "    if False:"),
        ("        table.keep()\n", "        pass\n"),
        ('raise type(error)(f"{place}: {error}")', 'raise type(error)(f"{error}")'),
    ),
    *_in("training/drift.py", "cli/test_study.py", ("    table.keep()\n", "")),
    *_in(
        "report/studies.py",
        "cli/test_study.py report/test_figures.py",
        ("_mean(study.angle[:, -1, -1])", "_mean(study.angle[:, 0, 0])"),
        ("_mean(study.distance[:, -1, -1]", "_mean(study.angle[:, -1, -1]"),
        ("float(each[n])", "float(each[0])"),
        ("_band(right, study.iterations, study.distance", "_band(right, study.iterations, study.angle"),
        ("axes.plot(over, angle[:, n]", "axes.plot(over, angle[:, 0]"),
    ),
    *_in(
        "optim.py",
        "test_optim.py",
        ("at_block(lr, p // 2)", "at_block(lr, 0)"),
        ("of_block(optimizer, p // 2)", "of_block(optimizer, 0)"),
        ("learning_rate(schedule, each, epoch, step) for each", "learning_rate(schedule, each, epoch) for each"),
    ),
    *_in(
        "training/loop.py",
        "training/test_loop.py training/test_resume.py",
        ("mark += self._compare(step, updates, losses)", "self._compare(step, updates, losses)"),
        ("        self.experiment.plan.backend.synchronize()\n", ""),
        ("> 60 * minutes", "> minutes"),
        ("- len(scores) + bad", "- 1"),
        ("                table.keep()\n", "                pass\n"),
    ),
    *_in(
        "training/checkpoint.py",
        "training/test_ranks.py",
        ("experiment.optimizer_state.step, experiment.feedback_step = counts", "_, experiment.feedback_step = counts"),
    ),
    *_in("training/loop.py", "training/test_ranks.py", ("share_state(self.experiment, None)", "pass")),
    *_in("model/blocks.py", "rules/test_rules.py", ("return 2 * sum(flops)", "return 3 * sum(flops)")),
    *_in("rules/dtp.py", "rules/test_rules.py", ("options.feedback, network, 3)", "options.feedback, network, 30)")),
    *_in("rules/dfa.py", "rules/test_rules.py", ("return [2 * classes", "return [20 * classes")),
    *_in("rules/drl.py", "rules/test_closed_form.py", ("singular > cutoff", "singular > 0")),
    *_in("rules/feedback.py", "training/test_feedback_epochs.py", ("loss += done.loss", "loss = done.loss")),
    *_in(
        "data_prep/imagenet32.py",
        "data_prep/test_cifar.py",
        ("images[start : start + _BLOCK_IMAGES]", "images[:_BLOCK_IMAGES]"),
        ("order[start : start + _BLOCK_IMAGES]", "order[:_BLOCK_IMAGES]"),
    ),
    *_in("data_prep/images.py", "data_prep/test_folder.py", ("labels[start : start + length]", "labels[:length]")),
    *_in(
        "data_prep/files.py",
        "data_prep/test_folder.py",
        ("fingerprint([file_state(src)])", "fingerprint([])"),
        ('f"{path} {file_state(path)}" for path', 'f"{path}" for path'),
    ),
    *_in("fast/feedback_training.py", "fast/test_feedback_training.py", ("block.activation.tie(z, ", "(z, ")),
    *_in("training/plan.py", "training/test_plan.py", ("limits.tiny if flushed", "0 if flushed")),
    *_in(
        "backend.py",
        "test_backend.py",
        ("return bool(free < LEAST_ROOM)", "return False"),
        ('("DevicesUnavailable", "MemoryAllocation")', '("MemoryAllocation",)'),
    ),
    *_in("signals.py", "test_signals.py", ("self._answer_the_next_as_before(error.signal_number)", "pass")),
]  # fmt: skip


SAMPLE = 3
# Neighbours in the list share their tests' time; shuffled once, a sample has mistakes of several files.
TURNS = random.Random(0).sample(MUTATIONS, len(MUTATIONS))


def sample(turn: int) -> list[Mutation]:
    """Return the mutations of a turn: the next ones of the list at each, so that none is left out for long."""
    return [TURNS[(turn * SAMPLE + i) % len(TURNS)] for i in range(SAMPLE)]


# By the day; `MUTATIONS_OF` repeats the sample of another day, given as its number (`date.toordinal`).
TODAY = int(os.environ.get("MUTATIONS_OF", datetime.datetime.now(datetime.UTC).date().toordinal()))


def test_every_mutation_has_its_turn():
    turns = -(-len(MUTATIONS) // SAMPLE)
    assert {mutation for turn in range(turns) for mutation in sample(TODAY + turn)} == set(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name_of)
def test_each_mutation_changes_one_place(mutation):
    """When the code changes, its mutations have to follow."""
    assert occurrences(mutation) == 1
    assert all((ROOT / "tests" / test).exists() for test in mutation.by)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = package(tmp_path_factory.mktemp("mutated"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("mutations"))
    shutil.copy(ROOT / "setup.cfg", folder)
    for name in ("runs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def check_noticed(copy, mutation):
    with made(copy, mutation):
        tests = [f"tests/{test}" for test in mutation.by]
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    # 1: a test failed; anything else (collection errors, none failed) proves nothing.
    assert result.returncode == 1, result.stdout[-2000:]


@pytest.mark.parametrize("mutation", sample(TODAY), ids=name_of)
def test_the_mutations_of_the_day_are_noticed(copy, mutation):
    check_noticed(copy, mutation)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=name_of)
def test_each_mutation_is_noticed(copy, mutation):
    check_noticed(copy, mutation)
