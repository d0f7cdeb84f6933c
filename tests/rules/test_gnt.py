"""Gauss-Newton targets: against Jacobians by finite differences, in their limits, and as a reference for angles."""

import csv

import numpy as np
import pytest
from samples import batch, close, fitting_blocks, placed, random_network, rng
from training import copies, fast, pass_of, plain

from arraytp import cli
from arraytp.config import dump_config, parse_config
from arraytp.errors import UserError
from arraytp.options import Conv, Dense, Pool
from arraytp.rules import bp
from arraytp.rules.gnt import RULE, Options
from arraytp.rules.protocol import State
from arraytp.training.build import build
from arraytp.training.compare import angle_degrees

LAYERS = [
    Conv(channels=3, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=4, kernel=2, stride=2, activation="leaky-relu"),
    Dense(units=7, activation="tanh"),
    Dense(units=4),
]
AUXILIARY = [
    Conv(channels=5, kernel=3, padding=1, activation="elu", auxiliary=2, pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=7, kernel=2, stride=2, activation="leaky-relu", auxiliary=3),
    Dense(units=8, activation="tanh", auxiliary=1),
    Dense(units=6, auxiliary=2),
]
STEP = 1e-6


def made(count=3, layers=LAYERS):
    network = random_network(fitting_blocks(layers, (6, 5, 2)))
    x, _ = batch(network.blocks, count)
    return network, x, rng(8).standard_normal((count, 4)) / count


def deltas_of(options, one):
    return [target.delta.copy() for target in RULE.targets(options, State(), one)][::-1]


def differenced(network, x, n):
    """Return ∂ logits / ∂ s^n of every sample, of shape (B, C, D), by central differences."""
    engine = plain()
    s = engine.forward(network, x).s[n]
    rest, columns = network.rest(n), []
    for place in np.ndindex(s.shape[1:]):
        moved = [s.copy(), s.copy()]
        for sign, each in zip((1, -1), moved, strict=True):
            each[(slice(None), *place)] += sign * STEP
        plus, minus = (engine.forward(rest, each).logits for each in moved)
        columns.append((plus - minus) / (2 * STEP))
    return np.stack(columns, axis=2)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("engine", [fast, plain])
@pytest.mark.parametrize("layers", [LAYERS, AUXILIARY])
def test_targets_are_those_of_jacobians_by_finite_differences(place, damping, engine, layers):
    network, x, dlogits = made(layers=layers)
    one = pass_of(placed(network, place.put), place.put(x), place.put(dlogits), engine(place.backend))
    deltas = [place.get(delta) for delta in deltas_of(Options(damping=damping, beta=0.3), one)]
    close(deltas[3].reshape(3, -1), -0.3 * 3 * dlogits, 1e-14)
    for n in (1, 2, 3):
        jacobian = differenced(network, x, n)
        for b, j in enumerate(jacobian):
            wanted = -0.3 * j.T @ np.linalg.inv(j @ j.T + damping * np.eye(4)) @ (3 * dlogits[b])
            close(deltas[n - 1][b].reshape(-1), wanted, 1e-6)


def test_without_damping_they_are_those_of_the_pseudo_inverse():
    network, x, dlogits = made()
    deltas = deltas_of(Options(damping=1e-12), pass_of(network, x, dlogits))
    for n in (1, 2, 3):
        for b, j in enumerate(differenced(network, x, n)):
            close(deltas[n - 1][b].reshape(-1), -0.5 * np.linalg.pinv(j) @ (3 * dlogits[b]), 1e-5)


def test_with_large_damping_updates_are_bp_in_direction():
    network, x, dlogits = made(6)
    exact = copies(bp.RULE.propose(bp.Options(), State(), pass_of(network, x, dlogits)))
    for damping, largest in ((1e8, 1e-4), (1e3, 1.0)):
        found = copies(RULE.propose(Options(damping=damping), State(), pass_of(network, x, dlogits)))
        for n, (mine, wanted) in enumerate(zip(found, exact, strict=True)):
            assert angle_degrees(mine[0], wanted[0]) < largest
            if damping == 1e8 and n < 3:
                close(mine[0] * damping / 0.5, wanted[0], 1e-5)
    found = copies(RULE.propose(Options(damping=1e-3), State(), pass_of(network, x, dlogits)))
    assert angle_degrees(found[0][0], exact[0][0]) > 5


def test_divided_by_beta_they_do_not_depend_on_it():
    network, x, dlogits = made()
    one, other = (copies(RULE.propose(Options(beta=beta, divide_by_beta=True), State(), pass_of(network, x, dlogits)))
                  for beta in (0.5, 1e-3))  # fmt: skip
    for mine, wanted in zip(one, other, strict=True):
        close(mine[0], wanted[0], 1e-12)


