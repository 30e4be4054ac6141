"""The sections of the report: panels, the rule by which one concludes, and the conclusions as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, product
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from fractal.score.answers import answer_counts
from fractal.score.intervals import wilson_interval
from fractal.score.table import Row as Figures
from fractal.view import draw
from fractal.view.draw import BAD, GOOD, NONE, WIDTH, Box, Panel, share, short
from fractal.view.scored import UNSEEN, Scored

TOLERANCE = 0.01  # accuracy that a shorter prefix may lose
WEAK = 0.8  # a type or a level below this accuracy is not to be trusted
HOLDS = 0.02  # calibration error that does no harm, if it is no more than twice that by chance
BLIND = 0.05  # accuracy that a prefix may lack at a level before it counts as blind there
NOTHING = 0.1  # a silhouette below this shows nothing
MAX_CLASSES = 30  # of a confusion matrix
BINS = 10  # of a calibration curve
FEW = 20  # cells: fewer are no reason to warn of a type
NUMBERS = ["cells", "right", "answered", "right_answered", "novel"]  # of `answer_counts`
Row = list[str]


@dataclass(frozen=True)
class Section:
    """Panels with a title, what they show and the rule by which the table concludes, and the table."""

    name: str  # of its files
    title: str
    rule: str
    panels: list[Panel]
    header: Row
    rows: list[Row]
    more: list[Row] = field(default_factory=list)  # all numbers, folded away; its first row is the header
    cautions: Mapping[str, Row] = field(default_factory=dict)  # where not to trust it: rule -> what breaks it, if any


def first(parts: Sequence[str], most: int = 6) -> str:
    """The first of many."""
    rest = len(parts) - most
    return "; ".join([*parts[:most], f"{rest} more"] if rest > 0 else parts)


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return share(value) + (f" [{share(interval[0])}, {share(interval[1])}]" if interval else "")


def accuracies(row: Figures, protocol: str, levels: Sequence[str], group: str = "") -> Row:
    """With intervals; group: "seen" or "unseen" types, else all cells."""
    values = row[group][protocol] if group else row[protocol]
    intervals = row[f"{group}_interval"][protocol] if group else row[f"{protocol}_interval"]
    return [with_interval(values[level], intervals[level]) for level in levels]


def brief(names: Sequence[str], letters: int = 30) -> Row:
    """Names of levels or classes as a table or an axis has room for."""
    return [short(name, letters) for name in names]


def compared(s: Scored) -> list[tuple[str, str]]:
    """Levels with two classes: key, and name to show."""
    return [(s.levels[k], short(s.levels[k], 30)) for k in s.compared()]


# What annotating would answer


def answers(s: Scored) -> Section | None:
    """How many cells are answered at each level, right and wrong."""
    if not s.answers:
        return None
    panels, rows = [], []
    weak, withheld, off, wrong = (list[str]() for _ in range(4))
    for cells, scores in s.answers.items():
        boxes: list[Box] = []
        for k, (level, name) in enumerate(zip(s.levels, brief(s.levels), strict=True)):
            score, start = scores["levels"][level], 0.0
            answered, accuracy, verdict = score["coverage"], score["accuracy"], calibrated(score)
            right = answered * (accuracy or 0)
            for colour, part in ((GOOD, right), (BAD, answered - right), (NONE, 1 - answered)):
                boxes.append(Box(start, k, f"{100 * part:.0f} %" if part >= 0.1 else "", colour, 1.0, part))
                start += part
            rows.append([cells, name, *map(share, (answered, accuracy, score["accuracy_forced"])), verdict])
            if cells == UNSEEN:
                wrong += [f"{name}, {share(answered - right)} of the cells"] if answered - right > TOLERANCE else []
                continue
            weak += [f"{name} {share(accuracy)}"] if (accuracy or 1) < WEAK else []
            withheld += [f"{name}, {share(1 - answered)} of the cells"] if answered < 0.5 else []
            off += [f"{name}, {verdict}"] if verdict != "holds" else []
        panels.append(draw.boxes(f"{cells.capitalize()}: {scores['cells']:,}", boxes, brief(s.levels, 14), []))
    flagged = first([f"{share(scores['flagged'])} of {cells}" for cells, scores in s.answers.items()])
    return Section(
        "answers",
        "What annotating answers",
        "Each cell is labelled as deep as its probability is .8 or more; finer labels are held back. Answered: the "
        f"share of cells with a label at that level. Right: of these labels. Flagged as novel: {flagged}.",
        [*panels, draw.legend([("answered, right", GOOD), ("answered, wrong", BAD), ("held back", NONE)])],
        ["Cells", "Level", "Answered", "Right", "Right if all were answered", "Probability"],
        rows,
        cautions={
            f"Answers that are right for less than {share(WEAK, 1)}": weak,
            "Most labels are held back": withheld,
            "The probability does not hold": off,
            "Types that the reference lacks get a wrong label all the same": wrong,
        },
    )


def calibration(s: Scored) -> Section | None:
    """Reliability curves, a panel per level."""
    if not (s.answers and s.compared()):
        return None
    panels, rows = [], []
    for level, name in compared(s):
        scores = [group["levels"][level] for group in s.answers.values()]
        panels.append(draw.calibration(name, [tenths(score["reliability"]) for score in scores]))
        for cells, score in zip(s.answers, scores, strict=True):
            errors = score["calibration_error"], score["calibration_noise_floor"]
            rows.append([cells, name, calibrated(score), *map(share, errors)])
    return Section(
        "calibration",
        "Can the probabilities be believed",
        "Across: the probability that an answer gets; up: how often such answers are right. On the dotted line both "
        "agree, below it the probability is too high. Upright bars: 95 % intervals over cells (Wilson); below: how "
        "many cells got it. It holds if its mean error is at most .02, or twice what perfect ones show by chance.",
        [*panels, draw.legend([*((cells, i) for i, cells in enumerate(s.answers)), ("perfect", ":")])],
        ["Cells", "Level", "Probability", "Mean error", "By chance"],
        rows,
    )


def calibrated(score: dict[str, Any]) -> str:
    """holds, too high by ..., too low by ..., or off by ..."""
    error, bins = score["calibration_error"], score["reliability"]
    cells = [bin["cells"] for bin in bins]
    gap = float(np.average([bin["probability"] - bin["accuracy"] for bin in bins], weights=cells))
    if error <= max(HOLDS, 2 * score["calibration_noise_floor"]):
        return "holds"
    if abs(gap) >= error / 2:
        return f"too {'high' if gap > 0 else 'low'} by {share(abs(gap))}"
    return f"off by {share(error)}, both ways"


def tenths(bins: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bins of fractal.score.metrics.reliability, joined by their probability into tenths, with Wilson intervals."""
    frame, joined = pd.DataFrame(bins), []
    for i, part in frame.groupby((frame["probability"] * BINS).astype(int).clip(upper=BINS - 1)):
        cells = int(part["cells"].sum())
        mean = {key: float(np.average(part[key], weights=part["cells"])) for key in ("probability", "accuracy")}
        interval = wilson_interval(mean["accuracy"] * cells, cells)
        joined.append({**mean, "interval": interval, "cells": cells, "middle": (i + 0.5) / BINS})
    return joined


