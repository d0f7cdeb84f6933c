"""Trees of image files: what is decoded, how it is resized, and what is refused."""

import csv
import errno
import io
import os
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from arraytp.cli import main
from arraytp.data.dataset import open_dataset
from arraytp.data_prep import images
from arraytp.data_prep.decode import BrokenImageError, decode, fit
from arraytp.data_prep.files import open_archives, open_files
from arraytp.data_prep.folder import pack, plan_tree
from arraytp.data_prep.images import pack_images
from arraytp.data_prep.options import PackOptions
from arraytp.errors import UserError

GENERATOR = np.random.default_rng(0)


def encoded(pixels, kind="PNG", mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def noise(height=6, width=5, channels=3):
    return GENERATOR.integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_tree(root, contents):
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_tar(path, contents, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def pixels():
    """The pixels of 40 train and 6 test images by name; the classes alternate, starting with dog."""
    names = [f"train/{('dog', 'cat')[i % 2]}/{i:02d}.png" for i in range(40)]
    names += [f"test/{('dog', 'cat')[i % 2]}/{i}.png" for i in range(6)]
    return {name: noise() for name in names}


def contents_of(pixels):
    hidden = dict.fromkeys(("train/._a.png", "train/.ipynb_checkpoints/0.png", ".cache/a/0.png"), b"")
    return {name: encoded(image) for name, image in pixels.items()} | {"classes.txt": b"no image"} | hidden


@pytest.mark.parametrize("form", ["folder", "w", "w:gz", "w:xz", "w:bz2"])
def test_all_images_arrive_with_their_labels_from_a_folder_or_an_archive(tmp_path, pixels, form):
    contents = contents_of(pixels)
    src = write_tree(tmp_path / "s", contents) if form == "folder" else write_tar(tmp_path / "s.tar", contents, form)
    pack(src, tmp_path / "d", PackOptions(shard_images=15))
    dataset = open_dataset(tmp_path / "d")
    assert (dataset.name, dataset.classes, dataset.shape) == ("s", ("cat", "dog"), (6, 5, 3))
    assert dataset.counts == {"train": 40, "test": 6}
    for split in ("train", "test"):
        images, labels = dataset.load(split)
        names = sorted(name for name in pixels if name.startswith(split))
        expected = [(pixels[name].tobytes(), int("dog" in name)) for name in names]
        found = [(image.tobytes(), label) for image, label in zip(images, labels, strict=True)]
        assert sorted(found) == sorted(expected)
        assert (found == expected) == (split == "test")
    assert not list(tmp_path.glob("d/skipped.csv"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
@pytest.mark.parametrize("target", ["nowhere", "link.png"])
def test_a_pipe_is_no_file_and_a_link_to_nothing_or_itself_is_skipped(tmp_path, pixels, target):
    """Opening the pipe would block for ever."""
    src = write_tree(tmp_path / "s", contents_of(pixels))
    os.mkfifo(src / "train/dog/pipe.png")
    (src / "train/dog/link.png").symlink_to(target)
    assert pack(src, tmp_path / "d", PackOptions(max_skipped=1)) == 1
    assert open_dataset(tmp_path / "d").counts == {"train": 40, "test": 6}
    assert "train/dog/link.png" in (tmp_path / "d/skipped.csv").read_text()


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, pixels):
    src = write_tree(tmp_path / "s", contents_of(pixels))
    for workers in (1, 2, 7):
        with open_files(src, tmp_path) as files:
            pack_images(plan_tree(files), tmp_path / str(workers), PackOptions(name="s"), {}, workers)
    for name in ("train-00000.h5", "test-00000.h5", "dataset.json"):
        assert len({(tmp_path / str(workers) / name).read_bytes() for workers in (1, 2, 7)}) == 1


def test_the_seed_decides_the_order_and_a_limit_takes_evenly(tmp_path, pixels):
    src = write_tree(tmp_path / "s", contents_of(pixels))
    for seed in (0, 1):
        pack(src, tmp_path / str(seed), PackOptions(seed=seed, limits={"train": 20}))
    a, b = (open_dataset(tmp_path / name).load("train") for name in "01")
    assert np.bincount(a[1]).tolist() == [10, 10]
    assert sorted(map(bytes, a[0])) == sorted(map(bytes, b[0]))
    assert not np.array_equal(a[0], b[0])
    with pytest.raises(UserError, match="--limit val=2: there is no split 'val'; the splits are train, test"):
        pack(src, tmp_path / "c", PackOptions(limits={"val": 2}))


COLOUR = noise(8, 9)
GREY = noise(8, 9, 1)[..., 0]


def rgb(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def test_every_kind_of_image_becomes_rgb():
    assert np.array_equal(fit(decode(encoded(COLOUR)), (8, 9), "stretch"), COLOUR)
    assert np.array_equal(fit(decode(encoded(GREY)), (8, 9), "stretch"), rgb(GREY))
    assert np.array_equal(np.asarray(decode(encoded(COLOUR, "WEBP", lossless=True))), COLOUR)
    palette = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(np.asarray(decode(encoded(palette))), np.asarray(palette.convert("RGB")))
    bits = GREY > 127
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(bits)))), rgb(bits * np.uint8(255)))
    deep = GREY.astype(np.uint16) * 257
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(deep)))), rgb(GREY))


