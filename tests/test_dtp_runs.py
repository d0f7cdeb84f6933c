"""runs/dtp: every config fits its network and data set, and its numbers are the paper's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arraytp.config import load_config, load_one
from arraytp.data.writer import Description, writing
from arraytp.training.plan import plan

FOLDER = Path(__file__).parents[1] / "runs" / "dtp"
# Not rows of the paper's tables: the figures' studies, the comparisons on the embedded images, and the stand-in.
EMBEDDED = FOLDER / "fashion-mnist-10k.yml"
CLOSED = FOLDER / "closed-form.yml"
STAND_IN = FOLDER / "tiny-imagenet-vgg.yml"
OWN = (EMBEDDED, CLOSED, STAND_IN)
RUNS = sorted(path for path in FOLDER.glob("*.yml") if not path.stem.startswith("figure") and path not in OWN)
SHAPES = {"mnist": ((28, 28, 1), 10), "fashion": ((28, 28, 1), 10), "cifar10": ((32, 32, 3), 10),
          "imagenet32": ((32, 32, 3), 1000)}  # fmt: skip


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Data sets of the right shapes and classes, with two images per split."""
    folders = {}
    for name, (shape, classes) in SHAPES.items():
        folders[name] = tmp_path_factory.mktemp(name) / "data"
        with writing(folders[name], Description(name, shape, tuple(map(str, range(classes))))) as writer:
            for split in ("train", "test"):
                writer.add(split, np.zeros((2, *shape), np.uint8), np.array([0, classes - 1]))
    return folders


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_fits_its_data_set_and_network(path, datasets):
    config = load_one(path)
    assert config.name == path.stem
    data = replace(config.data, dataset=str(datasets[path.stem.split("-")[0]]))
    planned = plan(replace(config, data=data))
    assert planned.notes == ()
    assert len(planned.blocks) == (6 if "vgg" in path.stem else 4)
    assert (config.data.flip, config.data.crop_padding) == (0.5, 4)
    assert config.train.epochs == (40 if "mnist" in path.stem else 90)
    assert (config.schedule.name, config.schedule.t_max, config.schedule.eta_min) == ("cosine", 85, 1e-5)
    assert Path(config.data.dataset).name == next(
        name for name in ("fashion-mnist", "mnist", "cifar10", "imagenet32") if path.stem.startswith(name)
    )


def test_there_is_a_config_for_every_row_and_the_readme_has_them_all():
    rows = {f"{data}-{rule}" for data in ("mnist", "fashion-mnist", "cifar10")
            for rule in ("s-ddtp", "p-ddtp", "ldrl", "bp")}  # fmt: skip
    rows |= {f"{data}-vgg-{rule}" for data in ("cifar10", "imagenet32") for rule in ("ldrl", "bp")}
    assert {path.stem for path in RUNS} == rows
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{path.name}` |" in page for path in FOLDER.glob("*.yml"))


@pytest.mark.parametrize("rule", ["bp", "ldrl"])
def test_the_stand_in_for_imagenet_has_the_values_of_vgg_on_cifar10(rule):
    config, other = load_one(STAND_IN, (), rule), load_one(FOLDER / f"cifar10-vgg-{rule}.yml")
    assert config.optimizer == other.optimizer
    assert config.network == other.network
    assert replace(config.data, dataset=other.data.dataset) == other.data
    assert config.rule == (replace(other.rule, expected=True) if rule == "ldrl" else other.rule)
    assert replace(config.schedule, t_max=85) == other.schedule
    assert replace(config.train, epochs=90) == other.train
    assert (config.train.epochs, config.schedule.t_max) == (10, 9)


@pytest.mark.parametrize(
    ("name", "steps"), [("mnist", 0.04385), ("fashion-mnist", 0.04385), ("cifar10", 0.015962099947441903)]
)
def test_s_ddtp_pretrains_and_divides_its_rates_by_the_target_step_size(name, steps):
    config = load_one(FOLDER / f"{name}-s-ddtp.yml")
    printed = {"cifar10": (0.00025935571806476586, 0.000885500279951265, 0.0001423047695105589, 3.3871035558126015e-06)}
    lr = printed.get(name, (0.001694, 0.09782, 0.02479, 0.001937))
    np.testing.assert_allclose(config.optimizer.lr, np.array(lr) / steps, rtol=1e-5)
    assert (config.rule.eta, config.rule.pretrain_epochs, config.rule.extra_epochs) == (steps, 10, 1)
    assert config.rule.feedback.iterations == 1
    assert config.dtype == "float64"


@pytest.mark.parametrize(
    ("name", "steps", "lr"),
    [("mnist", 0.0428, (0.004434, 0.001448, 0.0006104, 0.001353)),
     ("fashion-mnist", 0.01308, (0.0003865, 0.00175, 0.001484, 0.0001489)),
     ("cifar10", 0.09983, (0.0002289, 0.006166, 0.0001575, 5.573e-05))],
)  # fmt: skip
def test_p_ddtp_trains_feedback_many_times_a_batch(name, steps, lr):
    config = load_one(FOLDER / f"{name}-p-ddtp.yml")
    np.testing.assert_allclose(config.optimizer.lr, np.array(lr) / steps, rtol=1e-5)
    assert (config.rule.eta, config.rule.pretrain_epochs, config.rule.extra_epochs) == (steps, 0, 0)
    assert min(config.rule.feedback.iterations) > 20


def test_ldrl_on_cifar10_has_the_settings_of_the_authors_code():
    config = load_one(FOLDER / "cifar10-ldrl.yml")
    assert (config.optimizer.lr, config.optimizer.momentum, config.optimizer.weight_decay) == (0.03618, 0.9, 1e-4)
    assert (config.train.batch_size, config.rule.beta, config.rule.divide_by_beta) == (144, 0.4655, False)
    feedback = config.rule.feedback
    assert feedback.sigma == (0.4164, 0.3826, 0.1395)
    assert feedback.iterations == (41, 51, 24)
    assert feedback.optimizer.lr == (7.188e-4, 1.251e-4, 3.541e-2)


def test_the_rules_compared_on_the_embedded_images_differ_in_rule_and_learning_rate_only():
    variants = load_config(EMBEDDED).variants
    assert {name: config.rule.name for name, config in variants.items()} == {
        name: name for name in ("bp", "ldrl", "dtp", "tp", "drl")
    }
    shared = {replace(config, rule=variants["bp"].rule, optimizer=replace(config.optimizer, lr=1.0))
              for config in variants.values()}  # fmt: skip
    assert len(shared) == 1
    learned = [config.rule for name, config in variants.items() if name != "bp"]
    assert len({(rule.feedback.iterations, rule.feedback_init) for rule in learned}) == 1
    assert all(plan(config).notes == () for config in variants.values())
