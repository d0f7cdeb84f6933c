"""Pack ImageNet (ILSVRC 2012): train/<wnid>/ and val/, by class or flat with the devkit's ground truth.

The official archives can also be packed as they are: `ILSVRC2012_img_train.tar`, which holds a tar archive for each
wnid, `ILSVRC2012_img_val.tar` and `ILSVRC2012_devkit_t12.tar.gz`. Only the devkit is decompressed.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import scipy.io

from arraytp.data_prep.files import Files, open_archives, open_files
from arraytp.data_prep.folder import image_rows, plan_tree
from arraytp.data_prep.images import Plan, pack_images
from arraytp.data_prep.options import PackOptions
from arraytp.disk import read_small, real
from arraytp.errors import UserError

SIZE = (224, 224)
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_MOST_BYTES = 2**24
CLASS_MAPS = ("meta.mat", "map_clsloc.txt")
DEVKIT = "ILSVRC2012_devkit_t12"
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
# In the Kaggle competition's archive.
KAGGLE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
_FLAT = re.compile(r"val/ILSVRC2012_val_([0-9]{8})\.JPE?G", re.IGNORECASE)
_FLAT_TEST = re.compile(r"test/[^/]+")
# As Hugging Face names them: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG.
_WITH_WNID = re.compile(r"(train|val)/[^/]+_(n[0-9]{8})\.JPE?G", re.IGNORECASE)
_SOLVED = re.compile(r"ILSVRC2012_val_([0-9]{8}),\s*(n[0-9]{8})\b.*")
_OTHER_YEAR = re.compile(r"ILSVRC(?!2012)20[0-9]{2}\w*validation_ground_truth\.txt")
_WNID = re.compile(r"n[0-9]{8}")


class Document(NamedTuple):
    """A file of the devkit: its name for messages, and its content."""

    where: str
    content: bytes


def read_class_map(document: Document) -> dict[int, str]:
    """Read which synset each number of the ground truth stands for: 1 to 1000 → wnid.

    The document is the devkit's `meta.mat`, or a text file whose lines hold a wnid and a number in any order, such as
    the later devkits' `map_clsloc.txt`. UserError if it cannot be read, or is not such a map.
    """
    where = document.where
    try:
        pairs = list(_mat_pairs(document) if where.endswith(".mat") else _text_pairs(document))
    except UserError:
        raise
    # The exceptions for a damaged MATLAB file are not documented.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: cannot be read as a class map: {text}") from error
    classes = dict(pairs)
    wrong = next((wnid for wnid in classes.values() if not _WNID.fullmatch(wnid)), None)
    if wrong is not None or len(classes) != len(pairs) or len(set(classes.values())) != len(pairs) or not pairs:
        raise UserError(
            f"{where}: not a class map: expected one wnid, like n01440764, for each number, found {wrong!r}"
        )
    return classes


def _mat_pairs(document: Document) -> Iterator[tuple[int, str]]:
    synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(document.content), squeeze_me=True)["synsets"])
    for synset in synsets:
        # Higher numbers belong to inner nodes of the hierarchy.
        if int(synset["num_children"]) == 0:
            yield int(synset["ILSVRC2012_ID"]), str(synset["WNID"])


def _text_pairs(document: Document) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(document.content.decode("utf-8-sig").splitlines(), 1):
        words = line.split()
        wnids = [word for word in words if _WNID.fullmatch(word)]
        numbers = [int(word) for word in words if word.isdecimal()]
        if len(wnids) != 1 or len(numbers) != 1:
            raise UserError(f"{document.where}: line {number} is {line[:60]!r}, expected one wnid and one number")
        yield numbers[0], wnids[0]


def read_truth(document: Document, classes: Mapping[int, str]) -> list[str]:
    """Read the ground truth: the wnid of every validation image in the order of their numbers."""
    try:
        lines = document.content.decode("utf-8-sig").split()
    except ValueError as error:
        raise UserError(f"{document.where}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.isdecimal() or int(line) not in classes:
            raise UserError(f"{document.where}: line {number} is {line[:40]!r}, which the class map does not have")
    return [classes[int(line)] for line in lines]


def read_solution(document: Document) -> dict[int, str]:
    """Read Kaggle's `LOC_val_solution.csv`: the number of each validation image → wnid.

    UserError if a line is not like `ILSVRC2012_val_00000001,n01751748 111 108 432 342`.
    """
    head, *lines = document.content.decode("utf-8-sig", "replace").splitlines() or [""]
    if not head.startswith("ImageId,"):
        raise UserError(f"{document.where}: line 1 is {head[:60]!r}, expected ImageId,PredictionString")
    documents = {}
    for number, line in enumerate(lines, 2):
        match = _SOLVED.fullmatch(line)
        if match is None:
            raise UserError(f"{document.where}: line {number} is {line[:60]!r}, expected an image's name and its wnid")
        documents[int(match[1])] = match[2]
    return documents


def read_val_labels(src: Path, devkit: Path | None, dst: Path) -> tuple[str, dict[int, str]]:
    """Return the source of the flat validation images' labels, Kaggle's file or the devkit, and number → wnid."""
    # Kaggle's file lies beside ILSVRC/, whether `src` is the folder of both or lies within ILSVRC/.
    places = [] if devkit else [src / SOLUTION, *(parent / SOLUTION for parent in real(src).parents[:3])]
    solution = next((place for place in places if place.is_file()), None)
    if solution is not None:
        return str(solution), read_solution(Document(str(solution), read_small(solution, _MOST_BYTES)))
    document, class_map = find_devkit(src, devkit, dst)
    return document.where, dict(enumerate(read_truth(document, read_class_map(class_map)), 1))


def _devkit_documents(src: Path, devkit: Path | None, dst: Path) -> dict[str, Document]:
    roots = [devkit] if devkit else [src, src / DEVKIT, src / "devkit", src / f"{DEVKIT}.tar.gz"]
    documents: dict[str, Document] = {}
    for root in roots:
        documents = _documents(root, dst) | documents
    return documents


def find_class_map(src: Path, devkit: Path | None, dst: Path) -> Document | None:
    """Return the devkit's class map, from `devkit` or from the official places in `src`; None if there is none.

    UserError if it cannot be read, or if `devkit` is given but does not hold one.
    """
    documents = _devkit_documents(src, devkit, dst)
    class_map = next((documents[name] for name in CLASS_MAPS if name in documents), None)
    if devkit and class_map is None:
        raise UserError(f"{devkit}: no {' or '.join(CLASS_MAPS)}")
    return class_map


def find_devkit(src: Path, devkit: Path | None, dst: Path) -> tuple[Document, Document]:
    """Return ground truth and class map, from `devkit` or the official places in `src`; UserError if one is missing."""
    documents = _devkit_documents(src, devkit, dst)
    truth = documents.get(TRUTH)
    class_map = next((documents[name] for name in CLASS_MAPS if name in documents), None)
    other = next((documents[name] for name in documents if _OTHER_YEAR.fullmatch(name)), None)
    if other is not None and (truth is None or (class_map is not None and class_map.where.endswith(".txt"))):
        raise UserError(
            f"{other.where}: from the devkit of another year, whose numbers may differ from those of 2012; "
            f"give {DEVKIT}"
        )
    if truth is None or class_map is None:
        missing = TRUTH if truth is None else " or ".join(CLASS_MAPS)
        raise UserError(f"{devkit or src}: val/ is flat, and there is no {missing}; give --devkit")
    return truth, class_map


def _documents(root: Path, dst: Path) -> dict[str, Document]:
    """Read the devkit's files in a folder, in its `data/` or in an archive; return them by name."""
    needed = (TRUTH, *CLASS_MAPS)
    if root.is_file():
        with open_files(root, dst) as files:
            rows = {PurePosixPath(name).name: row for row, name in enumerate(files.names)}
            return {
                name: Document(f"{root}: {files.names[row]}", files.content(row))
                for name, row in rows.items()
                if name in needed or _OTHER_YEAR.fullmatch(name)
            }
    try:
        folders = [folder for folder in (root / "data", root) if folder.is_dir()]
        paths = {path.name: path for folder in folders for path in folder.iterdir()}
        return {
            name: Document(str(path), read_small(path, _MOST_BYTES))
            for name, path in paths.items()
            if (name in needed or _OTHER_YEAR.fullmatch(name)) and path.is_file()
        }
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


