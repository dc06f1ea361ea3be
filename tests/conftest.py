"""Settings for every test: no network, at most two threads, a fixed seed. And what tests prove, written down."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

HERE = Path(__file__).parent
ROOMS = (
    "api",
    "cli",
    "compare",
    "families",
    "formats",
    "language",
    "load",
    "picture",
    "plan",
    "project",
    "read",
    "refusals",
    "source",
    "write",
)
for folder in (HERE, *(HERE / room for room in ROOMS)):  # so that `from peers import openclip` works in every test
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session", autouse=True)
def _threads():
    import torch

    # one for a pytest-xdist worker: on shared cores a second thread mostly spins
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _seed(_threads):
    import torch

    torch.manual_seed(0)


# --- what tests prove: see proofs.py ---


def pytest_addoption(parser):
    parser.addoption(
        "--proofs", metavar="FILE", help="write what the tests that passed have proved, for the coverage page"
    )
    parser.addoption("--format", metavar="NAME", dest="format_name", help="run only the tests about this format")


def pytest_configure(config):
    path = config.getoption("--proofs")
    if path and not hasattr(config, "workerinput"):
        import proofs

        config.pluginmanager.register(proofs.Book(Path(path)))
    if config.getoption("format_name"):
        import selection

        selection.refuse_unknown(config.getoption("format_name"))


# --- the tests of one format: see selection.py ---


def pytest_collection_modifyitems(config, items):
    name = config.getoption("format_name")
    if name:
        import selection

        items[:], others = selection.select(items, name)
        config.hook.pytest_deselected(items=others)


@pytest.fixture
def proves(request):
    """``proves(word, plan, towers=None)``, after the assertions: what this test has proved of a load."""
    import proofs

    def stated(word, plan, towers=None, **more):
        proofs.state(request.node, proofs.record(word, plan, towers, **more))

    return stated


@pytest.fixture
def proves_format(request):
    """``proves_format(word, hub, example, name)``: the same for a format of another hub."""
    import proofs

    def stated(word, hub, example, name):
        way_back = "one-way" if example.oneway else "rounded" if example.rounded else "bit-equal"
        found = {"word": word, "format": example.form, "hub": hub, "example": name}
        proofs.state(request.node, {**found, "peer": example.peer, "way_back": way_back, "towers": {}})

    return stated
