"""Breaking one rule of a shipped mapping at a time: rows of text, and what follows from each.

A row names the mapping, what is wrong and what follows (``differs`` or ``refused``); then what is taken out (``-``) and
what is put there instead (``+``).
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import CLEAR, LIMIT
from peers.common import max_diff
from safetensors.torch import save_file
from torch import Tensor, nn

import keymap
from keymap.language.header import read_header
from keymap.source.registry import Registry

MAPPINGS = Path(__file__).parents[2] / "mappings"
Edits = list[tuple[str, str]]


def parsed(rows: str) -> Iterator[Any]:
    """(name, what follows, edits) of each row, as parameters of a test."""
    for row in re.split(r"\n(?![-+])", rows.strip()):
        head, _, body = row.partition("\n")
        name, what, follows = head.split(": ")
        edits = []
        for old, new in re.findall(r"((?:^- .*\n)+)((?:^\+.*(?:\n|$))+)", body, re.MULTILINE):
            edits.append(tuple("\n    ".join(line[2:] for line in part.splitlines()) for part in (old, new)))
        yield pytest.param(name, follows, edits, id=f"{name}: {what}")


def file_of(form: str) -> Path:
    """The file of a shipped mapping."""
    return next(MAPPINGS.rglob(f"{form}.yaml"))


def text_of(form: str, lookups: str = "") -> str:
    """A mapping with the tables and lookups that it uses written into it, so that they can be broken too.

    ``lookups`` are further lines of that section, which rows use.
    """
    text = file_of(form).read_text(encoding="utf-8")
    uses = re.search(r"^uses: \[([\w, ]+)\]\n", text, re.MULTILINE)
    sections = [("lookups", lookups)] if lookups else []
    if uses is not None:
        text = text.replace(uses[0], "")
        for other in uses[1].split(", "):
            used = file_of(other).read_text(encoding="utf-8")
            sections += re.findall(r"^(tables|lookups|configs):\n((?:  .*\n)+)", used, re.MULTILINE)
    for section, body in sections:
        if f"\n{section}:\n" not in text:
            text += f"{section}:\n"
        text = text.replace(f"\n{section}:\n", f"\n{section}:\n{body}", 1)
    return text


def edited(form: str, text: str, edits: Edits) -> str:
    """The text with these edits; a row whose edit is no longer in the file fails."""
    for old, new in edits:
        assert old in text, f"{form}.yaml no longer says {old!r}: adapt this row"
        text = text.replace(old, new, 1)
    return text


def use(form: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Make keymap use this text for a mapping; the path to give as ``mapping=``, None for a bridge."""
    if "kind: bridge" not in text:
        (folder / "broken.yaml").write_text(text.replace(f"format: {form}\n", "format: broken\n"), encoding="utf-8")
        return folder / "broken.yaml"
    copied = Path(shutil.copytree(MAPPINGS, folder / "mappings"))
    (copied / file_of(form).relative_to(MAPPINGS)).write_text(text, encoding="utf-8")
    known = Registry({path: read_header(path, str(path)) for path in sorted(copied.rglob("*.yaml"))})
    monkeypatch.setattr("keymap.source.registry._registry", [known])
    return None


@dataclass(frozen=True)
class Case:
    """A peer's file, the model that it loads into, and what the peer computes.

    ``outputs`` are the image embedding, the text embedding, the logit scale and the logit bias; None is not compared.
    """

    form: str
    state: Mapping[str, Tensor]
    model: nn.Module
    outputs: Sequence[Tensor | None]
    image: Tensor | None = None
    ids: Tensor | None = None
    towers: tuple[str, ...] | None = None

    @torch.no_grad()
    def distance(self, path: Path, mapping: Path | None) -> float:
        """Load the file and compare; the largest difference of any output."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", keymap.ConfigurationWarning)
            keymap.load_checkpoint(self.model, path, mapping=mapping, towers=self.towers)
        ways = (
            lambda: self.model.encode_image(self.image),
            lambda: self.model.encode_text(self.ids),
            lambda: self.model.logit_scale,
            lambda: self.model.logit_bias,
        )
        pairs = [(way(), peer) for way, peer in zip(ways, self.outputs, strict=False) if peer is not None]
        return max(max_diff(got.reshape(peer.shape), peer) for got, peer in pairs)


def rule_tests(
    rows: str,
    cases: Mapping[str, Callable[[], Case]],
    lookups: str | Mapping[str, str] = "",
    refusals: tuple[type[keymap.KeymapError], ...] = (keymap.PlanError, keymap.DetectionError),
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two tests of a format's rows: the rules as they are pass, and each broken one is seen.

    Seen means that the load is refused, or that the outputs clearly differ; not that the file is a bad mapping, for
    the broken file is a good mapping of something else.

    Args:
        rows: see the top of this module.
        cases: by the name of a row, a function that builds the peer. Each is called once.
        lookups: further lines of the section ``lookups``, which the rows use; of all rows, or by name.
        refusals: the errors that count as a refusal.
    """
    build = cache(lambda name: cases[name]())

    def distance(name: str, edits: Edits, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
        case = build(name)
        more = lookups if isinstance(lookups, str) else lookups.get(name, "")
        text = edited(case.form, text_of(case.form, more), edits)
        path = folder / "peer.safetensors"
        save_file({key: value.detach().contiguous().clone() for key, value in case.state.items()}, path)
        return case.distance(path, use(case.form, text, folder, monkeypatch))

    @pytest.mark.parametrize("name", cases)
    def test_the_unbroken_rules_give_the_outputs_of_the_peer(name, tmp_path, monkeypatch):
        assert distance(name, [], tmp_path, monkeypatch) <= LIMIT

    @pytest.mark.parametrize(("name", "follows", "edits"), list(parsed(rows)))
    def test_a_broken_rule_is_refused_or_changes_the_outputs(name, follows, edits, tmp_path, monkeypatch):
        if follows == "refused":
            with pytest.raises(refusals):
                distance(name, edits, tmp_path, monkeypatch)
        else:
            assert distance(name, edits, tmp_path, monkeypatch) > CLEAR

    return test_the_unbroken_rules_give_the_outputs_of_the_peer, test_a_broken_rule_is_refused_or_changes_the_outputs
