"""Families of models outside CLIP: small models of the real libraries, and files of every format that leads to them.

One module for each folder of ``mappings/``, of the hub's name. A module has

- ``EXAMPLES``: by name a function that makes an `Example`; the name is a format's, or a format's with more after a
  space.
- ``ROWS``: broken rules, in the form of ``formats/broken.py``; the name of a row is that of an example. Every example
  has one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from torch import Tensor, nn

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A file of a format, and what a load of it must give.

    Attributes:
        form: the format.
        file: the file's tensors, at random values.
        model: makes a model with the hub's names, at other random values.
        peer: what says that the load is right, for the coverage page: the name of a function or of a class.
        expected: the model's tensors after the load, by the peer's own loader or converter.
        outputs: pairs of outputs (the peer's, the loaded model's); of `expected` and `outputs` one is given.
        wrong: makers of models that must refuse the file, by what they are.
        facts: what the shapes do not show and a conversion without a model is told.
        prefix: of the file's keys, which the way back does not write; the owner's loader reads both.
        not_written: keys of the file that the way back does not write: buffers.
        back: what the way back writes, where that is more than these leave of the file: the copy of a tied weight.
        rounded: keys of the file whose values the way back computes and does not meet in the last bits.
        oneway: why there is no way back; "" where there is one.
        suffix: of the file's container.
    """

    form: str
    file: State
    model: Callable[[], nn.Module]
    peer: str
    expected: State | None = None
    outputs: Callable[[nn.Module], Iterable[tuple[Tensor, Tensor]]] | None = None
    wrong: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    facts: Mapping[str, int] = field(default_factory=dict)
    prefix: str = ""
    not_written: tuple[str, ...] = ()
    back: State | None = None
    rounded: tuple[str, ...] = ()
    oneway: str = ""
    suffix: str = ".safetensors"


def families() -> dict[str, ModuleType]:
    """The modules of this folder, by the name of their hub."""
    return {found.name: importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)}


@cache
def example(hub: str, name: str) -> Example:
    """An example, made once."""
    made: Example = families()[hub].EXAMPLES[name]()
    return made
