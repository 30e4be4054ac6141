"""The figures of a page, and below each a sentence that says what to conclude, made from its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from sklearn.metrics import confusion_matrix

from fractal.score.metrics import wilson_interval
from fractal.view import svg
from fractal.view.scored import Scored
from fractal.view.svg import hundredths, share, short

TOLERANCE = 0.01  # accuracy that a shorter prefix may lose
WEAK = 0.8  # a type or a study below this accuracy is not to be trusted
HOLDS = 0.02  # calibration error that does no harm, if it is no more than twice that by chance
BLIND = 0.05  # accuracy that a prefix may lack at a level before it is said to be blind there
NOTHING = 0.1  # a silhouette below this shows nothing
MAX_CLASSES = 30  # of a confusion matrix
MAX_ROWS = 25  # of the weakest types
BINS = 10  # of a calibration curve
FEW = 20  # cells: fewer are no reason to warn of a type


@dataclass(frozen=True)
class Figure:
    """Panels with a title, what they show, and what to conclude."""

    name: str  # of its files
    title: str
    panels: list[Markup]
    caption: str
    conclusion: str
    legend: Markup | None = None
    header: Sequence[str] = ()  # of the table of its numbers
    rows: list[list[str]] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)  # where the model should not be trusted


def joined(parts: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def some(parts: Sequence[str], most: int = 4) -> str:
    """The first of many."""
    rest = len(parts) - most
    return joined([*parts[:most], f"{rest} more"] if rest > 0 else parts)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def show(value: float | None) -> str:
    return "–" if value is None else share(value)


def interval_text(interval: Sequence[float] | None) -> str:
    return f" [{share(interval[0])}, {share(interval[1])}]" if interval else ""


def accuracies(row: dict[str, Any], protocol: str, levels: Sequence[str]) -> list[str]:
    return [show(row[protocol][level]) + interval_text(row[f"{protocol}_interval"][level]) for level in levels]


def level_names(s: Scored) -> list[str]:
    return [short(name, 30) for name in s.levels]


# Which prefix


def choose(values: Sequence[float]) -> int:
    """Accuracies of prefix 1, 2, ..., full -> the first, counted from 0, that loses at most TOLERANCE to the best."""
    return next(j for j, value in enumerate(values) if value >= max(values) - TOLERANCE - 1e-9)


def choices(s: Scored) -> dict[int, int]:
    """Level, by number -> the prefix to use, counted from 0."""
    return {k: choose([row[s.main][s.levels[k]] for row in s.prefixes]) for k in s.asked()}


def spoken(s: Scored, prefix: int, dims: bool = True) -> str:
    name = "the full vector" if prefix == len(s.prefixes) - 1 else f"prefix {prefix + 1}"
    return f"{name} ({s.prefixes[prefix]['dims']} numbers)" if dims else name


def by_prefix(s: Scored, values: dict[int, tuple[int, str]]) -> str:
    """Level -> (prefix, its value): "prefix 1 (32 numbers) for system (.99), prefix 2 ...", each prefix named once."""
    names = level_names(s)
    parts = []
    for prefix in sorted({prefix for prefix, _ in values.values()}):
        levels = [f"{names[k]} ({value})" for k, (own, value) in values.items() if own == prefix]
        parts.append(f"{spoken(s, prefix)} for {joined(levels)}")
    return joined(parts)


def silent_levels(s: Scored) -> str:
    """Levels of one class, which can't be asked."""
    names = [short(name, 30) for k, name in enumerate(s.levels) if k not in s.asked()]
    return f" {capital(joined(names))}: no two classes to tell apart." if names else ""


def of_whom(s: Scored) -> str:
    n = int(s.truth.seen.sum()) if s.mixed else len(s.truth.seen)
    return f"the {n:,} cells of types that were trained on" if s.mixed else f"the {n:,} cells"


def ticks(s: Scored) -> list[tuple[float, str, str]]:
    return [(j, name, f"{row['dims']}") for j, (name, row) in enumerate(zip(s.names, s.prefixes, strict=True))]


