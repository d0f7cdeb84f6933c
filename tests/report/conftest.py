import json
from collections.abc import Callable
from pathlib import Path

import pytest

METRICS = "epoch,seconds,lr,train_loss,train_top1,train_top5,test_loss,test_top1,test_top5"
ANGLES = "step,epoch,block,angle_deg,distance"
FEEDBACK = "step,epoch,block,loss,angle_deg,distance"
BLOCKS = ("conv1", "conv2", "dense1", "dense2")


def _csv(path: Path, header: str, rows: list[list[object]]) -> None:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [[header], *rows]), encoding="utf-8")


@pytest.fixture
def make_result(tmp_path: Path) -> Callable[..., Path]:
    """Write a result folder with numbers that can be worked out by hand."""

    def make(
        name: str = "results/fa",
        rule: str = "fa",
        epochs: int = 2,
        planned: int | None = None,
        steps: int | None = None,
        blocks: tuple[str, ...] = BLOCKS,
        angles: dict[int, list[float]] | None = None,
        finished: bool = True,
        named: bool = True,
    ) -> Path:
        """`angles` maps a step to the angle of every block; by default two steps, 10° more in the second.

        `steps` is the length of the run in summary.json and steps.csv, which has a row every 10 steps.
        """
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = f"name: demo\nseed: 3\nrule:\n  name: {rule}\ntrain:\n  epochs: {planned or epochs}\n"
        config += "compare:\n  every: 10\n"
        (folder / "config.yml").write_text(config, encoding="utf-8")
        rows: list[list[object]] = [[0, 0.5, 0.1, "nan", "nan", "nan", 2.3, 10.0, 50.0]]
        rows += [
            [e, 1.5 * e, 0.1, 2 / e, min(40.0 + e, 99.0), min(80.0 + e, 99.0), 2.2 / e, min(60.0 + e / 8, 99.0), 90.0]
            for e in range(1, epochs + 1)
        ]
        _csv(folder / "metrics.csv", METRICS, rows)
        first = [10.0 * (len(blocks) - 1 - n) for n in range(len(blocks))]
        taken = {0: first, 10: [angle + 10 for angle in first]} if angles is None else angles
        triples = [[s, 1, n, angle, 0.5] for s, given in taken.items() for n, angle in enumerate(given)]
        _csv(folder / "angles.csv", ANGLES, triples)
        # The accuracy is 20 % after ten steps and grows by 10 points every ten steps.
        taken_steps = [[s, 1, 2.0, min(s + 10.0, 99.0), 90.0] for s in range(10, (steps or 0) + 1, 10)]
        _csv(folder / "steps.csv", "step,epoch,train_loss,train_top1,train_top5", taken_steps)
        if finished:
            summary = {
                "name": "demo",
                "rule": rule,
                "epochs": epochs,
                "images_per_second": 12345.6,
                "peak_memory_mb": 321.0,
            }
            summary |= {"blocks": list(blocks)} if named else {}
            summary |= {"steps": steps} if steps else {}
            (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return folder

    return make
