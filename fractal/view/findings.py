"""The sections of the report: panels, the rule by which one concludes, and the conclusions as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from fractal.score.intervals import wilson_interval
from fractal.view import draw
from fractal.view.draw import BAD, GOOD, NONE, WIDTH, Box, Panel, Series, share, short
from fractal.view.scored import Scored

TOLERANCE = 0.01  # accuracy that a shorter prefix may lose
WEAK = 0.8  # a type, a study or a level below this accuracy is not to be trusted
HOLDS = 0.02  # calibration error that does no harm, if it is no more than twice that by chance
BLIND = 0.05  # accuracy that a prefix may lack at a level before it counts as blind there
NOTHING = 0.1  # a silhouette below this shows nothing
MAX_CLASSES = 30  # of a confusion matrix
BINS = 10  # of a calibration curve
FEW = 20  # cells: fewer are no reason to warn of a type
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
    cautions: list[tuple[str, str]] = field(default_factory=list)  # where not to trust it: the rule, and what breaks it


def first(parts: Sequence[str], most: int = 6) -> str:
    """The first of many."""
    rest = len(parts) - most
    return "; ".join([*parts[:most], f"{rest} more"] if rest > 0 else parts)


def cautions(*lines: tuple[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Those rules that anything breaks."""
    return [(rule, first(parts)) for rule, parts in lines if parts]


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return share(value) + (f" [{share(interval[0])}, {share(interval[1])}]" if interval else "")


def accuracies(row: dict[str, Any], protocol: str, levels: Sequence[str], group: str = "") -> Row:
    """With intervals; group: "seen" or "unseen" types, else all cells."""
    values, intervals = row[protocol] if not group else row[group][protocol], row[f"{protocol}_interval"]
    intervals = row[f"{group}_interval"][protocol] if group else intervals
    return [with_interval(values[level], intervals[level]) for level in levels]


def vectors(s: Scored) -> list[tuple[str, dict[str, Any]]]:
    """A title and a row of figures each: the prefixes, and the raw vectors."""
    return [*zip(s.names, s.prefixes, strict=True), ("raw", s.raw)]


def level_names(s: Scored) -> Row:
    return [short(name, 30) for name in s.levels]


def cells_counted(s: Scored) -> str:
    n = int(s.truth.seen.sum()) if s.mixed else len(s.truth.seen)
    return f"{n:,} cells of types that were trained on" if s.mixed else f"{n:,} cells"


# What annotating would answer


def answers(s: Scored) -> Section | None:
    """How many cells are answered at each level, right and wrong."""
    if not s.answers:
        return None
    panels, rows, weak, withheld, off, wrong = [], [], list[str](), list[str](), list[str](), list[str]()
    for group, scores in s.answers.items():
        boxes = []
        for k, (level, name) in enumerate(zip(s.levels, level_names(s), strict=True)):
            score = scores["levels"][level]
            answered, accuracy, verdict = score["coverage"], score["accuracy"], calibrated(score)
            right = answered * (accuracy or 0)
            starts = 0.0, right, answered
            for colour, start, part in zip((GOOD, BAD, NONE), starts, np.diff([*starts, 1.0]).tolist(), strict=True):
                boxes.append(Box(start, k, f"{100 * part:.0f} %" if part >= 0.1 else "", colour, 1.0, part))
            rows.append([whose(group), name, *map(share, (answered, accuracy, score["accuracy_forced"])), verdict])
            if group == "unseen":
                wrong += [f"{name}, {share(answered - right)} of the cells"] if answered - right > TOLERANCE else []
                continue
            weak += [f"{name} {share(accuracy)}"] if (accuracy or 1) < WEAK else []
            withheld += [f"{name}, {share(1 - answered)} of the cells"] if answered < 0.5 else []
            off += [f"{name}, {verdict}"] if verdict != "holds" else []
        title = f"{whose(group).capitalize()}: {scores['cells']:,}"
        panels.append(draw.boxes(title, boxes, [short(name, 14) for name in s.levels], []))
    flagged = [f"{share(scores['flagged'])} of {whose(group)}" for group, scores in s.answers.items()]
    return Section(
        "answers",
        "What annotating answers",
        "Each cell is labelled as deep as its probability is .8 or more; finer labels are held back. Answered: the "
        "share of cells with a label at that level. Right: of these labels. A probability holds if its mean error is "
        f"at most .02, or twice what chance makes. Flagged as novel: {first(flagged)}.",
        [*panels, draw.legend([("answered, right", GOOD), ("answered, wrong", BAD), ("held back", NONE)])],
        ["Cells", "Level", "Answered", "Right", "Right if all were answered", "Probability"],
        rows,
        cautions=cautions(
            (f"Answers that are right for less than {share(WEAK, 1)}", weak),
            ("Most labels are held back", withheld),
            ("The probability does not hold", off),
            ("Types that the reference lacks get a wrong label all the same", wrong),
        ),
    )


