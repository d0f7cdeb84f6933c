"""Adam as Keras' optimiser is documented to compute it; no TensorFlow is needed to check a formula."""

import numpy as np
from samples import rng

from arraytp.fast.parallel import Workspace
from arraytp.optim import apply_updates, init_optimizer
from arraytp.options import Adam


def test_adam_follows_the_documented_update():
    """Alpha_t = α √(1 − β2^t)/(1 − β1^t); θ ← θ − alpha_t m/(√v + ε̂), with the GP paper's numbers."""
    alpha, beta1, beta2, epsilon = 4.3e-5, 0.9, 0.99, 1e-4
    theta = rng(1).standard_normal(20)
    wanted, m, v = theta.copy(), np.zeros(20), np.zeros(20)
    optimizer = Adam(lr=alpha, beta1=beta1, beta2=beta2, epsilon=epsilon, epsilon_form="keras")
    state = init_optimizer(optimizer, [theta])
    for t in range(1, 30):
        g = 1e-3 * rng(2, t).standard_normal(20)
        apply_updates(optimizer, alpha, state, [theta], [g], Workspace(threads=1))
        alpha_t = alpha * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        m += (g - m) * (1 - beta1)
        v += (np.square(g) - v) * (1 - beta2)
        wanted -= alpha_t * m / (np.sqrt(v) + epsilon)
    np.testing.assert_allclose(theta, wanted, rtol=1e-12)
