"""The official ImageNet tree and devkit, on small images."""

import errno
import io
import os
import tarfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from arraytp.cli import main
from arraytp.data.dataset import open_dataset
from arraytp.data_prep.imagenet import Document, pack, read_class_map
from arraytp.data_prep.options import PackOptions
from arraytp.errors import UserError

# The devkit numbers the synsets in an order of its own.
WNIDS = {1: "n02119789", 2: "n01440764", 3: "n07753113"}
TRUTH = [2, 3, 1, 1, 2]


def jpeg(value):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (value, value, value)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(root, contents):
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def meta_mat():
    """`meta.mat`: synsets (N, 1) with fields in MATLAB's nesting, inner nodes of the hierarchy last."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, "words", 0) for number, wnid in WNIDS.items()] + [(4, "n00001740", "entity", 3)]
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": np.array(rows, fields)[:, None]})
    return file.getvalue()


DEVKIT = "ILSVRC2012_devkit_t12/data/"
MAPS = {
    "meta.mat": meta_mat(),
    "map_clsloc.txt": b"".join(f"{wnid} {number} some_name\n".encode() for number, wnid in WNIDS.items()),
}


def tree(flat=True, class_map="meta.mat"):
    contents = {f"train/{wnid}/{wnid}_{i}.JPEG": jpeg(10 * n + i) for n, wnid in WNIDS.items() for i in range(4)}
    for number, label in enumerate(TRUTH, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        contents[f"val/{name}" if flat else f"val/{WNIDS[label]}/{name}"] = jpeg(100 + number)
    if flat:
        contents[DEVKIT + "ILSVRC2012_validation_ground_truth.txt"] = "".join(f"{n}\n" for n in TRUTH).encode()
        contents[DEVKIT + class_map] = MAPS[class_map]
    return contents


@pytest.mark.parametrize(("flat", "class_map"), [(True, "meta.mat"), (True, "map_clsloc.txt"), (False, "meta.mat")])
def test_validation_labels_are_those_of_the_train_folders(tmp_path, flat, class_map):
    src = write(tmp_path / "s", tree(flat, class_map))
    assert main(["data", "pack", "imagenet", str(src), str(tmp_path / "d")]) == 0
    dataset = open_dataset(tmp_path / "d")
    assert dataset.shape == (224, 224, 3)
    assert dataset.classes == ("n01440764", "n02119789", "n07753113")
    assert dataset.counts == {"train": 12, "val": 5}
    label_of = {number: dataset.classes.index(wnid) for number, wnid in WNIDS.items()}
    images, labels = dataset.load("train")
    for image, label in zip(images, labels, strict=True):
        assert label == label_of[round(float(image.mean())) // 10]
    images, labels = dataset.load("val")
    numbers = [round(float(image.mean())) - 100 for image in images]
    assert sorted(numbers) == [1, 2, 3, 4, 5]
    assert labels.tolist() == [label_of[TRUTH[number - 1]] for number in numbers]


def tar(contents, mode="w"):
    """A tar archive like the official ones: plain names, no folders."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.USTAR_FORMAT) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def archives():
    """The train archive's inner archives, and the official archives: train, flat validation images, devkit."""
    contents = tree()
    inner = {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": contents[f"train/{wnid}/{wnid}_{i}.JPEG"] for i in range(4)})
        for wnid in WNIDS.values()
    }
    flat = {name.removeprefix("val/"): content for name, content in contents.items() if name.startswith("val/")}
    kit = {name: content for name, content in contents.items() if name.startswith(DEVKIT)}
    return inner, {TRAIN: tar(inner), VAL: tar(flat), KIT: tar(kit, "w:gz")}


def test_the_official_archives_give_the_same_data_set_as_the_tree(tmp_path):
    src = write(tmp_path / "archives", archives()[1])
    options = PackOptions(size=(8, 8))
    pack(src, tmp_path / "a", options)
    pack(write(tmp_path / "tree", tree()), tmp_path / "b", options)
    for split in ("train", "val"):
        for found, expected in zip(*(open_dataset(tmp_path / name).load(split) for name in "ab"), strict=True):
            assert np.array_equal(found, expected)
    assert sorted(path.name for path in src.iterdir()) == sorted([TRAIN, VAL, KIT])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "archives", "b", "tree"]


