"""Fetching official files, here from a server on the local machine."""

import hashlib
import http.server
import sys
import threading

import numpy as np
import pytest

from arraytp.cli import main
from arraytp.data_prep import fetch
from arraytp.data_prep.fetch import SOURCES, Source
from arraytp.errors import UserError

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file; each request takes the next of the server's `behaviours`."""

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        behaviour = server.behaviours.pop(0) if server.behaviours else "whole"
        content = server.content
        start = 0
        if behaviour == "missing":
            self.send_error(404)
            return
        if self.headers.get("Range") and behaviour != "no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + 100_000] if behaviour == "cut" else content[start:])

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.behaviours, server.asked, server.content = [], [], CONTENT
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def source(server, **changes):
    address = f"http://127.0.0.1:{server.server_port}"
    return Source((f"{address}/a", f"{address}/b")[: changes.pop("addresses", 1)], {"x.gz": MD5})


def fetched(server, folder, **changes):
    seen = []
    fetch.fetch(source(server, **changes), folder, lambda *state: seen.append(state))
    assert [path.name for path in folder.iterdir()] == ["x.gz"]
    assert (folder / "x.gz").read_bytes() == CONTENT
    return seen


def test_a_file_arrives_with_progress_and_is_not_fetched_again(server, tmp_path):
    seen = fetched(server, tmp_path / "new" / "folder")
    assert seen[-1] == ("x.gz", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert len(seen) > 3
    assert fetched(server, tmp_path / "new" / "folder") == []
    assert server.asked == [("/a/x.gz", None)]


def test_a_download_that_was_cut_goes_on_where_it_stopped(server, tmp_path):
    server.behaviours = ["cut", "cut", "whole"]
    for _ in range(2):
        with pytest.raises(UserError, match=r"/a/x\.gz: .*; the same command continues the download"):
            fetched(server, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".x.gz.part"]
    fetched(server, tmp_path)
    # Only whole blocks of 64 KiB are kept.
    assert server.asked == [("/a/x.gz", None), ("/a/x.gz", "bytes=65536-"), ("/a/x.gz", "bytes=131072-")]


def test_a_server_that_cannot_go_on_sends_everything_again(server, tmp_path):
    (tmp_path / ".x.gz.part").write_bytes(b"something else")
    server.behaviours = ["no ranges"]
    fetched(server, tmp_path)


def test_a_part_that_is_whole_is_taken(server, tmp_path):
    (tmp_path / ".x.gz.part").write_bytes(CONTENT)
    fetched(server, tmp_path)
    # At most the bytes beyond the end of the file are requested, of which there are none.
    assert all(asked == f"bytes={len(CONTENT)}-" for _, asked in server.asked)


@pytest.mark.parametrize("part", [b"", b"wrong", CONTENT + b"more"])
def test_a_wrong_checksum_is_an_error_and_the_next_call_starts_over(server, tmp_path, part):
    (tmp_path / ".x.gz.part").write_bytes(part)
    if not part:
        server.content = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=rf"/a/x\.gz: not the official file, its MD5 is not {MD5}"):
        fetched(server, tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.content = CONTENT
    fetched(server, tmp_path)


def test_a_file_with_another_content_is_replaced(server, tmp_path):
    (tmp_path / "x.gz").write_bytes(b"old")
    fetched(server, tmp_path)


def test_the_next_address_is_tried_and_all_failures_told(server, tmp_path):
    server.behaviours = ["missing"]
    fetched(server, tmp_path / "d", addresses=2)
    assert [path for path, _ in server.asked] == ["/a/x.gz", "/b/x.gz"]
    server.behaviours = ["missing", "missing"]
    with pytest.raises(UserError, match=r"/a/x\.gz: 404 .*; http.*/b/x\.gz: 404 .*; the same command continues"):
        fetched(server, tmp_path / "e", addresses=2)


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/x\.gz: .*refused"):
        fetch.fetch(Source(("http://127.0.0.1:1",), {"x.gz": MD5}), tmp_path, lambda *_: None)


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*: cannot be written"):
        fetch.fetch(source(server), tmp_path / "file", lambda *_: None)
    assert server.asked == []


def test_a_missing_package_is_told_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(UserError, match=r"pooch cannot be imported .*; install arraytp\[fetch\]"):
        fetch.fetch(SOURCES["mnist"], tmp_path, lambda *_: None)


def test_the_command_fetches_and_says_how_to_go_on(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("arraytp.commands.data.SOURCES", {"mnist": source(server)})
    assert main(["data", "fetch", "mnist", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "x.gz").read_bytes() == CONTENT
    shown = capsys.readouterr()
    assert shown.out == f"x.gz     300,000 bytes\narraytp data pack mnist {tmp_path / 'd' / 'x.gz'} DST\n"
    assert shown.err == ""
    server.behaviours = ["missing"]
    assert main(["data", "fetch", "mnist", str(tmp_path / "e")]) == 2
    assert "404" in capsys.readouterr().err


def test_every_source_has_official_files_with_checksums():
    for name in ("mnist", "fashion-mnist", "kmnist"):
        assert set(SOURCES[name].files) == {
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        }
    sums = [md5 for found in SOURCES.values() for md5 in found.files.values()]
    assert all(len(md5) == 32 and int(md5, 16) for md5 in sums)
    assert len(set(sums)) == len(sums) == 14
    assert all(address.startswith("http") for found in SOURCES.values() for address in found.addresses)
