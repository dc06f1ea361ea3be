"""Small language models of transformers, the files that it writes, and modules of packages that are not whole here."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file
from torch import Tensor, nn

from peers.common import randomised


def hf(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """A model of transformers, by the name of its class, at random values."""
    import transformers

    known = getattr(transformers, kind)
    return randomised(known, known.config_class(**options), seed=seed)


def written(model: nn.Module) -> dict[str, Tensor]:
    """The file that ``save_pretrained`` of transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


@contextmanager
def bare(*packages: str) -> Iterator[None]:
    """Modules of these packages can be imported without what the packages' own ``__init__`` imports.

    The packages are installed without their dependencies, which the imported modules do not need. What is imported
    inside is forgotten afterwards.
    """
    with patch.dict(sys.modules):
        top = find_spec(packages[0])
        assert top is not None and top.submodule_search_locations, packages[0]
        root = Path(next(iter(top.submodule_search_locations))).parent
        for name in packages:
            package = ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")))]
            sys.modules[name] = package
        yield