@pytest.mark.parametrize(("folder", "archive"), [("train", VAL), ("val", TRAIN)])
def test_a_folder_of_one_split_beside_an_archive_of_the_other_is_refused(tmp_path, folder, archive):
    contents = {name: content for name, content in tree().items() if name.startswith((f"{folder}/", DEVKIT))}
    src = write(tmp_path / "s", contents | {archive: archives()[1][archive]})
    other = "val" if folder == "train" else "train"
    with pytest.raises(UserError, match=rf"s: {folder}/ is a folder, but {archive} an archive; extract it to {other}/"):
        pack(src, tmp_path / "d", PackOptions(size=(8, 8)))


def test_archives_may_stay_beside_the_folders_that_were_extracted(tmp_path, expected):
    contents = tree()
    flat = {name: content for name, content in contents.items() if name.startswith("val/")}
    pack(write(tmp_path / "a", contents | archives()[1]), tmp_path / "b", PackOptions(size=(8, 8)))
    same(open_dataset(tmp_path / "b"), expected)
    pack(write(tmp_path / "c", flat | archives()[1]), tmp_path / "d", PackOptions(size=(8, 8)))
    same(open_dataset(tmp_path / "d"), expected)


def test_the_devkit_archive_can_lie_elsewhere(tmp_path):
    files = archives()[1]
    kit = write(tmp_path / "k", {"kit.tar.gz": files.pop(KIT)}) / "kit.tar.gz"
    src = write(tmp_path / "s", files)
    with pytest.raises(UserError, match=r"validation_ground_truth\.txt; give --devkit"):
        pack(src, tmp_path / "d", PackOptions(size=(8, 8)))
    pack(src, tmp_path / "d", PackOptions(size=(8, 8)), kit)
    assert open_dataset(tmp_path / "d").counts == {"train": 12, "val": 5}


