"""Every mistake in a config is one line that says where, what and what would be right."""

import re

import pytest

from arraytp.config import load_config, load_one, parse_config
from arraytp.errors import UserError

GOOD = """\
data: {dataset: fashion-mnist-10k}
network: {name: lenet}
optimizer: {name: adam, lr: 1e-3}
train: {epochs: 3, batch_size: 64}
"""


RATE = "optimizer.lr must be a number above 0, or a list, each entry a number above 0, got"


def good(**sections):
    """Return the good config with whole lines replaced, or added at its end as line 5."""
    text = GOOD
    for key, value in sections.items():
        line = f"{key}: {value}\n"
        text = re.sub(f"^{key}:.*\n", line, text, flags=re.M) if re.search(f"^{key}:", text, re.M) else text + line
    return text


def optimizer(settings):
    return good(optimizer="{" + settings + "}")


def blocks(entries):
    return good(network=f"{{blocks: [{entries}]}}")


def data(settings):
    return good(data="{dataset: folder, " + settings + "}")


def variants(text):
    return GOOD + "variants:\n" + text


SYNTAX = {
    "an empty file": ("", "bad.yml: empty; a config needs at least data, network, optimizer and train"),
    "a file of comments only": ("# nothing\n", "bad.yml: empty"),
    "a list": ("- 1\n", "bad.yml: must be a map of keys, such as seed: 0, got [1]"),
    "a lone word": ("lenet\n", 'bad.yml: must be a map of keys, such as seed: 0, got "lenet"'),
    "a tab": ("data:\n\tdataset: x\n", "bad.yml:2: not valid YAML: a tab where YAML wants spaces"),
    "a tab before a comment": (
        "seed: 3\t# x\n",
        "bad.yml:1: not valid YAML: a tab where YAML wants spaces; use spaces",
    ),
    "another YAML": (
        "# x\n%YAML 1.1\n---\nseed: 1\n",
        "bad.yml:2: %YAML 1.1: a config is YAML 1.2; leave this line out",
    ),
    "a later YAML": ("%YAML 1.3\n---\nseed: 1\n", "bad.yml:1: %YAML 1.3: a config is YAML 1.2"),
    "a number of 5,000 digits": (
        "variants: 0x" + 5000 * "f" + "\n",
        "must be a map from variant names to overrides, got 0xfff",
    ),
    "a long text many times": (
        "a: &x '" + 10**5 * "x" + "'\nb: [" + 50 * "*x, " + "]\n",
        "bad.yml:1: more than 4,194,304 characters, aliases written out",
    ),
    "a key given twice": ("seed: 1\nseed: 2\n", "bad.yml:2: the key seed is given twice, first at"),
    "a nested key given twice": (
        "train:\n  epochs: 1\n  epochs: 2\n",
        "bad.yml:3: the key train.epochs is given twice, first at",
    ),
    "an open bracket": ("a: 1\nb: [1\n", "bad.yml:3: not valid YAML: expected ',' or ']'"),
    "two colons": ("a: b: c\n", "bad.yml:1: not valid YAML: mapping values are not allowed here"),
    "an open quote": ("a: 'x\n", "bad.yml:2: not valid YAML: found unexpected end"),
    "an unknown alias": ("a: 1\nb: *x\n", "bad.yml:2: not valid YAML: found undefined alias 'x'"),
    "an alias of itself": ("a: &x [*x]\n", "bad.yml:1: nested too deeply"),
    "thousands of brackets": ("[" * 1000, "bad.yml: nested too deeply"),
    "two documents": ("a: 1\n---\nb: 2\n", "bad.yml:2: a second document starts here"),
    "a language's own tag": ("a: !!python/object x\n", "bad.yml:1: the tag !!python/object has no meaning in a config"),
    "a set": ("a: !!set {b}\n", "bad.yml:1: the tag !!set has no meaning in a config"),
    "a tag of nothing": ("seed: !!int\n", "bad.yml:1: '' cannot be read as !!int"),
    "a key that is no text": ('"\\ud800": 1\n', "is not a key: it holds what cannot be written as UTF-8"),
    "a tag that does not fit": ("a: !!int x\n", "bad.yml:1: 'x' cannot be read as !!int"),
    "a control character": ("a: 1\nb: \x01\n", "bad.yml:2: not valid YAML: the character U+0001 must not appear"),
    "a list as a key": ("? [1]\n: 2\n", "bad.yml:1: a key must be plain text"),
}

