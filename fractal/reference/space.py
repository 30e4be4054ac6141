"""Do new vectors come from the space of the reference? Two embeddings of one width look alike to a program.

Principal components that were computed anew, whose signs flipped, or whose columns were permuted give confident
nonsense. Other donors, studies or a single type of cells are an honest query, though, and far from the reference too.
So distances alone can't tell. What can: in the right space the components of a cell agree with those of its nearest
reference cell better than if the components are shuffled or get random signs, and than if one of them is flipped.
"""

import numpy as np

SAMPLE, BANK = 200, 2_000  # cells of either side that are compared: half a second
SHUFFLES, SIGNS = 8, 24  # random arrangements
MIN_CELLS = 5  # with fewer nothing can be said
MIN_AGREEMENT = 0.15  # 1: as near as reference cells are to each other; 0: as random arrangements are
MIN_GAIN, MIN_Z = 0.01, 6.0  # what another arrangement may gain, as a share of that range, and in standard errors

FAR = (
    "the vectors do not come from the reference's embedding: they are hardly nearer to its cells than with their "
    "numbers in random order or with random signs"
)
NEARER = "the vectors are nearer to the reference's cells with other signs or in another order: an embedding made anew?"


def space_problem(vectors: np.ndarray, reference: np.ndarray, seed: int = 0) -> str | None:
    """vectors (n, dim) and reference (m, dim) float32, usable -> why they can't be of one space; None if they can.

    n < MIN_CELLS: None.
    """
    if len(vectors) < MIN_CELLS or vectors.shape[1] < 2:
        return None
    agreement, gain, z = space_statistics(vectors, reference, seed)
    if agreement < MIN_AGREEMENT:
        return FAR
    if ((gain > MIN_GAIN) & (z > MIN_Z)).any():
        turned = np.flatnonzero((gain[: vectors.shape[1]] > MIN_GAIN) & (z[: vectors.shape[1]] > MIN_Z))
        return NEARER + (f" (above all number {turned[0] + 1} with its sign turned round)" if len(turned) else "")
    return None


def space_statistics(vectors: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, np.ndarray, np.ndarray]:
    """-> the agreement, and per other arrangement what it gains, and that in standard errors.

    The arrangements: first each number (dim) with its sign turned round, then the random ones.
    """
    rng = np.random.default_rng(seed)
    queries, bank, own = draw(vectors, SAMPLE, rng), draw(reference, BANK, rng), draw(reference, SAMPLE, rng)
    among = own @ bank.T
    ideal = np.where(among > 1 - 1e-6, -1.0, among).max(1).mean()  # a cell's own copy left out
    similarity = queries @ bank.T
    near, dim = similarity.max(1), vectors.shape[1]
    turned = [(similarity - 2 * np.outer(queries[:, i], bank[:, i])).max(1) for i in range(dim)]
    shuffled = [(queries[:, rng.permutation(dim)] @ bank.T).max(1) for _ in range(SHUFFLES)]
    signed = [((queries * rng.choice([-1, 1], dim).astype(np.float32)) @ bank.T).max(1) for _ in range(SIGNS)]
    chance = max(np.mean(shuffled), np.mean(signed))
    span = max(float(ideal - chance), 1e-6)
    gains = np.stack([*turned, *shuffled, *signed]) - near
    errors = gains.std(1) / len(near) ** 0.5 + 1e-9
    return float(near.mean() - chance) / span, gains.mean(1) / span, gains.mean(1) / errors


def draw(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of the rows, of length 1."""
    some = vectors[np.sort(rng.permutation(len(vectors))[:count])]
    return some / np.linalg.norm(some, axis=1, keepdims=True)
