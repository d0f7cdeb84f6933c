from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from arraytp.commands.report import command
from arraytp.errors import UserError

Make = Callable[..., Path]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_result_folder_gets_its_table_and_figures(make_result: Make) -> None:
    folder = make_result()
    done = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[3].startswith("fa   fa         2  1.000")
    assert str(folder / "figures") in done.stderr
    assert "figures/learning_curves.png" in files(folder)
    assert not list(folder.parent.glob("comparison*"))


def test_a_folder_of_variants_is_compared_in_that_folder(make_result: Make) -> None:
    make_result("results/bp", "bp")
    parent = make_result("results/fa").parent
    CliRunner().invoke(command, [str(parent)], catch_exceptions=False)
    assert {"comparison.png", "comparison.md", "comparison.csv", "bp/figures/learning_curves.png"} <= files(parent)


def test_with_out_nothing_is_written_elsewhere(make_result: Make, tmp_path: Path) -> None:
    folder = make_result()
    before = files(folder.parent)
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [str(folder), "--out", str(out)], catch_exceptions=False)
    assert files(folder.parent) == before
    assert {"comparison.png", "comparison.md", "comparison.csv", "fa/figures/angles_over_time.png"} <= files(out)
    assert str(out) in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", ""], "--out is empty"),
        (["--out", " "], "--out is empty"),
        ([""], "DIR is empty; give a folder$"),
    ],
)
def test_a_blank_name_is_refused(make_result: Make, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(command, [str(make_result()), *words], catch_exceptions=False)


def test_a_run_whose_name_is_no_text_is_refused_but_not_one_below(make_result: Make) -> None:
    folder = make_result("results\udcff/fa")
    CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    other = make_result("fa\udcff")
    with pytest.raises(UserError, match=r"fa\\udcff': the folder's name is not UTF-8 text"):
        CliRunner().invoke(command, [str(other)], catch_exceptions=False)


def test_a_summary_of_brackets_is_damage(make_result: Make) -> None:
    folder = make_result()
    (folder / "summary.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"summary\.json: nested too deeply"):
        CliRunner().invoke(command, [str(folder)], catch_exceptions=False)


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        CliRunner().invoke(command, [str(tmp_path / "absent")], catch_exceptions=False)
