"""Write docs/coverage.md: what the tests show for every configuration that OpenCLIP ships and every format.

    make test                                  runs the tests, which write build/proofs.json
    python tools/make_coverage.py              writes the page from it
    python tools/make_coverage.py --check      writes nothing; exit status 1 if the page is stale or a cell got worse

A cell combines two results: a test that plans the load of a full-size file into the configuration (names and shapes),
and, for each tower that the file fills, the tests on a small model with the same keys.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the lists of files are there

from peers import full_size, sources

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "coverage.md"
PROOFS = ROOT / "build" / "proofs.json"
WORDS = ("not proved", "names and shapes", "bit-equal", "parity")  # the weakest first
NONE = "–"
TITLES = {  # of the groups, by a configuration in each, in the order of the page
    "ViT-B-16": "OpenCLIP's ViT",
    "ViT-H-14-CLIPA": "OpenCLIP's ViT without a norm before its blocks (CLIPA)",
    "ViT-M-16-alt": "OpenCLIP's ViT with layer scales",
    "RN50": "OpenCLIP's ResNet",
    "ViT-B-16-SigLIP": "SigLIP and SigLIP 2: timm's ViT with a pooling head",
    "ViT-SO400M-16-SigLIP-i18n-256": "SigLIP without text projection",
    "convnext_base": "timm's ConvNeXt",
    "convnext_large_d": "timm's ConvNeXt, a projection of two layers",
    "ViTamin-S": "timm's ViTamin",
    "ViTamin-XL-256": "timm's ViTamin without positions",
    "swin_base_patch4_window7_224": "timm's Swin",
    "vit_medium_patch16_gap_256": "timm's ViT, pooled by average",
    "vit_relpos_medium_patch16_cls_224": "timm's ViT with relative positions",
    "EVA02-B-16": "EVA-02, B and L",
    "EVA01-g-14": "EVA-01, and EVA-02 E",
    "PE-Core-B-16": "Perception Encoder",
    "PE-Core-bigG-14-448": "Perception Encoder without class token",
    "MobileCLIP-S1": "MobileCLIP: timm's FastViT of four stages",
    "MobileCLIP2-S3": "MobileCLIP 2: timm's FastViT of five stages",
    "MobileCLIP-B": "MobileCLIP: timm's ViT with a stem of convolutions",
    "MobileCLIP2-L-14": "MobileCLIP 2: timm's ViT of CLIP",
    "coca_ViT-B-32": "CoCa",
    "coca_base": "CoCa without attention pool",
    "coca_roberta-ViT-B-32": "CoCa with a RoBERTa text tower",
    "roberta-ViT-B-32": "OpenCLIP's ViT and a RoBERTa or XLM-RoBERTa text tower",
    "mt5-base-ViT-B-32": "OpenCLIP's ViT and an mT5 text tower",
    "nllb-clip-base": "OpenCLIP's ViT and an NLLB text tower",
    "nllb-clip-base-siglip": "SigLIP's ViT and an NLLB text tower",
}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """The result for one format and one configuration: the weakest word of its towers."""

    word: str
    towers: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        halves = [tower for tower in self.towers if tower != "scale"]
        return self.word if self.whole or self.word == WORDS[0] else f"{self.word} ({', '.join(halves)})"


Cells = Mapping[tuple[str, str], Cell]


# --- proofs --------------------------------------------------------------------------------------------------


Proved = Mapping[tuple[str, str, str], set[int]]


def strengths(proofs: Iterable[Record]) -> Proved:
    """The results of the tests by format, tower and layout, as positions in ``WORDS``."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for proof in proofs:
        for tower, layout in proof["towers"].items():
            found.setdefault((proof["format"], tower, layout), set()).add(WORDS.index(proof["word"]))
    return found


def cell(record: Record, proved: Proved) -> Cell:
    """The word for one planned load: the best result of each tower, and of these the weakest.

    If the load warns, the embeddings differ, so the word is at most bit-equal. Scalars have no embedding: bit-equal is
    the best result for them, and it does not lower the word.
    """
    most = WORDS.index("bit-equal") if record["warnings"] else len(WORDS) - 1
    found = []
    for tower, layout in record["towers"].items():
        strength = max(word for word in proved.get((record["format"], tower, layout), {1}) if word <= most)
        found.append(most if tower == "scale" and strength > 1 else strength)
    return Cell(WORDS[min(found)], tuple(record["towers"]), record["whole"])


def short(warning: str) -> str:
    """The first part of a load's warning: the two values."""
    return re.sub(r" \((format|config\.json)[^)]*\)", "", warning).partition(", so ")[0]


# --- the page ------------------------------------------------------------------------------------------------