KEYS = {
    "a misspelt key": (
        optimizer("name: adam, lrr: 1"),
        "bad.yml:3: optimizer.lrr is not a known key; did you mean lr?",
    ),
    "a misspelt section": (good(sede=1), "bad.yml:5: sede is not a known key; did you mean seed?"),
    "a misspelt variants": (good(variant="{}"), "bad.yml:5: variant is not a known key; did you mean variants?"),
    "a key of nowhere": (good(frob=1), "bad.yml:5: frob is not a known key; known here: name, seed, backend"),
    "a key of the other optimizer": (
        optimizer("name: adam, lr: 1, momentum: 0.9"),
        "bad.yml:3: optimizer.momentum is not a known key; known with name: adam: name, lr, beta1",
    ),
    "a key of the other block": (
        blocks("{type: dense, units: 3, kernel: 3}"),
        "bad.yml:2: network.blocks.0.kernel is not a known key; known with type: dense: type, units, activation",
    ),
    "a missing section": (
        GOOD.replace("train:", "#"),
        "bad.yml: train is missing; for example train: {epochs: 10, batch_size: 128}",
    ),
    "a missing key": (optimizer("name: adam"), "bad.yml:3: optimizer.lr is missing; for example lr: 0.1"),
    "a missing dataset": (
        good(data="{}"),
        "bad.yml:1: data.dataset is missing; for example dataset: fashion-mnist-10k",
    ),
    "a missing name": (optimizer("lr: 1"), "bad.yml:3: optimizer.name is missing; it must be one of sgd or adam"),
    "a missing std": (
        data("normalize: {mean: [0.5]}"),
        "bad.yml:1: data.normalize.std is missing; for example std: [0.",
    ),
    "an empty section": (
        good(train=""),
        "bad.yml:4: train is empty; it must be a map with the keys epochs, batch_size",
    ),
    "an empty number": (optimizer("name: sgd, lr: "), "bad.yml:3: optimizer.lr is empty; it must be a number above 0"),
}

VALUES = {
    "a quoted number": (
        optimizer("name: sgd, lr: '1e-3'"),
        f'{RATE} "1e-3"; write it without quotes: 1e-3',
    ),
    "a number with underscores": (
        good(train="{epochs: 1_000, batch_size: 1}"),
        'at least 0, got "1_000"; write it without underscores: 1000',
    ),
    "a quoted number with too many digits": (optimizer(f"name: sgd, lr: '{'9' * 400}'"), f'{RATE} "999'),
    "a negative rate": (optimizer("name: sgd, lr: -1"), f"bad.yml:3: {RATE} -1"),
    "a rate of zero": (optimizer("name: sgd, lr: 0"), f"{RATE} 0"),
    "not a number": (optimizer("name: sgd, lr: .nan"), "bad.yml:3: optimizer.lr must be a finite number, got nan"),
    "infinity": (optimizer("name: sgd, lr: .inf"), "bad.yml:3: optimizer.lr must be a finite number, got inf"),
    "infinity by overflow": (optimizer("name: sgd, lr: 1e999"), "optimizer.lr must be a finite number, got inf"),
    "true as a number": (optimizer("name: sgd, lr: true"), f"{RATE} true"),
    "a list as a number": (optimizer("name: sgd, lr: [1, x]"), f'{RATE} [1, "x"]'),
    "a momentum of one": (
        optimizer("name: sgd, lr: 1, momentum: 1.0"),
        "optimizer.momentum must be a number from 0 to below 1, got 1.0",
    ),
    "true as a count": (
        good(train="{epochs: true, batch_size: 1}"),
        "train.epochs must be a whole number of at least 0",
    ),
    "a fraction of an epoch": (
        good(train="{epochs: 1.5, batch_size: 1}"),
        "bad.yml:4: train.epochs must be a whole num",
    ),
    "a count with a point": (
        good(train="{epochs: 3.0, batch_size: 1}"),
        "whole number of at least 0, got 3.0; write 3",
    ),
    "negative epochs": (good(train="{epochs: -1, batch_size: 1}"), "must be a whole number of at least 0, got -1"),
    "an empty batch": (
        good(train="{epochs: 1, batch_size: 0}"),
        "train.batch_size must be a whole number of at least 1",
    ),
    "a huge count": (good(seed=10**30), "bad.yml:5: seed is too large: whole numbers go up to 9223372036854775807"),
    "a negative seed": (good(seed=-1), "bad.yml:5: seed must be a whole number of at least 0, got -1"),
    "an unknown backend": (good(backend="cuda"), 'backend must be one of numpy or cupy, got "cuda"'),
    "a dtype of bits": (good(dtype=32), "dtype must be one of float32 or float64, got 32"),
    "a misspelt dtype": (good(dtype="flaot32"), 'float32 or float64, got "flaot32"; did you mean float32?'),
    "a name with a slash": (good(name="a/b"), "bad.yml:5: name must be usable as a folder's name: no slashes"),
    "an empty name": (good(name="''"), "bad.yml:5: name must not be empty"),
    "a negative interval": (good(compare="{every: -1}"), "compare.every must be a whole number of at least 0, got -1"),
    "a flip above one": (data("flip: 1.5"), "bad.yml:1: data.flip must be a number from 0 to 1, got 1.5"),
    "a negative crop": (data("crop_padding: -1"), "data.crop_padding must be a whole number of at least 0, got -1"),
    "a zero std": (data("normalize: {mean: [0], std: [0]}"), "data.normalize.std.0 must be a number above 0, got 0"),
    "a word as a mean": (data("normalize: {mean: [a], std: [1]}"), 'data.normalize.mean.0 must be a number, got "a"'),
    "no channels": (data("normalize: {mean: [], std: [1]}"), "bad.yml:1: data.normalize.mean must not be empty"),
    "lengths that differ": (
        data("normalize: {mean: [0.5], std: [1, 1, 1]}"),
        "data.normalize needs one mean and one std per channel, got 1 in mean and 3 in std",
    ),
    "a misspelt normalize": (
        data("normalize: datset"),
        "data.normalize must be one of dataset or none, or a map with the keys mean, std, "
        'got "datset"; did you mean dataset?',
    ),
    "a dataset number": (good(data="{dataset: 3}"), "bad.yml:1: data.dataset must be text, got 3"),
    "a checkpoint never": (
        good(train="{epochs: 1, batch_size: 1, checkpoint_minutes: 0}"),
        "train.checkpoint_minutes must be a number above 0, got 0",
    ),
}

