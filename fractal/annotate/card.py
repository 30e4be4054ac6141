"""The model card of a reference: what it is, how good it is, where it comes from.

Much of it is foreign text (names of files, of levels, of versions), which comes from whoever made the file. It stands
in code spans, where Markdown knows no HTML, links or other markup.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fractal.base.errors import printable
from fractal.score.answers import answer_table

MAX_TEXT = 200  # characters of one foreign text


def code(text: object) -> str:
    """Foreign text as a code span: one line, no control characters, nothing that ends the span."""
    return f"`{printable(' '.join(str(text).split())).replace('`', chr(39))[:MAX_TEXT] or ' '}`"


def headline(facts: Mapping[str, Any], show: Callable[[str], str] = str) -> str:
    """How many held-out cells are answered, how many of these are right, and how many of known types look novel."""
    scores = facts["scores"]
    finest, figures = list(scores["levels"].items())[-1]
    right = "" if figures["accuracy"] is None else f", {figures['accuracy']:.3f} of these right"
    worst = scores.get("flagged_worst")
    most = "" if worst is None else f" ({worst:.3f} in the worst study)"
    cells = f"{scores['cells']:,} cells held out ({show(facts.get('held_out', 'drawn at random'))})"
    answered = f"{figures['coverage']:.3f} answered down to the {show(finest)}{right}"
    return f"{cells}: {answered}; {scores['flagged']:.3f} flagged as novel though their type is known{most}"


def model_card(facts: Mapping[str, Any], version: int) -> str:
    """Markdown; `facts` as in bundle.json, `version` of the folder's format."""
    scores = facts["scores"]
    measured = "There were no test cells, so nothing is known of its quality.\n"
    if scores["cells"]:
        levels = {code(level): figures for level, figures in scores["levels"].items()}
        measured = (
            f"At confidence 0.8, {headline(facts, code)}. They were answered by an adapter and\n"
            "reference cells that had seen neither them nor, where studies are held out, their studies; what\n"
            f"`fractal fit` makes is trained on all cells afterwards.\n\n{answer_table(levels)}\n\n"
            "ECE: expected calibration error, 15 bins; by chance: what perfectly calibrated probabilities would score "
            "on so many cells. bundle.json holds the reliability curves.\n"
        )
    versions = facts.get("versions")
    made_with = ", ".join(code(f"{k} {v}") for k, v in versions.items()) if isinstance(versions, Mapping) else "unknown"
    projection = facts.get("projection")
    projects = (
        f"Cells that bring none are projected from their expression of {projection['genes']:,} genes, prepared as\n"
        "that of the reference.\n"
        if projection
        else ""
    )
    sources = facts.get("cells_from", [])
    parts = ", ".join(f"{part['cells']:,} of {code(part['name'])}" for part in sources)
    split = facts.get("split")
    fingerprint = split.get("fingerprint") if isinstance(split, Mapping) else "unknown"
    return f"""# Reference for annotating cells

An adapter of Fractal Cells (recipe {code(facts["recipe"])}) and {facts["reference_cells"]:,} reference cells of
{facts["reference_types"]} types, with {facts["config"]["dim"]} numbers each, drawn from a file of
{facts["training_cells"]:,} cells. Cell Ontology (CC-BY 4.0): release {code(facts.get("cl_release", "none"))}.

    fractal annotate --reference THIS_FOLDER --input cells.h5ad --output cells.tsv

{measured}
Cells must come as vectors of the same embedding, made in the same way, as those of
{code(facts.get("source", "unknown"))}.
{projects}Probabilities hold for cells like the test cells: other tissues, assays or another mix of types shift them.
A type that the reference lacks is only sometimes recognised as novel.

Made from {code(facts.get("data", "unknown"))} (sha256 {code(fingerprint)}), with {made_with};
format {version} of the folder.{f" Labelled cells: {parts}." if parts else ""}
"""
