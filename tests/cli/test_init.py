"""`arraytp init` writes a config that runs, and never over a file."""

from arraytp.cli import main
from arraytp.config import load_config
from arraytp.training.plan import plan


def test_the_starter_config_fits_its_data_and_trains(arraytp, place):
    """It is trained on the toy data, because evaluating its own data set takes seconds."""
    assert "arraytp run my.yml" in arraytp("init", "my.yml").out
    variants = load_config("my.yml").variants
    assert list(variants) == ["bp", "fa", "ldrl"]
    assert {plan(config).dataset.name for config in variants.values()} == {"fashion-mnist-10k"}
    assert arraytp("run", "my.yml", "--quiet", "--set", "data.dataset=toy", "--set", "train.steps=1").status == 0
    assert (place / "results" / "my" / "ldrl" / "summary.json").is_file()


def test_a_file_that_is_there_is_left_as_it_is(tmp_path, capsys):
    file = tmp_path / "my.yml"
    file.write_text("mine")
    assert main(["init", str(file)]) == 2
    assert file.read_text() == "mine"
    assert "exists already; give another name" in capsys.readouterr().err


def test_an_empty_name_is_refused(capsys):
    assert main(["init", ""]) == 2
    assert "'.' is not a file's name; give one, such as config.yml" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    assert main(["init", str(tmp_path / "nowhere" / "my.yml")]) == 2
    assert "nowhere/my.yml: cannot be written: No such file" in capsys.readouterr().err


def test_run_without_a_config_says_what_to_do(capsys):
    assert main(["run"]) == 2
    assert "give a config, such as runs/quickstart.yml" in capsys.readouterr().err