CHOICES = {
    "an unknown optimizer": (
        optimizer("name: adm, lr: 1"),
        'bad.yml:3: optimizer.name must be one of sgd or adam, got "adm"; did you mean adam?',
    ),
    "an unknown rule": (good(rule="{name: gradient}"), "bad.yml:5: rule.name must be one of bp, fa"),
    "a capital letter": (good(rule="{name: FA}"), 'got "FA"; did you mean fa?'),
    "a rule as a word": (good(rule="fa"), 'got "fa"; write rule: {name: fa}'),
    "an unknown loss": (good(loss="{name: l2}"), 'loss.name must be one of cross-entropy or mse, got "l2"'),
    "labels smoothed away": (
        good(loss="{label_smoothing: 1}"),
        "loss.label_smoothing must be a number from 0 to below 1, got 1",
    ),
    "a step schedule of no epochs": (
        good(schedule="{name: step}"),
        "schedule.epochs is missing; for example epochs: [1]",
    ),
    "epochs that do not increase": (
        good(schedule="{name: step, epochs: [3, 2]}"),
        "schedule needs epochs that increase, such as [30, 60], got [3, 2] in epochs",
    ),
    "a rate divided by less than 1": (
        good(schedule="{name: step, epochs: [3], factor: 0.1}"),
        "schedule.factor must be a number above 1, got 0.1",
    ),
    "a warm-up of half a step": (
        good(schedule="{name: constant, warmup_steps: 0.5}"),
        "schedule.warmup_steps must be a whole number of",
    ),
    "a schedule without a name": (good(schedule="{t_max: 3}"), "schedule.name is missing; it must be one of constant"),
    "an unknown network": (
        good(network="{name: lenett}"),
        "bad.yml:2: network.name must be one of fc-shallow, fc-deep, lenet, vgg or conv-imagenet, "
        'got "lenett"; did you mean lenet?',
    ),
    "no network": (good(network="{init: orthogonal}"), "bad.yml:2: network needs one of the keys name and blocks"),
    "two networks": (
        good(network="{name: lenet, blocks: [{type: dense, units: 3}]}"),
        "bad.yml:2: network has both name and blocks; keep one of them",
    ),
    "an activation beside blocks": (
        good(network="{activation: tanh, blocks: [{type: dense, units: 3}]}"),
        "bad.yml:2: network has both blocks and activation; with blocks, give each block its own",
    ),
    "no blocks": (blocks(""), "bad.yml:2: network.blocks must not be empty"),
    "a block of no type": (blocks("{unit: 3}"), "network.blocks.0.type is missing; it must be one of conv or dense"),
    "a block of unknown type": (blocks("{type: dens}"), 'got "dens"; did you mean dense?'),
    "a block that is a number": (blocks("7"), "network.blocks.0 must be a map with type: conv or dense, got 7"),
    "an unknown padding": (
        blocks("{type: conv, channels: 1, kernel: 1, padding: valid}"),
        'network.blocks.0.padding must be a whole number of at least 0, or same, got "valid"',
    ),
    "a pool without a stride": (
        blocks("{type: conv, channels: 1, kernel: 1, pool: {kernel: 2}}"),
        "network.blocks.0.pool.stride is missing; for example stride: 1",
    ),
}

