"""The model card of a reference: what it is, how good it is, where it comes from.

Much of it is foreign text (names of files, of levels, of versions), which comes from whoever made the file. It stands
in code spans, where Markdown knows no HTML, links or other markup.
"""

from collections.abc import Mapping
from typing import Any

from fractal.base.cli import printable, table

MAX_TEXT = 200  # characters of one foreign text


def code(text: object) -> str:
    """Foreign text as a code span: one line, no control characters, nothing that ends the span."""
    return f"`{printable(' '.join(str(text).split())).replace('`', chr(39))[:MAX_TEXT] or ' '}`"


COLUMNS = {
    "coverage": "Answered",
    "accuracy": "Accuracy",
    "accuracy_forced": "If all were answered",
    "calibration_error": "ECE",
    "calibration_noise_floor": "ECE by chance",
}


def report_table(scores: Mapping[str, Any], columns: int = len(COLUMNS)) -> str:
    """Markdown, a row per level and the first of COLUMNS."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    keys = list(COLUMNS)[:columns]
    rows = [[level, *(show(found[key]) for key in keys)] for level, found in scores["levels"].items()]
    return table(["Level", *(COLUMNS[key] for key in keys)], rows)


def model_card(facts: Mapping[str, Any], version: int) -> str:
    """Markdown; `facts` as in bundle.json, `version` of the folder's format."""
    scores = facts["scores"]
    measured = "There were no test cells, so nothing is known of its quality.\n"
    if scores["cells"]:
        scores = {**scores, "levels": {code(level): found for level, found in scores["levels"].items()}}
        measured = (
            f"On {scores['cells']:,} test cells that neither training nor calibration has seen, at confidence 0.8 "
            f"({scores['flagged']:.1%} are flagged as novel):\n\n{report_table(scores)}\n\n"
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
format {version} of the folder.
"""