HEAD = """<!-- Written by tools/make_coverage.py from a run of the tests: `make test`, then `make coverage-page`. -->
# Coverage

This page covers all {count} configurations that OpenCLIP {version} ships, and every format that keymap reads. A cell
says what the tests of this repository show for a load of a file of that format into that configuration.

| word | what the tests show |
|---|---|
| parity | the loaded model computes the same embeddings as the library that wrote the file, at most 2e-5 apart |
| bit-equal | every tensor has the same bits as after the library's own loader or converter, or a conversion by hand |
| names and shapes | every key of a full-size file and every tensor of the model is used, and all shapes agree |
| {none} | there are no such files |

*Names and shapes* are tested at full size for every cell. The key list comes from the code of the library that writes
the format. The model is on the meta device. The plan of the load is complete and strict, and resizes nothing.

*Parity* and *bit-equal* are tested on small models with random weights. The result holds for a configuration whose
towers have the same keys as the small model's, apart from the number of blocks. A cell shows the weakest of its towers.

Settings that are not stored in the weights (activations, head counts, eps of norms, pooling) are compared with the
library's code or its configuration file. If OpenCLIP's configuration has another value, the load warns, the embeddings
differ a little, and the cell says at most bit-equal.

A cell with one word is about the whole file. `(image)` or `(text)` means: the file holds only this tower, or its other
tower has no place in this configuration. Such a load passes `towers=`. A cell exists if the library's code can build
the tower, whether or not somebody has published such a file.
"""


def names(found: Sequence[str], group: Sequence[str]) -> str:
    """The configurations for which something holds, or the exceptions; empty for the whole group."""
    without = [name for name in group if name not in found]
    if not without:
        return ""
    return f" (all but {', '.join(without)})" if len(without) < len(found) else f" ({', '.join(found)})"


def code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def merged(facts: Iterable[tuple[str, str, str]], group: Sequence[str]) -> list[str]:
    """Lines for (format, what, configuration); formats with the same text and the same configurations share a line."""
    by_format: dict[tuple[str, str], list[str]] = {}
    for form, what, name in facts:
        by_format.setdefault((form, what), []).append(name)
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (form, what), found in by_format.items():
        lines.setdefault((what, tuple(found)), []).append(form)
    return [f"{code(forms)}: {what}{names(found, group)}" for (what, found), forms in lines.items()]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def usual() -> dict[str, str]:
    """For each format the most frequent reason why a configuration has no such file."""
    counted: dict[str, Counter[str]] = {form: Counter() for form in sources.FORMATS}
    for name in full_size.names():
        for form, answer in sources.of(name).items():
            if isinstance(answer, str):
                counted[form][answer] += 1
    return {form: reasons.most_common(1)[0][0] if reasons else "" for form, reasons in counted.items()}


def group_page(title: str, group: Sequence[str], records: Mapping[tuple[str, str], Record], cells: Cells) -> list[str]:
    """The table of a group of configurations, and the remarks below it."""
    answers = {name: sources.of(name) for name in group}
    columns = [form for form in sources.FORMATS if any(not isinstance(answers[n][form], str) for n in group)]
    rows = [[name, *(str(cells.get((name, form), NONE)) for form in columns)] for name in group]
    lines = [f"## {title}", "", *table(["configuration", *(f"`{form}`" for form in columns)], rows), ""]
    found = [records[name, form] for form in columns for name in group if (name, form) in records]
    lacking = [(r["format"], "the file has no projection to CLIP's embedding: pass `strict=False`", r) for r in found]
    remarks = [(form, text, r["configuration"]) for form, text, r in lacking if r["lacks"]]
    remarks += [
        (r["format"], f"a load warns: {short(text)}", r["configuration"]) for r in found for text in r["warnings"]
    ]
    common = usual()
    for form in sources.FORMATS:
        for name in group:
            answer = answers[name][form]
            if isinstance(answer, str) and (form in columns or answer != common[form]):
                remarks.append((form, f"no such files: {answer}", name))
    return [*lines, *(f"- {line}" for line in merged(remarks, group)), *([""] if remarks else [])]