def whose(group: str) -> str:
    return {"seen": "cells of types that were trained on", "unseen": "cells of types that were not"}.get(group, group)


def overconfidence(score: dict[str, Any]) -> float:
    """Mean probability less accuracy."""
    bins = score["reliability"]
    return sum((bin["probability"] - bin["accuracy"]) * bin["cells"] for bin in bins) / sum(
        bin["cells"] for bin in bins
    )


def calibrated(score: dict[str, Any]) -> str:
    """holds, too high by ..., too low by ..., or off by ..."""
    error, gap = score["calibration_error"], overconfidence(score)
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


def calibration(s: Scored) -> Section | None:
    """Reliability curves, a panel per level."""
    if not s.answers or not s.compared():
        return None
    rows, panels = [], []
    for k in s.compared():
        scores = [group["levels"][s.levels[k]] for group in s.answers.values()]
        panels.append(draw.calibration(short(s.levels[k], 18), [tenths(score["reliability"]) for score in scores]))
        for group, score in zip(s.answers, scores, strict=True):
            numbers = [score["calibration_error"], score["calibration_noise_floor"], overconfidence(score)]
            rows.append([whose(group), short(s.levels[k], 30), *(share(v) for v in numbers)])
    kinds = [(whose(group), i) for i, group in enumerate(s.answers)]
    return Section(
        "calibration",
        "Can the probabilities be believed",
        "Across: the probability that an answer gets; up: how often such answers are right. On the dotted line both "
        "agree, below it the probability is too high. Upright bars: 95 % intervals over cells (Wilson). Below: how "
        "many cells got such a probability. By chance: the error that perfect probabilities would show.",
        [*panels, draw.legend([*kinds, ("perfect", ":")])],
        ["Cells", "Level", "Mean error", "By chance", "Too high by"],
        rows,
    )


# Types and studies


def outcome(s: Scored, rows: np.ndarray, level: int) -> tuple[float, Row]:
    """-> accuracy if all were answered, and the columns of a table, of the cells in a mask (n,)."""
    n = int(rows.sum())
    if s.answered is None:
        right = int(s.prefixes[-1][f"{s.main}_right"][rows, level].sum())
        return right / n, [f"{n:,}", with_interval(right / n, wilson_interval(right, n))]
    hits, reached = s.answered.right[rows, level], s.answered.reached[rows, level]
    right, answered = int(hits.sum()), int(reached.sum())
    accuracy = share(float(hits[reached].mean())) if answered else "–"
    columns = [with_interval(right / n, wilson_interval(right, n)), share(answered / n), accuracy]
    return right / n, [f"{n:,}", *columns, share(float(s.answered.novel[rows].mean()))]


def outcome_header(s: Scored) -> Row:
    if s.answered is None:
        return ["Cells", f"Right (5-NN, {s.main})"]
    return ["Cells", "Right if all were answered", "Answered", "Right of these", "Flagged as novel"]


def by_type(s: Scored) -> Section | None:
    """Every type at the finest level, and in every study, worst first; and the tree, coloured by accuracy."""
    if not s.compared():
        return None
    level = s.compared()[-1]
    label, use = s.truth.labels[:, level].cpu().numpy(), s.counted(level)
    table = []
    for code in np.unique(label[use]):
        cells = use & (label == code)
        value, columns = outcome(s, cells, level)
        table.append((value, int(cells.sum()), code, short(s.classes[level][code]), columns))
    table.sort(key=lambda row: (row[0], row[1]))
    rows = []
    for _, _, code, name, columns in table:
        rows.append([name, *(["all"] if s.studies else []), *columns])
        rows += [["", *line] for line in by_study(s, use & (label == code), level)]
    weak = [f"{name} ({share(value)} of {n:,} cells)" for value, n, _, name, _ in table if value < WEAK and n >= FEW]
    few = [f"{name} ({n})" for _, n, _, name, _ in table if n < FEW]
    return Section(
        "types",
        f"Every class at {short(s.levels[level], 30)}, worst first",
        f"Of {cells_counted(s)}. Brackets: 95 % intervals over cells (Wilson). The tree: the share of cells of each "
        "class that are right if all are answered; the darker, the more are wrong; grey: no cells.",
        [tree_panel(s)],
        [short(s.levels[level], 30).capitalize(), *(["Study"] if s.studies else []), *outcome_header(s)],
        rows,
        cautions=cautions(
            (f"Classes that are right for less than {share(WEAK, 1)}", weak),
            (f"Classes with fewer than {FEW} cells, too few to judge", few),
        ),
    )