# Types and studies


def types(s: Scored) -> Section | None:
    """All cells, and every type at the finest level, worst first, each by study; and the tree, coloured by accuracy."""
    if not s.compared():
        return None
    level, name = s.compared()[-1], compared(s)[-1][1]
    counts, answered = (s.counts, True) if s.counts else (neighbour_counts(s), False)
    frame = at_level(counts, level)
    several = frame["study"].nunique() > 1
    classes, rows = worst_first(frame, "class"), by_study("all classes", frame, several)
    weak, few = list[str](), list[str]()
    for label, value, n in classes[["share", "cells"]].itertuples():
        rows += by_study(short(label), frame[frame["class"] == label], several)
        few += [f"{short(label)} ({n})"] if n < FEW else []
        weak += [f"{short(label)} ({share(value)} of {n:,} cells)"] if value < WEAK and n >= FEW else []
    header = [name.capitalize(), "Study", "Cells"]
    header += ["Right if all were answered" if answered else "Right (5-NN)", "Answered", "Right", "Novel"]
    shown = [True, several, True, True, *[answered] * 3]
    return Section(
        "types",
        f"Every class at {name}, worst first",
        f"Of {frame['cells'].sum():,} cells. Right: of the labels given; novel: flagged as a type that "
        "the reference lacks. Brackets: 95 % intervals over cells (Wilson). The tree: the share that is right if all "
        "cells are answered; the darker, the more are wrong; grey: no cells.",
        [tree_panel(s, counts)],
        [*compress(header, shown)],
        [[*compress(row, shown)] for row in rows],
        cautions={
            f"Classes that are right for less than {share(WEAK, 1)}": weak,
            f"Classes with fewer than {FEW} cells, too few to judge": few,
        },
    )


