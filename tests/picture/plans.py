"""Plans to draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peers import hf, openclip
from safetensors.torch import save_file
from torch import Tensor

import keymap
from keymap.plan.plan import Plan

HOSTILE = "</script><img src=x onerror=alert(1)>"


def clip_plan(folder: Path, depth: int = 4, **more: Tensor) -> Plan:
    """transformers' CLIP into a timm trunk of another size: rename, transpose, concat, resize, fill, cast and drop.

    Args:
        folder: for the checkpoint.
        depth: layers of each tower; the image tower's last layer is stored as float16.
        more: further keys of the file, which nothing uses.
    """
    sizes = {"image_depth": depth, "text_depth": depth}
    keys = hf.disk_keys(hf.clip(**sizes), 4, position_ids=True)
    last = f".layers.{depth - 1}."
    keys = {key: v.half() if last in key and key.startswith("vision") else v for key, v in keys.items()}
    save_file({**{key: v.contiguous() for key, v in keys.items()}, **more}, folder / "model.safetensors")
    model = openclip.clip_trunk(image_size=56, **sizes)
    return keymap.plan_load(model, folder / "model.safetensors", strict=False)


def hostile_plan(folder: Path) -> Plan:
    """A file with names that are markup, under a path with line ends and a change of the reading direction."""
    plan = clip_plan(folder, **{name: torch.zeros(2) for name in (HOSTILE, "<!--<script>", "a&lt;b", "{{data}}")})
    return replace(plan, file=f"right\u202eleft\nline\u2028end\udcff{HOSTILE}")
