"""The site builds without a warning, and every link within it leads somewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import address, browser

pytest.importorskip("sphinx", reason="needs the extra docs")
ROOT = Path(__file__).parents[2]


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", out)
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.fixture(scope="module")
def site(folder):
    out = folder
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
def test_the_notebook_is_the_tutorial(folder, site):
    """Its cells are the page's blocks; .ci/tutorial executes them."""
    assert 'href="tutorial.ipynb"' in site["tutorial.html"]
    cells = json.loads((folder / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|python)\n(.*?)\n```$", page, flags=re.DOTALL | re.MULTILINE)
    assert [re.sub(r"^%%.*\n", "", cell) for cell in code] == blocks
    assert len(blocks) >= 10


@pytest.mark.slow
def test_a_name_that_does_not_exist_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    for file in ("conf.py", "docstrings.py", "mathml.py", "notebook.py", "source_links.py", "tutorial.md"):
        (tmp_path / "docs" / file).write_bytes((ROOT / "docs" / file).read_bytes())
    (tmp_path / "arraytp").symlink_to(ROOT / "arraytp")
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n`arraytp.rules.dtp.tragets`\n", encoding="utf-8")
    done = build(tmp_path / "docs", tmp_path / "out")
    assert done.returncode != 0
    assert "there is no arraytp.rules.dtp.tragets" in done.stderr


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site):
    """Without a network, a font, script or picture from another host would be missing."""
    loaded = r'<(?:script|img|iframe)[^>]* src="(https?:)?//|<link[^>]* href="(https?:)?//|@import'
    assert not [page for page, text in site.items() if re.search(loaded, text)]


@pytest.mark.slow
def test_every_formula_is_drawn_without_a_network(folder, site):
    """Otherwise, a reader would see raw LaTeX."""
    with browser() as page:
        for name in sorted(name for name, text in site.items() if "<math" in text):
            page.get(address(folder / name))
            text = page.find_element("tag name", "article").text
            assert not re.search(r"\\[(\[]|\\(?:frac|mathrm|partial|omega)", text), name
            sizes = page.execute_script(
                "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())"
                ".map(r => [r.width, r.height])"
            )
            assert sizes
            assert all(width > 0 and height > 0 for width, height in sizes), name
            assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_the_first_page_fits_a_phone(folder, dark):
    """The first command can be read without scrolling sideways."""
    with browser(360, 740, dark=dark) as page:
        page.get(address(folder / "index.html"))
        wide, first, background = page.execute_script(
            "const pre = document.querySelector('.highlight pre');"
            "return [document.documentElement.scrollWidth, pre.scrollWidth - pre.clientWidth,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        assert wide <= 360
        assert first <= 0
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark


@pytest.mark.slow
def test_the_search_finds_a_word(folder):
    with browser() as page:
        page.get(f"{address(folder / 'search.html')}?q=orthogonality")
        # Results appear one by one; if the word is not found, the script times out.
        assert page.execute_async_script(
            "const done = arguments[0]; const look = () =>"
            " [...document.querySelectorAll('.search li a')].some(a => a.href.includes('gait-prop'))"
            " ? done(true) : setTimeout(look, 100); look()"
        )
