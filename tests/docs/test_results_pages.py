"""docs/results: the table and results.json are made from published.csv, README's numbers are in it, commands exist."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
ROWS = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def collect():
    spec = importlib.util.spec_from_file_location("collect", FOLDER / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_and_json_are_what_the_script_makes(collect):
    """`python docs/results/collect.py` mends this."""
    for path, text in collect.made().items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_a_row_with_kept_summaries_is_their_mean(collect, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "HERE", tmp_path)
    for seed, top1 in enumerate((85.0, 86.0)):
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps({"final": {"test_top1": top1}}), encoding="utf-8")
    head = (FOLDER / "published.csv").read_text(encoding="utf-8").splitlines()[0]
    row = "DTP,Table 1,CIFAR-10,BP,86.34,0.35,,,,not run,arraytp run x.yml,,,seed-*.json:final.test_top1"
    (tmp_path / "published.csv").write_text(f"{head}\n{row}\n", encoding="utf-8")
    (made,) = collect.read()
    assert (made["ours"], made["ours_sd"], made["seeds"], made["verdict"]) == ("85.50", "0.71", "2", "not reproduced")
    assert collect.verdict(86.34, 0.35, 85.7) == "reproduced"
    assert collect.verdict(53.2, 0, 54.3) == "not reproduced"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['paper']} {row['place']} {row['what']}")
def test_a_row_names_a_config_that_is_there_and_a_page_where_it_has_a_number(row):
    assert (ROOT / row["command"].split()[2]).is_file()
    assert (row["ours"] is None) == (row["verdict"] == "not run")
    if row["page"]:
        page = (FOLDER / f"{row['page']}.md").read_text(encoding="utf-8")
        assert re.search(rf"(?<![\d.]){re.escape(str(row['ours']).removesuffix('.0'))}", page)


def test_readmes_table_of_results_is_in_the_rows():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| experiment | paper | arraytp |")[2]
    shown = re.findall(r"^\| \w+, (?:Figure|Table) \d: .*? \| .*? \| ([\d.]+)", table, re.MULTILINE)
    ours = {str(row["ours"]) for row in ROWS}
    # The largest angle of Figure 3 is on its own page.
    assert len(shown) == 4
    assert set(shown) <= ours | {"34.97"}
    assert "34.97" in (FOLDER / "dtp-figure-3.md").read_text(encoding="utf-8")