def groups(records: Mapping[tuple[str, str], Record]) -> list[tuple[str, list[str]]]:
    """Groups of configurations with the same class and the same layouts, each with a title."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in full_size.names():
        record = records.get((name, "open_clip"))
        key = (record["classes"][0], *record["towers"].values()) if record else ("",)
        found.setdefault(key, []).append(name)
    titled = []
    for key, group in found.items():
        known = next((name for name in TITLES if name in group), None)
        record = records.get((group[0], "open_clip"))
        words = "{}: {} and {}".format(*record["classes"]) if record else "Not loaded"
        order = list(TITLES).index(known) if known else len(TITLES)
        titled.append((order, TITLES[known] if known and key != ("",) else words, group))
    return [(title, group) for _, title, group in sorted(titled)]


def page(proofs: Sequence[Record]) -> str:
    """The text of docs/coverage.md."""
    proved = strengths(proofs)
    planned = [proof for proof in proofs if proof["word"] == WORDS[1]]
    records = {(proof["configuration"], proof["format"]): proof for proof in planned if "configuration" in proof}
    cells: dict[tuple[str, str], Cell] = {}
    for name in full_size.names():
        for form, answer in sources.of(name).items():
            if not isinstance(answer, str):
                record = records.get((name, form))
                cells[name, form] = cell(record, proved) if record else Cell(WORDS[0], (), False)
    lines = [HEAD.format(count=len(full_size.names()), version=version("open_clip_torch"), none=NONE)]
    lines += ["## In short", ""]
    shown = [word for word in reversed(WORDS) if word != WORDS[0] or any(c.word == word for c in cells.values())]
    rows = []
    for form, reason in usual().items():
        words = [found.word for (_, other), found in cells.items() if other == form]
        counts = [str(words.count(word) or "") for word in shown]
        rows.append([f"[{form}](formats/{form}.md)", str(len(words) or ""), *counts, reason])
    lines += table(
        [
            "format",
            "configurations",
            *shown,
            "why the others have no such files, unless said below",
        ],
        rows,
    )
    lines += [""]
    for title, group in groups(records):
        lines += group_page(f"{title} ({len(group)})", group, records, cells)
    lines += relatives({proof["relative"]: proof for proof in planned if "relative" in proof}, proved)
    lines += families([proof for proof in proofs if "hub" in proof])
    return "\n".join(lines).rstrip() + "\n"


def relatives(records: Mapping[str, Record], proved: Proved) -> list[str]:
    """Models that OpenCLIP can build and has no configuration for."""
    rows = []
    for name, relative in sources.RELATIVES.items():
        found = cell(records[name], proved) if name in records else Cell(WORDS[0], (), False)
        rows.append([name.partition(", ")[0], f"`{relative.form}`", relative.target, str(found)])
    return [
        "## Models without a configuration",
        "",
        "OpenCLIP has no configuration for these models, but it builds them from a changed one. At full size:",
        "",
        *table(["model", "format", "loads into", "tests show"], rows),
        "",
        '- TinyCLIP\'s "auto" models are pruned block by block. OpenCLIP has no model with such blocks.',
        "- For LiT models with a BERT text tower, the image tower loads into the same models.",
        "",
    ]


def families(records: Sequence[Record]) -> list[str]:
    """Formats of models outside CLIP."""
    rows = []
    for record in sorted(records, key=lambda one: (one["hub"], one["example"])):
        form, _, more = record["example"].partition(" ")
        model = f"{record['hub']}: {form}{', ' if more else ''}{more}"
        link = f"[{form}](formats/{record['hub']}/{form}.md)"
        rows.append([model, link, record["peer"], record["word"], record["way_back"]])
    return [
        "## Models outside CLIP",
        "",
        "Small models with random weights. The way back is bit-equal if it writes the file's own tensors. It is",
        "rounded if some of them are computed and differ in their last bits.",
        "",
        *table(["model", "format", "compared with", "tests show", "way back"], rows),
        "",
    ]


# --- the committed page --------------------------------------------------------------------------------------


def read_cells(text: str) -> dict[tuple[str, str], str]:
    """The cells of a page, by configuration (or model) and format."""
    found: dict[tuple[str, str], str] = {}
    columns: list[str] = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.strip("|").split(" | ")] if line.startswith("|") else []
        if parts and parts[0] in ("configuration", "model"):
            columns = [part.strip("`") for part in parts]
        elif not parts:
            columns = []
        elif columns[:1] == ["configuration"] and parts[0] != "---":
            found |= {(parts[0], form): text for form, text in zip(columns[1:], parts[1:], strict=True)}
        elif columns[:1] == ["model"] and parts[0] != "---":
            found[parts[0], re.sub(r"\[(\w+)\].*", r"\1", parts[1].strip("`"))] = parts[3]
    return found


def rank(text: str) -> tuple[int, int]:
    """The strength of a cell: its word, and whether it is about the whole file."""
    word, _, part = text.partition(" (")
    return (WORDS.index(word), 0 if part else 1) if word in WORDS else (-1, 0)


def worse(old: str, new: str) -> list[str]:
    """The cells that are weaker than before."""
    before, after = read_cells(old), read_cells(new)
    return [
        f"{name}, {form}: was {text}, is {after.get((name, form), NONE)}"
        for (name, form), text in before.items()
        if any(now < was for now, was in zip(rank(after.get((name, form), NONE)), rank(text), strict=True))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the coverage page from what a run of the tests proved.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is stale")
    parser.add_argument("--proofs", type=Path, default=PROOFS, help="the file that `make test` wrote")
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    if not asked.proofs.is_file():
        print(f"{asked.proofs} is not there: run `make test` first")
        return 1
    run = json.loads(asked.proofs.read_text(encoding="utf-8"))
    if run["failed"]:
        print(f"{len(run['failed'])} tests failed in that run, the first is {run['failed'][0]}; no page is made of it")
        return 1
    old = asked.page.read_text(encoding="utf-8") if asked.page.is_file() else ""
    new = page(run["proofs"])
    lost = worse(old, new)
    for line in lost:
        print(f"worse: {line}")
    if asked.check:
        print(f"{asked.page.name} is {'fresh' if old == new else 'stale: run `make coverage-page` after `make test`'}")
        return 0 if old == new else 1
    asked.page.write_text(new, encoding="utf-8")
    print(f"{asked.page.name}: {len(read_cells(new))} cells, {len(lost)} worse than before")
    return 0


if __name__ == "__main__":
    sys.exit(main())
