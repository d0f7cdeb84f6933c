"""`arraytp bench`: which steps are timed, and what the table shows."""

import pytest

from arraytp.commands import bench
from arraytp.training.experiment import Experiment


@pytest.fixture(autouse=True)
def _small_product(monkeypatch):
    monkeypatch.setattr(bench, "PEAK_SIZE", 8)


def test_only_whole_batches_are_timed(arraytp, monkeypatch):
    """45 images in batches of 16: a median over steps that include the last 13 would depend on the number of steps."""
    sizes, forward = [], Experiment.forward

    def noted(self, images, labels, size=None):
        sizes.append(len(labels))
        return forward(self, images, labels, size)

    monkeypatch.setattr(Experiment, "forward", noted)
    assert arraytp("bench", "toy.yml", "--steps", 5).status == 0
    assert sizes == [16] * (5 + bench.WARM_UP)


LDRL = ("--set", "rule={name: ldrl, feedback: {iterations: 2, optimizer: {name: sgd, lr: 0.01}}}")


@pytest.mark.parametrize(
    ("more", "blocks"),
    [((), ["dense1", "dense2"]), (("--set", "rule.expected=true"), [])],
    ids=["noise", "closed form"],
)
def test_feedback_has_a_rate_per_block_unless_it_is_trained_in_closed_form(arraytp, more, blocks):
    outcome = arraytp("bench", "toy.yml", "--steps", 1, *LDRL, *more)
    assert outcome.status == 0
    lines = [line.split() for line in outcome.out.splitlines()]
    assert [line[2] for line in lines if line[:2] == ["feedback", "of"]] == blocks
    assert [line[2] for line in lines if line[0] == "feedback" and line[1] != "of"] == ["ms"]
