"""Checkpoints: an adapter of either kind built from its config, saved, checked and loaded."""

from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch

from fractal.base.errors import InputError
from fractal.base.files import atomic_write
from fractal.base.storage import Location, fetch, locate
from fractal.hierarchy.levels import MAX_LEVELS, MIN_LEVELS
from fractal.model.adapter import Adapter, FractalAdapter, pick_device
from fractal.model.published import PublishedAdapter

MAX_GROWTH = 32  # a loaded adapter's largest matrix, in sizes of its weights; 5,000 types at 4 levels need 21


def build_adapter(config: dict[str, Any], classes: list[list[str]]) -> Adapter:
    """A new adapter for a checkpoint's config and its class names per level of the file.

    config: recipe, dim, num_levels, scale_dim, block_levels (the level of the file that each block stands for) and,
    but for `published`, paths (num_paths, num_levels).
    """
    shape = config["dim"], config["num_levels"], config["scale_dim"]
    if config["recipe"] == "published":
        top, leaf = config["block_levels"][0], config["block_levels"][-1]
        return PublishedAdapter(*shape, len(classes[top]), len(classes[leaf]))
    return FractalAdapter(*shape, torch.tensor(config["paths"]))


def save(
    path: str | Location, adapter: Adapter, config: dict[str, Any], classes: list[list[str]], **facts: Any
) -> None:
    """Write a checkpoint of plain containers and tensors, so that `torch.load(weights_only=True)` reads it.

    `facts`: what else belongs to the run (split, versions, validation scores).
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in adapter.state_dict().items()}
    with atomic_write(path) as part, open(part, "wb") as file:
        torch.save({"config": config, "classes": classes, "state": state, **facts}, file)


def check(checkpoint: dict[str, Any]) -> None:
    """Raise ValueError or KeyError for a checkpoint that is not train.py's, before any memory is taken for it.

    A damaged or hostile config may ask for gigabytes, so all that it asks for must be there in the weights.
    """
    config, classes, state = checkpoint["config"], checkpoint["classes"], checkpoint["state"]
    levels, block_levels = config["levels"], config["block_levels"]
    sound = (
        config["recipe"].isidentifier()  # it is shown
        and all(isinstance(checkpoint[name], dict) for name in ("training", "versions", "split"))
        and isinstance(checkpoint["validation"], dict | None)
        and all(isinstance(names, list) for names in (levels, block_levels, classes, *classes))
        and all(isinstance(name, str) for names in (levels, *classes) for name in names)
        and MIN_LEVELS <= len(levels) == len(classes) <= MAX_LEVELS
        and MIN_LEVELS <= config["num_levels"] == len(block_levels) <= MAX_LEVELS
        and {*block_levels} <= {*range(len(levels))}
        # a view of one number may claim any shape
        and all(t.is_contiguous() and t.untyped_storage().nbytes() >= t.nbytes for t in state.values())
    )
    if not sound:
        raise ValueError("not as train.py writes it")
    published = config["recipe"] == "published"
    shapes = PublishedAdapter.shapes(config, classes) if published else FractalAdapter.shapes(config)
    if any(tuple(state[name].shape) != shape for name, shape in shapes.items()):
        raise ValueError("the sizes of the weights are not those of the config")
    if not published:
        matrix = 4 * len(config["paths"]) * shapes["anchors"][0]  # bytes of path_to_class
        if matrix > MAX_GROWTH * sum(tensor.nbytes for tensor in state.values()):
            raise ValueError("too many paths and classes for so few weights")


def restore(checkpoint: dict[str, Any]) -> Adapter:
    """The adapter of a checkpoint, or ValueError and the like, see `check`."""
    check(checkpoint)
    with torch.random.fork_rng([]):  # new weights are drawn; the caller's random numbers go on as they would
        adapter = build_adapter(checkpoint["config"], checkpoint["classes"])
    adapter.load_state_dict(checkpoint["state"])
    return adapter


def load(path: str | Location, device: str = "cpu") -> tuple[Adapter, dict[str, Any]]:
    """-> the adapter, ready for use on `device`, and the whole checkpoint. Runs no code from the file.

    Raises InputError for a file that is missing or is not a checkpoint of this version's train.py.
    """
    on = pick_device(device)
    if not locate(path).is_file():
        raise InputError(f"{path}: no such checkpoint; make one with train.py")
    try:
        with ZipFile(fetch(locate(path))) as parts:  # torch compresses nothing
            if any(part.compress_type != ZIP_STORED for part in parts.infolist()):
                raise ValueError("compressed, so that it may be of any size")
        checkpoint = torch.load(fetch(locate(path)), map_location=on, weights_only=True)
        adapter = restore(checkpoint)
    except Exception as error:  # whatever a damaged file makes torch and its modules raise
        raise InputError(
            f"{path}: not a checkpoint of train.py, or damaged, or of an older version; train it again"
        ) from error
    return adapter.to(on).eval(), checkpoint