def points(rows: Sequence[dict[str, Any]], protocol: str, level: str) -> list[tuple[float, float, Any]]:
    found = [(j, row[protocol][level], row[f"{protocol}_interval"][level]) for j, row in enumerate(rows)]
    return [(x, value, interval) for x, value, interval in found if value is not None]


def blind_prefixes(s: Scored) -> list[str]:
    """Levels at which a shorter prefix falls far behind the best, a line per prefix."""
    lines = []
    for j, row in enumerate(s.prefixes):
        lost = {k: max(r[s.main][s.levels[k]] for r in s.prefixes) - row[s.main][s.levels[k]] for k in s.asked()}
        blind = [f"{short(s.levels[k], 30)} (loses {share(value)})" for k, value in lost.items() if value > BLIND]
        if blind:
            lines.append(f"Do not ask {spoken(s, j, False)} for {joined(blind)}.")
    return lines


def accuracy(s: Scored) -> Figure:
    """Lines over the prefixes, a panel per level."""
    asked, best = s.asked(), choices(s)
    series = {
        k: [
            svg.Series(p, i, points(s.prefixes, p, s.levels[k]), "above" if i == 0 else "")
            for i, p in enumerate(s.protocols)
        ]
        for k in asked
    }
    lows = [low[0] if low else y for own in series.values() for one in own for _, y, low in one.points]
    raws = {k: s.raw[s.main][s.levels[k]] for k in asked}
    y_range = svg.span([*lows, *raws.values()])
    panels, rows, worse = [], [], []
    for k in asked:
        name, chosen = short(s.levels[k], 18), best[k]
        value = s.prefixes[chosen][s.main][s.levels[k]]
        mark = (chosen, value, f"use {s.names[chosen]}")
        panels.append(svg.lines(name, ticks(s), series[k], y_range, "numbers", ("raw", raws[k]), mark))
        if raws[k] - value > TOLERANCE:
            worse.append(f"{name} ({share(raws[k])})")
    for protocol in s.protocols:
        for title, row in [("raw", s.raw), *zip(s.names, s.prefixes, strict=True)]:
            rows.append([protocol, title, str(row["dims"]), *accuracies(row, protocol, s.levels)])
    told = {k: (j, share(s.prefixes[j][s.main][s.levels[k]])) for k, j in best.items()}
    conclusion = "There is no level with two classes, so accuracy says nothing."
    if told:
        rule = "the shortest that lose at most .01 to the best"
        conclusion = f"Use {by_prefix(s, told)}: {rule}"
        conclusion += f"; but the raw vectors are better for {joined(worse)}." if worse else "."
    lines_of = joined([f"{p}: neighbours are {whose}" for p, whose in s.protocols.items()])
    return Figure(
        "accuracy",
        "Which prefix for which level",
        panels,
        f"Share of {of_whom(s)} whose 5 nearest neighbours vote for the right label ({lines_of}). Upright bars: 95 % "
        f"intervals over {s.unit}. Dotted: the raw vectors. The ring: the prefix to use, by {s.main}."
        + silent_levels(s),
        conclusion,
        svg.legend(
            [(f"{p}: {whose}", i) for i, (p, whose) in enumerate(s.protocols.items())], [("raw vectors", "raw")]
        ),
        ["Neighbours", "Vector", "Numbers", *level_names(s)],
        rows,
        [
            *blind_prefixes(s),
            *([f"The raw vectors are better than the chosen prefix at {joined(worse)}."] if worse else []),
        ],
    )


def most_separated(s: Scored) -> dict[int, int]:
    """Level -> the prefix, counted from 0, with the largest silhouette."""
    found = {}
    for k, level in enumerate(s.levels):
        values = [row["silhouette"][level] for row in s.prefixes]
        if None not in values:
            found[k] = int(np.argmax(values))
    return found


