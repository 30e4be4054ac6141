"""What the model card of a reference says."""

from fractal.annotate.card import code, model_card
from fractal.reference import Reference


def test_a_card_names_the_file_that_it_was_made_from_and_its_columns():
    facts = {
        "recipe": "fractal", "reference_cells": 5, "reference_types": 2, "training_cells": 9, "config": {"dim": 3},
        "split": {"fingerprint": "0123abc"}, "source": "s.h5ad", "data": "d.parquet", "versions": {"torch": "2.10"},
        "scores": {"cells": 3, "flagged": 0.5, "levels": {"k": {"coverage": 0.25} | dict.fromkeys(
            ("accuracy", "accuracy_forced", "calibration_error", "calibration_noise_floor"))}},
    }  # fmt: skip
    card = model_card(facts, 3)
    assert "Made from `d.parquet` (sha256 `0123abc`), with `torch 2.10`;\nformat 3 of the folder." in card
    assert "as those of\n`s.h5ad`." in card
    assert "release `none`." in card
    assert "release `2025-07-30`." in model_card(facts | {"cl_release": "2025-07-30"}, 3)
    bare = {name: value for name, value in facts.items() if name not in ("split", "source", "data", "versions")}
    assert "Made from `unknown` (sha256 `unknown`), with unknown;" in model_card(bare, 3)
    assert "3 cells held out (`drawn at random`): 0.250 answered down to the `k`; 0.500 flagged as novel" in card
    assert "in the worst study" not in card
    header = "| Level | Answered | Accuracy | If all were answered | ECE | ECE by chance |"
    assert header in card
    assert "| `k`   |    0.250 |        - |" in card


def test_foreign_text_on_the_card_is_no_markup(reference: Reference):
    card = model_card(reference.facts, 3)
    outside = "".join(card.replace("\n", " ").split("`")[::2])
    assert "script" in card
    assert not any(mark in outside for mark in ("script", "javascript", "\x1b", "alert"))
    assert code("a`b\x1b[1m\nc") == "`a'b\\x1b[1m c`"
