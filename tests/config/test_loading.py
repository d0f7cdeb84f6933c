"""What a config file means: defaults, numbers, variants and `--set`."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arraytp.config import config_schema, load_config, load_one, parse_config
from arraytp.config.merge import merge, overlay
from arraytp.errors import UserError
from arraytp.options import SGD, Adam, Conv, Cosine, Dense
from arraytp.rules import RULES

BASE = """\
data: {dataset: fashion-mnist-10k, normalize: {mean: [0.5], std: [0.25]}}
network: {name: lenet, activation: tanh, init: orthogonal}
optimizer: {name: adam, lr: 1e-3, beta1: 0.5}
schedule: {name: cosine, t_max: 5}
train: {epochs: 3, batch_size: 64}
"""


@pytest.fixture
def write(tmp_path):
    def write_config(text):
        path = tmp_path / "study.yml"
        path.write_text(text)
        return path

    return write_config


@pytest.fixture
def with_override(write):
    def load_with(*overrides, text=BASE):
        return load_one(write(text), overrides)

    return load_with


def test_the_name_is_the_files_stem_unless_given(write):
    assert load_config(write(BASE)).name == "study"
    assert load_config(write(BASE + "name: other\n")).name == "other"
    assert load_config(write(BASE), ["name=third"]).name == "third"


def test_a_file_without_variants_holds_one_config_with_an_empty_name(write):
    assert list(load_config(write(BASE)).variants) == [""]
    assert list(load_config(write(BASE + "variants: {}\n")).variants) == [""]
    assert list(load_config(write(BASE + "variants:\n")).variants) == [""]


def test_whole_numbers_and_exponents_are_numbers(with_override):
    assert with_override("optimizer.lr=1e-8").optimizer.lr == 1e-8
    rate = with_override("optimizer.lr=1").optimizer.lr
    assert rate == 1.0
    assert isinstance(rate, float)


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "mark.yml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_one(path).train.epochs == 3


def test_variants_keep_the_files_order_and_inherit(write):
    text = BASE + "variants:\n  z: {seed: 1}\n  a: {optimizer: {lr: 0.5}}\n  plain:\n  0.10: {seed: 2}\n"
    variants = load_config(write(text)).variants
    assert list(variants) == ["z", "a", "plain", "0.10"]
    assert variants["z"].seed == 1
    assert variants["a"].optimizer == Adam(lr=0.5, beta1=0.5)
    assert variants["plain"].optimizer == Adam(lr=1e-3, beta1=0.5)
    assert load_one(write(text), variant="0.10").seed == 2


def test_another_optimizer_does_not_inherit_the_old_ones_keys(write):
    text = BASE + "variants: {a: {optimizer: {name: sgd, lr: 0.1}}}\n"
    assert load_one(write(text), variant="a").optimizer == SGD(lr=0.1)


def test_the_same_name_again_keeps_the_other_keys(write):
    text = BASE + "variants: {a: {optimizer: {name: adam, lr: 0.1}}}\n"
    assert load_one(write(text), variant="a").optimizer == Adam(lr=0.1, beta1=0.5)


@pytest.mark.parametrize("rule", [rule for rule in RULES if hasattr(RULES[rule].options(), "feedback")])
def test_feedback_given_in_part_keeps_the_rules_own_defaults(with_override, rule):
    """Otherwise, weight mirror with only σ given would do ten iterations instead of its one."""
    usual = RULES[rule].options().feedback
    assert with_override(f"rule={{name: {rule}, feedback: {{sigma: 0.7}}}}").rule.feedback == replace(usual, sigma=0.7)
    optimizer = with_override(f"rule={{name: {rule}, feedback: {{optimizer: {{name: sgd, lr: 0.3}}}}}}").rule.feedback
    assert optimizer == replace(usual, optimizer=SGD(lr=0.3))


@pytest.mark.parametrize("rule", ["bp", "[fa]", "3"])
def test_feedback_of_a_rule_without_any_is_a_mistake(with_override, rule):
    with pytest.raises(UserError, match="rule"):
        with_override(f"rule={{name: {rule}, feedback: {{sigma: 0.7}}}}")


def test_a_shared_setting_waits_for_the_variants_choice(write):
    text = BASE.replace("name: adam, lr: 1e-3, beta1: 0.5", "lr: 0.1")
    variants = load_config(
        write(text + "variants: {a: {optimizer: {name: sgd}}, b: {optimizer: {name: adam}}}\n")
    ).variants
    assert [variant.optimizer for variant in variants.values()] == [SGD(lr=0.1), Adam(lr=0.1)]


def test_blocks_replace_a_named_network_and_back(write, with_override):
    text = BASE + "variants: {a: {network: {blocks: [{type: dense, units: 10}]}}}\n"
    network = load_one(write(text), variant="a").network
    assert (network.name, network.blocks, network.activation) == (None, [Dense(units=10)], None)
    free = BASE.replace("name: lenet, activation: tanh", "blocks: [{type: dense, units: 10}]")
    network = with_override("network.name=vgg", text=free).network
    assert (network.name, network.blocks) == ("vgg", None)


def test_an_empty_value_withdraws_an_optional_choice(with_override):
    assert with_override("network.activation=").network.activation is None


def test_a_variant_replaces_normalisation_as_a_whole(write):
    text = BASE + "variants: {a: {data: {normalize: none}}}\n"
    assert load_one(write(text), variant="a").data.normalize == "none"


def test_set_reads_yaml_lists_and_maps(with_override):
    assert with_override("data.normalize.mean=[0.1]").data.normalize.mean == (0.1,)
    assert with_override("schedule={name: cosine, t_max: 7}").schedule == Cosine(t_max=7)
    assert with_override("data.dataset=a=b").data.dataset == "a=b"


def test_set_reaches_into_lists(with_override):
    conv = "{type: conv, channels: 4, kernel: 5, padding: same}"
    text = BASE.replace("name: lenet, activation: tanh", f"blocks: [{conv}, {{type: dense, units: 10}}]")
    blocks = with_override("network.blocks.0.kernel=3", "network.blocks.1.units=7", text=text).network.blocks
    assert blocks == [Conv(channels=4, kernel=3, padding="same"), Dense(units=7)]
    blocks = with_override("network.blocks.0={type: dense, units: 2}", text=text).network.blocks
    assert blocks == [Dense(units=2), Dense(units=10)]


def test_set_applies_in_order_after_the_variants_own(write):
    path = write(BASE + "variants: {fa: {seed: 1}, fa.b: {seed: 2}}\n")
    variants = load_config(path, ["seed=5", "variants.fa.b.seed=6", "train.epochs=9"]).variants
    assert {name: (config.seed, config.train.epochs) for name, config in variants.items()} == {
        "fa": (5, 9),
        "fa.b": (6, 9),
    }
    assert load_config(path, ["variants.fa.seed=6", "seed=5"]).variants["fa"].seed == 5


def test_set_of_another_optimizer_and_its_rate_work_in_turn(with_override):
    assert with_override("optimizer.name=sgd", "optimizer.lr=0.3").optimizer == SGD(lr=0.3)


def test_a_map_from_python_needs_no_file():
    tree = {
        "data": {"dataset": "x", "normalize": {"mean": (0.5,), "std": (1,)}},
        "network": {"name": "lenet"},
        "optimizer": {"name": "sgd", "lr": 1},
        "train": {"epochs": 1, "batch_size": 2},
    }
    config = parse_config(tree, overrides=["seed=4"]).variants[""]
    assert (config.name, config.seed, config.data.normalize.std) == ("config", 4, (1.0,))


trees = st.recursive(
    st.none() | st.integers() | st.text(max_size=2),
    lambda inner: st.dictionaries(st.sampled_from(["name", "type", "blocks", "a", "b"]), inner, max_size=4),
    max_leaves=8,
)


@given(trees, trees)
def test_merging_is_idempotent_and_changes_neither_side(base, over):
    before = repr((base, over))
    merged = merge(base, over)
    assert merge(merged, over) == merged
    assert repr((base, over)) == before


@given(trees)
def test_merging_nothing_changes_nothing(tree):
    tree = tree if isinstance(tree, dict) else {}
    assert merge(tree, {}) == overlay(tree, {}) == tree


def test_set_is_for_the_chosen_variant_which_may_have_keys_that_no_other_has(write):
    path = write(BASE + "variants: {gp: {rule: {name: gait-prop}}, fa: {rule: {name: fa}}}\n")
    assert load_one(path, ["rule.eta=1e-4"], "gp").rule.eta == 1e-4
    with pytest.raises(UserError, match=r"--set rule.eta=1e-4: rule.eta is not a known key.*\(in variant fa\)"):
        load_config(path, ["rule.eta=1e-4"])
    with pytest.raises(UserError, match=r"--set rule.nu=1: rule.nu is not a known key.*\(in variant gp\)"):
        load_one(path, ["rule.nu=1"], "gp")


def test_the_editor_schema_knows_every_section_and_variants():
    properties = config_schema()["properties"]
    assert {"data", "network", "rule", "optimizer", "train", "variants"} <= set(properties)
    assert [config_schema()["$defs"][block]["required"][-1] for block in ("Conv", "Dense")] == ["type", "type"]


def test_a_name_that_is_set_is_that_of_all_variants(tmp_path):
    """Under this name, the results of a single variant go beside those of the others."""
    path = tmp_path / "two.yml"
    path.write_text(BASE + "variants: {first: {rule: {name: bp}}, second: {rule: {name: fa}}}\n")
    assert load_config(path, ["name=mine"], "second").name == "mine"
    assert load_config(path, ["name=mine"]).name == "mine"
    assert load_config(path, [], "second").name == "two"
