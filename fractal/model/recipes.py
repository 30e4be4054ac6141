"""The recipes of train.py: what the loss is, and its settings.

A recipe that is not listed here is passed to `fractal.model.training.fit` as an object: benchmarks/controls.py does so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fractal.base.errors import InputError
from fractal.model.objective import PrefixObjective, TrainingRows
from fractal.model.published import PublishedObjective


@dataclass(frozen=True)
class Recipe:
    """What to train an adapter on, and how. `Settings` may override `lr` and `batch_size`."""

    name: str  # a word, for the checkpoint; all but "published" train a `FractalAdapter`
    # adapter, rows -> module whose forward(adapter, batch) is a loss
    objective: Callable[[Any, TrainingRows], nn.Module]
    own_level: bool  # prefix j is trained on level j; else all on the finest level
    lr: float = 2e-3
    batch_size: int = 512
    min_steps: int = 30  # per epoch: small atlases are gone through several times
    ema: bool = True  # score and save an exponential moving average of the weights


FRACTAL = Recipe("fractal", PrefixObjective, own_level=True)
PUBLISHED = Recipe("published", PublishedObjective, False, lr=1e-4, batch_size=256, min_steps=1, ema=False)
RECIPES = {recipe.name: recipe for recipe in (FRACTAL, PUBLISHED)}


def find_recipe(name: str) -> Recipe:
    """Raises InputError for a name that there is not."""
    if name not in RECIPES:
        raise InputError(f"recipe '{name}': is one of {', '.join(RECIPES)}")
    return RECIPES[name]


Counts = dict[tuple[str, ...], int]  # path of labels -> number of cells


@dataclass(frozen=True)
class Settings:
    """What to train. None: as the recipe or the cells suggest."""

    recipe: Recipe = FRACTAL
    num_levels: int | None = None  # blocks; None: one for each level with two or more classes
    scale_dim: int | None = None  # numbers per block; None: see `default_scale_dim`
    epochs: int = 20  # at most
    patience: int = 5  # stop after so many epochs that scored worse in validation than the best one
    lr: float | None = None
    batch_size: int | None = None
    seed: int = 0  # of the weights, the order of the rows, and the noise

    @property
    def of_recipe(self) -> Recipe:
        """The recipe, with the settings that are given in place of its defaults."""
        recipe = self.recipe
        return replace(recipe, lr=self.lr or recipe.lr, batch_size=self.batch_size or recipe.batch_size)
