"""How long the first use takes where a thousand mapping files of other hubs are installed.

    python tools/bench_hubs.py

Prints seconds of processor time for several numbers of files: to read their heads, to find the hub of a CLIP, to
compile the files of one small hub, and to compile those that keymap ships. Only the first two may grow with the files.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from keymap.language.header import read_header
from keymap.source.registry import Registry, hubs

FILES_OF_A_HUB = 10
HUB = (
    "format: {hub}\nkind: hub\ntitle: a hub\ndetect: {{all: [{hub}.w]}}\ntowers:\n  text:\n    {hub}.(.+): {hub}.\\1\n"
)
FORMAT = (
    "format: {name}\nhub: {hub}\ntitle: a format\ndetect: {{all: [{name}.w]}}\ntowers:\n  text:\n"
    "    {name}.(w|b): {hub}.\\1\n    {name}.layers.(\\d+).(q|k|v).weight: {{to: {hub}.layers.\\1.qkv, concat: 0}}\n"
)


def write(folder: Path, count: int) -> None:
    """Hubs of ten files each."""
    for number in range(count // FILES_OF_A_HUB):
        hub = f"hub{number}"
        (folder / f"{hub}.yaml").write_text(HUB.format(hub=hub), encoding="utf-8")
        for name in (f"{hub}_{form}" for form in range(1, FILES_OF_A_HUB)):
            (folder / f"{name}.yaml").write_text(FORMAT.format(hub=hub, name=name), encoding="utf-8")


def measured(folder: Path) -> list[float]:
    """The seconds of each step."""
    shipped = list(hubs().files)
    clip = {"visual.conv1.weight": torch.empty(1), "token_embedding.weight": torch.empty(1)}
    times = [time.process_time()]
    others = sorted(folder.glob("*.yaml"))
    known = Registry({path: read_header(path, str(path)) for path in (*shipped, *others)})
    times.append(time.process_time())
    (hub,) = known.claiming(clip)
    times.append(time.process_time())
    known.catalogue(known.hubs[-1])
    times.append(time.process_time())
    known.catalogue(hub)
    times.append(time.process_time())
    return [after - before for before, after in pairwise(times)]


def main() -> int:
    print("files   heads  hub of a CLIP  a small hub  keymap's own")
    for count in (0, 10, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), count)
            heads, claim, small, own = measured(Path(folder))
        print(f"{count:5} {heads:7.3f} {claim:14.3f} {small:12.3f} {own:13.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
