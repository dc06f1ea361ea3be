"""`import keymap` is quick: the public names are imported on first use, and work as ever."""

from __future__ import annotations

import doctest
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import keymap

ROOT = Path(__file__).parents[2]


def process(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_package_imports_no_torch_before_a_name_needs_it():
    heavy = "{'torch', 'numpy', 'jsonschema', 'yaml'} & set(sys.modules)"
    done = process(
        f"import sys, keymap; keymap.KeymapError; keymap.schema_path(); dir(keymap); assert not {heavy}, {heavy}"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(keymap.__all__))
def test_every_public_name_is_there_and_is_kept(name):
    value = getattr(keymap, name)
    assert value is getattr(keymap, name) is vars(keymap)[name]
    assert name in dir(keymap)


def test_all_names_are_imported_with_a_star():
    code = "from keymap import *; import keymap; assert all(n in globals() for n in keymap.__all__ if n[0] != '_')"
    done = process(code)
    assert done.returncode == 0, done.stderr


def test_the_table_of_names_and_what_type_checkers_see_agree():
    listed = {name for names in keymap._PLACES.values() for name in names}
    assert listed == set(keymap.__all__) - {"__version__"}
    text = (
        Path(keymap.__file__).read_text(encoding="utf-8").partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    )
    for module, names in keymap._PLACES.items():
        block = text.partition(f"from keymap.{module} import ")[2].partition("from keymap.")[0]
        assert set(block.replace("(", " ").replace(")", " ").replace(",", " ").split()) == set(names), module


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'keymap' has no attribute 'nothing'"):
        _ = keymap.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec("from keymap import nothing")


def test_errors_and_results_can_be_pickled():
    error = pickle.loads(pickle.dumps(keymap.PlanError("a")))
    assert type(error) is keymap.PlanError and str(error) == "a"
    assert pickle.loads(pickle.dumps(keymap.load_checkpoint)) is keymap.load_checkpoint


def test_help_and_the_example_of_the_package_work():
    assert "load_checkpoint" in pydoc.render_doc(keymap)
    assert doctest.testmod(keymap).failed == 0
