"""`arraytp report`: tables and figures that compare result folders."""

import importlib
from pathlib import Path
from types import ModuleType

import click

from arraytp.commands.shared_options import check_folder, check_folders
from arraytp.disk import real
from arraytp.errors import UserError
from arraytp.files import check_output
from arraytp.report.figures import write_comparison, write_figures
from arraytp.report.reading import common_parent, read_results
from arraytp.report.tables import comparison_table


@click.command(name="report")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, callback=check_folders)
@click.option(
    "--out",
    metavar="DIR",
    callback=check_folder,
    help="Folder for figures and tables.  [default: the folder that contains the results]",
)
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write one page for a browser, which needs no network; needs the extra html.",
)
def command(folders: tuple[Path, ...], out: Path | None, html: Path | None) -> None:
    """Print a table and write figures that compare result folders.

    DIR is a result folder, or a folder that contains result folders, such as that of a run with variants. Studies in it
    are left out: they have tables and figures of their own. Figures of each run go to RUN/figures. With more than one
    run, or with --out, comparison.png, comparison.md and comparison.csv go beside the folders of the runs.
    """
    if html is not None:
        ours = "a page of this command; only such are overwritten"
        check_output("--html", html, "report.html", lambda: _is_page(html), ours)
    results = read_results(folders)
    click.echo(comparison_table(results), nl=False)
    parent = out or common_parent([real(result.path) for result in results])
    for result in results:
        write_figures(result, parent / result.label / "figures")
    runs = "<run>" if len(results) > 1 else results[0].label
    if html is not None:
        click.echo(f"page: {_page().write_page(results, html)}", err=True)
    click.echo(f"figures: {parent / runs / 'figures'}", err=True)
    if out or len(results) > 1:
        picture, markdown, table = write_comparison(results, parent)
        click.echo(f"comparison: {picture}, {markdown.name}, {table.name}", err=True)


def _is_page(path: Path) -> bool:
    """Tell whether a file is a page that this command wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"<title>arraytp report</title>" in file.read(4096)


def _page() -> ModuleType:
    """Return the module that draws the page; UserError if Bokeh is not installed."""
    try:
        return importlib.import_module("arraytp.report.page")
    except ImportError as error:
        raise UserError(f"--html needs Bokeh ({error}); install it with: pip install 'arraytp[html]'") from error
