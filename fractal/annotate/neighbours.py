"""The nearest reference cells in a fraction of the time that exact search takes, and with its answers.

k-means cuts the reference into CENTRES clusters. Each has a list of the cells nearest to its centre, more than are in
the cluster, and a query looks only into the list of the centre nearest to it: an inverted file whose lists overlap, as
in SPANN (Chen et al. 2021).

Is the list long enough? Let a be the angle between query and centre, r that between centre and the list's last cell. A
cell that the list lacks is at least r away from the centre, so its cosine to the query is at most

    cos a cos r + sin a sin r cos p,

where p is the angle, seen from the centre, between query and cell. p = 0 makes this certain, but in many dimensions p
is close to a right angle: between random directions cos p has a standard deviation of 1 / sqrt(dim). A list is taken as
complete if only a cell whose cos p is above DEVIATIONS of these could be among the k nearest. All other queries look
into a longer list, and at last at every cell.
"""

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn.functional import normalize

from fractal.search.exact import nearest

CENTRES = 256
LENGTHS = (2_048, 8_192)  # cells of a list that are looked at, first and where these are not enough
DEVIATIONS = 6.2  # cos p = .55 in 128 dimensions; .4 let two answers in 1,000 differ from those of exact search
EXACT = 1_024  # queries at a time; their neighbours' vectors are 16 MB


class Neighbours:
    """The nearest of the vectors `bank` (m, dim), float32 of length 1."""

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank
        self.aligned = min(1.0, DEVIATIONS / bank.shape[1] ** 0.5)
        self.lengths = [length for length in LENGTHS if length < len(bank)]  # none: all search is exact
        if not self.lengths:
            return
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # of a bank of few distinct cells
            clusters = KMeans(CENTRES, init="random", n_init=1, max_iter=5, random_state=0).fit(bank.cpu().numpy())
        self.centres = normalize(torch.from_numpy(clusters.cluster_centers_).to(bank), dim=1)
        self.lists = nearest(self.centres, bank, self.lengths[-1], unit=True)  # (CENTRES, longest)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(n, dim), of length 1 -> the cosines (n, k) and rows (n, k) int64 of the k nearest, nearest first."""
        cosine = queries.new_empty(len(queries), k)
        rows = torch.empty_like(cosine, dtype=torch.int64)
        left = torch.arange(len(queries), device=queries.device)
        if self.lengths:
            to_centre, centre = (queries @ self.centres.T).max(1)
        for length in self.lengths if len(left) else ():
            cosine[left], rows[left] = self.listed(queries.index_select(0, left), centre[left], length, k)
            radius = (self.centres * self.bank[self.lists[:, length - 1]]).sum(1)
            cos_a, cos_r = to_centre[left], radius[centre[left]]
            sines = ((1 - cos_a**2) * (1 - cos_r**2)).clamp(min=0).sqrt()
            left = left[cosine[left, -1] < cos_a * cos_r + self.aligned * sines]
        for batch in left.split(EXACT) if len(left) else ():
            rows[batch] = nearest(queries[batch], self.bank, k, unit=True)
            cosine[batch] = torch.einsum("nd,nkd->nk", queries[batch], self.bank[rows[batch]])
        return cosine, rows

    def listed(self, queries: Tensor, centre: Tensor, length: int, k: int) -> tuple[Tensor, Tensor]:
        """The same among the first `length` cells of the list of each query's `centre` (n,) int64."""
        order = centre.argsort(stable=True)
        parts = queries.index_select(0, order).split(centre.bincount(minlength=len(self.centres)).tolist())
        cosine, rows = [queries.new_empty(0, k)], [self.lists.new_empty(0, k)]
        for part, members in zip(parts, self.lists[:, :length], strict=True):
            if len(part):  # one product for all queries of a centre
                values, columns = (part @ self.bank.index_select(0, members).T).topk(k, dim=1)
                cosine.append(values)
                rows.append(members[columns])
        back = order.argsort()
        return torch.cat(cosine)[back], torch.cat(rows)[back]