def test_a_devkit_whose_file_cannot_be_read_is_named_with_it(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    src = write(tmp_path / "s", archives()[1])
    monkeypatch.setattr("arraytp.data_prep.files._read_part", refuse)
    with pytest.raises(UserError, match=rf"{KIT}: {DEVKIT}[\w.]+: cannot be read: Input/output error"):
        pack(src, tmp_path / "d", PackOptions(size=(8, 8)))


@pytest.mark.parametrize("name", ["../n01440764_1.JPEG", "/n01440764_1.JPEG", "a/../../n01440764_1.JPEG"])
def test_an_inner_archive_that_leads_out_of_itself_is_refused(tmp_path, name):
    inner, files = archives()
    src = write(tmp_path / "s", files | {TRAIN: tar(inner | {"n01440764.tar": tar({name: jpeg(1)})})})
    with pytest.raises(UserError, match=r"img_train\.tar: n01440764\.tar: refused: member .* leads out of the archive"):
        pack(src, tmp_path / "d", PackOptions(size=(8, 8)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


@pytest.mark.parametrize("length", [0, 100, 512, 1024, 2560, -10240])
def test_a_truncated_inner_archive_is_refused_and_its_neighbour_not_taken_for_its_content(tmp_path, length):
    inner, files = archives()
    cut = {"n01440764.tar": inner["n01440764.tar"].rstrip(b"\0")[:length]}
    src = write(tmp_path / "s", files | {TRAIN: tar(cut | {name: inner[name] for name in inner if name not in cut})})
    with pytest.raises(UserError, match=r"img_train\.tar: n01440764\.tar: (truncated|not a tar)"):
        pack(src, tmp_path / "d", PackOptions(size=(8, 8)))
    assert not (tmp_path / "d").exists()


def test_a_truncated_outer_archive_is_refused(tmp_path):
    files = archives()[1]
    for length in (512, len(files[TRAIN]) // 2 // 512 * 512, len(files[TRAIN].rstrip(b"\0"))):
        src = write(tmp_path / "s", files | {TRAIN: files[TRAIN][:length]})
        with pytest.raises(UserError, match=r"img_train\.tar: .*(truncated|damaged)"):
            pack(src, tmp_path / "d", PackOptions(size=(8, 8)))


def test_a_devkit_elsewhere_can_be_named(tmp_path):
    contents = tree()
    devkit = {name.removeprefix(DEVKIT): contents.pop(name) for name in list(contents) if name.startswith(DEVKIT)}
    src, kit = write(tmp_path / "s", contents), write(tmp_path / "k", devkit)
    with pytest.raises(UserError, match=r"no ILSVRC2012_validation_ground_truth\.txt; give --devkit"):
        pack(src, tmp_path / "d", PackOptions())
    pack(src, tmp_path / "d", PackOptions(size=(8, 8)), devkit=kit)
    assert open_dataset(tmp_path / "d").counts["val"] == 5


GROUND = DEVKIT + "ILSVRC2012_validation_ground_truth.txt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({GROUND: b"2\n3\n1\n1\n"}, "has 4 lines, none for 'val/ILSVRC2012_val_00000005.JPEG'"),
        ({GROUND: b"2\n3\n1\n1\n9\n"}, "line 5 is '9', which the class map does not have"),
        ({GROUND: b"2\n3\n1\n1\n\xff\n"}, "ground_truth.txt: cannot be read"),
        ({DEVKIT + "meta.mat": b"no matlab file"}, "meta.mat: cannot be read as a class map"),
        ({DEVKIT + "meta.mat": meta_mat()[:200]}, "meta.mat: cannot be read as a class map"),
        ({DEVKIT + "meta.mat": None}, "no meta.mat or map_clsloc.txt; give --devkit"),
        ({"val/n01440764/ILSVRC2012_val_00000006.JPEG": jpeg(1)}, "both flat and in class folders"),
        ({"train/fish/x.JPEG": jpeg(1)}, "class folder 'fish' is not a wnid"),
        ({"val/other.JPEG": jpeg(1)}, "'val/other.JPEG' is not split/class/image"),
        ({f"train/n07753113/n07753113_{i}.JPEG": None for i in range(4)}, "is n07753113, which has no train image"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    contents = tree() | changes
    src = write(tmp_path / "s", {name: content for name, content in contents.items() if content is not None})
    with pytest.raises(UserError, match=message):
        pack(src, tmp_path / "d", PackOptions(size=(8, 8)))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "lines",
    ["", "n01440764 1\nn01440764 2\n", "n01440764 1\nn02119789 1\n", "tench 1\n", "n01440764\n", "n01440764 1 2\n"],
)
def test_a_text_that_is_no_class_map_is_refused(lines):
    with pytest.raises(UserError, match=r"map\.txt: "):
        read_class_map(Document("map.txt", lines.encode()))


def packed(tmp_path, contents, *flags):
    src = write(tmp_path / "s", contents)
    assert main(["data", "pack", "imagenet", str(src), str(tmp_path / "d"), "--size=8", *flags]) == 0
    return open_dataset(tmp_path / "d")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The data set packed from the official tree."""
    place = tmp_path_factory.mktemp("official")
    pack(write(place / "s", tree()), place / "d", PackOptions(size=(8, 8)))
    return open_dataset(place / "d")


def same(dataset, expected):
    """Check that two data sets have the same classes and, in any order, the same images with the same labels."""
    assert dataset.classes == expected.classes
    for split in ("train", "val"):
        pairs = [
            sorted((image.tobytes(), label) for image, label in zip(*found.load(split), strict=True))
            for found in (dataset, expected)
        ]
        assert pairs[0] == pairs[1]


def without_devkit():
    return {name: content for name, content in tree().items() if not name.startswith(DEVKIT)}


SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{number:08d},{WNIDS[label]} 85 1 499 272 {WNIDS[label]} 1 2 3 4 \n"
    for number, label in reversed(list(enumerate(TRUTH, 1)))
)


@pytest.mark.parametrize("inside", ["", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree_is_read_from_any_of_its_folders(tmp_path, expected, inside):
    contents = {f"ILSVRC/Data/CLS-LOC/{name}": content for name, content in without_devkit().items()}
    contents["ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG"] = jpeg(7)
    contents |= {"LOC_val_solution.csv": SOLUTION.encode(), "LOC_synset_mapping.txt": b"n01440764 tench\n"}
    write(tmp_path / "s", contents)
    pack(tmp_path / "s" / inside, tmp_path / "d", PackOptions(size=(8, 8)))
    same(open_dataset(tmp_path / "d"), expected)


@pytest.mark.parametrize("text", ["", "ImageId\n", "ImageId,PredictionString\nval_1,n01440764\n", "\xff"])
def test_a_solution_that_is_none_is_named(tmp_path, text):
    contents = without_devkit() | {"LOC_val_solution.csv": text.encode("latin-1")}
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv: line [12] is "):
        pack(write(tmp_path / "s", contents), tmp_path / "d", PackOptions(size=(8, 8)))


def test_images_whose_names_end_with_their_wnids_may_lie_flat(tmp_path, expected):
    contents = {}
    for name, content in tree(flat=False).items():
        split, wnid, file = name.split("/")
        contents[f"{split}/{file.removesuffix('.JPEG')}_{wnid}.JPEG"] = content
    same(packed(tmp_path, contents), expected)


def test_flat_validation_images_may_be_named_in_small_letters(tmp_path, expected):
    contents = {
        name.replace(".JPEG", ".jpeg") if name.startswith("val/") else name: content for name, content in tree().items()
    }
    same(packed(tmp_path, contents), expected)


def test_a_byte_order_mark_in_ground_truth_and_class_map_is_none_of_their_content(tmp_path, expected):
    contents = tree(class_map="map_clsloc.txt")
    for name in contents:
        if name.startswith(DEVKIT):
            contents[name] = b"\xef\xbb\xbf" + contents[name].replace(b"\n", b"\r\n")
    same(packed(tmp_path, contents), expected)


@pytest.mark.parametrize("with_truth", [True, False])
def test_the_devkit_of_another_year_is_refused(tmp_path, with_truth):
    contents = tree(class_map="map_clsloc.txt")
    contents[DEVKIT + "ILSVRC2014_clsloc_validation_ground_truth.txt"] = contents[GROUND]
    if not with_truth:
        del contents[GROUND]
    with pytest.raises(UserError, match=r"ILSVRC2014_clsloc.*: from the devkit of another year"):
        pack(write(tmp_path / "s", contents), tmp_path / "d", PackOptions(size=(8, 8)))


@pytest.mark.parametrize("source", ["imagenet", "folder"])
@pytest.mark.parametrize("first", [0, 1])
def test_classes_that_are_numbers_are_labelled_in_the_order_of_numbers(tmp_path, capsys, source, first):
    files = {f"{split}/{n}/{n}.jpg": jpeg(10 * n) for n in range(first, first + 12) for split in ("train", "val")}
    src = write(tmp_path / "s", files)
    assert main(["data", "pack", source, str(src), str(tmp_path / "d"), "--size=8"]) == 0
    assert "labels follow the numbers, not the text" in capsys.readouterr().err
    images, labels = open_dataset(tmp_path / "d").load("val")
    assert [round(float(image.mean()) / 10) for image in images] == (labels + first).tolist()


def test_what_another_archiver_leaves_in_the_official_archives_is_no_file(tmp_path, expected):
    inner, contents = archives()
    inner = {name: content for part in inner for name, content in ((f"._{part}", b"finder"), (part, inner[part]))}
    first = next(name for name in inner if not name.startswith("._"))
    with tarfile.open(fileobj=io.BytesIO(inner[first])) as archive:
        names = {member.name: archive.extractfile(member).read() for member in archive}
    inner[first] = tar({f"._{name}": b"finder" for name in names} | names)
    same(packed(tmp_path, contents | {TRAIN: tar(inner)}), expected)
