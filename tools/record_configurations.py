"""Record the configurations that the installed OpenCLIP ships, in mappings/open_clip_configurations.yaml.

    python tools/record_configurations.py            write the file
    python tools/record_configurations.py --check    exit status 1 if it would change

Models are built on the meta device: names and shapes, no memory, no download.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the builder of full-size models is there

from peers import full_size
from torch import nn

from keymap.plan.describe import describe
from keymap.plan.model import view_model
from keymap.source.registry import registry

FILE = Path(__file__).resolve().parents[1] / "mappings" / "open_clip_configurations.yaml"
HEAD = """# yaml-language-server: $schema=../schemas/mapping.schema.json
# Written by tools/record_configurations.py; run it again for another release of OpenCLIP.
format: open_clip_configurations
kind: configurations
title: OpenCLIP's configurations, by the fingerprints of their towers
reference: open_clip/model_configs (open_clip_torch {version})
configurations:
"""


Prints = tuple[tuple[str, str], ...]


def measured(model: nn.Module) -> tuple[Prints, list[int]]:
    """The fingerprints of a model's towers, and how many positions each has."""
    known = registry()
    towers = describe(known, view_model(model, known.hub).layouts())
    prints = tuple((tower, found.fingerprint) for tower, found in towers.items())
    return prints, [found.sizes.get("positions", 0) for found in towers.values()]


def text(groups: Iterable[tuple[Prints, Mapping[str, Sequence[int]]]]) -> str:
    """The text of the file: names and their positions, by fingerprints."""
    lines = []
    for prints, names in groups:
        told = ", ".join(f"{tower}: {digest!r}" for tower, digest in prints)
        rows = ", ".join(f"{name}: [{', '.join(map(str, numbers))}]" for name, numbers in names.items())
        lines.append(f"  - {{{told}, names: {{{rows}}}}}\n")
    return HEAD.format(version=version("open_clip_torch")) + "".join(lines)


def recorded() -> str:
    """The text of the file for the installed OpenCLIP."""
    groups: dict[Prints, dict[str, list[int]]] = {}
    for name in full_size.names():
        prints, rows = measured(full_size.model(name))
        groups.setdefault(prints, {})[name] = rows
    return text(groups.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record the configurations that OpenCLIP ships.")
    parser.add_argument("--check", action="store_true", help="only see whether the file is fresh")
    check = parser.parse_args(arguments).check
    written = recorded()
    fresh = FILE.is_file() and FILE.read_text(encoding="utf-8") == written
    if check:
        print(f"{FILE.name} is {'fresh' if fresh else 'stale: run tools/record_configurations.py'}")
        return 0 if fresh else 1
    FILE.write_text(written, encoding="utf-8")
    print(f"{FILE.name}: {written.count('names:')} groups")
    return 0


if __name__ == "__main__":
    sys.exit(main())
