"""Abandon a long step when the run is asked to stop."""

import math
import time
from collections.abc import Callable

from arraytp.errors import Interrupted
from arraytp.signals import Done, StopRequest
from arraytp.training.experiment import Experiment

# Seconds. Clusters leave a job some tens of seconds to write its checkpoint.
LONG = 1.0


class LongSteps:
    """Abandons a step in the middle if the step before was long, or if it is the first, whose length is not known."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._seconds = math.inf

    def given_up(self, work: Callable[[], Done], stop: StopRequest, save: Callable[[], None]) -> Done:
        """Run `work`, which precedes the optimiser's step; abandon a long step as soon as `stop` is requested.

        The experiment is then restored, and `save`, which raises, is called. Before the optimiser's step, only feedback
        weights, their moments and their count change.
        """
        started, experiment = time.monotonic(), self._experiment
        # A rank cannot abandon a step alone: the others would wait for its sums.
        if self._seconds < LONG or experiment.ranks.size > 1:
            done = work()
        else:
            state, count = experiment.rule_state.copy(), experiment.feedback_step
            try:
                done = stop.at_once(work)
            except Interrupted:
                # Use the copies themselves: threads of the step may still write to the old arrays.
                experiment.rule_state, experiment.feedback_step = state, count
                save()
                raise
        self._seconds = time.monotonic() - started
        return done
