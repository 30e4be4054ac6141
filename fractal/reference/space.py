"""Do new vectors come from the space of the reference? Two embeddings of one width look alike to a program.

Principal components that were computed anew, whose signs flipped, or whose columns were permuted give confident
nonsense. Other donors, studies or a single type of cells are an honest query, though, and far from the reference too.
So distances alone can't tell. What can: in the right space the components of a cell agree with those of its nearest
reference cell better than if the components are shuffled or get random signs, and than if one of them is flipped.
"""

import numpy as np

SAMPLE, BANK = 300, 3_000  # cells of either side that are compared: half a second
DRAWS = 8  # random arrangements of each kind
MIN_CELLS = 5  # with fewer nothing can be said
MIN_AGREEMENT = 0.25  # of 1: as well as reference cells agree with each other; 0: as random arrangements do
MIN_GAIN, MIN_Z = 0.01, 6.0  # what one flipped sign may gain, as a share of that range, and in standard errors


def space_problem(vectors: np.ndarray, reference: np.ndarray, seed: int = 0) -> str | None:
    """vectors (n, dim) and reference (m, dim) float32, usable -> why they can't be of one space; None if they can.

    n < MIN_CELLS: None.
    """
    if len(vectors) < MIN_CELLS or vectors.shape[1] < 2:
        return None
    agreement, gain, z = space_statistics(vectors, reference, seed)
    if agreement < MIN_AGREEMENT:
        return (
            "the vectors do not come from the reference's embedding: they are as near to its cells as with their "
            "numbers in random order or with random signs"
        )
    if flipped := np.flatnonzero((gain > MIN_GAIN) & (z > MIN_Z)).tolist():
        named = ", ".join(str(i + 1) for i in flipped[:10])
        return f"the vectors are nearer to the reference's cells with the sign of number {named} turned round"
    return None


def space_statistics(vectors: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, np.ndarray, np.ndarray]:
    """-> the agreement, and per number (dim,) what its sign turned round gains, and that in standard errors."""
    rng = np.random.default_rng(seed)
    queries, bank, own = draw(vectors, SAMPLE, rng), draw(reference, BANK, rng), draw(reference, SAMPLE, rng)
    near = (similarity := queries @ bank.T).max(1)
    # reference cells among themselves, a cell's own copy left out
    among = own @ bank.T
    ideal = float(np.where(among > 1 - 1e-6, -1.0, among).max(1).mean())
    dim = vectors.shape[1]
    shuffled = [(queries[:, rng.permutation(dim)] @ bank.T).max(1).mean() for _ in range(DRAWS)]
    signed = [((queries * rng.choice([-1, 1], dim).astype(np.float32)) @ bank.T).max(1).mean() for _ in range(DRAWS)]
    chance = float(max(np.mean(shuffled), np.mean(signed)))
    span = max(ideal - chance, 1e-6)
    gains, errors = np.zeros(dim), np.ones(dim)
    for i in range(dim):
        gain = (similarity - 2 * np.outer(queries[:, i], bank[:, i])).max(1) - near
        gains[i], errors[i] = gain.mean(), gain.std() / len(gain) ** 0.5 + 1e-9
    return (float(near.mean()) - chance) / span, gains / span, gains / errors


def draw(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of the rows, of length 1."""
    some = vectors[np.sort(rng.permutation(len(vectors))[:count])]
    return some / np.linalg.norm(some, axis=1, keepdims=True)