def test_single_precision_is_close_to_double():
    network, x, dlogits = made(6)
    double = deltas_of(Options(damping=0.1), pass_of(network, x, dlogits))
    single = deltas_of(Options(damping=0.1), pass_of(placed(network, lambda a: a.astype("float32")),
                                                     x.astype("float32"), dlogits.astype("float32")))  # fmt: skip
    for mine, wanted in zip(single, double, strict=True):
        assert mine.dtype == "float32"
        close(mine, wanted.astype("float32"), 1e-4)


TREE = {
    "name": "run",
    "data": {"dataset": "fashion-mnist-10k"},
    "network": {"blocks": [{"type": "dense", "units": 12, "activation": "tanh"}, {"type": "dense", "units": 10}]},
    "rule": {"name": "gnt"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"epochs": 1, "steps": 5, "batch_size": 16},
    "compare": {"every": 2, "against": ["bp", "gnt"], "damping": 0.3},
}
SQUARE = {"blocks": TREE["network"]["blocks"], "square": True}
REFUSED = [
    ({"loss": {"reduction": "sum"}}, "loss.reduction: sum: rule gnt is defined for the mean loss"),
    ({"network": SQUARE}, r"network block 1 \(dense2\): has 2 auxiliary units, which rule gnt does not support"),
    ({"compare": {"against": ["gnt"]}}, r"compare.against: \['gnt'\]: must contain bp"),
    ({"compare": {"against": ["bp", "dtp"]}}, r"compare.against.1 must be one of bp or gnt"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_it_cannot_do_is_refused_in_one_line(settings, words):
    with pytest.raises(UserError, match=words) as error:
        build(*parse_config(TREE | settings).variants.values())
    assert "\n" not in str(error.value)


def test_it_is_refused_above_a_number_of_classes():
    blocks = fitting_blocks([Dense(units=20), Dense(units=101)], (5,))
    with pytest.raises(UserError, match="rule gnt: takes a backward pass per class, and there are 101; at most 100"):
        RULE.check(Options(), blocks, "float64", "mean")


@pytest.mark.parametrize("rule", ["fa", "bp"])
def test_a_run_writes_the_angle_to_it_beside_that_to_bp(tmp_path, monkeypatch, rule):
    # No figures are needed here; `report` below draws its own.
    monkeypatch.setattr("arraytp.commands.run.write_figures", lambda *_: None)
    (config,) = parse_config(TREE | {"rule": {"name": rule}}).variants.values()
    (tmp_path / "run.yml").write_text(dump_config(config))
    assert cli.main(["run", str(tmp_path / "run.yml"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "angles.csv").read_text().splitlines()))
    assert [(row["step"], row["block"]) for row in rows] == [(str(s), str(n)) for s in (0, 2, 4) for n in (0, 1)]
    angles = [(float(row["angle_deg"]), float(row["gnt_angle_deg"])) for row in rows]
    hidden, output = angles[::2], angles[1::2]
    # The output's target is BP's for every rule here.
    assert max(abs(angle) for pair in output for angle in pair) < 1e-2
    assert min(gnt for _, gnt in hidden) > 0.5
    if rule == "bp":
        assert max(to_bp for to_bp, _ in hidden) < 1e-3
    else:
        assert cli.main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "report")]) == 0


def test_the_second_reference_is_the_rule_with_the_configs_damping():
    (config,) = parse_config(TREE | {"rule": {"name": "gnt", "damping": 0.3}}).variants.values()
    experiment = build(config)
    images, labels = next(experiment.train_loader.batches(0))
    step = experiment.forward(images, labels)
    for each in experiment.compare(step, experiment.updates(step)):
        assert each.gnt_angle_deg < 1e-2


def test_exact_gait_prop_is_compared_with_it_where_units_are_auxiliary():
    """With a large damping GNT's updates point along BP's, so the two angles agree."""
    (config,) = parse_config(
        TREE
        | {"network": SQUARE, "rule": {"name": "gait-prop", "form": "difference"}}
        | {"compare": {"against": ["bp", "gnt"], "damping": 1e6}}
    ).variants.values()
    experiment = build(config)
    images, labels = next(experiment.train_loader.batches(0))
    step = experiment.forward(images, labels)
    assert [block.auxiliary for block in experiment.network.blocks] == [0, 2]
    for each in experiment.compare(step, experiment.updates(step)):
        assert each.gnt_angle_deg == pytest.approx(each.angle_deg, abs=1e-2)
    for each in experiment.compare(step, experiment.exact_updates(step)):
        assert each.gnt_angle_deg < 1e-2
