"""Check mapping files; `keymap check` does the same.

    python tools/check_mappings.py                     all files of mappings/
    python tools/check_mappings.py my_format.yaml ...  these files, together with the shipped ones

Prints one line for each file, and every fault as file:line:column. The exit status is 1 if there are faults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keymap.errors import MappingError
from keymap.source.check_files import check_files, shipped_files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check mapping files; exit status 1 if one is wrong.")
    parser.add_argument("files", nargs="*", type=Path, help="mapping files; default: all shipped files")
    try:
        found = check_files(parser.parse_args(arguments).files or shipped_files())
    except MappingError as error:
        print(error)
        return 1
    for one in found.right:
        print(f"{one.name:24} {one.kind:11} {one.rules:4} rules {one.milliseconds:8.1f} ms")
    for fault in found.faults:
        print(fault)
    number = len(found.faults)
    print(f"{found.untouched} of {found.files} files are right, {number} fault{'' if number == 1 else 's'}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
