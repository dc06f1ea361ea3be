"""The commands. Each calls the library and returns an `Answer`; imports of torch wait until a command runs."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

import keymap
from keymap.cli import options
from keymap.cli.advice import in_options
from keymap.cli.answer import Answer, answers
from keymap.cli.names import complete_format
from keymap.cli.screen import Screen, progress_bar
from keymap.errors import printable

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cli"]

_DIFFERENT = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(keymap.__version__, "-V", "--version", prog_name="keymap", message="%(prog)s %(version)s")
def cli() -> None:
    """Load, check and convert checkpoints of the CLIP family.

    Exit codes: 0 right, 1 refused (of diff: different), 2 wrong usage, 130 interrupted. Every command takes --json.
    """


def _report(screen: Screen, text: str) -> None:
    """A report of the library: its first line, then a row for each of the others."""
    first, *others = in_options(text).splitlines()
    screen.line(first)
    rows = [line.strip().partition(": ") for line in others]
    screen.pairs((label, rest) if colon else ("", label) for label, colon, rest in rows)


def _checked_page(file: str, sources: Sequence[Path]) -> Path:
    """The path of a page to write, which is never that of a checkpoint.

    Raises:
        WriteError: it does not end as a page does, or cannot be written.
    """
    from keymap.write.place import check_place, in_words

    path = Path(file)
    if path.suffix not in (".html", ".htm"):
        raise keymap.WriteError(f"--html {shlex.quote(file)}: pass a name that ends with .html, for example plan.html")
    with in_words(path):
        target = Path(os.path.realpath(path))
        if target.suffix not in (".html", ".htm"):
            raise keymap.WriteError(f"--html {shlex.quote(file)}: is a link to {target}, which is no page; remove it")
        check_place(path, sources)
    return path


def _show_page(screen: Screen, html: str | None) -> None:
    if html is not None:
        screen.pairs([("page", html)])


def _write_page(path: Path, page: str) -> None:
    """Write a page of HTML, whole or not at all."""
    from keymap.write.place import whole_files

    with whole_files([path]) as parts:
        parts[0].write_text(page, encoding="utf-8")


# --- inspect -------------------------------------------------------------------------------------------------


@cli.command("inspect", short_help="Show what a checkpoint is.")
@options.apply(options.SOURCE, options.HUB, options.WRAPPER, options.UNSAFE)
@click.option("--tensors", is_flag=True, help="List every tensor with its shape and dtype.")
@answers
def inspect_command(path: str, hub: str | None, wrapper: str | None, unsafe_pickle: bool, tensors: bool) -> Answer:
    """Show what a checkpoint is. Needs no model and reads no weights.

    A file of no known format is not an error: the reasons are shown.
    """
    found = keymap.inspect_checkpoint(path, weights_only=not unsafe_pickle, wrapper=wrapper, hub=hub)

    def show(screen: Screen) -> None:
        _report(screen, str(found))
        if tensors:
            screen.title("tensors")
            entries = found.to_dict()["tensors"].items()
            screen.table(
                ("key", "shape", "dtype"), [(key, str(entry["shape"]), entry["dtype"]) for key, entry in entries]
            )

    return Answer(found.to_dict(), show)


# --- plan and load -------------------------------------------------------------------------------------------


@cli.command("plan", short_help="Show what a load would do.")
@options.apply(options.SOURCE, options.TARGET_MODEL)
@click.option(
    "--like",
    metavar="CHECKPOINT",
    type=options.PATH,
    help="Instead of a model: the names and shapes of this checkpoint, translated to the names of its hub. No "
    "setting is compared.",
)
@click.option("--like-wrapper", metavar="NAME", help="Which state dict of that checkpoint.")
@click.option(
    "--like-mapping", metavar="NAME|YAML", shell_complete=complete_format, help="The format of that checkpoint."
)
@click.option("--explain", metavar="KEY", help="Show how this tensor of the model is filled, and by which rules.")
@click.option("--html", metavar="FILE", type=options.PATH, help="Write the plan as a page of HTML.")
@options.request
@answers
def plan_command(
    path: str,
    model_name: str | None,
    like: str | None,
    like_wrapper: str | None,
    like_mapping: str | None,
    explain: str | None,
    html: str | None,
    **asked: Any,
) -> Answer:
    """Show what a load would do. Reads names, shapes and dtypes only.

    Pass --model or --like. The model is built without memory.
    """
    if (model_name is None) == (like is None):
        raise click.UsageError("pass either --model NAME or --like CHECKPOINT")
    arguments = options.load_arguments(**asked)
    from keymap.cli import targets

    page = _checked_page(html, [Path(path)]) if html is not None else None
    model: nn.Module
    if model_name is not None:
        model = targets.named(model_name)
    else:
        assert like is not None, "one of the two is given"
        hub = arguments["hub"] or (targets.hub_of_any_model(arguments["mapping"]) if like_mapping is None else None)
        options_of_like = arguments["facts"], arguments["weights_only"], hub
        model = targets.like(like, like_wrapper, like_mapping, *options_of_like)
    plan = keymap.plan_load(model, path, **arguments)
    explanation = plan.explain(explain) if explain is not None else None
    if page is not None:
        from keymap.picture import plan_page

        _write_page(page, plan_page(plan))

    def show(screen: Screen) -> None:
        if explanation is not None:
            for line in explanation.splitlines():
                screen.line(line)
        else:
            _report(screen, str(plan))
        _show_page(screen, html)

    return Answer({"plan": plan.to_dict(), "explanation": explanation, "html": html}, show)


@cli.command("load", short_help="Load into a new model and compare both sides.")
@options.apply(options.SOURCE)
@click.option(
    "--model",
    "model_name",
    metavar="NAME",
    required=True,
    shell_complete=options.complete_model,
    help="A configuration of OpenCLIP, for example ViT-B-32.",
)
@options.request
@answers
def load_command(path: str, model_name: str, **asked: Any) -> Answer:
    """Load a checkpoint into a new model, and compare both sides.

    The table shows the tensors, the sizes of the towers and the settings of the file and of the model. The model is
    thrown away.
    """
    arguments = options.load_arguments(**asked)
    from keymap.cli import parity, targets

    model = targets.named(model_name).to_empty(device="cpu")
    with warnings.catch_warnings(), progress_bar("load") as progress:
        warnings.simplefilter("ignore", keymap.ConfigurationWarning)  # the report has them
        report = keymap.load_checkpoint(model, path, progress=progress, **arguments).report
    wrapper = arguments["wrapper"] if isinstance(arguments["wrapper"], str) else None
    inspection = keymap.inspect_checkpoint(
        path, weights_only=arguments["weights_only"], wrapper=wrapper, hub=arguments["hub"] or report.plan.hub
    )
    rows = parity.parity(report.plan, inspection, model)
    equal = all(row.equal is not False for row in rows)

    def show(screen: Screen) -> None:
        _report(screen, str(report))
        screen.title("both sides")
        words = {True: "equal", False: "differs", None: "-"}
        screen.table(
            ("", "file", "model", "verdict"),
            [(row.name, *(_value(one) for one in (row.file, row.model)), words[row.equal]) for row in rows],
        )

    result = {"report": report.to_dict(), "parity": {"equal": equal, "rows": [row._asdict() for row in rows]}}
    return Answer(result, show)


def _value(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if type(value) is int else str(value)


# --- convert -------------------------------------------------------------------------------------------------


@cli.command("convert", short_help="Convert a checkpoint to another format.")
@click.argument("source", metavar="SRC", type=options.PATH)
@click.argument("destination", metavar="DST", type=options.PATH)
@click.option("--to", metavar="FORMAT", required=True, shell_complete=complete_format, help="The format to write.")
@options.reading
@click.option("--dtype", metavar="NAME", help="Cast floating tensors, for example to float16.")
@click.option("--max-shard-size", metavar="SIZE", help="Cut .safetensors into shards of this size, for example 5GB.")
@click.option("--overwrite", is_flag=True, help="Write into a folder with files; replace an earlier set of shards.")
@answers
def convert_command(
    source: str,
    destination: str,
    to: str,
    mapping: str | None,
    hub: str | None,
    wrapper: str | None,
    towers: Sequence[str],
    facts: Sequence[str],
    unsafe_pickle: bool,
    dtype: str | None,
    max_shard_size: str | None,
    overwrite: bool,
) -> Answer:
    """Convert a checkpoint to another format.

    The suffix of DST gives the container: .safetensors, .pt (.pth, .bin) or .npz. A DST that exists is replaced when
    the new file is whole. A DST without a suffix is a folder, with the configuration that the format's owner reads.
    """
    size: int | str | None = max_shard_size
    if max_shard_size is not None and max_shard_size.isdigit():
        size = int(max_shard_size)
    settings = options.settings_of(facts)
    with progress_bar("convert") as progress:
        written = keymap.convert_checkpoint(
            source,
            destination,
            to,
            mapping=mapping,
            hub=hub,
            wrapper=wrapper,
            towers=towers or None,
            facts=settings,
            dtype=dtype,
            max_shard_size=size,
            overwrite=overwrite,
            weights_only=not unsafe_pickle,
            progress=progress,
        )
    return Answer(written.to_dict(), lambda screen: _report(screen, str(written)))


# --- diff ----------------------------------------------------------------------------------------------------


@cli.command("diff", short_help="Compare two checkpoints.")
@click.argument("first", metavar="A", type=options.PATH)
@click.argument("second", metavar="B", type=options.PATH)
@click.option("--tolerance", type=float, default=0.0, metavar="X", help="The largest difference that counts as equal.")
@click.option("--check-dtype", is_flag=True, help="An unlike dtype is a difference.")
@options.sides
@answers
def diff_command(first: str, second: str, *, facts: Sequence[str], unsafe_pickle: bool, **asked: Any) -> Answer:
    """Compare two checkpoints, also of different formats.

    The exit code is 0 if they are equal, 1 if they differ or one is refused.
    """
    asked["towers"] = asked["towers"] or None
    asked |= {"facts": options.pairs_of(facts), "weights_only": not unsafe_pickle}
    found = keymap.compare_checkpoints(first, second, **asked)

    def show(screen: Screen) -> None:
        for line in in_options(str(found)).splitlines():
            screen.line(line)

    return Answer(found.to_dict(), show, 0 if found.equal else _DIFFERENT)


# --- formats -------------------------------------------------------------------------------------------------


@cli.command("formats", short_help="List the formats.")
@options.apply(options.HUB)
@answers
def formats_command(hub: str | None) -> Answer:
    """List the formats that keymap reads and writes, and the bridges between layouts."""
    from keymap.source.registry import hubs, registry

    entries = [
        {"name": name, "hub": each, "kind": registry(each).get(name).kind, "title": title}
        for each in (hubs().hubs if hub is None else (hubs().checked(hub),))
        for name, title in keymap.list_formats(each).items()
    ]

    def show(screen: Screen) -> None:
        rows = [(entry["name"], entry["hub"], entry["kind"], entry["title"]) for entry in entries]
        screen.table(("name", "hub", "kind", "files"), rows)

    return Answer({"formats": entries}, show)


@cli.command("explain", short_help="Describe a format.")
@click.argument("name", metavar="FORMAT", shell_complete=complete_format)
@options.apply(options.HUB)
@click.option("--html", metavar="FILE", type=options.PATH, help="Write the format as a page of HTML.")
@answers
def explain_command(name: str, hub: str | None, html: str | None) -> Answer:
    """Describe a format: its keys, and the keys of its hub that they become.

    FORMAT is a name that `keymap formats` lists, or the path of a mapping file.
    """
    from keymap.cli.explain import described, show_format
    from keymap.source.hubs import find_mapping

    page = _checked_page(html, [Path(name)]) if html is not None else None
    found = described(find_mapping(name, hub)[1])
    if page is not None:
        from keymap.picture import format_page

        _write_page(page, format_page(name, hub))

    def show(screen: Screen) -> None:
        show_format(screen, found)
        _show_page(screen, html)

    return Answer({**found, "html": html}, show)


# --- check ---------------------------------------------------------------------------------------------------


@cli.command("check", short_help="Check mapping files.")
@click.argument("files", metavar="[FILE]...", nargs=-1, type=options.PATH)
@answers
def check_command(files: Sequence[str]) -> Answer:
    """Check mapping files, or all .yaml files of a folder; without FILE those that keymap ships.

    Every fault is printed as file:line:column.
    """
    from keymap.source.check_files import check_files, shipped_files

    found = check_files([Path(file) for file in files] or shipped_files())

    def show(screen: Screen) -> None:
        rows = [(one.name, one.kind, str(one.rules), one.file) for one in found.right]
        if rows:
            screen.table(("right", "kind", "rules", "file"), rows)
        for fault in found.faults:
            screen.line(fault)
        screen.line(f"{found.untouched} of {found.files} files are right, faults: {len(found.faults)}")

    right = [{"file": one.file, "name": one.name, "kind": one.kind, "rules": one.rules} for one in found.right]
    result = {"right": right, "faults": list(found.faults), "files": found.files}
    return Answer(result, show, 1 if found.faults else 0)


# --- completion ----------------------------------------------------------------------------------------------


@cli.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@answers
def completion_command(shell: str) -> Answer:
    """Print the script that makes a shell complete the commands, options and names of keymap.

    For bash: eval "$(keymap completion bash)" in ~/.bashrc.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "the choices are shells that click knows"
    script = kind(cli, {}, "keymap", "_KEYMAP_COMPLETE").source()

    def show(_screen: Screen) -> None:
        for line in script.splitlines():
            click.echo(printable(line))

    return Answer({"shell": shell, "script": script}, show)
