"""The sections of the report: panels, the rule by which one concludes, and the conclusions as a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from fractal.score.answers import answer_counts
from fractal.score.intervals import wilson_interval
from fractal.view import draw
from fractal.view.draw import BAD, GOOD, NONE, WIDTH, Box, Panel, share, short
from fractal.view.scored import Scored

TOLERANCE = 0.01  # accuracy that a shorter prefix may lose
WEAK = 0.8  # a type or a level below this accuracy is not to be trusted
HOLDS = 0.02  # calibration error that does no harm, if it is no more than twice that by chance
BLIND = 0.05  # accuracy that a prefix may lack at a level before it counts as blind there
NOTHING = 0.1  # a silhouette below this shows nothing
MAX_CLASSES = 30  # of a confusion matrix
BINS = 10  # of a calibration curve
FEW = 20  # cells: fewer are no reason to warn of a type
GROUPS = {"seen": "types that were trained on", "unseen": "types that were not"}
Row = list[str]
Counts = dict[str, Any]  # a row of fractal.score.answers.answer_counts


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
    cautions: list[tuple[str, str]] = field(default_factory=list)  # where not to trust it: the rule, and what breaks it


def first(parts: Sequence[str], most: int = 6) -> str:
    """The first of many."""
    rest = len(parts) - most
    return "; ".join([*parts[:most], f"{rest} more"] if rest > 0 else parts)


def broken(rules: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Those rules that anything breaks."""
    return [(rule, first(parts)) for rule, parts in rules.items() if parts]


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return share(value) + (f" [{share(interval[0])}, {share(interval[1])}]" if interval else "")


def accuracies(row: dict[str, Any], protocol: str, levels: Sequence[str], group: str = "") -> Row:
    """With intervals; group: "seen" or "unseen" types, else all cells."""
    values = row[group][protocol] if group else row[protocol]
    intervals = row[f"{group}_interval"][protocol] if group else row[f"{protocol}_interval"]
    return [with_interval(values[level], intervals[level]) for level in levels]


def compared(s: Scored) -> Iterator[tuple[int, str, str]]:
    """Levels with two classes: number, key, and name to show."""
    return ((k, s.levels[k], short(s.levels[k], 30)) for k in s.compared())


# What annotating would answer


def answers(s: Scored) -> Section | None:
    """How many cells are answered at each level, right and wrong."""
    if not s.answers:
        return None
    panels, rows = [], []
    weak, withheld, off, wrong = (list[str]() for _ in range(4))
    for group, scores in s.answers.items():
        cells, boxes = GROUPS.get(group, group), []
        for k, level in enumerate(s.levels):
            name, score, verdict = short(level, 30), scores["levels"][level], calibrated(scores["levels"][level])
            answered, accuracy = score["coverage"], score["accuracy"]
            right = answered * (accuracy or 0)
            starts = 0.0, right, answered
            for colour, start, part in zip((GOOD, BAD, NONE), starts, np.diff([*starts, 1.0]).tolist(), strict=True):
                boxes.append(Box(start, k, f"{100 * part:.0f} %" if part >= 0.1 else "", colour, 1.0, part))
            numbers = answered, accuracy, score["accuracy_forced"]
            rows.append([cells, name, *map(share, numbers), verdict])
            if group == "unseen":
                wrong += [f"{name}, {share(answered - right)} of the cells"] if answered - right > TOLERANCE else []
                continue
            weak += [f"{name} {share(accuracy)}"] if (accuracy or 1) < WEAK else []
            withheld += [f"{name}, {share(1 - answered)} of the cells"] if answered < 0.5 else []
            off += [f"{name}, {verdict}"] if verdict != "holds" else []
        title = f"{cells.capitalize()}: {scores['cells']:,}"
        panels.append(draw.boxes(title, boxes, [short(name, 14) for name in s.levels], []))
    flagged = [f"{share(scores['flagged'])} of {GROUPS.get(group, group)}" for group, scores in s.answers.items()]
    bars = draw.legend([("answered, right", GOOD), ("answered, wrong", BAD), ("held back", NONE)])
    return Section(
        "answers",
        "What annotating answers",
        "Each cell is labelled as deep as its probability is .8 or more; finer labels are held back. Answered: the "
        f"share of cells with a label at that level. Right: of these labels. Flagged as novel: {first(flagged)}.",
        [*panels, bars],
        ["Cells", "Level", "Answered", "Right", "Right if all were answered", "Probability"],
        rows,
        cautions=broken(
            {
                f"Answers that are right for less than {share(WEAK, 1)}": weak,
                "Most labels are held back": withheld,
                "The probability does not hold": off,
                "Types that the reference lacks get a wrong label all the same": wrong,
            }
        ),
    )