def silhouettes(s: Scored) -> Figure:
    """Prefix x level as a heat map, and beside it the same on a shuffled tree."""
    best, names = most_separated(s), level_names(s)
    shown = [*zip(s.names, s.prefixes, strict=True), ("raw", s.raw)]
    values = [[row["silhouette"][level] for level in s.levels] for _, row in shown]
    boxed = [best.get(k) for k in range(len(s.levels))]
    panels = [svg.heat("Silhouette", [name for name, _ in shown], names, values, boxed)]
    told = {k: (j, hundredths(s.prefixes[j]["silhouette"][s.levels[k]])) for k, j in best.items()}
    conclusion = "There is no level with two classes, so nothing can lie apart."
    if told:
        conclusion = f"To draw or to cluster, take {by_prefix(s, told)}"
    blind = [names[k] for k, (j, _) in told.items() if s.prefixes[j]["silhouette"][s.levels[k]] < NOTHING]
    if blind:
        conclusion += f", though at {joined(blind)} no prefix shows islands (below {share(NOTHING)})"
    if s.shuffled and told:
        mixed = [[row["silhouette"][level] for level in s.levels] for row in s.shuffled[::-1]]
        none: list[int | None] = [None] * len(s.levels)
        panels.append(svg.heat("On a shuffled tree", s.names, names, mixed, none))
        gain = {k: s.prefixes[j]["silhouette"][s.levels[k]] - (mixed[j][k] or 0.0) for k, (j, _) in told.items()}
        last = len(s.levels) - 1  # stays as it is
        if parts := [f"{hundredths(value)} at {names[k]}" for k, value in gain.items() if k != last]:
            conclusion += f"; of this the hierarchy makes {joined(parts)}, and a shuffled tree shows the rest as well"
    rows = [
        [name, *("–" if v is None else f"{v:.3f}" for v in line)] for (name, _), line in zip(shown, values, strict=True)
    ]
    return Figure(
        "silhouette",
        "Which prefix shows which level",
        panels,
        f"How far the classes of a level lie apart among all {len(s.truth.seen):,} cells (cosine silhouette: 1 apart, "
        "0 touching, below 0 mixed). The frame: the prefix that shows a level best."
        + (
            " Shuffled: the finest labels spread over the branches at random; they themselves stay."
            if s.shuffled
            else ""
        ),
        conclusion.rstrip(".") + ".",
        None,
        ["Vector", *names],
        rows,
        [f"No prefix shows islands at {joined(blind)}: do not cluster for it."] if blind else [],
    )


# Mistakes


def parents(s: Scored, level: int) -> dict[int, frozenset[int]]:
    """Class of a level -> the classes above it, mostly one; of the first level: all have one parent."""
    found: dict[int, set[int]] = {}
    for row in s.paths.tolist():
        found.setdefault(row[level], set()).add(row[level - 1] if level else 0)
    return {code: frozenset(above) for code, above in found.items()}


def in_tree_order(s: Scored, level: int) -> list[int]:
    """The classes of a level, siblings side by side."""
    order = sorted({tuple(row[: level + 1]) for row in s.paths.tolist()})
    return list(dict.fromkeys(row[level] for row in order))


