"""The training loop: epochs of steps, evaluation, angles, checkpoints, and going on where a run stopped."""

import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arraytp import __version__
from arraytp.backend import array_module
from arraytp.checkpoint import all_finite, finite_moments, read_checkpoint, write_checkpoint
from arraytp.errors import Interrupted, NonFiniteError, UserError
from arraytp.experiment import Experiment, Score
from arraytp.metrics import ANGLES_COLUMNS, METRICS_COLUMNS, CsvTable, Totals, write_file
from arraytp.optim import learning_rate
from arraytp.progress import Progress
from arraytp.signals import StopRequest

# On a device, reading a number back makes the host wait; on the CPU it costs nothing.
DEVICE_STEPS_PER_READ = 50


@dataclass
class Position:
    """Where a run stands, and what it has to remember of the epoch it is in.

    Parameters
    ----------
    epoch : int
        Finished epochs.
    batch : int
        Batches trained in the running epoch; all of them means that only the evaluation is due.
    step : int
        Batches trained in the whole run.
    seconds : float
        Wall time of the run so far, evaluations included.
    train_seconds : float
        Wall time of the training steps alone.
    train_images : int
        Images trained in `train_seconds`.
    totals : Totals
        Of the running epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    train_images: int = 0
    totals: Totals = field(default_factory=Totals)


class Run:
    """A training run that writes a result folder (contract: metrics.csv, angles.csv, summary.json, checkpoint.h5).

    Parameters
    ----------
    experiment : Experiment
        In its initial state.
    folder : Path
        Exists.
    label : str
        What the display calls the run.
    quiet : bool
        Show no progress.
    """

    def __init__(self, experiment: Experiment, folder: Path, label: str, quiet: bool = False) -> None:
        self.experiment, self.folder, self.label, self.quiet = experiment, folder, label, quiet
        self.position = Position()
        self.metrics = CsvTable(folder / "metrics.csv", METRICS_COLUMNS)
        self.angles = CsvTable(folder / "angles.csv", ANGLES_COLUMNS)
        self._unread: list[Score] = []
        self._clock = time.monotonic()
        self._saved = self._clock

    def start(self) -> None:
        """Begin at the beginning."""
        self.metrics.restart([])
        self.angles.restart([])

    def resume(self) -> None:
        """Go on from the folder's checkpoint; rows of the tables that were written after it are dropped.

        Raises
        ------
        UserError
            As `read_checkpoint`; also if the config asks for fewer epochs than are trained. The folder is as it was.
        """
        path, epochs = self.folder / "checkpoint.h5", self.experiment.config.train.epochs
        state = read_checkpoint(path, self.experiment)
        try:
            totals = Totals(**state["position"].pop("totals"))
            self.position = Position(**state["position"], totals=totals)
            tables = state["metrics"], state["angles"]
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the checkpoint is damaged ({error}); --fresh starts over") from error
        if self.position.epoch + (self.position.batch > 0) > epochs:
            raise UserError(
                f"{path}: is in epoch {self.position.epoch + (self.position.batch > 0)} already, but train.epochs is "
                f"{epochs}; ask for more epochs, or start over with --fresh"
            )
        self.metrics.restart(tables[0])
        self.angles.restart(tables[1])

    def train(self, stop: StopRequest) -> None:
        """Train to the last epoch and write summary.json.

        Raises
        ------
        Interrupted
            After `stop` was requested and the checkpoint written.
        NonFiniteError
            If loss or weights are not finite; the last good checkpoint stays.
        """
        config, loader = self.experiment.config, self.experiment.train_loader
        position = self.position
        self._clock = self._saved = time.monotonic()
        steps_done = position.epoch * loader.steps_per_epoch + position.batch
        with Progress(
            self.label,
            config.train.epochs,
            loader.steps_per_epoch,
            steps_done=steps_done,
            test_top1=self._last_test_top1(),
            quiet=self.quiet,
        ) as progress:
            if not self.metrics.rows:
                self._evaluate(0, stop, progress)
            while position.epoch < config.train.epochs:
                self._train_epoch(stop, progress)
                self._evaluate(position.epoch + 1, stop, progress)
                position.epoch, position.batch, position.totals = position.epoch + 1, 0, Totals()
        self._save()
        self._write_summary()

    def _train_epoch(self, stop: StopRequest, progress: Progress) -> None:
        position, experiment = self.position, self.experiment
        every = experiment.config.compare.every
        mark = time.monotonic()
        with closing(experiment.train_loader.batches(position.epoch, position.batch)) as batches:
            for images, labels in batches:
                score = experiment.propose(images, labels)
                if every and position.step % every == 0 and experiment.config.rule.name != "bp":
                    mark += self._compare()
                experiment.apply(position.epoch)
                position.batch += 1
                position.step += 1
                position.train_images += len(labels)
                self._collect(score, progress)
                now = time.monotonic()
                position.train_seconds, mark = position.train_seconds + now - mark, now
                if stop.requested:
                    self._stop(stop, progress)
                if time.monotonic() - self._saved > 60 * experiment.config.train.checkpoint_minutes:
                    self._read_scores(progress)
                    self._save()
        self._read_scores(progress)

    def _collect(self, score: Score, progress: Progress) -> None:
        """Take a step's score; look at it now on the CPU, every so many steps on a device."""
        self._unread.append(score)
        if self.experiment.plan.backend.on_host or len(self._unread) == DEVICE_STEPS_PER_READ:
            self._read_scores(progress)

    def _read_scores(self, progress: Progress) -> None:
        scores, self._unread = self._unread, []
        if not scores:
            return
        xp = array_module(scores[0].totals)
        host = self.experiment.plan.backend.to_host(xp.stack([score.totals for score in scores]))
        fresh = Totals()
        for score, (loss, top1, top5) in zip(scores, host.tolist(), strict=True):
            fresh.add(loss, top1, top5, score.images)
            self.position.totals.add(loss, top1, top5, score.images)
        if not math.isfinite(fresh.loss):
            bad = next(i for i, (loss, _, _) in enumerate(host.tolist()) if not math.isfinite(loss))
            self._fail(f"at step {self.position.step - len(scores) + bad}")
        loss, top1, _ = fresh.means()
        progress.step(fresh.images, steps=len(scores), loss=loss, top1=top1)

    def _compare(self) -> float:
        """Write the angles to BP; return the seconds that it took, which are not the rule's."""
        started = time.monotonic()
        position = self.position
        for found in self.experiment.compare():
            self.angles.append(position.step, position.epoch + 1, found.block, found.angle_deg, found.distance)
        return time.monotonic() - started

    def _evaluate(self, epoch: int, stop: StopRequest, progress: Progress) -> None:
        """Evaluate the test split and add the row of an epoch; a stop in between leaves both to the resumed run."""
        position, config = self.position, self.experiment.config
        totals = Totals()
        to_host = self.experiment.plan.backend.to_host
        for score in self.experiment.evaluate():
            loss, top1, top5 = to_host(score.totals).tolist()
            totals.add(loss, top1, top5, score.images)
            if stop.requested:
                self._stop(stop, progress)
        if not math.isfinite(totals.loss):
            self._fail(f"in the evaluation after {position.step} steps")
        self._tick()
        lr = learning_rate(config.schedule, config.optimizer.lr, max(epoch - 1, 0))
        row = (epoch, round(position.seconds, 3), lr, *position.totals.means(), *totals.means())
        self.metrics.append(*row)
        progress.epoch(dict(zip(METRICS_COLUMNS, row, strict=True)))

    def _stop(self, stop: StopRequest, progress: Progress) -> None:
        self._read_scores(progress)
        self._save()
        position = self.position
        where = f"epoch {position.epoch + 1}, step {position.step}"
        raise Interrupted(f"{self.label}: stopped in {where}; {self.folder / 'checkpoint.h5'} is written", stop.signal)

    def _save(self) -> None:
        """Write the checkpoint, unless weights or moments are not finite: then the last good one must stay."""
        experiment = self.experiment
        if not all(all_finite(experiment.network)) or not all(finite_moments(experiment.optimizer_state)):
            self._fail(f"after {self.position.step} steps")
        self._tick()
        state = {"position": asdict(self.position), "metrics": self.metrics.rows, "angles": self.angles.rows}
        write_checkpoint(self.folder / "checkpoint.h5", self.experiment, state)
        self._saved = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        self.position.seconds += now - self._clock
        self._clock = now

    def _fail(self, when: str) -> None:
        """Raise NonFiniteError that says when and in which block the numbers left the finite ones."""
        checkpoint = self.folder / "checkpoint.h5"
        saved = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        raise NonFiniteError(
            f"{self.label}: not finite {when}: {self._culprit()}; {saved}; "
            + ("a smaller optimizer.lr may help" if self.position.step else "see data.normalize and network.init")
        )

    def _culprit(self) -> str:
        """Name what is not finite, the first in the order of the forward pass.

        Outputs come before weights: an update that follows from a bad output spoils the weights of all blocks.
        """
        network, passed = self.experiment.network, self.experiment.passed
        names = [f"block {n} ({block.label})" for n, block in enumerate(network.blocks)]
        if passed is not None:
            outputs = ["input of " + names[0], *("output of " + name for name in names)]
            for name, s in zip(outputs, passed.s, strict=True):
                if not bool(array_module(s).isfinite(s).all()):
                    return name
        bad = [name for name, finite in zip(names, all_finite(network), strict=True) if not finite]
        if bad:
            return f"weights of {bad[0]}"
        moments = finite_moments(self.experiment.optimizer_state)
        if not all(moments):
            # A weight and a bias per block.
            return f"optimiser's moments of {names[moments.index(False) // 2]}"
        return f"loss, from the output of {names[-1]}"

    def _last_test_top1(self) -> float:
        if not self.metrics.rows:
            return math.nan
        return float(self.metrics.rows[-1].split(",")[METRICS_COLUMNS.index("test_top1")])

    def _write_summary(self) -> None:
        rows = [dict(zip(METRICS_COLUMNS, map(float, row.split(",")), strict=True)) for row in self.metrics.rows]
        best = max(rows, key=lambda row: row["test_top1"])
        position, plan, config = self.position, self.experiment.plan, self.experiment.config
        seconds = position.train_seconds or math.nan
        summary: dict[str, Any] = {
            "name": config.name,
            "rule": config.rule.name,
            "seed": config.seed,
            "epochs": position.epoch,
            "steps": position.step,
            "final": _numbers(rows[-1]),
            "best": _numbers(best),
            "images_per_second": position.train_images / seconds,
            "steps_per_second": position.step / seconds,
            "peak_memory_mb": plan.backend.peak_memory() / 2**20,
            "blocks": [block.label for block in plan.blocks],
            "parameters": sum(w.size + b.size for w, b in _pairs(self.experiment)),
            "versions": {"arraytp": __version__, "python": platform.python_version(), **plan.backend.versions()},
            "device": plan.backend.device(),
        }
        write_file(self.folder / "summary.json", (json.dumps(_json_safe(summary), indent=2) + "\n").encode())


def _pairs(experiment: Experiment) -> Iterator[tuple[Any, Any]]:
    return zip(experiment.network.weights, experiment.network.biases, strict=True)


def _numbers(row: dict[str, float]) -> dict[str, float]:
    return {"epoch": int(row["epoch"]), **{name: row[name] for name in METRICS_COLUMNS[3:]}}


def _json_safe(value: Any) -> Any:
    """Return the value with NaN and infinities as null, which is what JSON can say."""
    if isinstance(value, dict):
        return {key: _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
