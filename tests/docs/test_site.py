"""The site builds without a warning, and every link within it leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("sphinx", reason="needs the extra docs")
ROOT = Path(__file__).parents[2]


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", out)
    assert (done.returncode, done.stderr) == (0, "")
    return {page.relative_to(out).as_posix(): page.read_text(encoding="utf-8") for page in out.rglob("*.html")}


@pytest.mark.slow
def test_every_link_within_the_site_leads_to_a_place(site):
    identifiers = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in site.items()}
    broken = []
    for page, text in site.items():
        for link in set(re.findall(r'href="([^"#:]*\.html)?#([^"]+)"', text)):
            place = Path("/", page).parent.joinpath(link[0]).resolve().relative_to("/").as_posix() if link[0] else page
            if link[1] and unquote(link[1]) not in identifiers.get(place, ()):
                broken.append((page, *link))
    assert not broken


@pytest.mark.slow
def test_a_named_function_links_to_its_line(site):
    link = r'href="([^"]+)"><code[^>]*><span class="pre">arraytp.rules.dtp.targets<'
    (target,) = set(re.findall(link, site["math/dtp.html"]))
    assert target == "../source/arraytp.rules.dtp.html#targets"
    after = site["source/arraytp.rules.dtp.html"].partition('<span id="targets"></span>')[2]
    assert re.sub(r"<[^>]*>", "", after).startswith("def targets(")


@pytest.mark.slow
def test_a_name_that_does_not_exist_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    for file in ("conf.py", "source_links.py"):
        (tmp_path / "docs" / file).write_bytes((ROOT / "docs" / file).read_bytes())
    (tmp_path / "arraytp").symlink_to(ROOT / "arraytp")
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n`arraytp.rules.dtp.tragets`\n", encoding="utf-8")
    done = build(tmp_path / "docs", tmp_path / "out")
    assert done.returncode != 0
    assert "there is no arraytp.rules.dtp.tragets" in done.stderr
