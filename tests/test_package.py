"""The package's metadata are the same wherever they are stated."""

import re
from configparser import ConfigParser
from pathlib import Path

from ruamel.yaml import YAML

from arraytp import __version__

ROOT = Path(__file__).parents[1]


def test_the_version_is_one():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert setup["metadata"]["version"] == "attr: arraytp.__version__"
    assert str(citation["version"]) == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["authors"] == [{"name": setup["metadata"]["author"]}]
    assert {paper["doi"] for paper in citation["references"]} == {
        "10.48550/arXiv.2102.11598",
        "10.48550/arXiv.2201.13415",
    }


def test_the_paper_cites_what_its_bibliography_has():
    cited = re.findall(r"@(\w+\d{4})", (ROOT / "paper.md").read_text(encoding="utf-8"))
    entries = re.findall(r"^@\w+\{(\w+),", (ROOT / "paper.bib").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(entries) == sorted(set(cited))
