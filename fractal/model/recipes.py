"""The recipes by name, and what differs between them beside the loss."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings that a recipe starts from; flags override the first two."""

    lr: float
    batch_size: int
    min_steps: int  # per epoch: small atlases are gone through several times
    ema: bool  # score and save an exponential moving average of the weights
    own_level: bool  # prefix j is trained on level j; else all on the last level


RECIPES = {
    "fractal": Recipe(lr=2e-3, batch_size=512, min_steps=30, ema=True, own_level=True),
    "published": Recipe(lr=1e-4, batch_size=256, min_steps=1, ema=False, own_level=False),
    "mrl": Recipe(lr=2e-3, batch_size=512, min_steps=30, ema=True, own_level=False),
    "hce": Recipe(lr=2e-3, batch_size=512, min_steps=30, ema=True, own_level=False),
}
