"""Recipes by name."""

import pytest

from fractal.base.errors import InputError
from fractal.model.recipes import FRACTAL, Settings, find_recipe


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="recipe 'mrl': is one of fractal, published"):
        find_recipe("mrl")


def test_settings_override_the_recipe():
    assert Settings().of_recipe == FRACTAL
    changed = Settings(lr=0.1, batch_size=7).of_recipe
    assert (changed.lr, changed.batch_size, changed.ema) == (0.1, 7, FRACTAL.ema)
