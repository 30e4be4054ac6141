"""Distances to class means, against scipy."""

import numpy as np
from scipy.spatial.distance import cdist

from fractal.annotate import discriminant
from fractal.annotate.discriminant import Discriminant, unit


def test_distances_are_those_of_mahalanobis():
    """Of one study: of all types' cells around their means, drawn towards a ball."""
    rng = np.random.default_rng(0)
    path = rng.integers(0, 3, 300)
    x = rng.normal(size=(3, 5))[path] * 3 + rng.normal(size=(300, 5)) * [1, 2, 1, 0.5, 1]
    means = np.array([unit(x)[path == p].mean(0) for p in range(3)])
    within = unit(x) - means[path]
    covariance = within.T @ within / 300
    share = discriminant.SHRINKAGE
    covariance = (1 - share) * covariance + share * np.trace(covariance) / 5 * np.eye(5)
    distance = cdist(unit(x), means, "mahalanobis", VI=np.linalg.inv(covariance))
    found = Discriminant(x, path, np.zeros(300, np.int64))(x)
    assert np.allclose(found[:, 0], distance.min(1))
    likelihood = np.exp(-(distance**2) / (2 * discriminant.TEMPERATURE))
    assert np.allclose(found[:, 1], -np.log(likelihood.max(1) / likelihood.sum(1)), atol=1e-9)


def test_a_shift_between_studies_does_not_look_like_a_new_type():
    """The second study lies elsewhere in one number; a cell as far away in that one is nearer than in another."""
    rng = np.random.default_rng(1)
    path, study = rng.integers(0, 3, 600), rng.integers(0, 2, 600)
    x = 5 + rng.normal(size=(3, 6))[path] + 0.2 * rng.normal(size=(600, 6))
    x[:, 0] += 2 * study
    found = Discriminant(x, path, study)
    centre = x[path == 0].mean(0)
    along, across = centre + [3, 0, 0, 0, 0, 0], centre + [0, 3, 0, 0, 0, 0]
    (near, _), (far, _) = found(np.stack([along, across]))
    assert near < far / 2