def by_study(s: Scored, cells: np.ndarray, level: int) -> list[Row]:
    """A row per study that has some of the cells (n,) bool, worst first."""
    if s.truth.groups is None:
        return []
    groups = s.truth.groups
    rows = [(outcome(s, cells & (groups == code), level), code) for code in np.unique(groups[cells])]
    return [[short(s.studies[code]), *columns] for (_, columns), code in sorted(rows, key=lambda row: row[0][0])]


def studies(s: Scored) -> Section | None:
    """Every study at the finest level, worst first."""
    if not s.compared() or s.truth.groups is None:
        return None
    level = s.compared()[-1]
    rows = by_study(s, s.counted(level), level)
    return Section(
        "studies",
        f"Every study at {short(s.levels[level], 30)}, worst first",
        f"Of {cells_counted(s)}. Brackets: 95 % intervals over cells (Wilson).",
        [],
        ["Study", *outcome_header(s)],
        rows,
    )


def tree_panel(s: Scored) -> Panel:
    """The hierarchy of the scored cells and the reference: a column per level, the darker the more cells are wrong."""
    labels, paths = s.truth.labels.cpu().numpy(), [tuple(row) for row in s.paths.tolist()]
    right = s.prefixes[-1][f"{s.main}_right"] if s.answered is None else s.answered.right
    size, letters = max(5.0, min(18.0, 900 / len(paths))), 96 // len(s.levels)
    boxes = []
    for level in range(len(s.levels)):
        use = s.counted(level)
        for node in dict.fromkeys(path[: level + 1] for path in paths):
            leaves = [i for i, path in enumerate(paths) if path[: level + 1] == node]
            cells = use & (labels[:, : level + 1] == node).all(1)
            value = float(right[cells, level].mean()) if cells.any() else None
            colour, opacity = (NONE, 0.5) if value is None else (BAD, 0.07 + 0.93 * (1 - value))
            text = f"{short(s.classes[level][node[-1]], letters)}  {share(value, 2)}"
            boxes.append(Box(level, leaves[0], text, colour, opacity, height=len(leaves)))
    names = [short(level, 20) for level in s.levels]
    return draw.boxes("Right if all were answered", boxes, [], names, 720, size)


# Mistakes


def parents(s: Scored, level: int) -> dict[int, frozenset[int]]:
    """Class of a level -> the classes above it, mostly one; of the first level: all have one parent."""
    above: dict[int, set[int]] = {}
    for row in s.paths.tolist():
        above.setdefault(row[level], set()).add(row[level - 1] if level else 0)
    return {code: frozenset(codes) for code, codes in above.items()}


def confusions(s: Scored, level: int) -> Section | None:
    """True classes by answers of the full vector at a level; None where it has no two classes."""
    if level not in s.compared():
        return None
    name, above = short(s.levels[level], 30), short(s.levels[max(level - 1, 0)], 30)
    counts = s.counted(level)
    true = s.truth.labels[:, level].cpu().numpy()[counts]
    predicted = s.prefixes[-1][f"{s.main}_predicted"][counts, level]
    wrong = true != predicted
    parent = parents(s, level)
    inside = np.array([bool(parent[a] & parent[b]) for a, b in zip(true[wrong], predicted[wrong], strict=True)], bool)
    pairs = frequent_mistakes(s, level, true[wrong], predicted[wrong], np.bincount(true))
    panel, hidden = confusion_panel(s, level, true, predicted, parent)
    often = [f"{a} for {b} ({part} of its {size:,} cells)" for a, b, _, part, size in pairs if part_of(part, size)]
    amount = f"{int(wrong.sum()):,} of {cells_counted(s)} are wrong"
    if level and wrong.any():
        amount += f", {share(float(inside.mean()))} of these inside the right {above}"
    return Section(
        f"confusion_{level + 1}",
        f"Mistakes at {name}",
        f"{amount}: 5 neighbours of the full vector ({s.main}). Each row is a true class, in the order of the tree, "
        "and shows how its cells were answered. Grey: right; "
        + (f"blue: wrong inside the same {above}; orange: outside it." if level else "blue: wrong.")
        + (f" The {MAX_CLASSES} classes with most mistakes of {MAX_CLASSES + hidden}." if hidden else ""),
        [panel],
        ["True", "Answered", "Cells", "Of that class"],
        [pair[:4] for pair in pairs],
        cautions=cautions(("Classes often taken for another", often)) if level == s.compared()[-1] else [],
    )


