"""The package from Python: load a config, build, step, read the arrays; rules and ops one by one."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arraytp.backend import NUMPY
from arraytp.config import load_config, load_one, parse_config
from arraytp.fast import orthogonality
from arraytp.fast.engine import Fast
from arraytp.model.architectures import plan_network
from arraytp.model.initialise import make_network
from arraytp.model.passes import Batch
from arraytp.model.shapes import plan_blocks
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward
from arraytp.options import Dense
from arraytp.rules import RULES, bp, fa
from arraytp.rules.protocol import State
from arraytp.training.build import build
from arraytp.training.compare import angle_degrees

QUICKSTART = Path(__file__).parents[2] / "runs" / "quickstart.yml"
SMALL_NETWORK = {"blocks": [{"type": "dense", "units": 12, "activation": "tanh"}, {"type": "dense", "units": 10}]}


def small(**sections):
    tree = {
        "data": {"dataset": "fashion-mnist-10k", "in_memory_mb": 0, "pool_images": 256},
        "network": SMALL_NETWORK,
        "rule": {"name": "fa"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"epochs": 1, "batch_size": 32, "eval_batch_size": 500},
    }
    return parse_config({**tree, **sections}).variants[""]


@pytest.fixture
def batch():
    """Return an experiment and a copy of its first training batch, which later batches cannot overwrite."""

    def make(config, plain=False):
        made = build(config, plain=plain)
        with closing(made.train_loader.batches(0)) as batches:
            images, labels = next(batches)
            return made, images.copy(), labels.copy()

    return make


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class_is_refused_before_anything_is_trained(batch, label):
    """NumPy would take -1 for the last class."""
    made, images, labels = batch(small())
    labels[[5, 9]] = label, -7
    before = [weight.copy() for weight in made.network.weights]
    with pytest.raises(ValueError, match=rf"label {label} of sample 5: expected one of 0 to 9"):
        made.step(images, labels)
    for old, new in zip(before, made.network.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_quickstart_can_be_stepped_from_python():
    made = build(load_one(QUICKSTART, ["data.in_memory_mb=0", "train.batch_size=16"], variant="fa"))
    before = [weight.copy() for weight in made.network.weights]
    with closing(made.train_loader.batches(0)) as batches:
        images, labels = next(batches)
        step = made.forward(images, labels)
        updates = made.updates(step)
        found = made.compare(step, updates)
        made.apply(step, updates)
    assert images.shape == (16, 28, 28, 1)
    assert step.score.images == 16
    assert float(step.score.loss) == pytest.approx(np.log(10), rel=0.2)
    shapes = [(5, 5, 1, 32), (5, 5, 32, 64), (3136, 512), (512, 10)]
    assert [weight.shape for weight in made.network.weights] == shapes
    assert [update.shape for update, _ in updates] == shapes
    assert [s.shape[1:] for s in step.batch.forward.s] == [(28, 28, 1), (14, 14, 32), (7, 7, 64), (512,), (10,)]
    for old, new in zip(before, made.network.weights, strict=True):
        assert not np.array_equal(old, new)
    assert [entry.block for entry in found] == [0, 1, 2, 3]
    # At first, FA's updates of the hidden blocks are unrelated to BP's; that of the output block is BP's.
    assert all(60 < entry.angle_deg < 120 for entry in found[:-1])
    assert found[-1].angle_deg == pytest.approx(0, abs=0.1)


def test_a_step_is_forward_updates_and_apply(batch):
    one, images, labels = batch(small())
    two, _, _ = batch(small())
    one.step(images, labels)
    step = two.forward(images, labels)
    updates = two.updates(step)
    for initial, weight in zip(build(small()).network.weights, two.network.weights, strict=True):
        np.testing.assert_array_equal(initial, weight)
    two.apply(step, updates)
    for a, b in zip(one.network.weights, two.network.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sgd_subtracts_the_updates_times_the_rate(batch):
    made, images, labels = batch(small())
    step = made.forward(images, labels)
    updates = made.updates(step)
    expected = [
        weight - np.float32(0.1) * update for weight, (update, _) in zip(made.network.weights, updates, strict=True)
    ]
    made.apply(step, updates)
    for weight, wanted in zip(made.network.weights, expected, strict=True):
        np.testing.assert_array_equal(weight, wanted)


def test_the_schedule_goes_by_the_epoch_given_to_step(batch):
    config = small(schedule={"name": "cosine", "t_max": 10, "eta_min": 0.0}, dtype="float64")
    steps = []
    for epoch in (0, 5):
        made, images, labels = batch(config)
        before = made.network.weights[0].copy()
        made.step(images, labels, epoch)
        steps.append(made.network.weights[0] - before)
    np.testing.assert_allclose(steps[1], steps[0] / 2, rtol=1e-9, atol=1e-12)


def test_a_step_reports_the_loss_and_hits_of_the_batch_before_the_update(batch):
    made, images, labels = batch(small(dtype="float64", loss={"reduction": "sum"}))
    z = np.tanh(images.reshape(32, -1) @ made.network.weights[0] + made.network.biases[0])
    logits = z @ made.network.weights[1] + made.network.biases[1]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(32), labels]
    better = (logits > logits[np.arange(32), labels][:, None]).sum(1)
    score = made.step(images, labels)
    assert float(score.loss) == pytest.approx(losses.sum(), rel=1e-12)
    assert score.totals.tolist() == pytest.approx([losses.sum(), (better < 1).sum(), (better < 5).sum()])


def test_a_mean_loss_is_summed_over_the_batch_in_the_totals(batch):
    summed, images, labels = batch(small(loss={"reduction": "sum"}))
    mean, _, _ = batch(small(loss={"reduction": "mean"}))
    steps = [made.forward(images, labels) for made in (summed, mean)]
    a, b = (step.score for step in steps)
    assert float(b.loss) * 32 == pytest.approx(float(a.loss), rel=1e-6)
    np.testing.assert_allclose(a.totals, b.totals, rtol=1e-6)
    updates = [made.updates(step)[0][0] for made, step in zip((summed, mean), steps, strict=True)]
    np.testing.assert_allclose(updates[0], 32 * updates[1], rtol=1e-4, atol=1e-6)


def test_evaluation_scores_every_test_image_once_and_learns_nothing(batch):
    made, images, labels = batch(small())
    made.updates(made.forward(images, labels))
    before = [weight.copy() for weight in made.network.weights]
    scores = list(made.evaluate())
    assert [score.images for score in scores] == [500] * 4
    assert all(0 <= score.totals[1] <= score.totals[2] <= 500 for score in scores)
    for old, new in zip(before, made.network.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_bp_is_at_no_angle_to_itself_and_fa_with_the_forward_weights_is_bp(batch):
    for rule in ("bp", "fa"):
        made, images, labels = batch(small(rule={"name": rule}, dtype="float64"))
        for n, feedback in made.rule_state.weights.items():
            feedback[...] = made.network.weights[n]
        step = made.forward(images, labels)
        for found in made.compare(step, made.updates(step)):
            assert found.angle_deg == pytest.approx(0, abs=1e-5)
            assert found.distance == pytest.approx(0, abs=1e-12)


def test_a_comparison_at_another_beta_is_that_of_its_update_and_leaves_the_steps_update(batch):
    """With curved activations, the direction of an update depends on β."""
    rule = {"name": "dtp", "beta": 0.9, "compare_beta": 0.01, "feedback_init": "symmetric"}
    deeper = {"blocks": [SMALL_NETWORK["blocks"][0], *SMALL_NETWORK["blocks"]]}
    made, images, labels = batch(small(rule=rule, network=deeper, dtype="float64"))
    other = replace(made.config.rule, beta=0.01)
    step = made.forward(images, labels)
    exact = made.exact_updates(step)[0][0].copy()
    small_step = made.rule.propose(other, made.rule_state, step.batch)[0][0].copy()
    updates = made.updates(step)
    before = [array.copy() for pair in updates for array in pair]
    found = made.compare(step, updates)[0].angle_deg
    for old, new in zip(before, (array for pair in updates for array in pair), strict=True):
        np.testing.assert_array_equal(old, new)
    assert found == pytest.approx(angle_degrees(small_step, exact), abs=1e-9)
    assert abs(found - angle_degrees(before[0], exact)) > 1e-3


def test_arrays_may_be_replaced_between_steps(batch):
    made, images, labels = batch(small())
    made.network.weights[1] = np.zeros_like(made.network.weights[1])
    made.network.biases[1][...] = 0
    assert float(made.forward(images, labels).score.loss) == pytest.approx(np.log(10), rel=1e-6)


def test_equal_configs_build_equal_experiments_and_seeds_differ():
    one, two, other = (build(small(seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.network.weights[0], two.network.weights[0])
    np.testing.assert_array_equal(one.rule_state.weights[1], two.rule_state.weights[1])
    assert not np.array_equal(one.network.weights[0], other.network.weights[0])


def test_an_experiment_takes_normalisation_of_ones_own(batch):
    raw, pixels, _ = batch(small(data={"dataset": "fashion-mnist-10k", "in_memory_mb": 0, "normalize": "none"}))
    own = {"dataset": "fashion-mnist-10k", "in_memory_mb": 0, "normalize": {"mean": [0.5], "std": [0.25]}}
    _, images, _ = batch(small(data=own))
    assert 0 <= pixels.min() < pixels.max() <= 1
    np.testing.assert_allclose(images, (pixels - 0.5) / 0.25, atol=1e-5)
    assert raw.config.data.normalize == "none"


def test_test_images_are_neither_flipped_nor_cropped_nor_shuffled():
    data = {"dataset": "fashion-mnist-10k", "in_memory_mb": 0}
    batches = []
    for settings in (data, data | {"flip": 1.0, "crop_padding": 4}):
        made = build(small(data=settings))
        with closing(made.test_loader.batches(0)) as test, closing(made.train_loader.batches(0)) as train:
            batches.append([array.copy() for array in (*next(test), next(train)[0])])
    (images, labels, plain), (same_images, same_labels, augmented) = batches
    np.testing.assert_array_equal(images, same_images)
    np.testing.assert_array_equal(labels, same_labels)
    np.testing.assert_array_equal(labels, made.plan.dataset.read("test", 0, 500)[1])
    assert not np.array_equal(plain, augmented)


def test_rules_networks_and_ops_work_without_config_or_data():
    """A user's own loop: two dense blocks, random numbers, FA's updates against BP's."""
    generator = np.random.default_rng(0)
    x, labels = generator.standard_normal((20, 6)), generator.integers(0, 4, 20)
    network = make_network(
        plan_blocks([Dense(units=5, activation="elu"), Dense(units=4)], (6,)), "xavier-normal", seed=0, dtype="float64"
    )
    engine = Fast(NUMPY, threads=1)
    forward = engine.forward(network, x)
    loss, cache = cross_entropy_forward(forward.logits, labels, "mean")
    step = Batch(engine, network, forward, cross_entropy_backward(cache, "mean"))
    options = fa.Options(feedback_init="xavier-normal")
    state = fa.RULE.init_state(options, network, 0, NUMPY)
    own = fa.RULE.propose(options, state, step)
    exact = bp.RULE.propose(bp.Options(), State(), replace(step, results="exact"))
    np.testing.assert_allclose(own[1][0], exact[1][0])
    assert angle_degrees(own[0][0], exact[0][0]) > 1
    for (update, _), weight in zip(exact, network.weights, strict=True):
        np.subtract(weight, 0.5 * update, out=weight)
    again, _ = cross_entropy_forward(engine.forward(network, x).logits, labels, "mean")
    assert float(again) < float(loss)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_to_the_protocol(batch, name):
    """The loop, the trace, the bench and the audit rely on these shapes, names, numbers of blocks and FLOPs."""
    rule = RULES[name]
    made, images, labels = batch(small(rule={"name": name}, network={**SMALL_NETWORK, "square": rule.inverts},
                                       loss={"reduction": "mean"}))  # fmt: skip
    network, blocks = made.network, range(len(made.network))
    assert rule.name == rule.options().name == name
    step = made.forward(images, labels)
    losses, pairs = made.train_feedback(step), made.feedback_pairs()
    updates = made.updates(step)
    for (dweight, dbias), weight, bias in zip(updates, network.weights, network.biases, strict=True):
        assert (dweight.shape, dbias.shape) == (weight.shape, bias.shape)
        assert dweight.dtype == dbias.dtype == weight.dtype
    # At least the output block's dW, at two FLOPs per weight.
    assert made.rule.flops(made.config.rule, network) >= 2 * network.weights[-1].size
    relatives = ("fa", "sign-symmetry", "kolen-pollack", "weight-mirror", "alignment")
    assert (rule.targets is None) == (name in ("bp", "dfa", *relatives))
    assert (rule.local_loss is None) == (rule.local_update is None) == (rule.updates is not None)
    targets = list(made.targets(step))
    assert len(targets) == (len(network) if rule.targets is not None else 0)
    last = network.blocks[-1]
    assert not targets or targets[0].delta.size == len(images) * last.next_shape[0]
    learned = name in ("tp", "dtp", "ldrl", "ldrl-parallel", "drl", "weight-mirror", "alignment")
    assert (rule.feedback is not None) == learned
    assert made.feedback_step == (learned or name == "sign-symmetry")
    assert [n for n, *_ in pairs] == (list(blocks[1:]) if learned or name in relatives else [])
    for n, omega, theta in pairs:
        assert omega is made.rule_state.weights[n]
        assert theta is None or theta.shape == omega.shape
    assert len(losses) == (len(network) - 1 if learned else 0)
    if not learned:
        return
    # Alignment's default loss, the symmetric one, needs no matrix products.
    assert (rule.feedback.flops(made.config.rule, network) > 0) == (name != "alignment")
    assert rule.feedback.epochs(made.config.rule) == (0, 0)


