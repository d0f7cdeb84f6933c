"""Ten losses per rule and dtype that must not change unnoticed: seeds, initialisation, rules and optimiser together.

Tolerances: BLAS libraries differ in the order of their sums, 1e-16 (float64) or 6e-8 (float32) per step relative to the
numbers; ten steps of momentum and the kinks of max-pooling may multiply that by a hundred or so.
"""

import numpy as np
import pytest
from samples import fitting_blocks
from training import trainer

from arraytp.network import make_network
from arraytp.options import SGD, Adam, Conv, Dense, Pool

LAYERS = [
    Conv(channels=6, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=8, kernel=3, stride=2, padding="same", activation="leaky-relu"),
    Dense(units=12, activation="tanh"),
    Dense(units=5),
]
TOLERANCE = {"float64": 1e-11, "float32": 2e-5}
LOSSES = {}


def losses(rule, optimizer, dtype, place):
    """Ten steps on five batches of noise whose classes differ in brightness."""
    generator = np.random.default_rng(11)
    labels = generator.integers(0, 5, (5, 16))
    images = generator.standard_normal((5, 16, 9, 8, 2)) + 0.4 * labels[:, :, None, None, None]
    network = make_network(fitting_blocks(LAYERS, (9, 8, 2)), "kaiming-uniform", 7, dtype, place.backend)
    runner = trainer(network, rule, optimizer, place.backend, threads=2, seed=7)
    return [
        float(runner.step(place.put(images[step % 5].astype(dtype)), place.put(labels[step % 5]))) for step in range(10)
    ]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rule", LOSSES)
def test_ten_losses(place, rule, dtype):
    optimizer = Adam(lr=0.01, epsilon_form="keras") if rule == "bp-adam" else SGD(lr=0.1, momentum=0.9, weight_decay=1e-3)
    found = losses(rule.removesuffix("-adam"), optimizer, dtype, place)
    np.testing.assert_allclose(found, LOSSES[rule], rtol=TOLERANCE[dtype])