def part_of(part: str, size: int) -> bool:
    """Whether a mistake is worth a warning."""
    return float(part) >= 1 - WEAK and size >= FEW


def frequent_mistakes(
    s: Scored, level: int, true: np.ndarray, predicted: np.ndarray, sizes: np.ndarray, most: int = 15
) -> list[list[Any]]:
    """The most frequent pairs of wrong cells (n,): true name, answered name, cells, share of the class, its cells."""
    pairs, number = np.unique(np.stack([true, predicted], 1), axis=0, return_counts=True)
    order, names = np.argsort(-number, kind="stable")[:most], s.classes[level]
    return [
        [short(names[a]), short(names[b]), f"{cells:,}", share(cells / sizes[a]), int(sizes[a])]
        for (a, b), cells in zip(pairs[order].tolist(), number[order].tolist(), strict=True)
    ]


def confusion_panel(
    s: Scored, level: int, true: np.ndarray, predicted: np.ndarray, parent: dict[int, frozenset[int]]
) -> tuple[Panel, int]:
    """The classes with most mistakes, siblings side by side -> the panel, and how many classes it leaves out."""
    answered = {*true.tolist(), *predicted.tolist()}
    order = sorted({tuple(row[: level + 1]) for row in s.paths.tolist()})
    present = [code for code in dict.fromkeys(row[level] for row in order) if code in answered]
    blame = {code: int(((true != predicted) & ((true == code) | (predicted == code))).sum()) for code in present}
    size = {code: int((true == code).sum()) for code in present}
    kept = set(sorted(present, key=lambda code: (-blame[code], -size[code]))[:MAX_CLASSES])
    shown = [code for code in present if code in kept]
    counts = confusion_matrix(true, predicted, labels=shown)
    size_of_cell, boxes = max(13.0, min(28.0, 300 / len(shown))), []
    for i, j in np.argwhere(counts).tolist():
        part = counts[i, j] / size[shown[i]]
        related = parent[shown[i]] & parent[shown[j]]
        colour = NONE if i == j else GOOD if related else BAD
        opacity = 1.0 if i == j else 0.15 + 0.85 * part**0.5  # a mistake of 1 % is to be seen: the root widens it
        number = f"{100 * part:.0f}" if size_of_cell >= 20 and part >= 0.005 else ""
        boxes.append(Box(j, i, number, colour, opacity))
    names = [f"{short(s.classes[level][code], 28)}  {i}" for i, code in enumerate(shown, 1)]
    borders = [i for i in range(1, len(shown)) if parent[shown[i]] != parent[shown[i - 1]]]
    columns, width = [str(i + 1) for i in range(len(shown))], max(WIDTH, 200 + len(shown) * size_of_cell)
    title = "% of each row"
    return draw.boxes(title, boxes, names, columns, width, size_of_cell, borders), len(present) - len(shown)


# Types that training never saw


def unseen(s: Scored, protocol: str) -> Section | None:
    """Seen and unseen types apart, at every level."""
    if s.truth.seen.all() or protocol not in s.protocols:
        return None
    rows, weak = [], list[str]()
    for k in s.compared():
        level, name = s.levels[k], short(s.levels[k], 30)
        values = [row["unseen"][protocol][level] for row in s.prefixes]
        if None in values:
            rows.append([name, "–", "no such class was trained on", "–", "–"])
            continue
        best = choose(values)
        groups = [accuracies(s.prefixes[best], protocol, [level], group)[0] for group in ("unseen", "seen")]
        rows.append([name, s.names[best], *groups, share(s.raw["unseen"][protocol][level])])
        weak += [f"{name}, right in {share(values[best])}"] if values[best] < WEAK else []
    types = len(np.unique(s.truth.labels[:, -1].cpu().numpy()[~s.truth.seen]))
    cells = f"{int((~s.truth.seen).sum()):,} cells of {types} unseen type{'s' if types > 1 else ''}"
    bank = protocol == "bank"
    more = [["Types", "Vector", *level_names(s)]]
    for group in ("seen", "unseen"):
        more += [[group, title, *accuracies(row, protocol, s.levels, group)] for title, row in vectors(s)]
    return Section(
        f"unseen_{protocol}",
        f"Types that training never saw ({protocol}): {cells}",
        ("bank: are unseen types put into the right branch? A level counts where other types brought the class into "
         "training." if bank else "loo: do unseen types stay together?")
        + " With the shortest prefix that loses at most .01 to the best. 95 % intervals: of unseen types over the "
        f"types, resampled whole (none where one type counts); of seen ones over {s.unit}.",
        [],
        ["Level", "With", "Unseen types", "Seen types", "Unseen, raw vectors"],
        rows,
        more,
        cautions(("Types that the reference lacks are often put into a wrong branch", weak),
                 ("Types that the reference lacks are taken for others", destinations(s)),
                 ("Few unseen types: others may do better or worse", [cells] if types < 6 else []))
        if bank else [],
    )  # fmt: skip