def calibration(s: Scored) -> Section | None:
    """Reliability curves, a panel per level."""
    panels, rows = [], []
    for _, level, name in compared(s) if s.answers else ():
        scores = [group["levels"][level] for group in s.answers.values()]
        panels.append(draw.calibration(name, [tenths(score["reliability"]) for score in scores]))
        for group, score in zip(s.answers, scores, strict=True):
            errors = score["calibration_error"], score["calibration_noise_floor"]
            rows.append([GROUPS.get(group, group), name, calibrated(score), *map(share, errors)])
    if not panels:
        return None
    entries = [(GROUPS.get(group, group), i) for i, group in enumerate(s.answers)]
    return Section(
        "calibration",
        "Can the probabilities be believed",
        "Across: the probability that an answer gets; up: how often such answers are right. On the dotted line both "
        "agree, below it the probability is too high. Upright bars: 95 % intervals over cells (Wilson); below: how "
        "many cells got it. It holds if its mean error is at most .02, or twice what perfect ones show by chance.",
        [*panels, draw.legend([*entries, ("perfect", ":")])],
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
    joined = []
    for i in range(BINS):
        inside = [bin for bin in bins if min(int(bin["probability"] * BINS), BINS - 1) == i]
        if n := sum(bin["cells"] for bin in inside):
            mean = {key: sum(bin[key] * bin["cells"] for bin in inside) / n for key in ("probability", "accuracy")}
            interval = wilson_interval(mean["accuracy"] * n, n)
            joined.append({**mean, "interval": interval, "cells": n, "middle": (i + 0.5) / BINS})
    return joined


# Types and studies


def types(s: Scored) -> Section | None:
    """All cells, and every type at the finest level, worst first, each by study; and the tree, coloured by accuracy."""
    if not s.compared():
        return None
    *_, (level, _, name) = compared(s)
    counts, answered = (s.counts, True) if s.counts else (neighbour_counts(s), False)
    by_class: dict[str, list[Counts]] = {}
    for row in counts:
        by_class.setdefault(row["path"][level], []).append(row)
    each = sorted(by_class.items(), key=lambda item: outcome(item[1], level)[:2])
    several = len({row["study"] for row in counts}) > 1
    rows = by_study(counts, level, "all classes", several, answered)
    weak, few = list[str](), list[str]()
    for kind, part in each:
        value, n, _ = outcome(part, level)
        rows += by_study(part, level, short(kind), several, answered)
        few += [f"{short(kind)} ({n})"] if n < FEW else []
        weak += [f"{short(kind)} ({share(value)} of {n:,} cells)"] if value < WEAK and n >= FEW else []
    columns = ["Right if all were answered", "Answered", "Right", "Novel"] if answered else ["Right (5-NN)"]
    return Section(
        "types",
        f"Every class at {name}, worst first",
        f"Of {sum(row['cells'] for row in counts):,} cells. Right: of the labels given; novel: flagged as a type that "
        "the reference lacks. Brackets: 95 % intervals over cells (Wilson). The tree: the share that is right if all "
        "cells are answered; the darker, the more are wrong; grey: no cells.",
        [tree_panel(s, counts)],
        [name.capitalize(), *(["Study"] if several else []), "Cells", *columns],
        rows,
        cautions=broken(
            {
                f"Classes that are right for less than {share(WEAK, 1)}": weak,
                f"Classes with fewer than {FEW} cells, too few to judge": few,
            }
        ),
    )


def cells_counted(s: Scored) -> str:
    n = int(s.truth.seen.sum()) if s.mixed else len(s.truth.seen)
    return f"{n:,} cells of types that were trained on" if s.mixed else f"{n:,} cells"


def neighbour_counts(s: Scored) -> list[Counts]:
    """Where there are no answers: what 5 neighbours say, in the same form."""
    cells = np.flatnonzero(s.counted(len(s.levels) - 1))
    labels, right = s.truth.labels.cpu().numpy()[cells], s.prefixes[-1][f"{s.main}_right"][cells]
    paths = [tuple(s.classes[k][code] for k, code in enumerate(row)) for row in labels.tolist()]
    studies = None if s.truth.groups is None else [s.studies[code] for code in s.truth.groups[cells]]
    return answer_counts(paths, studies, right, right | True, np.zeros(len(cells), bool))


def outcome(counts: list[Counts], level: int) -> tuple[float, int, Row]:
    """-> accuracy if all were answered, number and columns of the table."""
    n, novel = (sum(row[key] for row in counts) for key in ("cells", "novel"))
    right, answered, both = (sum(row[key][level] for row in counts) for key in ("right", "answered", "right_answered"))
    accuracy = share(both / answered) if answered else "–"
    interval = with_interval(right / n, wilson_interval(right, n))
    return right / n, n, [f"{n:,}", interval, share(answered / n), accuracy, share(novel / n)]


def by_study(counts: list[Counts], level: int, name: str, several: bool, answered: bool) -> list[Row]:
    """A row of all these cells, and one per study that has any of them, worst first."""
    columns = slice(None) if answered else slice(2)
    if not several:
        return [[name, *outcome(counts, level)[2][columns]]]
    studies = {study: [row for row in counts if row["study"] == study] for study in {row["study"] for row in counts}}
    each = sorted((*outcome(rows, level), study) for study, rows in studies.items())
    rows = [["", short(study), *row[columns]] for _, _, row, study in each]
    return [[name, "all", *outcome(counts, level)[2][columns]], *rows]


def tree_panel(s: Scored, counts: list[Counts]) -> Panel:
    """The hierarchy of the scored cells and the reference: a column per level, the darker the more cells are wrong."""
    named = (tuple(s.classes[k][code] for k, code in enumerate(row)) for row in s.paths.tolist())
    paths = sorted({*named, *(tuple(row["path"]) for row in counts)})
    size, letters = max(5.0, min(18.0, 900 / len(paths))), 96 // len(s.levels)
    boxes = []
    for level in range(len(s.levels)):
        for node in dict.fromkeys(path[: level + 1] for path in paths):
            leaves = [i for i, path in enumerate(paths) if path[: level + 1] == node]
            below = [row for row in counts if tuple(row["path"][: level + 1]) == node]
            value = outcome(below, level)[0] if below else None
            colour, opacity = (NONE, 0.5) if value is None else (BAD, 0.07 + 0.93 * (1 - value))
            text = f"{short(node[-1], letters)}  {share(value, 2)}"
            boxes.append(Box(level, leaves[0], text, colour, opacity, height=len(leaves)))
    names = [short(level, 20) for level in s.levels]
    return draw.boxes("Right if all were answered", boxes, [], names, 720, size)


def unseen(s: Scored) -> Section | None:
    """Types that training never saw, at every level."""
    if s.truth.seen.all():
        return None
    rows, weak = [], list[str]()
    for protocol, (_, level, name) in product(s.protocols, [*compared(s)]):
        values = [row["unseen"][protocol][level] for row in s.prefixes]
        if None in values:
            rows.append([protocol, name, "–", "no such class was trained on", "–", "–"])
            continue
        best = choose(values)
        both = [accuracies(s.prefixes[best], protocol, [level], group)[0] for group in ("unseen", "seen")]
        rows.append([protocol, name, s.names[best], *both, share(s.raw["unseen"][protocol][level])])
        weak += [f"{name}, right in {share(values[best])}"] if protocol == "bank" and values[best] < WEAK else []
    kinds = len(np.unique(s.truth.labels[:, -1].cpu().numpy()[~s.truth.seen]))
    cells = f"{int((~s.truth.seen).sum()):,} cells of {kinds} unseen type{'s' if kinds > 1 else ''}"
    more = [["Types", "Neighbours", "Vector", *(short(level, 30) for level in s.levels)]]
    for group, protocol, (title, row) in product(GROUPS, s.protocols, s.vectors):
        more.append([group, protocol, title, *accuracies(row, protocol, s.levels, group)])
    return Section(
        "unseen",
        f"Types that training never saw: {cells}",
        "bank: are unseen types put into the right branch? A level counts where other types brought the class into "
        "training. loo: do unseen types stay together? With the shortest prefix that loses at most .01 to the best. "
        f"95 % intervals: of unseen types over the types (none where one type counts); of seen ones "
        f"over {s.unit}.",
        [],
        ["Neighbours", "Level", "With", "Unseen types", "Seen types", "Unseen, raw vectors"],
        rows,
        more,
        broken(
            {
                "Types that the reference lacks are often put into a wrong branch": weak,
                "Types that the reference lacks are taken for others": destinations(s) if "bank" in s.protocols else [],
                "Few unseen types: others may do better or worse": [cells] if kinds < 6 else [],
            }
        ),
    )


def destinations(s: Scored) -> Row:
    """What most cells of each unseen type are taken for at the finest level."""
    true, predicted = s.truth.labels[:, -1].cpu().numpy(), s.prefixes[-1][f"{s.main}_predicted"][:, -1]
    lines = []
    for code in np.unique(true[~s.truth.seen]):
        answered, cells = np.unique(predicted[(true == code) & ~s.truth.seen], return_counts=True)
        part = share(float(cells.max() / cells.sum()))
        lines.append(f"{short(s.classes[-1][code])} for {short(s.classes[-1][answered[cells.argmax()]])} ({part})")
    return lines


# Mistakes


def mistakes(s: Scored, level: int) -> Section:
    """True classes by answers of the full vector at a level."""
    name, above = short(s.levels[level], 30), short(s.levels[max(level - 1, 0)], 30)
    counts = s.counted(level)
    true = s.truth.labels[counts, level].cpu().numpy()
    predicted = s.prefixes[-1][f"{s.main}_predicted"][counts, level]
    parent: dict[int, set[int]] = {}  # class -> the classes above it, mostly one; of the first level all have one
    for row in s.paths.tolist():
        parent.setdefault(row[level], set()).add(row[level - 1] if level else 0)
    panel, hidden = confusion_panel(s, level, true, predicted, parent)
    wrong, sizes, names = true != predicted, np.bincount(true), s.classes[level]
    pairs, number = np.unique(np.stack([true, predicted], 1)[wrong], axis=0, return_counts=True)
    inside = sum(n for (a, b), n in zip(pairs.tolist(), number.tolist(), strict=True) if parent[a] & parent[b])
    amount = f"{int(wrong.sum()):,} of {cells_counted(s)} are wrong"
    if level and wrong.any():
        amount += f", {share(inside / int(wrong.sum()))} of these inside the right {above}"
    rows, often = [], []
    for i in np.argsort(-number, kind="stable")[:15]:
        (a, b), part = pairs[i].tolist(), float(number[i] / sizes[pairs[i, 0]])
        rows.append([short(names[a]), short(names[b]), f"{number[i]:,}", share(part)])
        if part >= 1 - WEAK and sizes[a] >= FEW and level == s.compared()[-1]:
            often.append(f"{rows[-1][0]} for {rows[-1][1]} ({share(part)} of its {sizes[a]:,} cells)")
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
        cautions=broken({"Classes often taken for another": often}),
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
    for k, level in enumerate(s.levels):
        name, row = short(level, 30), ["one class only", *["–"] * 4]
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
        apart = None if None in silhouette else int(np.argmax(silhouette))
        rows.append([name, *row, *(["–"] * 2 if apart is None else [s.names[apart], share(silhouette[apart], 2)])])
        mixed += [name] if apart is not None and silhouette[apart] < NOTHING else []
    more = [["Neighbours", "Vector", "Numbers", *(short(level, 30) for level in s.levels)]]
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
        broken({"A simpler method is better": worse, "No prefix shows islands: do not cluster for it": mixed}),
    )


