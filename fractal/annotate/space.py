"""Do new vectors come from the space of the reference? Two embeddings of one width look alike to a program.

Principal components that were computed anew, whose signs flipped, or whose columns were permuted give confident
nonsense. Other donors, studies, a single type of cells, or types that the reference lacks are an honest query, though,
and far from the reference too. So distances alone can't tell. Two things together can:

- In the right space the numbers of a cell agree with those of its nearest reference cell better than if they are
  shuffled or get random signs, and than if one of them has its sign turned round.
- In the right space neighbouring cells differ in the same ways on both sides: which numbers rise and fall together
  from cell to cell belongs to the space, whatever the types. In another space there is no relation.

And principal components that were computed of the query alone are centred and uncorrelated. Only strong evidence
refuses a query, anything else is a warning: a wrong refusal stops honest work. The limits were chosen on studies and
organs held out, and single types of them; docs/annotate.md says what comes of them.
"""

from dataclasses import dataclass

import numpy as np

SAMPLE, BANK = 200, 4_000  # cells of either side that are compared: about a second
SHUFFLES, SIGNS = 8, 24  # random arrangements
DIFFERENCES, NEAR = 1_000, 3  # cells whose differences from so many neighbours tell how cells vary
MIN_CELLS, MANY_CELLS = 5, 100  # with fewer nothing can be said; with as many, how cells vary can be relied on
# The agreement below is 1 where cells are as near as reference cells are to each other, and 0 where they are as near as
# in random arrangements.
MIN_AGREEMENT = 0.15
MIN_UNRELATED = 0.45  # of cells that vary in other ways than the reference's
MIN_CENTRED = 0.7  # of cells whose numbers are centred and uncorrelated, as if computed of these very cells
SAME = 0.3  # cosine of the variation in two halves of the reference: with less it says nothing
RELATED = 4.0  # standard errors: the ways in which cells vary are those of the reference
MAX_TURNED = 4  # signs that are tried out, one after the other
MIN_GAIN, MIN_Z = 0.1, 5.0  # of agreement, by turning one of them round; and in standard errors

ANEW = "the numbers are centred and uncorrelated, as if they were computed anew of these cells alone"
FAR = (
    "the vectors do not come from the reference's embedding: they are hardly nearer to its cells than with their "
    "numbers in random order or with random signs"
)
TURNED = "the vectors fit the reference's cells with the sign of {} turned round better than as they are"
WARNING = "it may be another embedding, or types that the reference lacks: "


@dataclass(frozen=True)
class Comparison:
    """What speaks for and against one space."""

    cells: int
    agreement: float  # of the vectors with the nearest reference cells
    centred: bool  # are the numbers centred and uncorrelated?
    related: float | None  # how alike cells vary, in standard errors of chance; None where the reference can't tell
    turned: tuple[int, ...]  # numbers whose signs, turned round, bring the vectors nearer
    gain: float  # of agreement by these, and in standard errors
    z: float
    vary: float  # do cells vary as if these signs were as in the reference? Standard errors; below 0: no

    def is_far(self) -> bool:
        """Is it certain that the numbers mean something else?"""
        unrelated = self.related is None or abs(self.related) < RELATED
        relied_on = self.related is not None and self.cells >= MANY_CELLS
        return unrelated and self.agreement < (MIN_UNRELATED if relied_on else MIN_AGREEMENT)

    def is_turned(self) -> bool:
        """Is it certain that signs are turned round? Types that the reference lacks may look so too."""
        repaired = self.agreement + self.gain
        if self.related is None:
            return self.z >= 10 and repaired >= 0.35
        return (self.z >= 10 and self.vary < 3 and repaired >= 0.5) or (self.vary <= -5.5 and repaired >= 0.25)