def destinations(s: Scored) -> Row:
    """What most cells of each unseen type are taken for at the finest level."""
    true, predicted = s.truth.labels[:, -1].cpu().numpy(), s.prefixes[-1][f"{s.main}_predicted"][:, -1]
    lines = []
    for code in np.unique(true[~s.truth.seen]):
        answered, cells = np.unique(predicted[(true == code) & ~s.truth.seen], return_counts=True)
        part = share(float(cells.max() / cells.sum()))
        lines.append(f"{short(s.classes[-1][code])} for {short(s.classes[-1][answered[cells.argmax()]])} ({part})")
    return lines


# Prefixes


def choose(values: Sequence[float]) -> int:
    """Accuracies of prefix 1, 2, ..., full -> the first, counted from 0, that loses at most TOLERANCE to the best."""
    return next(j for j, value in enumerate(values) if value >= max(values) - TOLERANCE - 1e-9)


def ticks(s: Scored) -> list[tuple[float, str]]:
    return [(j, f"{name}\n{row['dims']}") for j, (name, row) in enumerate(zip(s.names, s.prefixes, strict=True))]


def points(
    rows: Sequence[dict[str, Any]], protocol: str, level: str
) -> list[tuple[float, float, Sequence[float] | None]]:
    """x, accuracy and interval of each row that has one."""
    every = [(j, row[protocol][level], row[f"{protocol}_interval"][level]) for j, row in enumerate(rows)]
    return [point for point in every if point[1] is not None]


def accuracy(s: Scored) -> Section:
    """Which prefix for which level: lines over the prefixes, a panel per level."""
    panels, rows, worse = [], [], list[str]()
    lines_of = {k: [Series(p, points(s.prefixes, p, s.levels[k]), p == s.main) for p in s.protocols]
                for k in s.compared()}  # fmt: skip
    ends = [low[0] if low else y for series in lines_of.values() for one in series for _, y, low in one.points]
    low = draw.floor([*ends, *(s.raw[s.main][s.levels[k]] for k in lines_of)])
    for k, level in enumerate(s.levels):
        if k not in lines_of:
            rows.append([short(level, 30), "one class only", "–", "–", "–"])
            continue
        values = [row[s.main][level] for row in s.prefixes]
        best, raw, name = choose(values), s.raw[s.main][level], short(level, 18)
        panels.append(draw.lines(name, ticks(s), lines_of[k], low, ("raw", raw), (best, values[best])))
        blind = [s.names[j] for j, value in enumerate(values) if max(values) - value > BLIND]
        right = accuracies(s.prefixes[best], s.main, [level])
        rows.append(
            [short(level, 30), f"{s.names[best]} ({s.prefixes[best]['dims']})", *right, share(raw), first(blind)]
        )
        worse += [f"{name} ({share(raw)} against {share(values[best])})"] if raw - values[best] > TOLERANCE else []
    more = [["Neighbours", "Vector", "Numbers", *level_names(s)]]
    for p in s.protocols:
        more += [[p, title, str(row["dims"]), *accuracies(row, p, s.levels)] for title, row in vectors(s)]
    kinds: list[tuple[str, int | str]] = [(f"{p}: {whose}", i) for i, (p, whose) in enumerate(s.protocols.items())]
    return Section(
        "accuracy",
        "Which prefix for which level",
        f"How often 5 neighbours vote for the right label, of {cells_counted(s)}. Use: the shortest prefix that loses "
        f"at most .01 to the best (the ring), and how many numbers it has. Blind: prefixes that lose more than .05. "
        f"Conclusions are by {s.main}. Upright bars: 95 % intervals over {s.unit}.",
        [*panels, draw.legend([*kinds, ("raw vectors", ":")])] if panels else [],
        ["Level", "Use", f"Right ({s.main})", "Raw vectors", "Blind"],
        rows,
        more,
        cautions(("Raw vectors are better than the best prefix", worse)),
    )


