"""Abandon a step that takes long when the run has been asked to stop."""

import math
import time
from collections.abc import Callable

from arraytp.errors import Interrupted
from arraytp.signals import Done, StopRequest
from arraytp.training.experiment import Experiment

# Seconds. Clusters leave a job some tens of them to write its checkpoint.
LONG = 1.0


class LongSteps:
    """Abandons a step in the middle if the step before was long; the length of the first step is not known."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._seconds = math.inf

    def given_up(self, work: Callable[[], Done], stop: StopRequest, save: Callable[[], None]) -> Done:
        """Do what comes before the optimiser's step; a long step is left as soon as `stop` is requested.

        The experiment then is as it was before, and `save` is called, which raises. Until the optimiser's step nothing
        but feedback weights, their moments and their count changes.
        """
        started, experiment = time.monotonic(), self._experiment
        # Ranks leave a step together: the others would wait for this one's sums.
        if self._seconds < LONG or experiment.ranks.size > 1:
            done = work()
        else:
            state, count = experiment.rule_state.copy(), experiment.feedback_step
            try:
                done = stop.at_once(work)
            except Interrupted:
                # The copies themselves: threads of the step may still write to the arrays.
                experiment.rule_state, experiment.feedback_step = state, count
                save()
                raise
        self._seconds = time.monotonic() - started
        return done