VARIANTS = {
    "variants that are a list": (variants("  - fa\n"), "bad.yml:5: variants must be a map from variant names"),
    "a variant with a space": (variants("  a b:\n"), "bad.yml:6: variants.a b is not a variant name: use letters"),
    "a variant that starts with a dot": (variants("  .a:\n"), "bad.yml:6: variants..a is not a variant name"),
    "a variant named like a file": (
        variants("  comparison.png:\n"),
        "bad.yml:6: variants.comparison.png is not a variant",
    ),
    "a variant in a folder": (variants("  a/b:\n"), "bad.yml:6: variants.a/b is not a variant name: use letters"),
    "a variant of 300 letters": (variants(f"  {'v' * 300}:\n"), "is too long: a variant name has at most 200 letters"),
    "a variant like a study's table": (variants("  study.md:\n"), "bad.yml:6: variants.study.md is not a variant name"),
    "a variant like the seeds' table": (
        variants("  seeds.csv:\n"),
        "bad.yml:6: variants.seeds.csv is not a variant name",
    ),
    "a variant without a name": (variants("  '':\n"), "bad.yml:6: variants. is not a variant name"),
    "a variant that is a number": (variants("  a: 3\n"), "bad.yml:6: variants.a must be a map of overrides, got 3"),
    "a variant that renames": (variants("  a:\n    name: b\n"), "bad.yml:7: variants.a.name has no place in a variant"),
    "a variant of variants": (variants("  a:\n    variants: {}\n"), "bad.yml:7: variants.a.variants has no place"),
    "a mistake in a variant": (variants("  a:\n    seed: x\n"), "bad.yml:7: variants.a.seed must be a whole number"),
    "a key missing from one variant": (
        optimizer("name: adam") + "variants: {a: , b: {optimizer: {lr: 1}}}\n",
        "bad.yml:3: optimizer.lr is missing; for example lr: 0.1 (in variant a)",
    ),
    "a key missing from what a variant chose": (
        variants("  a:\n    optimizer:\n      name: sgd\n"),
        "bad.yml:8: variants.a.optimizer.lr is missing; for example lr: 0.1",
    ),
}

CASES = SYNTAX | KEYS | VALUES | CHOICES | VARIANTS


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_the_message_names_the_place_the_value_and_what_is_right(tmp_path, text, expected):
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert expected in message
    assert len(message.splitlines()) == 1
    assert not re.search(r"pydantic|https?:|Input should|Options|Adam\b|Config\b|Normalize", message)


SETS = {
    "no equals sign": ("optimizer.lr", "--set optimizer.lr: expected key.path=value, for example optimizer.lr=0.1"),
    "no key": ("=3", "--set =3: expected key.path=value"),
    "an empty step": ("a..b=3", "--set a..b=3: expected key.path=value"),
    "a bad value": ("optimizer.lr=-1", f"--set optimizer.lr=-1: {RATE} -1"),
    "a number with underscores": ("optimizer.lr=1_000", "--set optimizer.lr=1_000: optimizer.lr must be"),
    "no value": ("optimizer.lr=", "--set optimizer.lr=: optimizer.lr is empty; it must be a number above 0"),
    "a misspelt section": (
        "optimzer.lr=1",
        "--set optimzer.lr=1: optimzer is not a known key; did you mean optimizer?",
    ),
    "another optimizer without a rate": ("optimizer.name=sgd", "--set optimizer.name=sgd: optimizer.lr is missing"),
    "broken YAML": ("optimizer.lr=[1", "--set optimizer.lr=[1: not valid YAML: expected ',' or ']'"),
    "a key below a number": ("seed.x=1", "--set seed.x=1: seed must be a whole number of at least 0, got {x: 1}"),
    "a list index too high": (
        "data.normalize.mean.3=1",
        "data.normalize.mean has the entries 0 to 0; 3 is none of them",
    ),
    "a list index that is a word": ("data.normalize.mean.x=1", "data.normalize.mean has the entries 0 to 0; x is none"),
    "a variant that is not there": (
        "variants.c.seed=1",
        "--set variants.c.seed=1: expected variants.NAME.key.path=value with NAME among the variants: a, b",
    ),
    "a whole variant": ("variants.a=3", "expected variants.NAME.key.path=value"),
    "a variant's name": ("variants.a.name=x", "--set variants.a.name=x: name has no place in a variant"),
    "a mistake in one variant": (
        "variants.a.seed=x",
        'seed must be a whole number of at least 0, got "x" (in variant a)',
    ),
}