def space_problem(vectors: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[str, bool] | None:
    """vectors (n, dim) and reference (m, dim) float32, usable -> what is odd, and whether it is certain; or None.

    n < MIN_CELLS: None.
    """
    if len(vectors) < MIN_CELLS or vectors.shape[1] < 2 or len(reference) < MIN_CELLS:
        return None
    found = compare(vectors, reference, seed)
    turned = TURNED.format(f"number {', '.join(str(i + 1) for i in found.turned)}")
    if found.centred and found.agreement < MIN_CENTRED:
        return ANEW, True
    if found.turned and found.is_turned():
        return turned, True
    if found.is_far():
        return FAR, True
    if found.turned:
        return WARNING + turned, False
    return (WARNING + FAR, False) if found.agreement < MIN_AGREEMENT else None


def compare(vectors: np.ndarray, reference: np.ndarray, seed: int = 0) -> Comparison:
    """vectors (n, dim) and reference (m, dim), n and m at least MIN_CELLS."""
    rng = np.random.default_rng(seed)
    queries, bank, own = draw(vectors, SAMPLE, rng), draw(reference, BANK, rng), draw(reference, SAMPLE, rng)
    among = own @ bank.T
    ideal = np.where(among > 1 - 1e-6, -1.0, among).max(1).mean()  # a cell's own copy left out
    near, dim = (queries @ bank.T).max(1), vectors.shape[1]
    shuffled = [(queries[:, rng.permutation(dim)] @ bank.T).max(1) for _ in range(SHUFFLES)]
    signed = [((queries * rng.choice([-1, 1], dim).astype(np.float32)) @ bank.T).max(1) for _ in range(SIGNS)]
    chance = max(np.mean(shuffled), np.mean(signed))
    span = max(float(ideal - chance), 1e-6)
    turned, nearer = turn_signs(queries, bank, MIN_GAIN * span)
    gains = nearer - near
    ours, theirs = variation(vectors, rng), variation(reference, rng)
    halves = np.array_split(rng.permutation(len(reference)), 2)
    one, other = (variation(reference[half], rng) for half in halves)
    can_tell = (one * other).sum() >= SAME * np.linalg.norm(one) * np.linalg.norm(other)
    return Comparison(
        len(vectors),
        float(near.mean() - chance) / span,
        is_centred(vectors),
        relation(ours, theirs, rng) if can_tell else None,
        turned,
        float(gains.mean()) / span,
        float(gains.mean() / (gains.std() / len(gains) ** 0.5 + 1e-9)),
        min((row_relation(ours, theirs, len(vectors), i) for i in turned), default=0.0),
    )


def is_centred(vectors: np.ndarray) -> bool:
    """Do all numbers have mean 0 and no correlation, as principal components of these very cells do?"""
    n, dim = vectors.shape
    if n < max(MANY_CELLS, dim + 1) or dim < 5:
        return False
    x = vectors.astype(np.float64)
    spread = x.std(0)
    if not spread.all() or (abs(x.mean(0)) > 0.01 * spread).any():
        return False
    return bool(abs(np.corrcoef(x.T) - np.eye(dim)).max() < 0.01)


def draw(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of the rows, of length 1."""
    some = vectors[np.sort(rng.permutation(len(vectors))[:count])]
    return some / np.linalg.norm(some, axis=1, keepdims=True)


def turn_signs(queries: np.ndarray, bank: np.ndarray, min_gain: float) -> tuple[tuple[int, ...], np.ndarray]:
    """The signs that bring queries (n, dim) nearest to the bank, one after the other, and the cosines (n,) then."""
    similarity, turned = queries @ bank.T, list[int]()
    near = similarity.max(1)
    for _ in range(MAX_TURNED):
        others = [i for i in range(queries.shape[1]) if i not in turned]
        tried = np.stack([(similarity - 2 * np.outer(queries[:, i], bank[:, i])).max(1) for i in others])
        gains = (tried - near).mean(1), (tried - near).std(1) / len(near) ** 0.5 + 1e-9
        best = int(gains[0].argmax())
        if gains[0][best] < min_gain or gains[0][best] < MIN_Z * gains[1][best]:
            break
        turned.append(others[best])
        similarity = similarity - 2 * np.outer(queries[:, others[best]], bank[:, others[best]])
        near = tried[best]
    return tuple(turned), near


def variation(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How cells differ from their neighbours: correlations (dim, dim) of the differences, with a diagonal of 0."""
    some = draw(vectors, DIFFERENCES, rng).astype(np.float64)
    similarity = some @ some.T
    np.fill_diagonal(similarity, -2)
    nearest = np.argsort(-similarity, axis=1)[:, : min(NEAR, len(some) - 1)]
    differences = (some[:, None] - some[nearest]).reshape(-1, some.shape[1])
    covariance = differences.T @ differences
    scale = np.sqrt(covariance.diagonal()) + 1e-12
    correlation = covariance / np.outer(scale, scale)
    np.fill_diagonal(correlation, 0)
    return correlation


def relation(ours: np.ndarray, theirs: np.ndarray, rng: np.random.Generator) -> float:
    """Inner product of two variations, in standard deviations of that with random signs."""
    signs = rng.choice([-1.0, 1.0], (64, len(ours)))
    by_chance = np.einsum("si,ij,sj->s", signs, ours * theirs, signs)
    return float((ours * theirs).sum() / (by_chance.std() + 1e-12))


def row_relation(ours: np.ndarray, theirs: np.ndarray, cells: int, i: int) -> float:
    """The same for number i alone, in standard errors of correlations over so many cells."""
    return float((ours[i] * theirs[i]).sum() / (np.linalg.norm(theirs[i]) + 1e-12) * min(cells, DIFFERENCES) ** 0.5)
