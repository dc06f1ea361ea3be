"""Load a checkpoint of any known format into an existing model, or write it. Each format is one YAML file of rules.

>>> import keymap
>>> all(keymap.list_formats().values())  # each format has a title
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keymap.api import inspect_checkpoint, load_checkpoint, plan_load
    from keymap.compare.compare import compare_checkpoints
    from keymap.compare.report import Comparison, Difference
    from keymap.convert import convert_state_dict
    from keymap.errors import (
        CheckpointError,
        ConfigurationWarning,
        DetectionError,
        KeymapError,
        LoadError,
        MappingError,
        PlanError,
        UnsafeCheckpointError,
        VerifyError,
        WriteError,
    )
    from keymap.names import map_key
    from keymap.paths import schema_path
    from keymap.plan.plan import Plan
    from keymap.results import Inspection, LoadResult, Report
    from keymap.save import WriteResult, convert_checkpoint, save_checkpoint
    from keymap.source.registry import list_formats, register_mappings

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Comparison",
    "ConfigurationWarning",
    "DetectionError",
    "Difference",
    "Inspection",
    "KeymapError",
    "LoadError",
    "LoadResult",
    "MappingError",
    "Plan",
    "PlanError",
    "Report",
    "UnsafeCheckpointError",
    "VerifyError",
    "WriteError",
    "WriteResult",
    "__version__",
    "compare_checkpoints",
    "convert_checkpoint",
    "convert_state_dict",
    "inspect_checkpoint",
    "list_formats",
    "load_checkpoint",
    "map_key",
    "plan_load",
    "register_mappings",
    "save_checkpoint",
    "schema_path",
]

_PLACES = {  # the public names of each module: imported on first use, because torch takes seconds
    "api": (
        "inspect_checkpoint",
        "load_checkpoint",
        "plan_load",
    ),
    "compare.compare": ("compare_checkpoints",),
    "compare.report": (
        "Comparison",
        "Difference",
    ),
    "convert": ("convert_state_dict",),
    "errors": (
        "CheckpointError",
        "ConfigurationWarning",
        "DetectionError",
        "KeymapError",
        "LoadError",
        "MappingError",
        "PlanError",
        "UnsafeCheckpointError",
        "VerifyError",
        "WriteError",
    ),
    "names": ("map_key",),
    "paths": ("schema_path",),
    "plan.plan": ("Plan",),
    "results": (
        "Inspection",
        "LoadResult",
        "Report",
    ),
    "save": (
        "WriteResult",
        "convert_checkpoint",
        "save_checkpoint",
    ),
    "source.registry": (
        "list_formats",
        "register_mappings",
    ),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}


if not TYPE_CHECKING:  # otherwise every attribute of the package would have the type Any

    def __getattr__(name: str) -> Any:
        """Import a public name on first use (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
