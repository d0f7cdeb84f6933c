import numpy as np
import pytest

from arraytp.data.dataset import open_dataset
from arraytp.data.writer import Description, writing


def _pack(folder, *, train=600, test=70, shape=(5, 4, 3), compression=False, shard_images=250, classes=10):
    generator = np.random.default_rng(0)
    description = Description("tiny", shape, tuple(f"class {n}" for n in range(classes)))
    with writing(folder, description, compression=compression, shard_images=shard_images) as writer:
        for split, count in (("train", train), ("test", test)):
            images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
            # The first two bytes tell the rows apart.
            images.reshape(count, -1)[:, 0], images.reshape(count, -1)[:, 1] = np.divmod(np.arange(count), 256)
            writer.add(split, images, generator.integers(0, classes, count))
    return open_dataset(folder)


@pytest.fixture(scope="session")
def pack():
    """Write a small data set; the row number is in the first two bytes of each image."""
    return _pack


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """600 train and 70 test images of shape (5, 4, 3), in 3 shards and 1; no test may modify them."""
    return _pack(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def row_numbers():
    """Read the row numbers back from images, which are uint8 or scaled to [0, 1]."""

    def numbers(images):
        flat = np.asarray(images).reshape(len(images), -1)[:, :2]
        if flat.dtype != np.uint8:
            flat = np.rint(flat * 255)
        return (flat.astype(np.int64) @ [256, 1]).tolist()

    return numbers