def confusions(s: Scored, level: int) -> Figure | None:
    """True classes by answers of the full vector at a level; None where it can't be asked."""
    if level not in s.asked():
        return None
    name, above = short(s.levels[level], 30), short(s.levels[max(level - 1, 0)], 30)
    counts = s.counted(level)
    true = s.truth.labels[:, level].cpu().numpy()[counts]
    said = s.prefixes[-1][f"{s.main}_predicted"][counts, level]
    wrong = true != said
    parent, classes = parents(s, level), s.classes[level]
    inside = np.array([bool(parent[a] & parent[b]) for a, b in zip(true[wrong], said[wrong], strict=True)], bool)

    present = [code for code in in_tree_order(s, level) if code in {*true.tolist(), *said.tolist()}]
    blame = {code: int((wrong & ((true == code) | (said == code))).sum()) for code in present}
    size = {code: int((true == code).sum()) for code in present}
    kept = set(sorted(present, key=lambda code: (-blame[code], -size[code]))[:MAX_CLASSES])
    shown = [code for code in present if code in kept]
    table = confusion_matrix(true, said, labels=shown).astype(float)
    shares = table / np.maximum([[size[code]] for code in shown], 1)
    groups = [tuple(sorted(parent[code])) for code in shown]
    names, sizes = [classes[code] for code in shown], [size[code] for code in shown]
    related = [[bool(parent[a] & parent[b]) for b in shown] for a in shown]
    panels = [svg.confusion("% of each true class", names, shares.tolist(), groups, sizes, related)]

    n, rows, cautions = int(wrong.sum()), [], []
    if not n:
        conclusion = f"No mistake among {len(true):,} cells at {name}."
    else:
        pairs, number = np.unique(np.stack([true[wrong], said[wrong]], 1), axis=0, return_counts=True)
        order = np.argsort(-number, kind="stable")[:15]
        for (a, b), cells in zip(pairs[order].tolist(), number[order].tolist(), strict=True):
            rows.append([short(classes[a]), short(classes[b]), f"{cells:,}", share(cells / size[a])])
        worst, other, cells, part = rows[0]
        conclusion = f"{n:,} of {len(true):,} cells are wrong at {name}"
        if level and len(set(groups)) > 1:
            conclusion += f", and {share(float(inside.mean()))} of these stay inside the right {above}"
        conclusion += f"; the most frequent mistake takes {worst} for {other} ({cells} cells, {part} of that class)."
        for (a, b), cells in zip(pairs[order].tolist(), number[order].tolist(), strict=True):
            if cells >= 0.2 * size[a] and size[a] >= FEW and level == s.asked()[-1]:
                part = share(cells / size[a])
                cautions.append(
                    f"{short(classes[a])} is taken for {short(classes[b])} in {part} of its {size[a]:,} cells."
                )
    hidden = len(present) - len(shown)
    return Figure(
        f"confusion_{level + 1}",
        f"Mistakes at {name}",
        panels,
        f"The full vector ({s.main}), {of_whom(s)}; each row is a true class, in the order of the tree, and says how "
        "its cells were answered. Grey: right; "
        + (f"blue: wrong inside the same {above}; orange: outside it." if level else "blue: wrong.")
        + (f" The {len(shown)} classes with most mistakes of {len(present)}." if hidden else ""),
        conclusion,
        None,
        ["True", "Answered", "Cells", "Of that class"],
        rows,
        cautions[:5],
    )


def weakest(s: Scored, what: str) -> Figure | None:
    """Accuracy of each type, or of each study, at the finest level; `what` is "type" or "study"."""
    if not s.asked() or (what == "study" and s.truth.groups is None):
        return None
    level = s.asked()[-1]
    right = s.prefixes[-1][f"{s.main}_right"][:, level]
    use = s.counted(level)
    own = s.truth.groups if what == "study" else s.truth.labels[:, level].cpu().numpy()
    names = s.studies if what == "study" else s.classes[level]
    assert own is not None
    found = []
    for code in np.unique(own[use]):
        rows = use & (own == code)
        n, hits = int(rows.sum()), int(right[rows].sum())
        found.append((names[code], n, hits / n, wilson_interval(hits, n)))
    if not found:
        return None
    found.sort(key=lambda row: (row[2], row[1]))
    label, finest = ("studies" if what == "study" else "classes"), short(s.levels[level], 30)
    weak = [(name, n, value) for name, n, value, _ in found if value < WEAK]
    sure = [f"{short(name)} ({share(value)} of {n:,} cells)" for name, n, value in weak if n >= FEW]
    if weak:
        listed = some([f"{short(name)} ({share(value)} of {n:,} cells)" for name, n, value in weak])
        conclusion = f"Do not trust {finest} in {listed}: right for less than {share(WEAK)}."
    else:
        name, n, value, _ = found[0]
        conclusion = f"All {len(found)} {label} are right for {share(WEAK)} or more; the lowest is {short(name)} "
        conclusion += f"({share(value)} of {n:,} cells)."
    few = [f"{short(name)} ({n})" for name, n, *_ in found if n < FEW]
    shown = found[:MAX_ROWS]
    x_range = svg.span([interval[0] for *_, interval in shown])
    each = "study" if what == "study" else short(s.levels[level], 18)
    title = f"Right {short(s.levels[level], 16)}, per {each}" if what == "study" else f"Right cells, per {each}"
    return Figure(
        f"weakest_{what}",
        "Weakest studies" if what == "study" else f"Weakest classes at {finest}",
        [svg.dots(title, shown, x_range)],
        f"Share of {of_whom(s)} whose {finest} is right by the full vector ({s.main}). Bars: 95 % intervals over cells "
        "(Wilson). "
        + (f"The {len(shown)} weakest of {len(found)}." if len(found) > len(shown) else f"All {len(found)}."),
        conclusion,
        None,
        [capital(what), "Cells", "Right"],
        [[short(name), f"{n:,}", share(value) + interval_text(interval)] for name, n, value, interval in found],
        [
            *([f"{capital(finest)} is often wrong in {some(sure)}."] if sure else []),
            *([f"Too few cells to judge {some(few, 6)}."] if few else []),
        ],
    )


