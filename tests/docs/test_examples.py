"""The Python examples in README and docs run as printed, and links lead to existing files and headings.

The examples in docs/tutorial.md need the results of the commands before them; .ci/tutorial runs both.
"""

import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from arraytp.cli import main
from arraytp.config import parse_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


PAGES = {
    str(page.relative_to(ROOT)): blocks(page.read_text(encoding="utf-8"), "python")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if page.name != "tutorial.md"
}
EXAMPLES = {page: examples for page, examples in PAGES.items() if examples}


def run(page: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a page's examples, one after the other, in one namespace; return what they print."""
    return run_in({}, page, capsys)


def run_in(namespace: dict[str, object], page: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    for number, example in enumerate(EXAMPLES[page]):
        exec(compile(example, f"{page}, example {number}", "exec"), namespace)
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change into a new folder that contains only runs/, and return it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(ROOT / "runs")
    return tmp_path


def test_readmes_example_prints_a_loss_and_an_angle_per_block(folder, capsys):
    printed = run("README.md", capsys)
    loss, angles = float(printed.split()[0]), re.findall(r"\[(.*?)\]", printed)[0].split(",")
    assert 0.5 < loss < 3
    assert len(angles) == 4
    assert float(angles[-1]) == 0


def test_the_example_on_traces_recomputes_an_update(folder, capsys):
    command, *_ = blocks((ROOT / "docs" / "trace.md").read_text(encoding="utf-8"), "sh")
    name, *words = shlex.split(command)
    assert name == "arraytp"
    assert main([*words, "--set", "train.batch_size=8", "--dtype", "float64"]) == 0
    deviation, angle = map(float, run("docs/trace.md", capsys).split())
    assert deviation < 1e-12
    assert 45 < angle < 135


def test_the_example_on_configs_loads_parses_and_writes_out(folder, capsys):
    made: dict = {}
    assert run_in(made, "docs/config.md", capsys) == ""
    variants, config = made["variants"], made["config"]
    assert (config.rule.name, config.optimizer.lr, config.train.batch_size) == ("fa", 0.1, 32)
    assert {name: variant.rule.name for name, variant in variants.items()} == {
        name: name.partition("-")[0] for name in variants
    }
    assert {"bp", "fa", "dfa"} <= variants.keys()
    text = YAML(typ="safe").load(made["text"])
    # All defaults are written out, so that the text loads as the same config.
    assert "momentum" in text["optimizer"]
    assert list(parse_config(text).variants.values()) == [config]


def test_the_example_on_results_reads_each_run(folder, capsys):
    small = [
        "network={square: true, blocks: [{type: dense, units: 10}, {type: dense, units: 10}]}",
        "train.steps=2",
        "train.batch_size=8",
        "compare.every=1",
    ]
    settings = [word for setting in small for word in ("--set", setting)]
    assert main(["run", "runs/quickstart-gait-prop.yml", "--out", "results/quickstart", "--quiet", *settings]) == 0
    *lines, last = run("docs/results-format.md", capsys).splitlines()
    assert [line.split()[0] for line in lines] == ["bp", "fa", "gp"]
    # The network of the checkpoint has the accuracy that its run reported.
    assert last.split()[0] == "fa"
    assert float(last.split()[1]) == pytest.approx(float(lines[1].split()[1]) / 100)
    assert (folder / "results" / "quickstart" / "comparison.png").is_file()


def test_no_page_has_examples_that_nothing_runs():
    assert set(EXAMPLES) == {"README.md", "docs/config.md", "docs/results-format.md", "docs/trace.md"}


TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "paper.md", "tests/README.md")]
TEXTS += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "runs").rglob("*.md")]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = set(re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", text))
    assert not [link for link, _ in links if link and not (page.parent / link).is_file()]
    pages = {link: page.parent / link if link else page for link, _ in links}
    assert not [(link, place) for link, place in links if place and place not in headings(pages[link])]


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_figure_is_in_the_gallery():
    shown = re.findall(r"\(images/([\w.-]+)\)", (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(image.name for image in (ROOT / "docs" / "images").iterdir())


def test_readmes_rule_is_the_rule_that_runs():
    """README presents these lines as the code that runs."""
    (lines,) = blocks(README, "py")
    assert lines in (ROOT / "arraytp" / "rules" / "ldrl.py").read_text(encoding="utf-8")
