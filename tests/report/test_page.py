"""`arraytp report --html`: one page that needs no network, opened in headless Chromium."""

import json
import re

import pytest
from browser import address, browser

from arraytp.cli import main
from arraytp.errors import UserError
from arraytp.report.reading import read_result

pytest.importorskip("bokeh", reason="needs the extra html")
from bokeh.models import Div

from arraytp.report import page as page_module


@pytest.fixture
def page(make_result, tmp_path, monkeypatch):
    # Drawing PNG files takes longer than writing the page.
    monkeypatch.setattr("arraytp.commands.report.write_figures", lambda *_: None)
    monkeypatch.setattr("arraytp.commands.report.write_comparison", lambda *_: [tmp_path] * 3)
    make_result("results/bp", "bp", angles={})
    results = make_result("results/fa").parent
    assert main(["report", str(results), "--html", str(tmp_path / "page.html")]) == 0
    return tmp_path / "page.html"


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_runs_of_different_packages_are_in_one_table(make_result, tmp_path, monkeypatch, names):
    """An unfinished run records no versions, and a run on the host none of CuPy."""
    monkeypatch.setattr("arraytp.commands.report.write_figures", lambda *_: None)
    monkeypatch.setattr("arraytp.commands.report.write_comparison", lambda *_: [tmp_path] * 3)
    summary = make_result(f"results/{names[0]}") / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"versions": {"numpy": "2.9.9", "cupy": "15.8"}}))
    make_result(f"results/{names[1]}", finished=False)
    assert main(["report", str(tmp_path / "results"), "--html", str(tmp_path / "page.html")]) == 0
    assert "15.8" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'<(?:script|img|link)[^>]* (?:src|href)="(?:https?:)?//', text)
    assert page.stat().st_size < 4e6


def test_the_page_shows_sorted_rows_curves_and_settings(page):
    """A click on a column's name sorts; the pointer shows a point's values; differing keys and versions can be read."""
    with browser(1400, 2400) as window:
        window.get(address(page))
        # Bokeh's elements are in shadow trees.
        shown = (
            "const all = (root) => [...root.querySelectorAll('*')]"
            ".flatMap(e => e.shadowRoot ? [e, ...all(e.shadowRoot)] : [e]);"
            "const find = (css) => all(document).filter(e => e.matches(css));"
        )
        window.set_script_timeout(60)
        window.execute_async_script(
            shown
            + "const done = arguments[0]; const look = () => find('.slick-row').length > 3 && find('canvas').length"
            " ? done() : setTimeout(look, 100); look()"
        )
        cells = shown + "return find('.slick-row .slick-cell.l0').slice(0, 2).map(e => e.innerText)"
        assert window.execute_script(cells) == ["bp", "fa"]
        for order in (["bp", "fa"], ["fa", "bp"]):
            window.execute_script(shown + "find('.slick-header-column')[0].click()")
            assert window.execute_script(cells) == order
        # The accuracy after epoch 2 is 60.25 %; its point is where the plot's own scales put it.
        place = window.execute_script(
            shown + "const plot = [...Bokeh.documents[0].roots()[0].references()]"
            ".find(m => m.type == 'Figure' && m.left.some(axis => axis.axis_label == 'test top-1 (%)'));"
            "const view = Bokeh.index.find_one(plot); view.el.scrollIntoView({block: 'center'});"
            "const {left, top} = view.el.getBoundingClientRect();"
            "return [left + view.frame.x_scale.compute(2), top + view.frame.y_scale.compute(60.25)].map(Math.round)"
        )
        window.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": place[0], "y": place[1]})
        tips = window.execute_async_script(
            shown + "const done = arguments[0]; const look = () => { const tips = find('.bk-tooltip-row-value');"
            " tips.length ? done(tips.map(e => e.innerText)) : setTimeout(look, 100) }; look()"
        )
        assert tips[:3] == ["bp", "2", "60.25"]
        text = window.execute_script(shown + "return find('.slick-cell').map(e => e.innerText)")
        assert "rule.name" in text
        assert window.execute_script(shown + "return find('canvas').length") >= 4
        assert [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("name", ["notes.yml", ".", "", "nowhere/page.html"])
def test_only_a_page_of_ours_is_overwritten(make_result, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.yml").write_text("mine")
    assert main(["report", str(make_result()), "--html", name]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("arraytp: error: --html ")
    assert len(said.err.splitlines()) == 1
    assert (tmp_path / "notes.yml").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_page_of_ours_is_replaced(make_result, tmp_path):
    folder = make_result()
    for _ in range(2):
        assert main(["report", str(folder), "--html", str(tmp_path / "page.html")]) == 0


def test_without_bokeh_the_extra_is_named(make_result, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "arraytp.report.page", None)
    assert main(["report", str(make_result()), "--html", str(tmp_path / "page.html")]) == 2
    assert "pip install 'arraytp[html]'" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_the_curves_are_of_the_images_that_each_epoch_was_evaluated_on(make_result, tmp_path, monkeypatch):
    folder = make_result("results/fa")
    config = folder / "config.yml"
    config.write_text(config.read_text().replace("train:\n", "train:\n  validation: 5\n"))
    text = (folder / "metrics.csv").read_text().splitlines()
    extra = [
        ",validation_loss,validation_top1,validation_top5",
        *[f",1.{n},4{n}.5,9{n}.0" for n in range(len(text) - 1)],
    ]
    (folder / "metrics.csv").write_text("\n".join(line + more for line, more in zip(text, extra, strict=True)) + "\n")
    drawn = []
    monkeypatch.setattr(page_module, "_lines", lambda series, x, y, **_: drawn.append((y, series)) or Div(text=y))
    monkeypatch.setattr(page_module, "gridplot", lambda *_, **__: Div(text="curves"))
    page_module.write_page([read_result(folder)], tmp_path / "page.html")
    curves = dict(drawn)
    assert {"validation top-1 (%)", "validation loss"} < curves.keys()
    ((_, values), *_), *_ = curves["validation top-1 (%)"]
    assert list(values) == [40.5, 41.5, 42.5]


def test_a_page_that_cannot_be_written_says_what_would_help(make_result, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot be written.*; give another --html file"):
        page_module.write_page([read_result(make_result())], tmp_path / "folder")
