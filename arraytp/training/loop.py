"""The training loop: epochs of steps, evaluation, angles, checkpoints and resuming."""

import math
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from arraytp import __version__
from arraytp.backend import Array, array_module
from arraytp.data.loader import Loader
from arraytp.errors import Interrupted, NonFiniteError, UserError
from arraytp.files import write_json
from arraytp.model.plain import Plain
from arraytp.optim import at_block, learning_rates
from arraytp.ranks import agreed
from arraytp.rules import bp
from arraytp.rules.protocol import Updates
from arraytp.signals import StopRequest
from arraytp.training import tables
from arraytp.training.checkpoint import check_owner, read_checkpoint, share_state, write_checkpoint
from arraytp.training.compare import finite_blocks, finite_moments, is_finite
from arraytp.training.experiment import Experiment
from arraytp.training.long_steps import LongSteps
from arraytp.training.progress import Progress
from arraytp.training.step import Score, Step
from arraytp.training.tables import CsvTable, Totals

# On a device, reading a number back makes the host wait; on the CPU it costs nothing.
DEVICE_STEPS_PER_READ = 50
TABLES = ("metrics", "steps", "angles", "feedback")


@dataclass
class Position:
    """Where a run stands, and what it has to remember of its current epoch.

    `epoch` counts finished epochs, `batch` the batches trained in the current one (after all of them, only the
    evaluation is due), `step` those of all epochs. `passes` counts finished passes over the data, in epochs of
    training and of feedback training alone; it keys the order of the images. `feedback_epochs` and `feedback_batch` are
    the progress of the feedback training alone that precedes the current epoch.

    `seconds` is the wall time of the run so far, `train_seconds` that of the training steps alone, which trained on
    `train_images`. `totals` are sums over the current epoch, `recent` since the last row of steps.csv.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    passes: int = 0
    feedback_epochs: int = 0
    feedback_batch: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    train_images: int = 0
    totals: Totals = field(default_factory=Totals)
    recent: Totals = field(default_factory=Totals)


class Run:
    """A training run that writes a result folder: metrics.csv, steps.csv, angles.csv, feedback.csv, and others.

    The folder must exist, and the experiment must be in its initial state. The display calls the run `label`; `quiet`
    turns it off. On several ranks each has a `Run`, and only the first writes files and shows progress.
    """

    def __init__(self, experiment: Experiment, folder: Path, label: str, quiet: bool = False) -> None:
        self._writes = experiment.ranks.rank == 0
        self.experiment, self.folder, self.label = experiment, folder, label
        self.quiet = quiet or not self._writes
        self.position = Position()
        validated = experiment.validation_loader is not None
        # The split that every epoch is evaluated on and `best` is chosen by.
        self._split = "validation" if validated else "test"
        train = experiment.config.train
        # The images that `train.score_train` scores after every epoch.
        self._trained = experiment.train_loader.in_order(train.eval_batch_size) if train.score_train else None
        knows = experiment.rule.optimum is not None
        columns = (
            tables.METRICS_COLUMNS + tables.VALIDATION_COLUMNS * validated,
            tables.STEPS_COLUMNS,
            tables.ANGLES_COLUMNS + tables.GNT_COLUMNS * experiment.against_gnt,
            tables.FEEDBACK_COLUMNS + tables.OPTIMUM_COLUMNS * knows,
        )
        self._tables = {
            name: CsvTable(folder / f"{name}.csv", each, written=self._writes)
            for name, each in zip(TABLES, columns, strict=True)
        }
        self.metrics, self.steps, self.angles, self.feedback = self._tables.values()
        self._unread: list[Score] = []
        # The last training step, while its arrays are valid.
        self._step: Step | None = None
        # Whether the current batch belongs to an evaluation.
        self.evaluating = False
        self._clock = time.monotonic()
        self._saved = self._clock
        self._long_steps = LongSteps(experiment)

    def start(self) -> None:
        """Start the run from its beginning."""
        # Machines of different kinds may have drawn initial weights that differ in the last digit.
        share_state(self.experiment, None)
        self._restart({name: [] for name in TABLES})

    def resume(self) -> None:
        """Resume from the folder's checkpoint; table rows that were written after it are dropped.

        Raises UserError as `read_checkpoint` and `check_owner` do, and also if the config asks for fewer epochs or
        steps than are trained already. The folder is unchanged then.
        """
        path, train = self.folder / "checkpoint.h5", self.experiment.config.train
        state = agreed(self.experiment.ranks, lambda: self._read(path) if self._writes else {})
        state = share_state(self.experiment, state)
        try:
            # Checkpoints written before steps.csv existed have neither its rows nor its sums.
            totals, recent = (Totals(**state["position"].pop(name, {})) for name in ("totals", "recent"))
            self.position = Position(**state["position"], totals=totals, recent=recent)
            steps = {} if "steps" in state else {"steps": self._steps_without_numbers()}
            rows = {name: (state | steps)[name] for name in TABLES}
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the checkpoint is damaged ({error}); --fresh starts over") from error
        if self.position.epoch + (self.position.batch > 0) > train.epochs:
            raise UserError(
                f"{path}: is in epoch {self.position.epoch + (self.position.batch > 0)} already, but train.epochs is "
                f"{train.epochs}; set more epochs, or start over with --fresh"
            )
        if train.steps is not None and self.position.step > train.steps:
            raise UserError(
                f"{path}: has {self.position.step} steps already, but train.steps is {train.steps}; set more "
                "steps, or start over with --fresh"
            )
        between = self.position.batch == 0 and (self.position.feedback_epochs or self.position.feedback_batch)
        if between and (self.position.epoch >= train.epochs or self.position.step == train.steps):
            ends = "epochs" if self.position.epoch >= train.epochs else "steps"
            raise UserError(
                f"{path}: has trained feedback for epoch {self.position.epoch + 1} already, but train.{ends} is "
                f"{getattr(train, ends)}; set more {ends}, or start over with --fresh"
            )
        self._restart(rows)

    def _steps_without_numbers(self) -> list[str]:
        """Return the rows that steps.csv should have by now, with step and epoch alone."""
        every, per_epoch = self.experiment.config.compare.every, self.experiment.train_loader.steps_per_epoch
        measured = range(every, self.position.step + 1, every) if every else ()
        return [f"{step},{(step - 1) // per_epoch + 1}" for step in measured]

    def _read(self, path: Path) -> dict[str, Any]:
        if path.exists():
            check_owner(self.folder, self.experiment.plan)
        return read_checkpoint(path, self.experiment)

    def _restart(self, rows: Mapping[str, list[str]]) -> None:
        """Write the tables anew; feedback.csv only for rules whose feedback weights pair with forward ones."""
        for name, table in self._tables.items():
            if name != "feedback" or self.experiment.feedback_pairs():
                table.restart(rows[name])

    def train(self, stop: StopRequest) -> None:
        """Train to the last epoch, or to step `train.steps`, and write summary.json.

        Raises Interrupted after `stop` was requested and the checkpoint written, and NonFiniteError if loss or weights
        are not finite; then the last good checkpoint is kept.
        """
        position, per_epoch = self.position, self.experiment.train_loader.steps_per_epoch
        steps, epochs = self.experiment.length
        self._clock = self._saved = time.monotonic()
        with (
            self.experiment.steady(),
            Progress(
                self.label,
                epochs,
                per_epoch,
                steps=steps,
                steps_done=position.epoch * per_epoch + position.batch,
                test_top1=self._last_top1(),
                feedback_epochs=self._feedback_alone()[1],
                split=self._split,
                quiet=self.quiet,
            ) as progress,
        ):
            if not self.metrics.rows:
                self._evaluate(0, stop, progress)
            while position.epoch < epochs:
                self._feedback_epochs(stop, progress)
                self._train_epoch(steps, stop, progress)
                self._evaluate(position.epoch + 1, stop, progress)
                if position.batch < per_epoch:
                    # train.steps ends the run here; with a larger value, it can resume within this epoch.
                    break
                position.epoch, position.batch, position.totals = position.epoch + 1, 0, Totals()
                position.passes, position.feedback_epochs = position.passes + 1, 0
            self._save()
            if self.experiment.validation_loader is not None:
                self._test(stop, progress)
        if self._writes:
            self._write_summary()

    def _feedback_alone(self) -> tuple[int, int]:
        """Return for how many epochs feedback is trained alone before the first epoch, and before each later one."""
        trained = self.experiment.rule.feedback
        return (0, 0) if trained is None else trained.epochs(self.experiment.config.rule)

    def _feedback_epochs(self, stop: StopRequest, progress: Progress) -> None:
        """Train feedback alone for the epochs that are due before the next training epoch."""
        position, experiment = self.position, self.experiment
        first, between = self._feedback_alone()
        due, save = between if position.epoch else first, partial(self._stop, stop, progress)
        while position.feedback_epochs < due:
            with closing(experiment.train_loader.batches(position.passes, position.feedback_batch)) as batches:
                sizes = experiment.train_loader.sizes(position.feedback_batch)
                for size, (images, labels) in zip(sizes, batches, strict=True):
                    self._long_steps.given_up(partial(self._until_feedback, images, labels, size), stop, save)
                    experiment.agree_to_stop(lambda: stop.requested)
                    position.feedback_batch += 1
                    progress.feedback(position.feedback_epochs + 1, due, position.feedback_batch)
                    self._pause(self._stopping(stop), stop, progress)
            position.passes, position.feedback_epochs = position.passes + 1, position.feedback_epochs + 1
            position.feedback_batch = 0

    def _train_epoch(self, steps: int, stop: StopRequest, progress: Progress) -> None:
        """Train to the end of the epoch, or to the last of the run's `steps`."""
        position, experiment = self.position, self.experiment
        every, per_epoch = experiment.config.compare.every, experiment.train_loader.steps_per_epoch
        save = partial(self._stop, stop, progress)
        mark = time.monotonic()
        with closing(experiment.train_loader.batches(position.passes, position.batch)) as batches:
            sized = zip(experiment.train_loader.sizes(position.batch), batches, strict=True)
            # The minimum, because a run may have more steps than islice can count; an epoch always has fewer.
            for size, (images, labels) in islice(sized, min(steps - position.step, per_epoch)):
                until_updates = partial(self._until_updates, images, labels, size, stop)
                step, losses, updates = self._long_steps.given_up(until_updates, stop, save)
                compared = experiment.rule is not bp.RULE or experiment.against_gnt
                if every and position.step % every == 0 and compared:
                    mark += self._compare(step, updates, losses)
                experiment.apply(step, updates, position.epoch)
                position.batch += 1
                position.step += 1
                position.train_images += size
                self._collect(step.score, progress)
                if every and position.step % every == 0:
                    self._read_scores(progress)
                    self.steps.append(position.step, position.epoch + 1, *position.recent.means())
                    position.recent = Totals()
                if (stopping := self._stopping(stop)) or self._save_due():
                    # Waits for a device to finish its steps; this time counts as training.
                    self._read_scores(progress)
                position.train_seconds += time.monotonic() - mark
                self._pause(stopping, stop, progress)
                mark = time.monotonic()
        # A device may have steps left to compute.
        self._read_scores(progress)
        position.train_seconds += time.monotonic() - mark

    def _until_feedback(self, images: Array, labels: Array, size: int) -> tuple[Step, list[Array | None]]:
        """Do the forward pass of a batch and train feedback on it."""
        step = self._step = self.experiment.forward(images, labels, size)
        return step, self._train_feedback(step)

    def _until_updates(
        self, images: Array, labels: Array, size: int, stop: StopRequest
    ) -> tuple[Step, list[Array | None], Updates]:
        """Do the part of a step that precedes the optimiser's."""
        step, losses = self._until_feedback(images, labels, size)
        with self._located():
            return step, losses, self.experiment.updates(step, lambda: stop.requested)

    def _pause(self, stopping: bool, stop: StopRequest, progress: Progress) -> None:
        """Stop between two batches if requested, or write a checkpoint if one is due."""
        if stopping:
            self._stop(stop, progress)
        if self._save_due():
            self._read_scores(progress)
            self._save()

    def _save_due(self) -> bool:
        """Tell whether the last checkpoint is older than `train.checkpoint_minutes`."""
        minutes = self.experiment.config.train.checkpoint_minutes
        return self._writes and time.monotonic() - self._saved > 60 * minutes

    def _stopping(self, stop: StopRequest) -> bool:
        """Tell whether to stop; on several ranks, whether any rank wanted to at the last sum over ranks."""
        return stop.requested if self.experiment.ranks.size == 1 else self.experiment.stop_agreed

    def _train_feedback(self, step: Step) -> list[Array | None]:
        """Train feedback and return its losses; stop at once when it diverges.

        On a device, where the losses would have to be read back, divergence is not checked here.
        """
        with self._located():
            losses = self.experiment.train_feedback(step)
        if losses and self.experiment.plan.backend.on_host:
            for (n, *_), loss in zip(self.experiment.feedback_pairs(), losses, strict=True):
                if loss is not None and not math.isfinite(loss):
                    finite = all(is_finite(each.logits) for each in step.batch.every)
                    culprit = self._feedback_of(n) if finite else None
                    self._fail(f"at step {self.position.step}", culprit)
        return losses

    def _collect(self, score: Score, progress: Progress) -> None:
        """Store a step's score; read it at once on the CPU, every `DEVICE_STEPS_PER_READ` steps on a device."""
        self._unread.append(score)
        # Count steps, not unread scores: for a checkpoint, the first rank alone reads scores in between.
        if self.experiment.plan.backend.on_host or self.position.step % DEVICE_STEPS_PER_READ == 0:
            self._read_scores(progress)

    def _read_scores(self, progress: Progress) -> None:
        scores, self._unread = self._unread, []
        if not scores:
            return
        xp = array_module(scores[0].totals)
        host = self.experiment.plan.backend.to_host(xp.stack([score.totals for score in scores]))
        fresh = Totals()
        for score, (loss, top1, top5) in zip(scores, host.tolist(), strict=True):
            for totals in (fresh, self.position.totals, self.position.recent):
                totals.add(loss, top1, top5, score.images)
        if not math.isfinite(fresh.loss):
            bad = next(i for i, (loss, _, _) in enumerate(host.tolist()) if not math.isfinite(loss))
            self._fail(f"at step {self.position.step - len(scores) + bad}")
        for line in self.experiment.graphs.news():
            progress.say(f"{self.label}  {line}")
        loss, top1, _ = fresh.means()
        progress.step(fresh.images, steps=len(scores), loss=loss, top1=top1)

    def _compare(self, step: Step, updates: Updates, losses: list[Array | None]) -> float:
        """Write the angles to BP; return the seconds that it took, which do not count as training."""
        # Work that a device has not finished yet counts as training.
        self.experiment.plan.backend.synchronize()
        started = time.monotonic()
        position = self.position
        for each in self.experiment.compare(step, updates):
            self.angles.append(position.step, position.epoch + 1, *each.numbers)
        for pair in self.experiment.compare_feedback(losses, step):
            self.feedback.append(position.step, position.epoch + 1, *pair.numbers)
        return time.monotonic() - started

    def _evaluate(self, epoch: int, stop: StopRequest, progress: Progress) -> None:
        """Evaluate the network and add the row of an epoch; if stopped in between, the resumed run does both."""
        position, config = self.position, self.experiment.config
        trained = self._scored(self._trained, stop, progress) if self._trained is not None else position.totals
        totals = self._scored(self.experiment.validation_loader, stop, progress)
        self._tick()
        over = max(epoch - 1, 0), max(position.step - 1, 0)
        lr = at_block(learning_rates(config.schedule, config.optimizer.lr, *over), 0)
        row = (epoch, round(position.seconds, 3), lr, *trained.means())
        self.metrics.append(*row, *([math.nan] * 3 if self._split != "test" else ()), *totals.means())
        progress.epoch(dict(zip(tables.METRICS_COLUMNS, (*row, *totals.means()), strict=True)))

    def _test(self, stop: StopRequest, progress: Progress) -> None:
        """Score the test split, once, for the row of the last epoch.

        The checkpoint was written before, so a run that resumes from it has not seen the test split yet.
        """
        means = self._scored(None, stop, progress).means()
        *rows, last = self.metrics.rows
        cells, at = last.split(","), tables.METRICS_COLUMNS.index("test_loss")
        cells[at : at + len(means)] = map(repr, means)
        self.metrics.restart([*rows, ",".join(cells)])
        progress.say(f"{self.label}  test loss {means[0]:.3f}  top-1 {means[1]:.1f} %")

    def _scored(self, loader: Loader | None, stop: StopRequest, progress: Progress) -> Totals:
        """Score the images of a loader, or the test split."""
        totals, self._step, self.evaluating = Totals(), None, True
        to_host = self.experiment.plan.backend.to_host
        for score in self.experiment.evaluate(loader, lambda: stop.requested):
            loss, top1, top5 = to_host(score.totals).tolist()
            totals.add(loss, top1, top5, score.images)
            if self._stopping(stop):
                self._stop(stop, progress)
        self.evaluating = False
        if not math.isfinite(totals.loss):
            self._fail(f"in the evaluation after {self.position.step} steps")
        return totals

    def _stop(self, stop: StopRequest, progress: Progress) -> None:
        self._read_scores(progress)
        self._save()
        position = self.position
        # The test split is scored after the last epoch, when `position.epoch` counts all epochs.
        where = f"epoch {min(position.epoch + 1, self.experiment.length[1])}, step {position.step}"
        number = max(self.experiment.ranks.gather(stop.signal))
        raise Interrupted(f"{self.label}: stopped in {where}; {self.folder / 'checkpoint.h5'} is written", number)

    def _save(self) -> None:
        """Write the checkpoint, or fail and keep the last good one if weights or moments are not finite."""
        experiment = self.experiment
        if not self._writes:
            return
        if not all(finite_blocks(experiment.network)) or not all(finite_moments(experiment.optimizer_state)):
            self._fail(f"after {self.position.step} steps")
        for n, omega, _ in self.experiment.feedback_pairs():
            if not is_finite(omega):
                self._fail(f"after {self.position.step} steps", self._feedback_of(n))
        self._tick()
        # Leave out the row of an epoch that train.steps cut short: a resumed run writes it again.
        rows = {name: table.rows for name, table in self._tables.items()}
        rows["metrics"] = self.metrics.rows[: self.position.epoch + 1]
        state = {"position": asdict(self.position), **rows}
        write_checkpoint(self.folder / "checkpoint.h5", self.experiment, state)
        self._saved = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        self.position.seconds += now - self._clock
        self._clock = now

    def _feedback_of(self, n: int) -> str:
        return f"feedback weights of block {n} ({self.experiment.network.blocks[n].label})"

    @contextmanager
    def _located(self) -> Iterator[None]:
        """Add run, step and checkpoint to an error of the rule, which names block and numbers alone."""
        try:
            yield
        except NonFiniteError as error:
            raise type(error)(f"{self.label}: at step {self.position.step}: {error}; {self._saved_where()}") from None

    def _fail(self, when: str, culprit: str | None = None) -> None:
        """Raise a NonFiniteError that says when and in which block numbers became non-finite."""
        keys = ["rule.feedback.optimizer.lr", "rule.feedback.sigma"] if culprit else ["optimizer.lr"]
        if culprit is None and self.experiment.rule.feedback is not None:
            keys.append("rule.feedback.optimizer.lr")
        remedy = f"a smaller {' or '.join(keys)} may help"
        if not self.position.step and culprit is None:
            remedy = "see data.normalize and network.init"
        where = self._saved_where()
        raise NonFiniteError(f"{self.label}: not finite {when}: {culprit or self._culprit()}; {where}; {remedy}")

    def _saved_where(self) -> str:
        checkpoint = self.folder / "checkpoint.h5"
        return f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"

    def _culprit(self) -> str:
        """Name the first non-finite quantity in the order of the forward pass.

        Outputs come before weights, because the update from one bad output spoils the weights of all blocks.
        """
        network = self.experiment.network
        names = [f"block {n} ({block.label})" for n, block in enumerate(network.blocks)]
        if self._step is not None:
            passes = [each.forward for each in self._step.batch.every]
            for n, place in enumerate(["input of " + names[0], *("output of " + name for name in names)]):
                if not all(is_finite([each.s[0], *each.outputs][n]) for each in passes):
                    return place
        bad = [name for name, finite in zip(names, finite_blocks(network), strict=True) if not finite]
        if bad:
            return f"weights of {bad[0]}"
        moments = finite_moments(self.experiment.optimizer_state)
        if not all(moments):
            # A weight and a bias per block.
            return f"optimiser's moments of {names[moments.index(False) // 2]}"
        return f"loss, from the output of {names[-1]}"

    def _last_top1(self) -> float:
        if not self.metrics.rows:
            return math.nan
        return float(self.metrics.rows[-1].split(",")[self.metrics.columns.index(f"{self._split}_top1")])

    def _write_summary(self) -> None:
        for table in self._tables.values():
            if table.path.exists():
                table.keep()
        rows = [self._numbers(row) for row in self.metrics.rows]
        best = max(rows, key=lambda row: row[f"{self._split}_top1"])
        position, plan, config = self.position, self.experiment.plan, self.experiment.config
        seconds = position.train_seconds or math.nan
        summary: dict[str, Any] = {
            "name": config.name,
            "rule": config.rule.name,
            "seed": config.seed,
            "ranks": self.experiment.ranks.size,
            "epochs": int(rows[-1]["epoch"]),
            "steps": position.step,
            "final": rows[-1],
            "best": best,
            "images_per_second": position.train_images / seconds,
            "steps_per_second": position.step / seconds,
            "peak_memory_mb": plan.backend.peak_memory() / 2**20,
            "blocks": [block.label for block in plan.blocks],
            "parameters": sum(array.size for array in self.experiment.network.parameters()),
            "versions": {"arraytp": __version__, "python": platform.python_version(), **plan.backend.versions()},
            "device": plan.backend.device(),
            "primitives": "plain" if isinstance(self.experiment.engine, Plain) else "fast",
        }
        write_json(self.folder / "summary.json", summary)

    def _numbers(self, row: str) -> dict[str, float]:
        """Return epoch and metrics of a row of metrics.csv."""
        named = dict(zip(self.metrics.columns, map(float, row.split(",")), strict=True))
        return {"epoch": int(named["epoch"]), **{name: named[name] for name in self.metrics.columns[3:]}}
