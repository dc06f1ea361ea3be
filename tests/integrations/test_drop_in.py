"""OpenCLIP's own functions load files through keymap while it is installed, and are its own again afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import open_clip
import pytest
import torch
from open_clip import factory
from peers import by_hand, hf, openclip
from peers.common import Size, same_bits
from safetensors.torch import save_file

import keymap
from keymap.integrations.open_clip import install, installed, uninstall

NAMES = [(open_clip, "create_model"), (open_clip, "load_checkpoint"), (factory, "create_model")]
NAMES += [(factory, "load_checkpoint"), (factory, "load_state_dict")]
FUNCTIONS = ("create_model_and_transforms", "create_model_from_pretrained", "get_tokenizer")


def held():
    return [getattr(module, name) for module, name in NAMES]


OWN = held()


@pytest.fixture(autouse=True)
def clean():
    yield
    uninstall()
    assert all(now is own for now, own in zip(held(), OWN, strict=True))


@pytest.fixture
def tiny(monkeypatch):
    """The configuration of a small model, under a name that OpenCLIP knows."""
    size = Size()
    configuration = {
        "embed_dim": size.embed_dim,
        "vision_cfg": openclip._native_vision(size),
        "text_cfg": openclip.native_text(size),
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", configuration)
    return configuration


@pytest.fixture
def weights(tmp_path):
    """transformers' file, and the same weights under OpenCLIP's names, converted by hand."""
    tensors = hf.disk_keys(hf.clip(seed=1))
    save_file(tensors, tmp_path / "hf.safetensors")
    return tmp_path / "hf.safetensors", by_hand.hf_clip(tensors)


def holds(model, wanted, start=""):
    state = model.state_dict()
    return all(same_bits(state[key], value) for key, value in wanted.items() if key.startswith(start))


def test_create_model_loads_a_file_of_any_format(tiny, weights):
    path, wanted = weights
    with pytest.raises(Exception, match=r"Missing key|size mismatch|Unexpected"):
        open_clip.create_model("tiny", pretrained=str(path))
    with installed():
        assert holds(open_clip.create_model("tiny", pretrained=str(path)), wanted)
        assert holds(open_clip.create_model_and_transforms("tiny", pretrained=str(path))[0], wanted)
        assert holds(open_clip.create_model_from_pretrained("tiny", pretrained=str(path))[0], wanted)


def test_a_file_that_openclip_loads_itself_gives_the_same_model(tiny, tmp_path):
    torch.save({"state_dict": openclip.clip(seed=3).state_dict()}, tmp_path / "own.pt")
    without = open_clip.create_model("tiny", pretrained=str(tmp_path / "own.pt"))
    with installed():
        model = open_clip.create_model("tiny", pretrained=str(tmp_path / "own.pt"))
    assert holds(model, without.state_dict()) and type(model) is type(without)


def test_load_checkpoint_is_keymaps(weights):
    path, wanted = weights
    model = openclip.clip(seed=2)
    with installed():
        result = open_clip.load_checkpoint(model, str(path), strict=True)
    assert isinstance(result, keymap.LoadResult) and holds(model, wanted)


def test_a_local_dir_goes_through_keymap(tiny, weights, tmp_path):
    path, wanted = weights
    folder = tmp_path / "model"
    folder.mkdir()
    path.rename(folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny}))
    with installed():
        assert holds(open_clip.create_model(f"local-dir:{folder}"), wanted)


@pytest.mark.parametrize(
    ("tower", "start", "other"), [("image", "visual.", "ln_final"), ("text", "ln_final", "visual.")]
)
def test_the_file_of_a_tower_goes_through_keymap(tower, start, other, tiny, weights, tmp_path):
    """One that OpenCLIP alone would read without effect."""
    path, wanted = weights
    base = openclip.clip(seed=3).state_dict()
    torch.save(base, tmp_path / "base.pt")
    options = {"pretrained": str(tmp_path / "base.pt"), f"pretrained_{tower}_path": str(path)}
    assert not holds(open_clip.create_model("tiny", **options), wanted, start)
    with installed():
        model = open_clip.create_model("tiny", **options)
    assert holds(model, wanted, start) and holds(model, base, other)


def test_a_file_that_does_not_fit_is_refused_in_words(tiny, weights, tmp_path):
    wide = openclip.clip(seed=1, image_width=72, image_heads=3)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    with installed(), pytest.raises(keymap.KeymapError, match=r"class_embedding: shape \[72\] in the file"):
        open_clip.create_model("tiny", pretrained=str(tmp_path / "wide.pt"))
    with installed(), pytest.raises(keymap.KeymapError, match="jit=False"):
        open_clip.create_model("tiny", pretrained_image_path=str(weights[0]), jit=True)
    with installed():  # nothing of the call that failed remains
        assert factory.load_state_dict(str(weights[0])).keys() == hf.disk_keys(hf.clip(seed=1)).keys()


def test_the_file_of_a_tower_that_does_not_fit_raises(tiny, tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "other.pt")
    with installed(), pytest.raises(keymap.DetectionError, match="no known format has these keys"):
        open_clip.create_model("tiny", pretrained_image_path=str(tmp_path / "other.pt"))
    with installed():  # a path that is no file is OpenCLIP's to report
        open_clip.create_model("tiny", pretrained_image_path=str(tmp_path / "nothing.pt"))


def test_names_that_were_taken_before_stay_openclips(tiny, weights):
    path, wanted = weights
    with installed():
        with pytest.raises(Exception, match=r"Missing key|size mismatch|Unexpected"):
            OWN[1](openclip.clip(seed=2), str(path))
        assert holds(OWN[0]("tiny", pretrained=str(path)), wanted)  # it calls the loader of its module


def test_keymap_alone_does_not_import_openclip():
    code = "import sys, keymap, keymap.integrations.open_clip; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_to_install_twice_and_to_uninstall_once():
    install()
    first = held()
    assert all(now is not own for now, own in zip(first, OWN, strict=True))
    install()
    assert all(now is before for now, before in zip(held(), first, strict=True))
    uninstall()
    assert all(now is own for now, own in zip(held(), OWN, strict=True))
    uninstall()


def test_blocks_nest_and_leave_what_was_there():
    with installed():
        with installed():
            pass
        assert held()[0] is not OWN[0]
    assert held()[0] is OWN[0]
    install()
    with installed():
        pass
    assert held()[0] is not OWN[0]
    with installed():
        uninstall()
        assert held()[0] is not OWN[0]
    assert held()[0] is OWN[0]
    with pytest.raises(ZeroDivisionError), installed():
        raise ZeroDivisionError
    assert held()[0] is OWN[0]


def test_other_functions_are_not_touched():
    before = [getattr(open_clip, name) for name in FUNCTIONS]
    with installed():
        assert all(getattr(open_clip, name) is own for name, own in zip(FUNCTIONS, before, strict=True))
        assert open_clip.create_model.__doc__ == OWN[0].__doc__ and open_clip.create_model.__wrapped__ is OWN[0]


def test_a_name_that_others_replaced_stays_theirs(monkeypatch):
    def theirs():
        pass

    install()
    open_clip.load_checkpoint = theirs
    try:
        uninstall()
        assert open_clip.load_checkpoint is theirs and factory.load_checkpoint is OWN[3]
    finally:
        open_clip.load_checkpoint = OWN[1]


def test_many_threads_install_and_leave():
    start = threading.Barrier(8)
    seen = []

    def work():
        start.wait()
        for _ in range(50):
            with installed():
                seen.append(factory.load_checkpoint is not OWN[3])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 400 and all(seen)
    assert all(now is own for now, own in zip(held(), OWN, strict=True))
