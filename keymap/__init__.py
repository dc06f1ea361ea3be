"""Load any CLIP-family checkpoint into an existing OpenCLIP model. Each format is one YAML file of rules.

>>> import keymap
>>> all(keymap.list_formats().values())  # each format has a title
True
"""

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
