"""What a config is checked against before anything is computed."""

from pathlib import Path

import pytest

from arraytp.backend import NUMPY
from arraytp.config import load_one, parse_config
from arraytp.data.dataset import Dataset
from arraytp.errors import UserError
from arraytp.training.plan import plan

QUICKSTART = Path(__file__).parents[2] / "runs" / "quickstart.yml"
SMALL_NETWORK = {"blocks": [{"type": "dense", "units": 12, "activation": "tanh"}, {"type": "dense", "units": 10}]}


def small(**sections):
    tree = {
        "data": {"dataset": "fashion-mnist-10k"},
        "network": SMALL_NETWORK,
        "rule": {"name": "fa"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"epochs": 1, "batch_size": 32},
    }
    return parse_config({**tree, **sections}).variants[""]


@pytest.mark.parametrize(("dtype", "epsilon"), [("float32", 1e-44), ("float64", 1e-50)])
def test_a_small_epsilon_is_fine_while_it_is_not_zero(dtype, epsilon):
    config = small(optimizer={"name": "adam", "lr": 0.1, "epsilon": epsilon}, dtype=dtype)
    assert plan(config).config.optimizer.epsilon == epsilon


def test_a_gpu_takes_a_subnormal_epsilon_for_zero():
    """CuPy compiles with -ftz=true: for a gradient that is always 0, m / (sqrt(v) + ε) would be 0 / 0."""
    config = small(optimizer={"name": "adam", "lr": 0.1, "epsilon": 1e-44}, backend="cupy")
    with pytest.raises(UserError, match=r"optimizer.epsilon: 1e-44 is 0 in float32 on a GPU; use at least 1.2e-38"):
        plan(config, backend=NUMPY)
    double = small(optimizer={"name": "adam", "lr": 0.1, "epsilon": 1e-44}, backend="cupy", dtype="float64")
    assert plan(double, backend=NUMPY).config == double


def test_a_plan_tells_what_will_be_built_without_reading_images(monkeypatch):
    """The images may take gigabytes, or lie on a disk that is asleep."""

    def read(*arguments, **keywords):
        raise AssertionError("an image was read")

    for method in ("read", "read_into", "load", "_open"):
        monkeypatch.setattr(Dataset, method, read)
    planned = plan(load_one(QUICKSTART, variant="dfa"))
    assert [block.label for block in planned.blocks] == ["conv1", "conv2", "dense1", "dense2"]
    assert planned.test_split == "test"
    assert planned.dataset.counts == {"train": 10000, "test": 2000}


def test_normalisation_of_another_number_of_channels_is_refused():
    data = {"dataset": "fashion-mnist-10k", "normalize": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    with pytest.raises(UserError, match=r"data\.normalize: 3 values of mean and std.* need 1, one per channel"):
        plan(small(data=data))


def test_a_channel_without_deviation_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(Dataset, "std", (0.0,))
    with pytest.raises(UserError, match=r"data\.normalize: dataset, but .* \[0\.0\]: a channel is the same"):
        plan(small())
    data = {"dataset": "fashion-mnist-10k", "normalize": "none"}
    assert plan(small(data=data)).dataset.std == (0.0,)


def test_a_network_that_the_rule_cannot_invert_is_refused_before_training():
    with pytest.raises(UserError, match=r"network block 1 \(dense2\): rule gait-prop .* 12x10 is not square"):
        plan(small(rule={"name": "gait-prop"}))


def test_what_a_rule_has_to_say_about_a_config_is_in_the_plan():
    square = {**SMALL_NETWORK, "square": True}
    (note,) = plan(small(rule={"name": "gait-prop"}, network=square)).notes
    assert "literal in float32" in note
    assert plan(small(network=square)).notes == ()


@pytest.mark.parametrize(("lr", "lowest", "rises"), [(0.1, 0.1, False), (0.1, 0.2, True), ([0.3, 0.1], 0.2, True)])
def test_a_cosine_schedule_whose_lowest_rate_is_above_a_rate_is_noted(lr, lowest, rises):
    config = small(optimizer={"name": "sgd", "lr": lr}, schedule={"name": "cosine", "eta_min": lowest})
    said = (f"schedule.eta_min: {lowest:g} is above optimizer.lr 0.1, so that the rate rises; set it to at most that",)
    assert plan(config).notes == (said if rises else ())


def test_what_begins_after_the_end_is_told():
    """10,000 images in batches of 32 are 313 steps per epoch."""
    orthogonal = {"name": "sgd", "lr": 0.1, "orthogonality": 1, "orthogonality_on": "all-but-first"}
    late = small(
        schedule={"name": "step", "epochs": [1, 2], "warmup_steps": 627},
        optimizer={**orthogonal, "orthogonality_every": 627},
        train={"epochs": 2, "batch_size": 32},
    )
    assert plan(late).notes == (
        "schedule.warmup_steps: 627, but train.epochs 2 is 626 steps, so that the rate never reaches optimizer.lr",
        "schedule.epochs: 2 is not reached with train.epochs 2",
        "optimizer.orthogonality_every: 627, but train.epochs 2 is 626 steps, so that the regulariser never acts",
    )
    in_time = small(
        schedule={"name": "step", "epochs": [1], "warmup_steps": 626},
        optimizer={**orthogonal, "orthogonality_every": 626},
        train={"epochs": 2, "batch_size": 32, "steps": 5},
    )
    assert plan(in_time).notes == ()


def test_a_network_of_one_block_is_told_so_by_the_regulariser():
    config = small(
        network={"blocks": [{"type": "dense", "units": 10}]}, rule={"name": "bp"},
        optimizer={"name": "sgd", "lr": 0.1, "orthogonality": 1, "orthogonality_on": "all-but-first"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the network has one block, dense1, whose matrix is not square; set it to 0$"):
        plan(config)


def test_a_study_of_drift_has_no_place_for_gauss_newton_targets():
    config = small(
        rule={"name": "gait-prop", "inverse": "pseudo"}, study={"kind": "drift", "seeds": 1},
        compare={"every": 1, "against": ["bp", "gnt"]},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"compare.against: gnt: a study of drift measures angles to bp alone"):
        plan(config)