def test_a_jpeg_in_cmyk_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    found = np.asarray(decode(encoded(red, "JPEG", mode="CMYK", quality=95)))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() < 12


def test_what_is_transparent_is_laid_on_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    found = np.asarray(decode(encoded(pixels)))
    assert found[0, :, 0].tolist() == [255, 127, 0]
    grey = Image.merge("LA", [Image.new("L", (2, 1), 10), Image.fromarray(np.array([[0, 255]], np.uint8))])
    assert np.asarray(decode(encoded(grey)))[0, :, 2].tolist() == [255, 10]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 70, 80, 90])
    palette.putpixel((1, 0), 1)
    found = np.asarray(decode(encoded(palette, transparency=0)))
    assert found.tolist() == [[[255, 255, 255], [70, 80, 90]]]


def png(depth, colour, pixels, transparent):
    """A PNG file of two pixels with a transparent grey or colour, written byte by byte from the PNG specification."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">2I5B", 2, 1, depth, colour, 0, 0, 0)
    rows = zlib.compress(b"\0" + pixels)
    parts = (
        (b"IHDR", head),
        (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
        (b"IDAT", rows),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "colour", "pixels", "transparent", "other"),
    [
        (1, 0, b"\x40", [1], 0),
        (2, 0, b"\x60", [2], 85),
        (4, 0, b"\x12", [2], 17),
        (8, 0, b"\x03\x04", [4], 3),
        (16, 0, struct.pack(">2H", 1000, 2000), [2000], 4),
        (8, 2, b"\3\3\3\4\4\4", [4, 4, 4], 3),
        (16, 2, struct.pack(">6H", *[1000] * 3, *[2000] * 3), [2000] * 3, 3),
    ],
)
def test_the_transparent_grey_or_colour_of_a_png_of_any_depth_is_white(depth, colour, pixels, transparent, other):
    found = np.asarray(decode(png(depth, colour, pixels, transparent)))
    assert found.tolist() == [[[other] * 3, [255] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_turned_as_exif_says(orientation, kind):
    # How a file of each orientation stores the image: EXIF defines to which sides its row 0 and column 0 belong.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 250
    upright[:8, 24:] = 120
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(np.ascontiguousarray(stored[orientation](upright)), kind, exif=exif)
    found = np.asarray(decode(file)).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() < 40


def test_damaged_exif_does_not_cost_the_image():
    assert decode(encoded(COLOUR, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")).size == (9, 8)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(encoded(COLOUR, exif=exif)).size == (9, 8)


def test_stretching_averages_and_changes_the_aspect():
    board = rgb(np.indices((64, 32)).sum(axis=0).astype(np.uint8) % 2 * 255)
    small = fit(Image.fromarray(board), (8, 8), "stretch")
    # Without antialiasing, a checkerboard becomes black or white instead of grey.
    assert small.shape == (8, 8, 3)
    assert np.abs(small.astype(int) - 127).max() < 10


def test_shorter_crop_keeps_the_middle_of_the_longer_side():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert np.array_equal(fit(Image.fromarray(wide), (10, 10), "shorter-crop"), wide[:, 10:20])
    half = fit(Image.fromarray(wide), (5, 5), "shorter-crop")
    assert np.array_equal(half, fit(Image.fromarray(wide), (5, 15), "stretch")[:, 5:10])
    tall = fit(Image.fromarray(np.ascontiguousarray(wide.transpose(1, 0, 2))), (5, 10), "shorter-crop")
    assert (tall == 200).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (64, 64)])
def test_images_of_any_size_fit(size):
    assert (fit(Image.new("RGB", size[::-1], (1, 2, 3)), (4, 6), "stretch") == (1, 2, 3)).all()
    assert (fit(Image.new("RGB", size[::-1], (1, 2, 3)), (4, 6), "shorter-crop") == (1, 2, 3)).all()


@pytest.mark.parametrize("size", [7, 224])
def test_the_shorter_side_of_any_length_is_kept_whole(size):
    """By rounding, the scale times the size can exceed the side that the scale was computed from."""
    for side in range(1, 400):
        for shape in ((side, side + 11), (side + 11, side)):
            assert (fit(Image.new("RGB", shape, (1, 2, 3)), (size, size), "shorter-crop") == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("place", "given", "name"),
    [("flowers.v2", "flowers.v2", "flowers.v2"), ("s", ".", "s"), ("s/train", "..", "s"), ("s", "../s/", "s")],
)
def test_a_data_set_has_the_name_of_its_folder(tmp_path, monkeypatch, place, given, name):
    write_tree(tmp_path / name, {"train/a/x.png": encoded(COLOUR)})
    monkeypatch.chdir(tmp_path / place if given.startswith(".") else tmp_path)
    pack(Path(given), tmp_path / "d", PackOptions())
    assert open_dataset(tmp_path / "d").name == name


@pytest.mark.parametrize("name", [b"s\xff", b"a\nb", b" "])
def test_a_folder_whose_name_no_data_set_can_have_needs_another(tmp_path, name):
    src = write_tree(tmp_path / os.fsdecode(name), {"train/a/x.png": encoded(COLOUR)})
    with pytest.raises(UserError, match="is not a name of printable characters, which the data set needs; give --name"):
        pack(src, tmp_path / "d", PackOptions())
    assert not (tmp_path / "d").exists()
    pack(src, tmp_path / "d", PackOptions(name="s"))
    assert open_dataset(tmp_path / "d").name == "s"


def test_a_png_named_jpeg_is_decoded_by_its_content(tmp_path):
    src = write_tree(tmp_path / "s", {"train/a/x.JPEG": encoded(COLOUR), "train/b/y.jpg": encoded(GREY)})
    pack(src, tmp_path / "d", PackOptions())
    images, labels = open_dataset(tmp_path / "d").load("train")
    assert np.array_equal(images[labels.argsort()], [COLOUR, rgb(GREY)])


BAD = {
    "empty": (b"", "not a JPEG, PNG or WebP image"),
    "text": (b"hello", "not a JPEG, PNG or WebP image"),
    "gif": (encoded(COLOUR, "GIF"), "not a JPEG, PNG or WebP image"),
    "cut-jpeg": (encoded(noise(64, 64), "JPEG")[:900], "truncated"),
    "cut-png": (encoded(noise(64, 64))[:900], "truncated"),
    "bad-crc": (encoded(COLOUR)[:50] + b"\xff\xff\xff" + encoded(COLOUR)[53:], "broken"),
    "huge": (encoded(Image.new("1", (2**14, 2**12 + 1))), "pixels are more than"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_broken_file_is_told_with_the_reason(bad):
    content, reason = BAD[bad]
    with pytest.raises(BrokenImageError, match=reason):
        decode(content)


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")])
def test_an_image_is_not_broken_because_memory_is_full(monkeypatch, error):
    def refuse(_):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
    with pytest.raises(MemoryError):
        decode(encoded(COLOUR))


def test_broken_files_are_listed_and_the_others_packed(tmp_path, capsys):
    good = {f"train/a/{i}.png": encoded(np.full((4, 4, 3), i, np.uint8)) for i in range(40)}
    bad = {f"train/a/{name}.jpg": content for name, (content, _) in BAD.items()}
    src = write_tree(tmp_path / "s", good | bad)
    (src / "train/a/gone.jpg").symlink_to("nowhere")
    arguments = ["data", "pack", "folder", str(src), str(tmp_path / "d"), "--size", "4x4", "--max-skipped"]
    assert main([*arguments, "7"]) == 2
    error = capsys.readouterr().err
    assert "broken file 'train/a/" in error
    assert "that makes 8, more than --max-skipped 7" in error
    assert not (tmp_path / "d").exists()
    assert main([*arguments, "8"]) == 0
    assert "8 broken files, listed in" in capsys.readouterr().out
    with (tmp_path / "d/skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"]
    assert {path for path, _ in rows[1:]} == {*bad, "train/a/gone.jpg"}
    for path, reason in rows[1:]:
        name = path.split("/")[2][:-4]
        assert (BAD[name][1] if name in BAD else "No such file") in reason
    images, _ = open_dataset(tmp_path / "d").load("train")
    assert sorted(images[:, 0, 0, 0].tolist()) == list(range(40))


def test_images_of_several_sizes_need_a_size(tmp_path):
    src = write_tree(tmp_path / "s", {"train/a/1.png": encoded(noise(4, 4)), "train/a/2.png": encoded(noise(4, 5))})
    with pytest.raises(UserError, match=r"'train/a/2.png' has 4x5 pixels, another image has 4x4; give --size HxW"):
        pack(src, tmp_path / "d", PackOptions())
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/x.png"], "'a/x.png' is not split/class/image"),
        (["train/a/b/x.png"], "'train/a/b/x.png' is not split/class/image"),
        (["train/a/y.png", "train/a/b/c/d/e/x.png"], "'train/a/b/c/d/e/x.png' is not split/class/image"),
        (["Train/a/x.png"], "'Train/a/x.png' is not split/class/image, the split in small letters"),
        (["train/a\nb/x.png"], r"the class 'a\\nb' has a character that cannot be printed; rename it"),
        (["test/a/x.png"], "no image train/class/…, found splits: test"),
        ([], "found splits: none"),
        (["train/a/x.png", "val/b/x.png"], "class 'b' of split 'val' has no train image"),
    ],
)
def test_a_tree_of_another_shape_is_refused(tmp_path, names, message):
    (tmp_path / "s").mkdir()
    src = write_tree(tmp_path / "s", dict.fromkeys(names, encoded(COLOUR)))
    with pytest.raises(UserError, match=message):
        pack(src, tmp_path / "d", PackOptions())
    assert not (tmp_path / "d").exists()


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_a_folder_that_links_to_itself_and_deep_files_that_are_no_images_are_no_matter(tmp_path):
    src = write_tree(tmp_path / "s", {"train/a/x.png": encoded(COLOUR), "notes/1/2/3/4/5/list.txt": b"none"})
    (tmp_path / "s/notes/again").symlink_to(tmp_path / "s/notes")
    pack(src, tmp_path / "d", PackOptions())
    assert open_dataset(tmp_path / "d").counts == {"train": 1}


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "train/../../x.png"])
def test_an_archive_that_leads_out_of_itself_is_refused(tmp_path, name):
    src = write_tar(tmp_path / "s.tar", {name: encoded(COLOUR)})
    with pytest.raises(UserError, match=r"refused: member .* leads out of the archive"):
        pack(src, tmp_path / "d", PackOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.tar"]


def test_links_and_names_given_twice_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(link("train/a/x.png", "/etc/passwd"))
    with pytest.raises(UserError, match=r"'train/a/x\.png' is a link, device or sparse file"):
        pack(tmp_path / "s.tar", tmp_path / "d", PackOptions())
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("train/a/x.png"))
    with pytest.raises(UserError, match=r"holds 'train/a/x\.png' twice"):
        pack(tmp_path / "s.tar", tmp_path / "d", PackOptions())


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path, pixels, mode):
    whole = write_tar(tmp_path / "s.tar", contents_of(pixels), mode).read_bytes()
    # A plain archive ends with zeros up to a multiple of 10,240 bytes.
    end = len(whole.rstrip(b"\0")) if mode == "w" else len(whole) - 1
    for length in [0, 5, 512, 1024, *range(2048, end, max(512, end // 20 // 512 * 512)), end]:
        (tmp_path / "s.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"s\.tar: .*(truncated|damaged|not a tar)"):
            pack(tmp_path / "s.tar", tmp_path / "d", PackOptions())
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("made", [False, True])
def test_an_archive_is_unpacked_beside_the_data_set(tmp_path, pixels, monkeypatch, made):
    """Some network file systems give the unnamed file a name, which in the data set's folder may count as foreign."""
    src = write_tar(tmp_path / "s.tar", contents_of(pixels), "w:gz")
    (tmp_path / "e").mkdir()
    (tmp_path / "d").symlink_to("e/d")
    if made:
        (tmp_path / "e/d").mkdir()
    folders, original = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: folders.append(dir) or original(dir=dir))
    with open_files(src, tmp_path / "d"):
        assert folders == [(tmp_path / "e").resolve()]