RUNS = sorted((QUICKSTART.parent / "gait-prop").glob("*.yml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_gait_prop_papers_configs_fit_their_networks(path):
    shape, classes = ((224, 224, 3), 1000) if "imagenet" in path.stem else ((32, 32, 3), 10)
    for config in load_config(path).variants.values():
        blocks = plan_network(config.network, shape, classes)
        assert config.loss.reduction == "sum"
        if config.rule.name == "gait-prop":
            assert RULES["gait-prop"].check(config.rule, blocks, config.dtype, config.loss.reduction) == []


@pytest.mark.parametrize("rule", ["bp", "gp", "vgp", "fa"])
@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_the_first_steps_are_those_of_the_papers_runs(depth, rule):
    """They differ only in name, length and how often angles are measured."""
    folder = QUICKSTART.parent / "gait-prop"
    short = load_one(folder / f"first-steps-{depth}.yml", variant=rule)
    whole = load_one(folder / f"cifar10-{depth}-{rule}.yml")
    assert short == replace(whole, name=short.name, train=short.train, compare=short.compare)
    assert (short.train.steps, short.train.batch_size) == (300, whole.train.batch_size)


def test_the_quickstart_of_gait_prop_trains(batch):
    made, images, labels = batch(load_one(QUICKSTART.with_name("quickstart-gait-prop.yml"), variant="gp"))
    losses = [float(made.step(images, labels).loss) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    step = made.forward(images, labels)
    assert all(found.angle_deg < 30 for found in made.compare(step, made.updates(step)))


@pytest.mark.parametrize("spoil", [np.asfortranarray, lambda array: array.astype(np.float64)])
def test_a_parameter_that_the_optimiser_could_not_write_to_is_refused(batch, spoil):
    """Otherwise, a copy would silently be trained in its place."""
    made, images, labels = batch(small())
    step = made.forward(images, labels)
    updates = made.updates(step)
    made.network.weights[-1] = spoil(made.network.weights[-1])
    with pytest.raises(ValueError, match="C-contiguous"):
        made.apply(step, updates)


def test_weights_replaced_between_steps_are_those_that_rule_and_regulariser_see(batch):
    """A cached WWᵀ of the step before would give other updates and another gradient of the regulariser."""
    hidden = [{"type": "dense", "units": 24, "activation": "leaky-relu"}] * 2
    network = {"blocks": [*hidden, {"type": "dense", "units": 10}], "square": True, "init": "orthogonal"}
    optimizer = {"name": "sgd", "lr": 1e-3, "orthogonality": 10.0}
    config = small(network=network, rule={"name": "gait-prop", "form": "difference"}, optimizer=optimizer)
    one, images, labels = batch(config)
    other, _, _ = batch(config)
    one.step(images, labels)
    generator = np.random.default_rng(0)
    for n, weight in enumerate(other.network.weights):
        weight[...] = weight + generator.standard_normal(weight.shape) * 1e-2
        if n == 1:
            one.network.weights[n] = weight.copy()
        else:
            one.network.weights[n][...] = weight
        one.network.biases[n][...] = other.network.biases[n]
    for made in (one, other):
        made.step(images, labels)
    for mine, wanted in zip(one.network.weights, other.network.weights, strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_the_regulariser_comes_every_so_many_steps_as_many_times_as_strong(batch, every, plain):
    """On both engines, against λ·n·4(WWᵀ − I)W added by hand at steps n, 2n, …; the steps between have none."""
    network = {"blocks": [{"type": "dense", "units": 12}, {"type": "dense", "units": 10}], "square": True}
    results = []
    for strength in (2.0, 0.0):
        optimizer = {"name": "sgd", "lr": 0.01, "momentum": 0.5, "orthogonality": strength}
        if strength:
            optimizer["orthogonality_every"] = every
        config = small(network=network, optimizer=optimizer, dtype="float64")
        made, images, labels = batch(config, plain)
        for count in range(1, 8):
            step = made.forward(images, labels)
            updates = made.updates(step)
            if not strength and count % every == 0:
                w = made.network.weights[1]
                updates[1][0][...] += every * 2.0 * 4 * (w @ w.T - np.eye(len(w))) @ w
            made.apply(step, updates)
        results.append(made.network.weights)
    for mine, by_hand in zip(*results, strict=True):
        np.testing.assert_allclose(mine, by_hand, rtol=1e-11, atol=1e-13)


def test_rule_and_regulariser_share_what_is_computed_of_the_weights(batch, monkeypatch):
    """WWᵀ − I, which costs as much as its factors, is computed once per step."""
    network = {"blocks": [{"type": "dense", "units": 12}, {"type": "dense", "units": 10}], "square": True}
    config = small(
        network={**network, "init": "orthogonal"},
        rule={"name": "gait-prop", "form": "difference"},
        optimizer={"name": "sgd", "lr": 0.01, "orthogonality": 2.0},
        loss={"reduction": "sum"},
    )
    made, images, labels = batch(config)
    computed, compute = [], orthogonality.excess_rows
    monkeypatch.setattr(orthogonality, "excess_rows", lambda *given: computed.append(compute(*given)))
    for _ in range(3):
        computed.clear()
        made.step(images, labels)
        assert len(computed) == 1