@contextmanager
def open_tree(src: Path, dst: Path) -> Iterator[Files]:
    """Open train/ and val/, like `open_files`: a folder or archive of both, or a folder with the official archives."""
    if (src / KAGGLE).is_dir():
        src = src / KAGGLE
    archives = {split: src / name for split, name in ARCHIVES.items() if (src / name).is_file()}
    _refuse_halves(src, archives)
    if (src / "train").exists() or "train" not in archives:
        with open_files(src, dst) as files:
            yield files
    else:
        with open_archives(src, archives) as files:
            yield files


def _refuse_halves(src: Path, archives: Mapping[str, Path]) -> None:
    """Raise UserError if one split is a folder and the other an official archive: `open_tree` would leave out val."""
    folders = [split for split in ARCHIVES if (src / split).exists()]
    read, left = (folders, [*archives]) if "train" in folders else ([*archives], folders)
    if "train" in read and "val" in left and "val" not in read:
        folder, archive = ("train", "val") if "train" in folders else ("val", "train")
        raise UserError(
            f"{src}: {folder}/ is a folder, but {ARCHIVES[archive]} an archive; extract it to {archive}/, or leave "
            "both splits in their archives"
        )


def plan_imagenet(files: Files, src: Path, devkit: Path | None, dst: Path) -> Plan:
    """Plan train/<wnid>/ and val/<wnid>/ or flat val/; labels are the wnids in alphabetical order.

    Images may also lie flat in train/ and val/, with their wnids at the end of their names. A flat test/, which has no
    labels, is ignored. UserError if a class is not a wnid (unless all classes are numbers), the tree has neither
    layout, or the ground truth does not match the images.
    """
    flat, unlabelled, given = {}, set(), {}
    for row, name in image_rows(files):
        if match := _FLAT.fullmatch(name):
            flat[row] = int(match[1])
        elif match := _WITH_WNID.fullmatch(name):
            given[row] = match[1].lower(), match[2]
        elif _FLAT_TEST.fullmatch(name):
            unlabelled.add(row)
    plan = plan_tree(files, leave=flat.keys() | unlabelled, given=given)
    wrong = next((name for name in plan.classes if not _WNID.fullmatch(name)), None)
    if wrong is not None and not all(name.isdecimal() for name in plan.classes):
        raise UserError(f"{files.root}: class folder {wrong!r} is not a wnid, such as n01440764")
    if not flat:
        return plan
    if "val" in plan.splits:
        raise UserError(f"{files.root}: val/ holds images both flat and in class folders")
    where, truth = read_val_labels(src, devkit, dst)
    labels = {wnid: label for label, wnid in enumerate(plan.classes)}
    rows = sorted(flat, key=flat.__getitem__)
    for row in rows:
        if flat[row] not in truth:
            raise UserError(f"{where}: has {len(truth)} lines, none for {files.names[row]!r}")
        if truth[flat[row]] not in labels:
            raise UserError(f"{files.root}: {files.names[row]!r} is {truth[flat[row]]}, which has no train image")
    val = np.array(rows, np.int64), np.array([labels[truth[flat[row]]] for row in rows], np.int64)
    return replace(plan, splits={**plan.splits, "val": val})


def pack(src: Path, dst: Path, options: PackOptions, devkit: Path | None = None) -> int:
    """Pack the official tree, 224×224 unless `options.size` says otherwise; return how many broken files were skipped.

    UserError like `plan_imagenet`, `open_tree` and `pack_images`.
    """
    # EXIF is ignored as in every published run: the usual loaders do not apply it, and few of the images have any.
    given = replace(options, name=options.name or "imagenet", size=options.size or SIZE, exif=options.exif or "ignore")
    with open_tree(src, dst) as files:
        plan = plan_imagenet(files, src, devkit, dst)
        return pack_images(plan, dst, given, {"packer": "imagenet", "files": src.name})