def cells_counted(s: Scored) -> str:
    n = int(s.truth.seen.sum()) if s.mixed else len(s.truth.seen)
    return f"{n:,} cells of types that were trained on" if s.mixed else f"{n:,} cells"


def neighbour_counts(s: Scored) -> list[dict[str, Any]]:
    """Where there are no answers: what 5 neighbours say, as `answer_counts` returns it."""
    cells = np.flatnonzero(s.counted(len(s.levels) - 1))
    labels, right = s.truth.labels.cpu().numpy()[cells], s.prefixes[-1][f"{s.main}_right"][cells]
    paths = [tuple(s.classes[k][code] for k, code in enumerate(row)) for row in labels.tolist()]
    studies = None if s.truth.groups is None else [s.studies[code] for code in s.truth.groups[cells]]
    return answer_counts(paths, studies, right, right | True, np.zeros(len(cells), bool))


def at_level(counts: list[dict[str, Any]], level: int) -> pd.DataFrame:
    """Rows of `answer_counts` -> a table of their NUMBERS at a level, with `class`, `node` (its path) and `study`."""
    frame = pd.DataFrame(counts)
    for key in ("right", "answered", "right_answered"):
        frame[key] = frame[key].str[level]
    return frame.assign(**{"class": frame["path"].str[level], "node": [tuple(p[: level + 1]) for p in frame["path"]]})


