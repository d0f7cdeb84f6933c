"""feedback.csv: every B compared with the forward weight of its shape, checked by separate formulas."""

import numpy as np
import pytest

from arraytp.report import read_results
from arraytp.report.figures import write_figures
from arraytp.training.tables import FEEDBACK_COLUMNS, OPTIMUM_COLUMNS

RULES = {
    "fa": {"name": "fa"},
    "sign-symmetry": {"name": "sign-symmetry", "magnitude": "batch"},
    "kolen-pollack": {"name": "kolen-pollack", "decay": 0.1},
    "weight-mirror": {"name": "weight-mirror"},
    "alignment": {"name": "alignment"},
}
TRAIN = {"epochs": 2, "batch_size": 16, "eval_batch_size": 12}


@pytest.mark.parametrize("rule", RULES)
def test_every_comparison_has_angle_distance_and_ratio_of_b_and_w(make_config, start, stop_after, rule, read_rows):
    run, measured = start(make_config(rule=RULES[rule], train=TRAIN)), []
    compare = run.experiment.compare

    def remembered(step, updates):
        pairs = run.experiment.rule_state.weights, run.experiment.network.weights
        measured.extend((n, B.copy(), pairs[1][n].copy()) for n, B in pairs[0].items())
        return compare(step, updates)

    run.experiment.compare = remembered
    run.train(stop_after())
    table = read_rows(run.folder / "feedback.csv")
    # Steps 0 and 3 of 6, blocks 1 and 2.
    assert [(row["step"], row["epoch"], row["block"]) for row in table] == [
        (step, epoch, n) for step, epoch in ((0, 1), (3, 2)) for n in (1, 2)
    ]
    assert tuple(table[0]) == FEEDBACK_COLUMNS
    for row, (n, B, W) in zip(table, measured, strict=True):
        b, w = (array.astype(float).ravel() for array in (B, W))
        assert row["block"] == n
        cosine = b @ w / np.linalg.norm(b) / np.linalg.norm(w)
        assert np.cos(np.radians(row["angle_deg"])) == pytest.approx(cosine, abs=1e-9)
        assert row["distance"] == pytest.approx(np.linalg.norm(b - w) / np.linalg.norm(w), rel=1e-9)
        assert row["ratio"] == pytest.approx(np.linalg.norm(b) / np.linalg.norm(w), rel=1e-9)
        assert np.isnan(row["loss"]) == (rule not in ("weight-mirror", "alignment"))


@pytest.mark.parametrize("options", [{}, {"expected": "optimum"}, {"hidden": 5}], ids=str)
def test_drls_table_has_the_distance_of_q_to_its_optimum(make_config, start, stop_after, options, read_rows):
    """The output is linear: its Jacobian is Wᵀ for every sample, and A⁻¹ J is the pseudo-inverse of W."""
    run, measured = start(make_config(rule={"name": "drl", **options}, train=TRAIN)), []
    compare = run.experiment.compare

    def remembered(step, updates):
        measured.append((run.experiment.rule_state.weights[2].copy(), run.experiment.network.weights[2].copy()))
        return compare(step, updates)

    run.experiment.compare = remembered
    run.train(stop_after())
    table = read_rows(run.folder / "feedback.csv")
    assert tuple(table[0]) == (*FEEDBACK_COLUMNS, *OPTIMUM_COLUMNS)
    for first, last, (Q, W) in zip(table[::2], table[1::2], measured, strict=True):
        if "hidden" in options:
            assert np.isnan(last["optimum_distance"])
            continue
        best = np.linalg.pinv(W.astype(float))
        assert last["optimum_distance"] == pytest.approx(np.linalg.norm(Q - best) / np.linalg.norm(best), abs=1e-5)
        assert (max(first["optimum_distance"], last["optimum_distance"]) < 1e-5) == bool(options)


@pytest.mark.parametrize("rule", ["bp", "dfa"])
def test_a_rule_without_such_weights_has_no_table(make_config, start, stop_after, rule):
    """DFA's B maps the output's error directly to a block, so that no forward weight has its shape."""
    run = start(make_config(rule={"name": rule}, train=TRAIN))
    run.train(stop_after())
    assert not (run.folder / "feedback.csv").exists()


def test_a_table_of_an_earlier_version_is_read_and_gone_on_with(make_config, start, stop_after, read_rows):
    """Earlier versions had no column `ratio`."""
    config = make_config(rule=RULES["fa"], train=TRAIN)
    run = start(config)
    run.train(stop_after())
    path = run.folder / "feedback.csv"
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines()))
    (run.folder / "config.yml").write_text("rule: {name: fa}\ntrain: {epochs: 2}\ncompare: {every: 3}\n")
    (result,) = read_results([run.folder])
    assert np.isnan(result.feedback["ratio"]).all()
    assert np.isfinite(result.feedback["distance"]).all()
    run.feedback.restart(path.read_text().splitlines()[1:])
    assert np.isnan([row["ratio"] for row in read_rows(run.folder / "feedback.csv")]).all()


def test_the_angles_are_drawn(make_config, start, stop_after, tmp_path):
    run = start(make_config(rule=RULES["fa"], train=TRAIN))
    run.train(stop_after())
    (run.folder / "config.yml").write_text("rule: {name: fa}\ntrain: {epochs: 2}\ncompare: {every: 3}\n")
    assert "feedback_angles.png" in {path.name for path in write_figures(run.folder, tmp_path / "figures")}