# Types that training never saw


def strangers(s: Scored, protocol: str) -> Figure | None:
    """Seen and unseen types apart, a panel per level where both count."""
    if s.truth.seen.all() or protocol not in s.protocols:
        return None
    groups = ("seen", 0), ("unseen", 1)
    panels, told, unknown, lows, drawn = [], [], [], [], []
    for k in s.asked():
        level = s.levels[k]
        series = [
            svg.Series(
                name,
                kind,
                [
                    (j, row[name][protocol][level], row[f"{name}_interval"][protocol][level])
                    for j, row in enumerate(s.prefixes)
                    if row[name][protocol][level] is not None
                ],
                "right" if kind == 1 else "",
            )
            for name, kind in groups
        ]
        if not series[1].points:
            unknown.append(short(level, 30))
            continue
        drawn.append((k, series))
        lows += [low[0] if low else y for one in series for _, y, low in one.points]
        values = [y for _, y, _ in series[1].points]
        best = choose(values)
        seen = s.prefixes[best]["seen"][protocol][level]
        against = f" ({share(seen)} of seen types)" if seen is not None else ""
        told.append((short(level, 30), values[best], f"{share(values[best])} with {spoken(s, best, False)}{against}"))
    y_range = svg.span([*lows, *(s.raw["unseen"][protocol][s.levels[k]] for k, _ in drawn)])
    for k, series in drawn:
        raw = s.raw["unseen"][protocol][s.levels[k]]
        panels.append(svg.lines(short(s.levels[k], 18), ticks(s), series, y_range, "numbers", ("raw, unseen", raw)))
    types = len(np.unique(s.truth.labels[:, -1].cpu().numpy()[~s.truth.seen]))
    cells = int((~s.truth.seen).sum())
    kind = f"{cells:,} cells of {types} unseen type{'s' if types > 1 else ''}"
    if not told:
        conclusion = f"The {kind} share no class with the reference at any level that could be asked."
    elif protocol == "bank":
        conclusion = f"Of {kind}, " + joined([f"{name} is right in {text}" for name, _, text in told])
    else:
        conclusion = f"Among themselves, {kind} find their own " + joined(
            [f"{name} in {text}" for name, _, text in told]
        )
    if told:
        conclusion += f"; {joined(unknown)} can't be right, since no such class was trained on." if unknown else "."
    weak = [f"{name} ({share(value)})" for name, value, _ in told if value < WEAK] if protocol == "bank" else []
    ask = "bank: are unseen types put into the right branch?" if protocol == "bank" else "loo: do they stay together?"
    over = "over the types, resampled whole (none where one type counts: it says nothing of others)"
    ends = destinations(s) if protocol == "bank" else []
    return Figure(
        f"unseen_{protocol}",
        f"Types that training never saw ({protocol})",
        panels,
        f"{ask} Seen and unseen types apart. 95 % intervals: of unseen types {over}; of seen ones over {s.unit}. "
        "Dotted: unseen types in the raw vectors. In bank a level counts where other types brought the class into "
        "training.",
        conclusion,
        svg.legend([("types that were trained on", 0), ("types that were not", 1)], [("raw vectors, unseen", "raw")]),
        ["Types", "Vector", *level_names(s)],
        [
            [
                name,
                title,
                *(show(row[name][protocol][k]) + interval_text(row[f"{name}_interval"][protocol][k]) for k in s.levels),
            ]
            for name, _ in groups
            for title, row in [("raw", s.raw), *zip(s.names, s.prefixes, strict=True)]
        ],
        [
            *([f"Types that the reference lacks are often put into a wrong {joined(weak)}."] if weak else []),
            *([f"Types that the reference lacks are taken for others: {some(ends)}."] if ends else []),
            *(
                [f"Only {types} unseen type{'s were' if types > 1 else ' was'} at hand: others may do better or worse."]
                if ends and types < 6
                else []
            ),
        ],
    )