def test_a_place_where_an_archive_cannot_be_unpacked_is_named(tmp_path, pixels, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{dir}/tmpabc")

    src = write_tar(tmp_path / "s.tar", contents_of(pixels), "w:gz")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=rf"s\.tar: cannot be unpacked in {tmp_path}: Permission denied; choose"):
        pack(src, tmp_path / "d", PackOptions())


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder or archive"):
        pack(tmp_path / "nowhere", tmp_path / "d", PackOptions())


@pytest.mark.parametrize("size", ["0", "x", "4x", "x4", "4x4x4", "-3", "99999"])
def test_a_size_that_is_none_is_refused(tmp_path, capsys, size):
    assert main(["data", "pack", "folder", str(tmp_path), str(tmp_path / "d"), f"--size={size}"]) == 2
    assert "is not like 224 or 180x240" in capsys.readouterr().err


def test_options_of_other_sources_are_refused(tmp_path, capsys):
    for source, option in [("mnist", "--size=28"), ("cifar10", "--max-skipped=1"), ("folder", "--devkit=x")]:
        assert main(["data", "pack", source, str(tmp_path), str(tmp_path / "d"), option]) == 2
        assert f"{option.partition('=')[0]} is for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "flags", "turned"),
    [
        ("imagenet", [], False),
        ("folder", [], True),
        ("imagenet", ["--exif=apply"], True),
        ("folder", ["--exif=ignore"], False),
    ],
)
def test_exif_is_ignored_for_imagenet_as_in_published_runs_and_applied_for_folders(tmp_path, source, flags, turned):
    image = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {f"{split}/n01440764/a.png": encoded(image, exif=exif) for split in ("train", "val")}
    write_tree(tmp_path / "src", files)
    assert main(["data", "pack", source, str(tmp_path / "src"), str(tmp_path / "d"), "--size=8", *flags]) == 0
    dataset = open_dataset(tmp_path / "d")
    np.testing.assert_array_equal(dataset.load("val")[0][0], np.rot90(image, -1) if turned else image)
    assert dataset.manifest.source["exif"] == ("apply" if turned else "ignore")


