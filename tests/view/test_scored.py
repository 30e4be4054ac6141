"""What the figures of a page are of."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from fractal.hierarchy.levels import LEVELS
from fractal.score.table import truth_of
from fractal.view.scored import Scored
from tests.view.conftest import GRAPH


def test_the_seen_mask_decides_what_counts(scored: Scored):
    """`apart` takes the figures of seen types where there are both, and all where there are not."""
    labels = scored.truth.labels
    truth = truth_of(LEVELS, labels, scored.classes, scored.classes, [scored.classes[3][0]], None, GRAPH)
    s = replace(scored, truth=truth)
    row = {**s.prefixes[0], "seen": {"bank": {"x": 1}, "loo": {"x": 2}}, "seen_interval": {"bank": {}, "loo": {}}}
    apart = replace(s, prefixes=[row], controls=[], raw=row).apart()
    assert apart.prefixes[0]["bank"] == {"x": 1}
    assert apart.counted(3).sum() == truth.seen.sum() < len(labels)
    assert scored.apart() is scored
    none_seen = replace(s, truth=SimpleNamespace(**{**vars(truth), "seen": np.zeros(120, bool)}))  # type: ignore[arg-type]
    assert none_seen.apart() is none_seen