def destinations(s: Scored) -> list[str]:
    """What most cells of each unseen type are taken for at the finest level."""
    true, said = s.truth.labels[:, -1].cpu().numpy(), s.prefixes[-1][f"{s.main}_predicted"][:, -1]
    lines = []
    for code in np.unique(true[~s.truth.seen]):
        answered, cells = np.unique(said[(true == code) & ~s.truth.seen], return_counts=True)
        part = share(float(cells.max() / cells.sum()))
        lines.append(f"{short(s.classes[-1][code])} for {short(s.classes[-1][answered[cells.argmax()]])} ({part})")
    return lines


# Probabilities


def tenths(bins: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bins of fractal.score.metrics.reliability, joined by their probability into tenths, with Wilson intervals."""
    found = []
    for i in range(BINS):
        own = [bin for bin in bins if min(int(bin["probability"] * BINS), BINS - 1) == i]
        if n := sum(bin["cells"] for bin in own):
            mean = {key: sum(bin[key] * bin["cells"] for bin in own) / n for key in ("probability", "accuracy")}
            interval = wilson_interval(mean["accuracy"] * n, n)
            found.append({**mean, "interval": interval, "cells": n, "place": (i + 0.5) / BINS})
    return found


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


def known_answers(s: Scored) -> tuple[str, dict[str, Any]] | None:
    """The answers that conclusions are drawn from: those of seen types, else of all test cells."""
    found = [(who, scores) for who, scores in s.answers.items() if who != "unseen" and scores["cells"]]
    return found[0] if found else None


def calibration(s: Scored) -> Figure | None:
    """Reliability curves, a panel per level."""
    if not (known := known_answers(s)):
        return None
    who, scores = known
    strange = s.answers.get("unseen")
    panels, rows = [], []
    holds, off = list[str](), list[str]()
    for k in s.asked():
        level, name = s.levels[k], short(s.levels[k], 30)
        curves = [(0, tenths(scores["levels"][level]["reliability"]))]
        if strange:
            curves.append((1, tenths(strange["levels"][level]["reliability"])))
        panels.append(svg.calibration(short(level, 18), curves))
        verdict = calibrated(scores["levels"][level])
        (holds if verdict == "holds" else off).append(name if verdict == "holds" else f"{name} ({verdict})")
    for group, own in s.answers.items():
        for k in s.asked():
            score = own["levels"][s.levels[k]]
            figures = [score["calibration_error"], score["calibration_noise_floor"], overconfidence(score)]
            rows.append([group, short(s.levels[k], 30), f"{own['cells']:,}", *(f"{v:.3f}" for v in figures)])
    if not rows:
        return None
    parts = [f"can be taken at their word for {joined(holds)}"] if holds else []
    parts += [f"not for {joined(off)}" if holds else f"can't be taken at their word for {joined(off)}"] if off else []
    cells = f"{scores['cells']:,} {'cells of seen types' if who == 'seen' else who}"
    conclusion = f"On {cells}, probabilities {', '.join(parts)}"
    cautions = [f"Probabilities are wrong at {joined(off)}."] if off else []
    if strange:
        last = s.asked()[-1]
        score, name = strange["levels"][s.levels[last]], short(s.levels[last], 30)
        mean = score["accuracy_forced"] + overconfidence(score)
        often = f"right in {share(score['accuracy_forced'])}" if score["accuracy_forced"] else "never right"
        conclusion += f"; of unseen types, {name} gets {share(mean)} on average and is {often}"
        if mean - score["accuracy_forced"] > HOLDS:
            cautions.append(
                f"Probabilities are too high in types that the reference lacks ({name}: {share(mean)} on average)."
            )
    kinds = [("types that were trained on" if who == "seen" else who, 0)] + (
        [("types that were not", 1)] if strange else []
    )
    return Figure(
        "calibration",
        "Can the probabilities be believed",
        panels,
        "Across: the probability that an answer gets; up: how often such answers are right. On the dotted line both "
        "agree, below it the probability is too high. Upright bars: 95 % intervals over cells (Wilson). Below: how "
        "many cells got such a probability. It holds if its mean error is at most .02, or twice what chance makes.",
        conclusion + ".",
        svg.legend(kinds, [("perfect", "raw")]),
        ["Cells", "Level", "Number", "Calibration error", "By chance", "Too high by"],
        rows,
        cautions,
    )


def answers(s: Scored) -> Figure | None:
    """How many cells are answered at each level, right and wrong."""
    if not (known := known_answers(s)):
        return None
    panels, rows = [], []
    for who, scores in s.answers.items():
        bars = []
        for level in s.levels:
            score = scores["levels"][level]
            right = score["coverage"] * (score["accuracy"] or 0)
            parts = [("good", right), ("bad", score["coverage"] - right), ("none", 1 - score["coverage"])]
            bars.append((level, parts))
            rows.append([who, short(level, 30), *(share(part) for _, part in parts)])
        names = {"seen": "Types that were trained on", "unseen": "Types that were not"}
        panels.append(svg.stacked(f"{names.get(who, capital(who))}: {scores['cells']:,} cells", bars))
    who, scores = known
    finest = s.levels[-1]
    score, name = scores["levels"][finest], short(finest, 30)
    conclusion = f"At confidence .8, {name} is answered for {share(score['coverage'])} of the cells"
    if score["accuracy"] is not None:
        conclusion += f", and {share(score['accuracy'])} of these answers are right"
    cautions = []
    if strange := s.answers.get("unseen"):
        own = strange["levels"][finest]
        wrong = own["coverage"] * (1 - (own["accuracy"] or 0))
        conclusion += (
            f"; of unseen types {share(strange['flagged'])} are flagged as novel and {share(wrong)} get a wrong {name}"
        )
        if wrong > TOLERANCE:
            cautions.append(
                f"Types that the reference lacks: {share(wrong)} of their cells get a wrong {name} all the same."
            )
    if score["accuracy"] is not None and score["accuracy"] < WEAK:
        cautions.append(f"Answers at {name} are right for {share(score['accuracy'])} only.")
    return Figure(
        "answers",
        "What annotating would answer",
        panels,
        "Each cell is labelled as deep as its probability is .8 or more; a finer label is held back.",
        conclusion + ".",
        svg.legend([], [("answered, right", "good"), ("answered, wrong", "bad"), ("held back", "none")]),
        ["Cells", "Level", "Right", "Wrong", "Held back"],
        rows,
        cautions,
    )


# Controls


def controls(s: Scored) -> Figure | None:
    """PCA, LDA and cut raw vectors beside the prefixes, by numbers per cell."""
    if not s.controls or not s.asked():
        return None
    families = {
        "prefixes": s.prefixes,
        "raw, cut": [*(r for r in s.controls if r["embedding"].startswith("raw")), s.raw],
    }
    for name in ("PCA", "LDA"):
        own = [row for row in s.controls if row["embedding"].split(" ")[0] == name]
        families |= {name: sorted(own, key=lambda row: row["dims"])} if own else {}
    most = s.prefixes[-1]["dims"]
    widths = sorted({row["dims"] for rows in families.values() for row in rows if row["dims"] <= most})
    at = [(width, str(width), "") for width in widths]
    panels, series_of = [], {}
    beaten, ahead = list[str](), list[str]()
    for k in s.asked():
        level = s.levels[k]
        series_of[k] = [
            svg.Series(
                name,
                i,
                [(r["dims"], r[s.main][level], r[f"{s.main}_interval"][level]) for r in rows if r["dims"] <= most],
            )
            for i, (name, rows) in enumerate(families.items())
        ]
        best = max(row[s.main][level] for row in s.prefixes)
        rival = max([*s.controls, s.raw], key=lambda row: row[s.main][level])
        difference = best - rival[s.main][level]
        text = f"{short(level, 30)} ({share(best)} against {share(rival[s.main][level])} of {rival['embedding']})"
        if abs(difference) > TOLERANCE:
            (ahead if difference > 0 else beaten).append(text)
    lows = [low[0] if low else y for own in series_of.values() for one in own for _, y, low in one.points]
    for k, series in series_of.items():
        panels.append(svg.lines(short(s.levels[k], 18), at, series, svg.span(lows), "numbers per cell"))
    parts = [f"the best prefix is ahead of all controls at {joined(ahead)}"] if ahead else []
    parts += [f"a control is ahead of every prefix at {joined(beaten)}"] if beaten else []
    rest = len(s.asked()) - len(ahead) - len(beaten)
    if rest:
        where = "all levels" if rest == len(s.asked()) else f"the other {rest} level{'s' if rest > 1 else ''}"
        parts.append(f"at {where} the best prefix and the best control are within .01")
    return Figure(
        "controls",
        "Beside simpler methods",
        panels,
        f"5-NN accuracy ({s.main}, {of_whom(s)}) by how many numbers a cell takes: the prefixes, and what one gets "
        f"without an adapter. PCA and LDA are fitted on training cells. Upright bars: 95 % intervals over {s.unit}.",
        capital("; ".join(parts)) + ".",
        svg.legend([(name, i) for i, name in enumerate(families)]),
        ["Vector", "Numbers", *level_names(s)],
        [
            [title, str(row["dims"]), *accuracies(row, s.main, s.levels)]
            for title, row in [
                *zip(s.names, s.prefixes, strict=True), ("raw", s.raw), *((r["embedding"], r) for r in s.controls)
            ]
        ],
        [f"A simpler method is better at {joined(beaten)}."] if beaten else [],
    )  # fmt: skip


# All together


def summary(s: Scored) -> tuple[list[str], list[list[str]]]:
    """-> header and a row per level: which prefix to use, how good it is, and whether its probability holds."""
    known, best, apart = known_answers(s), choices(s), most_separated(s)
    strange = not s.truth.seen.all()
    header = [
        "Level",
        "Use",
        f"Right ({s.main})",
        "To draw",
        *(["Probability"] if known else []),
        *(["Unseen types"] if strange else []),
    ]
    rows = []
    for k, level in enumerate(s.levels):
        if k not in best:
            rows.append([short(level, 30), "one class only", *["–"] * (len(header) - 2)])
            continue
        row = s.prefixes[best[k]]
        cells = [
            f"{s.names[best[k]]} ({row['dims']})",
            share(row[s.main][level]) + interval_text(row[f"{s.main}_interval"][level]),
        ]
        cells.append(s.names[apart[k]] if k in apart else "–")
        cells += [calibrated(known[1]["levels"][level])] if known else []
        if strange:
            cells.append(show(row["unseen"][s.main][level]))
        rows.append([short(level, 30), *cells])
    return header, rows


def figures(s: Scored) -> list[Figure]:
    """All that can be drawn, in the order of the page."""
    found = [
        accuracy(s),
        silhouettes(s),
        *(strangers(s, protocol) for protocol in s.protocols),
        answers(s),
        calibration(s),
        *(confusions(s, level) for level in range(len(s.levels))),
        weakest(s, "type"),
        weakest(s, "study"),
        controls(s),
    ]
    return [figure for figure in found if figure]
