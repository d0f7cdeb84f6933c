"""Ten losses per rule and dtype that must not change unnoticed: seeds, initialisation, rules and optimiser together.

Tolerances: BLAS libraries differ in the order of their sums, 1e-16 (float64) or 6e-8 (float32) per step relative to the
numbers; ten steps of momentum may multiply that by a hundred or so. Measured between the two dtypes: at most 1.5e-7.
"""

import numpy as np
import pytest
from samples import fitting_blocks
from training import trainer

from arraytp.model.network import make_network
from arraytp.options import SGD, Adam, Conv, Dense, Pool

LAYERS = [
    Conv(channels=6, kernel=3, padding=1, activation="elu", pool=Pool(kernel=3, stride=2, padding=1)),
    Conv(channels=8, kernel=3, stride=2, padding="same", activation="leaky-relu"),
    Dense(units=12, activation="tanh"),
    Dense(units=5),
]
TOLERANCE = {"float64": 1e-11, "float32": 5e-6}
LOSSES = {
    "bp": [
        1.57992488849358,
        1.63615946162752,
        1.57015663836708,
        1.55654213757879,
        1.5017798711131,
        1.55018260382528,
        1.42543029256212,
        1.31508467779319,
        1.1785048627437,
        1.07857211090322,
    ],
    "fa": [
        1.57992488849358,
        1.64312684644354,
        1.62236547211797,
        1.64134708610753,
        1.53960725902909,
        1.58591996095292,
        1.63657966855324,
        1.53394976668921,
        1.57395925532976,
        1.48991431026716,
    ],
    "dfa": [
        1.57992488849358,
        1.62757429189815,
        1.59171960664427,
        1.64434682432908,
        1.62934229433749,
        1.71701654013989,
        1.55307785817692,
        1.75555415372774,
        1.65106682518299,
        1.55009103862487,
    ],
    "bp-adam": [
        1.57992488849358,
        1.64357817319417,
        1.56614883402757,
        1.50780024440379,
        1.41900737531097,
        1.45132779365632,
        1.30639989238343,
        1.16788829108493,
        1.09297755579689,
        0.981193761211811,
    ],
}


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
    optimizer = (
        Adam(lr=0.01, epsilon_form="keras") if rule == "bp-adam" else SGD(lr=0.1, momentum=0.9, weight_decay=1e-3)
    )
    found = losses(rule.removesuffix("-adam"), optimizer, dtype, place)
    np.testing.assert_allclose(found, LOSSES[rule], rtol=TOLERANCE[dtype])