def worst_first(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The sums of NUMBERS per class, node or study, and the `share` that is right if all were answered."""
    sums = frame.groupby(by)[NUMBERS].sum()
    return sums.assign(share=sums["right"] / sums["cells"]).sort_values(["share", "cells"])


def by_study(name: str, frame: pd.DataFrame, several: bool) -> list[Row]:
    """A row of all these cells, and, where there are several studies, one per study that has any, worst first."""
    groups = [(name, "all", frame[NUMBERS].sum())]
    if several:
        groups += [("", short(study), sums) for study, sums in worst_first(frame, "study")[NUMBERS].iterrows()]
    rows = []
    for label, study, sums in groups:
        cells, right, answered, both, novel = sums.astype(int)
        forced = with_interval(right / cells, wilson_interval(right, cells))
        accuracy = share(both / answered if answered else None)
        rows.append([label, study, f"{cells:,}", forced, share(answered / cells), accuracy, share(novel / cells)])
    return rows


def tree_panel(s: Scored, counts: list[dict[str, Any]]) -> Panel:
    """The hierarchy of the scored cells and the reference: a column per level, the darker the more cells are wrong."""
    named = (tuple(s.classes[k][code] for k, code in enumerate(row)) for row in s.paths.tolist())
    paths = sorted({*named, *(tuple(row["path"]) for row in counts)})
    size, letters = max(5.0, min(18.0, 900 / len(paths))), 96 // len(s.levels)
    boxes = []
    for level in range(len(s.levels)):
        right = worst_first(at_level(counts, level), "node")["share"].to_dict()
        nodes = [path[: level + 1] for path in paths]
        for node in dict.fromkeys(nodes):
            value = right.get(node)
            colour, opacity = (NONE, 0.5) if value is None else (BAD, 0.07 + 0.93 * (1 - value))
            text = f"{short(node[-1], letters)}  {share(value, 2)}"
            boxes.append(Box(level, nodes.index(node), text, colour, opacity, height=nodes.count(node)))
    return draw.boxes("Right if all were answered", boxes, [], brief(s.levels, 20), 720, size)


def unseen(s: Scored) -> Section | None:
    """Types that training never saw, at every level."""
    if s.truth.seen.all():
        return None
    rows, weak, groups = [], list[str](), ("seen", "unseen")
    for protocol, (level, name) in product(s.protocols, compared(s)):
        values = [row["unseen"][protocol][level] for row in s.prefixes]
        if None in values:
            rows.append([protocol, name, "–", "no such class was trained on", "–", "–"])
            continue
        best = choose(values)
        both = [accuracies(s.prefixes[best], protocol, [level], group)[0] for group in ("unseen", "seen")]
        rows.append([protocol, name, s.names[best], *both, share(s.raw["unseen"][protocol][level])])
        weak += [f"{name}, right in {share(values[best])}"] if protocol == "bank" and values[best] < WEAK else []
    number = len(np.unique(s.truth.labels[:, -1].cpu().numpy()[~s.truth.seen]))
    cells = f"{int((~s.truth.seen).sum()):,} cells of {number} unseen type{'s' if number > 1 else ''}"
    more = [["Types", "Neighbours", "Vector", *brief(s.levels)]]
    for group, protocol, (title, row) in product(groups, s.protocols, s.vectors):
        more.append([group, protocol, title, *accuracies(row, protocol, s.levels, group)])
    return Section(
        "unseen",
        f"Types that training never saw: {cells}",
        "bank: are unseen types put into the right branch? A level counts where other types brought the class into "
        "training. loo: do unseen types stay together? With the shortest prefix that loses at most .01 to the best. "
        f"95 % intervals: of unseen types over the types (none where one type counts); of seen ones over {s.unit}.",
        [],
        ["Neighbours", "Level", "With", "Unseen types", "Seen types", "Unseen, raw vectors"],
        rows,
        more,
        {
            "Types that the reference lacks are often put into a wrong branch": weak,
            "Types that the reference lacks are taken for others": destinations(s) if "bank" in s.protocols else [],
            "Few unseen types: others may do better or worse": [cells] if number < 6 else [],
        },
    )


def destinations(s: Scored) -> Row:
    """What most cells of each unseen type are taken for at the finest level."""
    labels, predicted = s.truth.labels[:, -1].cpu().numpy(), s.prefixes[-1][f"{s.main}_predicted"][:, -1]
    names = np.array(brief(s.classes[-1], draw.MAX_NAME), object)
    answered = pd.Series(names[predicted[~s.truth.seen]]).groupby(names[labels[~s.truth.seen]])
    shares = answered.value_counts(normalize=True).groupby(level=0).head(1)
    return [f"{kind} for {other} ({share(value)})" for (kind, other), value in shares.items()]


# Mistakes


def mistakes(s: Scored, level: int) -> Section:
    """True classes by answers of the full vector at a level."""
    name, above = brief(s.levels)[level], brief(s.levels)[max(level - 1, 0)]
    counts = s.counted(level)
    true = s.truth.labels[counts, level].cpu().numpy()
    predicted = s.prefixes[-1][f"{s.main}_predicted"][counts, level]
    parent: dict[int, set[int]] = {}  # class -> the classes above it, mostly one; of the first level all have one
    for row in s.paths.tolist():
        parent.setdefault(row[level], set()).add(row[level - 1] if level else 0)
    panel, hidden = confusion_panel(s, level, true, predicted, parent)
    wrong = pd.DataFrame({"true": true, "answered": predicted})[true != predicted]
    pairs = wrong.groupby(["true", "answered"]).size().sort_values(ascending=False, kind="stable")
    amount = f"{len(wrong):,} of {cells_counted(s)} are wrong"
    if level and len(wrong):
        inside = sum(n for (a, b), n in pairs.items() if parent[a] & parent[b])
        amount += f", {share(inside / len(wrong))} of these inside the right {above}"
    rows, often, sizes, names = [], [], np.bincount(true), s.classes[level]
    for (a, b), n in pairs.head(15).items():
        rows.append([short(names[a]), short(names[b]), f"{n:,}", share(n / sizes[a])])
        if n / sizes[a] >= 1 - WEAK and sizes[a] >= FEW and level == s.compared()[-1]:
            often.append(f"{rows[-1][0]} for {rows[-1][1]} ({rows[-1][3]} of its {sizes[a]:,} cells)")
    return Section(
        f"mistakes_{level + 1}",
        f"Mistakes at {name}",
        f"{amount}: 5 neighbours of the full vector ({s.main}). Each row is a true class, in the order of the tree, "
        "and shows how its cells were answered. Grey: right; "
        + (f"blue: wrong inside the same {above}; orange: outside it." if level else "blue: wrong.")
        + (f" The {MAX_CLASSES} classes with most mistakes of {MAX_CLASSES + hidden}." if hidden else ""),
        [panel],
        ["True", "Answered", "Cells", "Of that class"],
        rows,
        cautions={"Classes often taken for another": often},
    )


def confusion_panel(
    s: Scored, level: int, true: np.ndarray, predicted: np.ndarray, parent: dict[int, set[int]]
) -> tuple[Panel, int]:
    """The classes with most mistakes, siblings side by side -> the panel, and how many classes it leaves out."""
    order = dict.fromkeys(path[level] for path in sorted({tuple(row[: level + 1]) for row in s.paths.tolist()}))
    present = [code for code in order if code in {*true.tolist(), *predicted.tolist()}]
    blame = {code: int(((true != predicted) & ((true == code) | (predicted == code))).sum()) for code in present}
    kept = sorted(present, key=lambda code: (-blame[code], -(true == code).sum()))[:MAX_CLASSES]
    shown = [code for code in present if code in kept]
    counts = confusion_matrix(true, predicted, labels=shown)
    size, boxes = max(13.0, min(28.0, 300 / len(shown))), []
    for i, j in np.argwhere(counts).tolist():
        part = float(counts[i, j] / (true == shown[i]).sum())
        colour = NONE if i == j else GOOD if parent[shown[i]] & parent[shown[j]] else BAD
        opacity = 1.0 if i == j else 0.15 + 0.85 * part**0.5  # a mistake of 1 % is to be seen: the root widens it
        boxes.append(Box(j, i, f"{100 * part:.0f}" if size >= 20 and part >= 0.005 else "", colour, opacity))
    names = [f"{short(s.classes[level][code], 28)}  {i}" for i, code in enumerate(shown, 1)]
    borders = [i for i in range(1, len(shown)) if parent[shown[i]] != parent[shown[i - 1]]]
    columns, width = [str(i + 1) for i in range(len(shown))], max(WIDTH, 200 + len(shown) * size)
    return draw.boxes("% of each row", boxes, names, columns, width, size, borders), len(present) - len(shown)


# Prefixes


def choose(values: Sequence[float]) -> int:
    """Accuracies of prefix 1, 2, ..., full -> the first, counted from 0, that loses at most TOLERANCE to the best."""
    return next(j for j, value in enumerate(values) if value >= max(values) - TOLERANCE - 1e-9)


def prefixes(s: Scored) -> Section:
    """Which prefix for which level, to classify and to draw, beside what one gets without an adapter."""
    rows, worse, mixed = [], list[str](), list[str]()
    for k, (level, name) in enumerate(zip(s.levels, brief(s.levels), strict=True)):
        row = ["one class only", *["–"] * 4]
        if k in s.compared():
            values = [row[s.main][level] for row in s.prefixes]
            best, rival = choose(values), max([s.raw, *s.controls], key=lambda row: row[s.main][level])
            blind = [s.names[j] for j, value in enumerate(values) if max(values) - value > BLIND]
            right, other = accuracies(s.prefixes[best], s.main, [level])[0], rival[s.main][level]
            control = f"{share(other)}, {rival['embedding']}"
            row = [f"{s.names[best]} ({s.prefixes[best]['dims']})", right, share(s.raw[s.main][level]), control]
            row.append(first(blind))
            worse += [f"{name} ({control} against {share(max(values))})"] if other - max(values) > TOLERANCE else []
        silhouette = [row["silhouette"][level] for row in s.prefixes]
        if None in silhouette:
            rows.append([name, *row, "–", "–"])
            continue
        apart = max(silhouette)
        rows.append([name, *row, s.names[silhouette.index(apart)], share(apart, 2)])
        mixed += [name] if apart < NOTHING else []
    more = [["Neighbours", "Vector", "Numbers", *brief(s.levels)]]
    every = [*s.vectors, *((row["embedding"], row) for row in s.controls)]
    for protocol, (title, row) in product(s.protocols, every):
        more.append([protocol, title, str(row["dims"]), *accuracies(row, protocol, s.levels)])
    return Section(
        "prefixes",
        "Which prefix for which level",
        f"How often 5 neighbours vote for the right label, of {cells_counted(s)}, by {s.main}. Use: the shortest "
        "prefix that loses at most .01 to the best (the ring), and how many numbers it has. Blind: prefixes that lose "
        "more than .05. Best control: raw vectors, whole or cut, PCA and LDA (fitted on training cells). Silhouette: "
        "how far the classes lie apart (cosine: 1 apart, 0 touching, below 0 mixed); to draw or to cluster, take the "
        f"framed prefix; below .1 it shows nothing. Upright bars: 95 % intervals over {s.unit}.",
        [*accuracy_panels(s), silhouette_panel(s)],
        ["Level", "Use", "Right", "Raw vectors", "Best control", "Blind", "Draw with", "Silhouette"],
        rows,
        more,
        {"A simpler method is better": worse, "No prefix shows islands: do not cluster for it": mixed},
    )


def accuracy_panels(s: Scored) -> list[Panel]:
    """Lines over the prefixes, a panel per level."""
    ticks = [(j, f"{name}\n{row['dims']}") for j, (name, row) in enumerate(zip(s.names, s.prefixes, strict=True))]
    drawn = []
    for level, name in compared(s):
        lines = [
            [(j, row[p][level], row[f"{p}_interval"][level]) for j, row in enumerate(s.prefixes)] for p in s.protocols
        ]
        drawn.append((level, name, lines))
    ends = [low[0] if low else y for *_, lines in drawn for line in lines for _, y, low in line]
    low = draw.floor([*ends, *(s.raw[s.main][level] for level, *_ in drawn)])
    panels = []
    for level, name, lines in drawn:
        values = [row[s.main][level] for row in s.prefixes]
        best = choose(values)
        panels.append(draw.lines(name, ticks, lines, low, s.raw[s.main][level], (best, values[best])))
    entries: list[tuple[str, int | str]] = [(f"{p}: {whose}", i) for i, (p, whose) in enumerate(s.protocols.items())]
    return [*panels, draw.legend([*entries, ("raw vectors", ":")])] if panels else []


def silhouette_panel(s: Scored) -> Panel:
    values = [[row["silhouette"][level] for level in s.levels] for _, row in s.vectors]
    best = [max((line[k] or -1.0 for line in values[:-1]), default=None) for k in range(len(s.levels))]
    boxes = [
        Box(k, i, share(v, 2), BAD if (v or 0) < 0 else GOOD, abs(v or 0), framed=v == best[k] and i < len(s.prefixes))
        for i, line in enumerate(values)
        for k, v in enumerate(line)
    ]
    return draw.boxes("Silhouette", boxes, [title for title, _ in s.vectors], brief(s.levels, 9))


# Of annotated cells


def clusters(s: Scored) -> Section | None:
    """What the clusters of annotated cells were called, and the genes to check it by."""
    if not s.clusters:
        return None
    return Section(
        "clusters",
        "Clusters of annotated cells",
        "What annotating called each cluster, and how sure it is; the true labels of these cells are not known here. "
        "Cells that agree: the share whose likeliest label is the cluster's. Markers: genes that a cluster has most "
        "clearly more of than all other cells (Welch's t); doubt a label whose genes they are not.",
        [],
        *s.clusters,
    )


# All together


def sections(s: Scored) -> list[Section]:
    """All that is known, in the order of the page."""
    wrong = [mistakes(s, level) for level in reversed(s.compared())]
    every = [answers(s), types(s), clusters(s), calibration(s), unseen(s), *wrong, prefixes(s)]
    return [section for section in every if section]


def cautions(sections: Sequence[Section]) -> list[tuple[str, str]]:
    """The rules that anything breaks, and what breaks them."""
    every = [item for section in sections for item in section.cautions.items()]
    return [(rule, first(parts)) for rule, parts in every if parts]


def summary(s: Scored) -> tuple[Row, list[Row]]:
    """-> header and rows of the first table: how good the answers are, or, where there are none, the neighbours."""
    section = answers(s) or prefixes(s)
    return section.header, section.rows
