"""Record the models of the installed OpenCLIP: their configurations, and the keys of each layout of each tower.

    python tools/record_configurations.py            write both files
    python tools/record_configurations.py --check    exit status 1 if one of them would change

It writes mappings/open_clip/open_clip_configurations.yaml, and open_clip_keys.json, with which the checks of a mapping
file find a misspelt target. Models are built on the meta device: names and shapes, no memory, no download.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the builder of full-size models is there

import open_clip
from peers import full_size, layouts, naflex, openclip
from torch import nn

from keymap.language.layout import Layout
from keymap.plan.describe import describe
from keymap.plan.model import view_model
from keymap.plan.to_hub import tower_of
from keymap.source.detect import tower_layout
from keymap.source.registry import registry

FILE = Path(__file__).resolve().parents[1] / "mappings" / "open_clip" / "open_clip_configurations.yaml"
HEAD = """# yaml-language-server: $schema=../../schemas/mapping.schema.json
# Written by tools/record_configurations.py; run it again for another release of OpenCLIP.
format: open_clip_configurations
kind: configurations
title: OpenCLIP's configurations, by the fingerprints of their towers
reference: open_clip/model_configs (open_clip_torch {version})
configurations:
"""


KEYS = FILE.with_name("open_clip_keys.json")
KEYS_HEAD = "Written by tools/record_configurations.py: run it again for another OpenCLIP."

# Layouts whose names come from timm or transformers: a model of theirs may have keys that none of these models has.
OPEN = {"image": ("clip_trunk", "map_trunk", "gap_trunk", "naflex", "naflex_token", "trunk"), "text": ("hf",)}
_SCALED = {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
_LAYER_SCALE = {"ls_init_value": 1e-5}
_OPTIONS: dict[str, Mapping[str, object]] = {  # options of OpenCLIP that add keys and that no configuration uses
    "norms of queries and keys": {"vision": _SCALED | {"qk_norm": True}, "text": _SCALED | {"qk_norm": True}},
    "cosine attention": {"vision": {"scaled_cosine_attn": True}, "text": {"scaled_cosine_attn": True}},
    "layer scale": {"vision": _LAYER_SCALE, "text": _LAYER_SCALE | {"proj_bias": True, "embed_cls": True}},
}

Facts = Mapping[str, str | int]
Prints = tuple[tuple[str, str], ...]
Keys = dict[str, dict[str, dict[str, None]]]  # by tower and layout ("" where the tower has none), in order


def further_models() -> Iterable[nn.Module]:
    """Small models with keys that none of the configurations has: options of OpenCLIP, and timm's NaFlexVit."""
    for options in _OPTIONS.values():
        for build in (openclip.clip, openclip.custom):
            yield build(**options)
        yield openclip.coca(**options)
    for model in layouts.MODELS.values():
        yield model(seed=0)
    yield from (naflex.model(), naflex.token_model(), openclip.clip_trunk(), openclip.siglip(projection=False))
    yield openclip.convnext(head="mlp")


def add_keys(model: nn.Module, keys: Keys) -> None:
    """Add a model's keys, with ``(\\d+)`` for each index, under the layouts of its towers."""
    hub = registry().hub
    tensors: dict[str, Layout] = view_model(model, hub).layouts()
    held = {tower: tower_layout(hub, tower, tensors) or "" for tower in hub.layouts}
    for key in tensors:
        tower = tower_of(hub, key)
        form = re.sub(r"(?<![^.])[0-9]+(?![^.])", r"(\\d+)", key)
        keys.setdefault(tower, {}).setdefault(held.get(tower, ""), {})[form] = None


def keys_text(keys: Keys) -> str:
    """The text of the file of keys, one key a line, in order."""
    ordered = {t: {name: sorted(keys[t][name]) for name in sorted(keys[t])} for t in sorted(keys)}
    return json.dumps({"about": KEYS_HEAD, "open": OPEN, "keys": ordered}, indent=1) + "\n"


def measured(model: nn.Module) -> tuple[Prints, list[int]]:
    """The fingerprints of a model's towers, and how many positions each has."""
    known = registry()
    towers = describe(known, view_model(model, known.hub).layouts())
    prints = tuple((tower, found.fingerprint) for tower, found in towers.items())
    return prints, [found.sizes.get("positions", 0) for found in towers.values()]


_NAMED = {  # facts that no weight shows: what a configuration calls its towers, and where it says so
    "image.architecture": ("vision_cfg", "timm_model_name"),
    "text.hf_name": ("text_cfg", "hf_model_name"),
    "text.tokenizer": ("text_cfg", "hf_tokenizer_name"),
    "decoder.context_length": ("multimodal_cfg", "context_length"),
}


def named(name: str) -> Facts:
    """The names that a configuration gives its towers, and the side of the images of a timm tower."""
    config = open_clip.get_model_config(name)
    places = {
        **_NAMED,
        **({"image.size": ("vision_cfg", "image_size")} if "timm_model_name" in config["vision_cfg"] else {}),
    }
    found = {fact: config.get(section, {}).get(key) for fact, (section, key) in places.items()}
    return {fact: value for fact, value in found.items() if value is not None}


def text(groups: Iterable[tuple[Prints, Mapping[str, Sequence[int]]]], facts: Mapping[str, Facts]) -> str:
    """The text of the file of configurations: names and their positions, by fingerprints; and facts by name."""
    lines = []
    for prints, names in groups:
        digests = ", ".join(f"{tower}: {digest!r}" for tower, digest in prints)
        rows = ", ".join(f"{name}: [{', '.join(map(str, numbers))}]" for name, numbers in names.items())
        stated = {name: facts[name] for name in names if facts.get(name)}
        of_each = ", ".join(
            f"{name}: {{{', '.join(f'{fact}: {value}' for fact, value in found.items())}}}"
            for name, found in stated.items()
        )
        more = f", facts: {{{of_each}}}" if of_each else ""
        lines.append(f"  - {{{digests}, names: {{{rows}}}{more}}}\n")
    return HEAD.format(version=version("open_clip_torch")) + "".join(lines)


def recorded() -> dict[Path, str]:
    """The texts of both files for the installed OpenCLIP."""
    groups: dict[Prints, dict[str, list[int]]] = {}
    keys: Keys = {}
    for name in full_size.names():
        model = full_size.model(name)
        prints, rows = measured(model)
        groups.setdefault(prints, {})[name] = rows
        add_keys(model, keys)
    for model in further_models():
        add_keys(model, keys)
    return {FILE: text(groups.items(), {name: named(name) for name in full_size.names()}), KEYS: keys_text(keys)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record the configurations that OpenCLIP ships.")
    parser.add_argument("--check", action="store_true", help="only see whether the files are fresh")
    check = parser.parse_args(arguments).check
    stale = 0
    for file, written in recorded().items():
        fresh = file.is_file() and file.read_text(encoding="utf-8") == written
        if check:
            print(f"{file.name} is {'fresh' if fresh else 'stale: run tools/record_configurations.py'}")
            stale += not fresh
        else:
            file.write_text(written, encoding="utf-8")
            print(f"{file.name}: {len(written.splitlines())} lines")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