def most_separated(s: Scored) -> dict[int, int]:
    """Level -> the prefix, counted from 0, with the largest silhouette."""
    values = {k: [row["silhouette"][level] for row in s.prefixes] for k, level in enumerate(s.levels)}
    return {k: int(np.argmax(column)) for k, column in values.items() if None not in column}


def silhouettes(s: Scored) -> Section:
    """Prefix x level as a heat map."""
    best, names, titles = most_separated(s), level_names(s), [title for title, _ in vectors(s)]
    values = [[row["silhouette"][level] for level in s.levels] for _, row in vectors(s)]
    boxes = [
        Box(k, i, share(value, 2), GOOD if (value or 0) >= 0 else BAD, abs(value or 0), framed=best.get(k) == i)
        for i, line in enumerate(values)
        for k, value in enumerate(line)
    ]
    mixed = [names[k] for k, j in best.items() if (values[j][k] or 0.0) < NOTHING]
    return Section(
        "silhouette",
        "Which prefix shows which level",
        f"How far the classes of a level lie apart among all {len(s.truth.seen):,} cells (cosine silhouette: 1 apart, "
        "0 touching, below 0 mixed). To draw or to cluster, take the prefix with the largest (framed); below .1 it "
        "shows nothing.",
        [draw.boxes("Silhouette", boxes, titles, [short(name, 9) for name in names])],
        ["Level", "Draw with", "Silhouette"],
        [[names[k], s.names[j], share(values[j][k])] for k, j in best.items()],
        [["Vector", *names], *([title, *map(share, line)] for title, line in zip(titles, values, strict=True))],
        cautions(("No prefix shows islands: do not cluster for it", mixed)),
    )


def controls(s: Scored) -> Section | None:
    """PCA, LDA and cut raw vectors beside the prefixes."""
    if not s.controls or not s.compared():
        return None
    rows, beaten = [], list[str]()
    for k in s.compared():
        level, name = s.levels[k], short(s.levels[k], 30)
        best, rival = (max(of, key=lambda row: row[s.main][level]) for of in (s.prefixes, [*s.controls, s.raw]))
        lead = best[s.main][level] - rival[s.main][level]
        verdict = "within .01" if abs(lead) <= TOLERANCE else "prefix ahead" if lead > 0 else "control ahead"
        ours, theirs = (accuracies(row, s.main, [level])[0] for row in (best, rival))
        rows.append([name, ours, theirs, rival["embedding"], verdict])
        if lead < -TOLERANCE:
            ahead = f"{share(rival[s.main][level])} of {rival['embedding']}"
            beaten.append(f"{name} ({share(best[s.main][level])} against {ahead})")
    every = [*vectors(s), *((row["embedding"], row) for row in s.controls)]
    more = [[title, str(row["dims"]), *accuracies(row, s.main, s.levels)] for title, row in every]
    return Section(
        "controls",
        "Beside simpler methods",
        f"5-NN accuracy ({s.main}, {cells_counted(s)}) of the best prefix, and of the best that one gets without an "
        "adapter: raw vectors, whole or cut, and PCA and LDA, which are fitted on training cells. Ahead: by more than "
        f".01. 95 % intervals over {s.unit}.",
        [],
        ["Level", "Best prefix", "Best control", "Which", "Verdict"],
        rows,
        [["Vector", "Numbers", *level_names(s)], *more],
        cautions(("A simpler method is better", beaten)),
    )


# All together


def summary(s: Scored) -> tuple[Row, list[Row]]:
    """-> header and rows of the first table: how good the answers are, or where there are none the neighbours."""
    section = answers(s) or accuracy(s)
    return section.header, section.rows


def sections(s: Scored) -> list[Section]:
    """All that is known, in the order of the page."""
    every = [
        answers(s),
        by_type(s),
        studies(s),
        calibration(s),
        *(unseen(s, protocol) for protocol in s.protocols),
        *(confusions(s, level) for level in reversed(range(len(s.levels)))),
        accuracy(s),
        silhouettes(s),
        controls(s),
    ]
    return [section for section in every if section]
