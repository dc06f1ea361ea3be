"""The page: the template with a picture's data. It names no other file and no network address."""

from __future__ import annotations

import hashlib
import html
import json
import re
from base64 import b64encode
from importlib.resources import files

from keymap.errors import PlanError
from keymap.picture.data import Picture, picture_of, plain
from keymap.picture.sample import picture_of_format
from keymap.plan.collecting import without_gc
from keymap.plan.plan import Plan
from keymap.source.hubs import PathLike, find_mapping

__all__ = ["format_page", "plan_page", "render"]

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_FIELD = re.compile(r"\{\{(\w+)\}\}")
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@without_gc()
def plan_page(plan: Plan) -> str:
    """A plan as one HTML page: the file's keys on the left, the model's on the right, a ribbon for each source.

    Args:
        plan: as `plan_load` returns it, or ``.plan`` of a report.

    Returns:
        The page, in ASCII. It needs no network and no other file. Write it to a file and open that in a browser.

    Raises:
        PlanError: the argument is not a plan.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"expected a plan, as plan_load() returns it, not {type(plan).__name__}")
    return render(picture_of(plan))


@without_gc()
def format_page(format: PathLike, hub: str | None = None) -> str:
    """The rules of a format as the same page, without a checkpoint.

    The keys are made up from the rules: there may be any number of layers, and shapes are shown only where an
    operation changes them.

    Args:
        format: the name of a format or a bridge, or the path of a mapping file.
        hub: the name of its hub, where several have a format of that name.

    Returns:
        The page, as `plan_page` returns it.

    Raises:
        MappingError: there is no such format or file, the file is wrong, or it has no rules.
    """
    known, mapping = find_mapping(format, hub)
    return render(picture_of_format(mapping, known))


def render(picture: Picture) -> str:
    """The page of a picture, in ASCII."""
    template = files("keymap.picture").joinpath("page.html").read_text(encoding="utf-8")
    scripts = [hashlib.sha256(code.encode()).digest() for code in _SCRIPT.findall(template)]
    data = plain(picture)
    values = {
        "scripts": " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in scripts),
        "title": html.escape(data["title"]).encode("ascii", "xmlcharrefreplace").decode(),
        "data": json.dumps(data, separators=(",", ":")).translate(_ESCAPES),
    }
    return _FIELD.sub(lambda match: values[match.group(1)], template)
