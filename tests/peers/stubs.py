"""Stand-ins for packages that a peer imports and that its models do not use: they download, tokenize or compile."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Anything(ModuleType):
    """A module that has every attribute: a class that does nothing, and that as a decorator changes nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        class Nothing(Exception):  # noqa: N818 - a class, so that `except` and type annotations take it
            def __new__(cls, *arguments: Any, **_: Any) -> Any:
                return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else super().__new__(cls)

            def __init__(self, *_: Any, **__: Any) -> None:
                super().__init__()

            def __call__(self, function: Any) -> Any:
                return function

        return Nothing


@contextmanager
def stand_ins(*names: str, **tensorflow: Any) -> Iterator[None]:
    """Within it these packages can be imported, also if they are not installed.

    Args:
        names: of packages and of their modules; a package that is installed is itself.
        tensorflow: attributes of a package ``tensorflow``, which then takes the place of a real one.
    """
    modules: dict[str, ModuleType] = {}
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            modules[name] = _Anything(name)
    if tensorflow:
        modules["tensorflow"] = ModuleType("tensorflow")
        vars(modules["tensorflow"]).update(tensorflow)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
