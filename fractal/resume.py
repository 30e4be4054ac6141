"""The state of a training run, kept beside its output, so that a killed run can go on and end with the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fractal.cli import InputError
from fractal.files import atomic_write


class TrainingState:
    """Reads and writes `output` + ".resume", after each epoch: 10 MB at 128-d and 4 x 32, five times the checkpoint.

    `flags`: what the run was asked to do, and the input's fingerprint. `parts`: all that has a state_dict.
    """

    def __init__(self, output: Path, flags: dict[str, str], parts: dict[str, Any], device: torch.device) -> None:
        self.path, self.flags, self.parts = output.with_name(output.name + ".resume"), flags, parts
        self.generators = [torch, *([getattr(torch, device.type)] if device.type != "cpu" else [])]

    def write(self, *progress: Any) -> None:
        """Plain containers and tensors only, so that `torch.load(weights_only=True)` reads them."""
        state = {
            "flags": self.flags,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": [generator.get_rng_state() for generator in self.generators],
            "progress": progress,
        }
        with atomic_write(self.path) as part, open(part, "wb") as file:
            torch.save(state, file)

    def read(self) -> tuple[Any, ...]:
        """Put all parts and random numbers back as they were -> the `progress` that was written.

        Raises InputError for a damaged file, and for the state of a run with other flags or of another input.
        """
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            was = state["flags"]
            other = [f"{name} {was.get(name)}, not {value}" for name, value in self.flags.items() if was[name] != value]
            if not other:
                for name, part in self.parts.items():
                    part.load_state_dict(state["parts"][name])
                for generator, random in zip(self.generators, state["random"], strict=True):
                    generator.set_rng_state(random)
                return state["progress"]
        except Exception as error:  # whatever a damaged file makes torch and its modules raise
            raise InputError(f"{self.path}: damaged; train from the beginning, without --resume") from error
        raise InputError(
            f"{self.path}: of a run with {', '.join(other)}; give the same flags and input, or leave out --resume"
        )


@contextmanager
def noting_interrupts() -> Iterator[list[KeyboardInterrupt]]:
    """Leave the block on Ctrl-C or SIGTERM, with what came in the list that is yielded."""
    noted: list[KeyboardInterrupt] = []
    try:
        yield noted
    except KeyboardInterrupt as stop:
        noted.append(stop)
