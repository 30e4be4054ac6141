"""How far a cell is from the types of a reference, and between which of them it lies, whatever its study.

A linear discriminant: distances to the class means in axes in which the cells of one type vary alike in all directions.
How the means of one type differ between studies counts BETWEEN times: the few studies of a reference hardly show how
far the next one may be shifted, and a shift must not look like a new type.
"""

import numpy as np
import torch

BETWEEN = 25.0  # on unseen studies and types of three atlases better than 1 and 5
SHRINKAGE = 0.3  # of the covariance towards a ball
TEMPERATURE = 2.0  # the numbers of a cell are not independent witnesses
PIECE = 2_048  # cells at a time: their distances to 203 types are 3 MB, which stay in the cache


class Discriminant:
    """Of reference cells: vectors (m, dim), their paths (m,) and studies (m,), as codes."""

    def __init__(self, vectors: np.ndarray, path: np.ndarray, study: np.ndarray) -> None:
        x = unit(vectors)
        means, row = means_by(path, x)
        group = path * (study.max() + 1) + study  # the cells of a type in a study
        of_groups, member = means_by(group, x)
        within, between = x - of_groups[member], of_groups[member] - means[row]
        covariance = (within.T @ within + BETWEEN * between.T @ between) / len(x)
        ball = max(np.trace(covariance), 1e-12) / x.shape[1] * np.eye(x.shape[1])
        variance, directions = np.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * ball)
        self.axes = directions / np.sqrt(variance)  # (dim, dim)
        self.means = means @ self.axes  # (types, dim)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(n, dim) -> (n, 2): the distance from the nearest mean, and -log of the largest probability of a type."""
        axes, means = torch.from_numpy(self.axes), torch.from_numpy(self.means)
        lengths = means.square().sum(1)
        parts = []
        for start in range(0, max(len(vectors), 1), PIECE):
            x = torch.from_numpy(unit(vectors[start : start + PIECE])) @ axes
            squares = torch.addmm(lengths, x, means.T, alpha=-2).add_(x.square().sum(1, keepdim=True))
            nearest = squares.amin(1, keepdim=True)
            ambiguity = ((nearest - squares) / (2 * TEMPERATURE)).logsumexp(1, keepdim=True)
            parts.append(torch.cat([nearest.clamp(min=0).sqrt(), ambiguity.clamp(min=0)], 1))
        return torch.cat(parts).numpy()


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, dim) -> float64 of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float64)


def means_by(codes: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes (n,) of rows x (n, dim) -> the mean of each code that occurs, and which of these each row has (n,)."""
    _, row, size = np.unique(codes, return_inverse=True, return_counts=True)
    sums = np.zeros((len(size), x.shape[1]))
    np.add.at(sums, row, x)
    return sums / size[:, None], row