def test_exif_is_no_option_of_sources_without_image_files(tmp_path, capsys):
    assert main(["data", "pack", "mnist", str(tmp_path), str(tmp_path / "d"), "--exif=apply"]) == 2
    assert "--exif is for folder and imagenet, not for mnist" in capsys.readouterr().err


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_becomes_rgb_by_the_product_that_libjpeg_has(adobe):
    """Adobe's files store 255 minus each ink. Pillow, and so torchvision, assumes it without Adobe's marker too."""
    inks = np.repeat(np.repeat(GENERATOR.integers(0, 256, (4, 4, 4), dtype=np.uint8), 16, 0), 16, 1)
    content = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    if not adobe:
        at = content.index(b"\xff\xee")
        content = content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]
    light = 255 - inks.astype(float)
    expected = light[..., :3] * light[..., 3:] / 255
    assert np.abs(np.asarray(decode(content)).astype(float) - expected).max() < 6


def test_a_jpeg_with_extraneous_bytes_is_taken_as_libjpeg_decodes_it():
    """The loaders of published runs accept it too; the image may be grey after the extraneous bytes."""
    content = encoded(np.full((64, 64, 3), 200, np.uint8), "JPEG", restart_marker_blocks=4)
    at = content.index(b"\xff\xd1")
    assert decode(content[:at] + bytes(5) + content[at:]).size == (64, 64)


def test_images_of_many_blocks_have_their_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BLOCK_BYTES", 7 * 6 * 5 * 3)
    contents = {f"train/{'ab'[n % 2]}/{n:02d}.png": encoded(np.full((6, 5, 3), n, np.uint8)) for n in range(40)}
    pack(write_tree(tmp_path / "src", contents), tmp_path / "dst", PackOptions())
    found, labels = open_dataset(tmp_path / "dst").load("train")
    assert sorted(found[:, 0, 0, 0].tolist()) == list(range(40))
    assert labels.tolist() == [n % 2 for n in found[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("opened", [open_files, lambda src, dst: open_archives(dst, {"train": src})])
def test_the_state_of_an_archive_is_of_its_size_and_time(tmp_path, pixels, opened):
    """By the state, a pack that is resumed notices that the archive was replaced."""
    src, states = write_tar(tmp_path / "src.tar", contents_of(pixels)), []
    for time in (1, 1, 2):
        os.utime(src, (time, time))
        with opened(src, tmp_path / "dst") as files:
            states.append(files.state)
    assert states[0] == states[1] != states[2]
