"""Run the examples of the documents, and compare what they print with what the documents show.

    python tools/run_docs.py            run every document that holds examples; exit status 1 if one prints otherwise
    python tools/run_docs.py --write    write what the examples print into the documents

Fenced blocks of a document are run in order, in an empty folder:

    python     runs; all blocks of a document share one session
    text       what the block before it prints; times and the place of the repository may differ
    yaml       a mapping is written to a file of its name; a part of one must be found in the files of mappings/
    console    lines that begin with $ run, and print the lines that follow; the programs are python and keymap, and
               `# exit N` after a command says with which status it ends
    mermaid    a drawing

A python block that prints must be followed by a text block. A block of any other kind is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import small_models

import keymap
from keymap.cli.main import main as main_of_keymap
from keymap.source import registry

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/api.md",
    "docs/command.md",
    "docs/how-it-works.md",
    "docs/recipes.md",
    "docs/rule-language.md",
    "docs/transformers.md",
    "docs/tutorial.md",
)
FOLDERS = ("tools", "tests", "mappings", "schemas", "keymap")  # that examples see beside their own files
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TIME = re.compile(r"\s*\b[\d.]+ (ms|s)\b")


# --- files that examples load --------------------------------------------------------------------------------


def clip_vit_base_patch32(folder: Path) -> None:
    """A folder with the names, shapes and settings of openai/clip-vit-base-patch32; its values are random.

    Like the published file it holds position_ids, which transformers wrote before 4.31.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.CLIPConfig(text_config={"eos_token_id": 2})
    with torch.device("meta"):
        names = {key: value.shape for key, value in transformers.CLIPModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in names.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


FILES: dict[str, Callable[[Path], None]] = {"clip-vit-base-patch32": clip_vit_base_patch32, **small_models.FILES}


def prepare(text: str, store: Path, folder: Path) -> None:
    """Put the files that a document names into its folder; they are made once, in the store."""
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    for name, make in FILES.items():
        if re.search(rf'["\s]{re.escape(name)}\b', text):
            if not (store / name).exists():
                make(store / name)
            if (store / name).is_file():
                os.link(store / name, folder / name)
                continue
            (folder / name).mkdir()
            for file in (store / name).iterdir():
                os.link(file, folder / name / file.name)


# --- blocks --------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A fenced block: its language and text, its line, and the start and end of its text in the document."""

    language: str
    text: str
    line: int
    start: int
    end: int


def blocks(document: str) -> list[Block]:
    return [
        Block(m.group(1), m.group(2), document[: m.start()].count("\n") + 1, m.start(2), m.end(2))
        for m in FENCE.finditer(document)
    ]


@dataclass
class Outcome:
    """What a document shows and what its examples print, for every block that shows output."""

    shown: list[tuple[Block, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def plain(printed: str, folder: Path) -> str:
    """Printed text without the places of this machine."""
    for place in (folder.resolve(), folder, ROOT):
        printed = printed.replace(f"{place}/", "")
    return "".join(f"{line.rstrip()}\n" for line in printed.strip().splitlines())


def without_times(text: str) -> str:
    return TIME.sub(r" _ \1", text).strip()


def _in_a_mapping(text: str) -> Iterator[str]:
    """The lines of a part of a mapping that no shipped file has."""
    there = {
        line.strip() for file in (ROOT / "mappings").rglob("*.yaml") for line in file.read_text("utf-8").split("\n")
    }
    yield from (line for line in text.splitlines() if line.strip() not in there)


def _console(text: str, folder: Path) -> tuple[str, list[str]]:
    """A console block as it runs now, and what went wrong."""
    now, faults = [], []
    for run in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line = run.partition("\n")[0]
        command, _, wanted = line.partition("  # exit ")
        words = shlex.split(command)
        if words[0] == "keymap":
            status, printed = _keymap(words[1:])
        elif words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False, cwd=folder)
            status, printed = done.returncode, done.stdout + (done.stderr if done.returncode else "")
        else:
            faults.append(f"{command}: only python and keymap run here")
            continue
        now.append(f"$ {line}\n{plain(printed, folder)}")
        if status != int(wanted or 0):
            faults.append(f"{command}: exit status {status}: {printed}")
    return "".join(now), faults


def _keymap(words: Sequence[str]) -> tuple[int, str]:
    """The exit status of the command keymap, and what it prints on both streams."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main_of_keymap(words)
    return status, out.getvalue()


def perform(document: str, name: str, folder: Path) -> Outcome:
    """Run a document in a folder, which must be the working folder, as a reader would."""
    session: dict[str, object] = {"__name__": "document"}
    outcome, printed = Outcome(), ""
    for block in blocks(document):
        where = f"{name}, line {block.line}"
        if printed and block.language != "text":
            outcome.faults.append(f"{where}: the block before prints, and no text block shows it:\n{printed}")
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * block.line + block.text, name, "exec"), session)
            printed = plain(out.getvalue(), folder)
            continue
        if block.language == "text":
            outcome.shown.append((block, printed))
        elif block.language == "yaml":
            found = re.search(r"^format: (\w+)$", block.text, re.MULTILINE)
            if found is not None:
                (folder / f"{found.group(1)}.yaml").write_text(block.text, encoding="utf-8")
            else:
                outcome.faults += [f"{where}: no file of mappings/ has {line!r}" for line in _in_a_mapping(block.text)]
        elif block.language == "console":
            now, faults = _console(block.text, folder)
            outcome.shown.append((block, now))
            outcome.faults += [f"{where}: {fault}" for fault in faults]
        elif block.language != "mermaid":
            outcome.faults.append(f"{where}: a block of {block.language or 'no language'} that nothing checks")
        printed = ""
    if printed:
        outcome.faults.append(f"{name}: the last block prints, and no text block shows it:\n{printed}")
    return outcome


def rewritten(document: str, outcome: Outcome) -> str:
    """The document with what its examples print now; a line that differs by a time alone stays as it is."""
    for block, printed in reversed(outcome.shown):
        if without_times(block.text) != without_times(printed):
            before = {without_times(line): line for line in block.text.splitlines()}
            lines = [before.get(without_times(line), line) for line in printed.splitlines()]
            text = "".join(f"{line}\n" for line in lines)
            document = document[: block.start] + text + document[block.end :]
    return document


# --- all -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Run there, with nothing registered but what the document registers, and with gradients."""
    import torch

    before, known = Path.cwd(), list(registry._registry)
    registry._registry[:] = []
    os.chdir(folder)
    try:
        with torch.enable_grad(), small_models.known_to_libraries():
            yield
    finally:
        os.chdir(before)
        registry._registry[:] = known


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the examples of the documents.")
    parser.add_argument("documents", nargs="*", default=EXAMPLES, help="relative to the repository; all of them")
    parser.add_argument("--write", action="store_true", help="write what the examples print into the documents")
    asked = parser.parse_args(arguments)
    import warnings

    warnings.simplefilter("ignore", keymap.ConfigurationWarning)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="keymap-docs-") as name:
        (store := Path(name) / "store").mkdir()
        for place in asked.documents:
            text = (ROOT / place).read_text(encoding="utf-8")
            (folder := Path(name) / place.replace("/", "-")).mkdir()
            prepare(text, store, folder)
            with working_folder(folder):
                outcome = perform(text, place, folder)
            new = rewritten(text, outcome)
            for fault in outcome.faults:
                print(fault)
            print(f"{place}: {len(outcome.shown)} outputs, {'as shown' if new == text else 'not as shown'}")
            bad += bool(outcome.faults) or (new != text and not asked.write)
            if asked.write:
                (ROOT / place).write_text(new, encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