def accuracy_panels(s: Scored) -> list[Panel]:
    """Lines over the prefixes, a panel per level."""
    ticks = [(j, f"{name}\n{row['dims']}") for j, (name, row) in enumerate(zip(s.names, s.prefixes, strict=True))]
    lines = {
        level: [
            [
                (j, row[p][level], row[f"{p}_interval"][level])
                for j, row in enumerate(s.prefixes)
                if row[p][level] is not None
            ]
            for p in s.protocols
        ]
        for _, level, _ in compared(s)
    }
    ends = [low[0] if low else y for level in lines.values() for line in level for _, y, low in line]
    low = draw.floor([*ends, *(s.raw[s.main][level] for level in lines)])
    panels = []
    for _, level, name in compared(s):
        values = [row[s.main][level] for row in s.prefixes]
        best = choose(values)
        panels.append(draw.lines(name, ticks, lines[level], low, s.raw[s.main][level], (best, values[best])))
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
    return draw.boxes("Silhouette", boxes, [title for title, _ in s.vectors], [short(name, 9) for name in s.levels])


# All together


def sections(s: Scored) -> list[Section]:
    """All that is known, in the order of the page."""
    every = [
        answers(s),
        types(s),
        calibration(s),
        unseen(s),
        *(mistakes(s, level) for level in reversed(s.compared())),
        prefixes(s),
    ]
    return [section for section in every if section]


def summary(s: Scored) -> tuple[Row, list[Row]]:
    """-> header and rows of the first table: how good the answers are, or, where there are none, the neighbours."""
    section = answers(s) or prefixes(s)
    return section.header, section.rows