@pytest.mark.parametrize(("override", "expected"), SETS.values(), ids=SETS)
def test_a_bad_override_is_named_as_it_was_given(tmp_path, override, expected):
    path = tmp_path / "bad.yml"
    path.write_text(data("normalize: {mean: [0.5], std: [1]}") + "variants: {a: , b: }\n")
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yml: no such file"):
        load_config(tmp_path / "nowhere.yml")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; give a config file"):
        load_config(tmp_path)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "bad.yml"
    path.write_bytes(b"seed: 1\nname: caf\xe9\n")
    with pytest.raises(UserError, match=r"bad\.yml:2: not UTF-8 text \(byte 0xe9\)"):
        load_config(path)


def test_several_mistakes_are_reported_together_misspelt_keys_first(tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text(good(seed=-1, sched=1, train="{epochs: x, batch_size: 1}"))
    with pytest.raises(UserError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines] == ["sched", "seed", "train.epochs"]


def test_at_most_ten_mistakes_are_listed(tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text(GOOD + "".join(f"frob{index}: 1\n" for index in range(13)))
    with pytest.raises(UserError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 3 more problems"


def test_a_mistake_that_all_variants_share_is_reported_once(tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text(good(seed=-1) + "variants: {a: , b: }\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}:5: seed must be a whole number of at least 0, got -1"


def test_a_map_from_python_is_checked_like_a_file():
    tree = {"data": {"dataset": "x"}, "network": {"name": "lenet"}, "optimizer": {"name": "sgd", "lr": "fast"}}
    with pytest.raises(UserError) as caught:
        parse_config(tree, "sweep")
    assert str(caught.value).splitlines() == [
        f'sweep: {RATE} "fast"',
        "sweep: train is missing; for example train: {epochs: 10, batch_size: 128}",
    ]


def test_a_key_from_python_must_be_text():
    with pytest.raises(UserError, match="sweep: 3 is not a key: keys are text, got 3"):
        parse_config({3: 4}, "sweep")


def test_an_object_that_yaml_cannot_hold_is_refused():
    with pytest.raises(UserError, match="config: seed must be a number, text, list or map, got object"):
        parse_config({"seed": object()})


def test_a_key_that_is_missing_in_a_set_is_not_looked_for_in_the_file_that_it_replaces(tmp_path):
    path = tmp_path / "set.yml"
    path.write_text(GOOD.replace("name: lenet", "blocks: [{type: dense, units: 3}]"))
    with pytest.raises(UserError, match=r"^--set network=.*: network.blocks.0.type is missing"):
        load_config(path, ["network={blocks: [{units: 10}]}"])


def test_one_config_is_not_picked_from_several(tmp_path):
    path = tmp_path / "two.yml"
    path.write_text(GOOD + "variants: {a: , b: }\n")
    with pytest.raises(UserError, match=r"two\.yml: has the variants a, b; choose one"):
        load_one(path)
    with pytest.raises(UserError, match=r"two\.yml: has no variant 'c'; its variants are a, b"):
        load_one(path, variant="c")
    path.write_text(GOOD)
    with pytest.raises(UserError, match=r"two\.yml: has no variant 'c'; it has no variants"):
        load_one(path, variant="c")


def test_a_quoted_fraction_of_an_epoch_is_not_right_without_quotes(tmp_path):
    (tmp_path / "bad.yml").write_text(good(train="{epochs: '1.5', batch_size: 1}"))
    with pytest.raises(UserError, match=r'at least 0, got "1\.5"$'):
        load_config(tmp_path / "bad.yml")


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ("train={epochs: 1, batch_size: 0.0}", "got 0.0"),
        ("train={epochs: 1, batch_size: '0'}", 'got "0"'),
        ("seed='-3'", 'got "-3"'),
        ("seed=١٢", 'got "١٢"'),
    ],
)
def test_no_hint_leads_to_the_next_refusal(tmp_path, change, got):
    path = tmp_path / "bad.yml"
    path.write_text(GOOD)
    with pytest.raises(UserError) as refused:
        load_config(path, [change])
    assert str(refused.value).endswith(got)
