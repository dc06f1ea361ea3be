"""A folder as the destination: its owner's loader opens it, and nothing in its configuration is invented."""

from __future__ import annotations

import open_clip
import pytest
import torch
import transformers
from peers import hf, openclip
from peers.common import images, max_diff, same_bits, tokens
from safetensors.torch import load_file, save_file

import keymap

OWNERS = {  # the format, the model, and the class that opens the folder
    "CLIP": ("hf_clip", openclip.clip, {}, transformers.CLIPModel),
    "CLIP with quick_gelu": ("hf_clip", openclip.clip, {"quick_gelu": True}, transformers.CLIPModel),
    "Chinese-CLIP": (
        "hf_chinese_clip",
        openclip.hf_text,
        {"family": "bert", "pooler": "cls_last_hidden_state_pooler", "proj": "linear", "quick_gelu": True},
        transformers.ChineseCLIPModel,
    ),
    "SigLIP": ("hf_siglip", openclip.siglip, {}, transformers.SiglipModel),
}


def features(peer, model):
    """The largest differences of the image and the text embeddings."""
    size = model.visual.image_size
    image, ids = images(size[0] if isinstance(size, tuple) else size), tokens()
    with torch.no_grad():
        if isinstance(peer, transformers.ChineseCLIPModel):  # OpenCLIP masks the padding
            text = peer.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        else:
            text = hf.text_features(peer, ids)
        image_difference = max_diff(hf.image_features(peer, image), model.encode_image(image))
        return image_difference, max_diff(text, model.encode_text(ids))


@pytest.mark.parametrize("name", OWNERS)
def test_the_owners_loader_opens_the_folder_of_a_model(name, tmp_path):
    form, build, options, owner = OWNERS[name]
    model = build(seed=1, **options).eval()
    result = keymap.save_checkpoint(model, tmp_path / "out", form)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert result.files == tuple(str(tmp_path / "out" / file) for file in ("model.safetensors", "config.json"))
    peer, info = owner.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert max(features(peer.eval(), model)) < 1e-5
    back = build(seed=2, **options)
    plan = keymap.load_checkpoint(back, tmp_path / "out").report.plan
    assert (plan.warnings, plan.unverified) == ((), ())
    assert all(same_bits(value, model.state_dict()[key]) for key, value in back.state_dict().items())


TOWERS = {  # format and tower, the class that holds all of it, and the one that AutoModel finds, if there is one
    ("CLIP", "image"): (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionModel),
    ("CLIP", "text"): (transformers.CLIPTextModelWithProjection, transformers.CLIPTextModel),
    ("SigLIP", "image"): (transformers.SiglipVisionModel, transformers.SiglipVisionModel),
    ("SigLIP", "text"): (transformers.SiglipTextModel, None),
}


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_one_tower_is_a_folder_of_the_towers_own_class(name, tower, tmp_path):
    """Not one of the whole model, of which transformers would make up the other tower."""
    form, build, options, _ = OWNERS[name]
    whole, found = TOWERS[name, tower]
    model = build(seed=1, **options).eval()
    keymap.save_checkpoint(model, tmp_path / "out", form, towers=(tower,))
    peer, info = whole.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    if found is not None:
        assert type(transformers.AutoModel.from_pretrained(tmp_path / "out")) is found
    size = model.visual.image_size
    batch = images(size[0] if isinstance(size, tuple) else size) if tower == "image" else tokens()
    with torch.no_grad():
        outputs = peer.eval()(batch)
        ours = model.encode_image(batch) if tower == "image" else model.encode_text(batch)
    embeds = getattr(outputs, f"{tower}_embeds", None)
    assert max_diff(outputs.pooler_output if embeds is None else embeds, ours) < 1e-5
    back = build(seed=2, **options)
    plan = keymap.load_checkpoint(back, tmp_path / "out", towers=(tower,)).report.plan
    assert (plan.warnings, plan.unverified) == ((), ())
    loaded = [entry.key for entry in plan.entries]
    assert loaded and all(same_bits(back.state_dict()[key], model.state_dict()[key]) for key in loaded)
    keymap.convert_checkpoint(tmp_path / "out", tmp_path / "again", form)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_of_chinese_clip_keeps_its_projection(tower, tmp_path):
    """The classes of its towers have none, so the whole model's class opens the folder."""
    form, build, options, owner = OWNERS["Chinese-CLIP"]
    model = build(seed=1, **options).eval()
    keymap.save_checkpoint(model, tmp_path / "out", form, towers=(tower,))
    peer, info = owner.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = tokens()
    with torch.no_grad():
        if tower == "image":
            embedding, ours = hf.image_features(peer.eval(), images()), model.encode_image(images())
        else:
            outputs = peer.eval().get_text_features(input_ids=ids, attention_mask=(ids != 0).long())
            embedding, ours = outputs.pooler_output, model.encode_text(ids)
    assert max_diff(embedding, ours) < 1e-5
    back = build(seed=2, **options)
    loaded = [
        entry.key for entry in keymap.load_checkpoint(back, tmp_path / "out", towers=(tower,)).report.plan.entries
    ]
    assert "visual.proj" in loaded or "text.proj.weight" in loaded
    assert all(same_bits(back.state_dict()[key], model.state_dict()[key]) for key in loaded)


@pytest.mark.parametrize("options", [{}, {"quick_gelu": True}, {"vision": {"pool_type": "avg"}}, {"image_mlp": 2.7}])
def test_openclip_opens_its_folder(options, tmp_path):
    model = openclip.clip(seed=1, **options).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "open_clip")
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    image, ids = images(), tokens()
    with torch.no_grad():
        assert torch.equal(peer.encode_image(image), model.encode_image(image))
        assert torch.equal(peer.encode_text(ids), model.encode_text(ids))


def test_timm_opens_its_folder(tmp_path):
    timm = pytest.importorskip("timm")
    model = openclip.custom(seed=1)
    model.visual = torch.nn.Module()
    model.visual.trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    keymap.save_checkpoint(model, tmp_path / "out", "timm", towers=("image",))
    overlay = {"file": str(tmp_path / "out" / "model.safetensors"), "num_classes": 0}
    by_file = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
    ).state_dict()
    assert all(same_bits(value, by_file[key]) for key, value in model.visual.trunk.state_dict().items())
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(same_bits(value, model.visual.trunk.state_dict()[key]) for key, value in peer.state_dict().items())


# --- what is not known ---


def test_settings_that_nothing_states_are_asked_for_by_name(tmp_path):
    model = openclip.clip(seed=1, quick_gelu=True).eval()
    keymap.save_checkpoint(model, tmp_path / "x.pt", "open_clip")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "out", "hf_clip")
    asked = ("image.heads", "text.heads", "image.activation", "text.activation", "image.eps", "text.eps", "text.pool")
    for name in (*asked, "text.causal", "image.pool"):
        assert f"{name}: " in str(caught.value)
    assert not (tmp_path / "out").exists()
    facts = {"image.heads": 3, "text.heads": 4, "image.eps": 1e-5, "text.eps": 1e-5, "text.pool": "argmax"}
    facts |= {"image.activation": "quick_gelu", "text.activation": "quick_gelu"}
    facts |= {"text.causal": True, "image.pool": "tok"}
    keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "out", "hf_clip", facts=facts)
    assert max(features(transformers.CLIPModel.from_pretrained(tmp_path / "out").eval(), model)) < 1e-5


def test_the_sources_configuration_is_used(tmp_path):
    peer = hf.clip(seed=1, quick_gelu=True).eval()
    peer.config.text_config.eos_token_id = 98  # the last of its ids, as in OpenAI's vocabulary
    peer.save_pretrained(tmp_path / "theirs")
    keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", "open_clip", facts={"image.head_width": 16})
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    assert max(features(peer, model)) < 1e-5
    keymap.convert_checkpoint(tmp_path / "ours", tmp_path / "back", "hf_clip", facts={"image.heads": 3})
    again = transformers.CLIPModel.from_pretrained(tmp_path / "back").eval()
    assert max(features(again, model)) < 1e-5
    assert all(same_bits(value, peer.state_dict()[key]) for key, value in again.state_dict().items())


REFUSED = {  # a model, the format of the folder, and what the error says
    "an activation that the format lacks": (lambda: openclip.clip(quick_gelu=True), "hf_siglip", "cannot be written"),
    "no causal mask": (
        lambda: openclip.clip(text={"no_causal_mask": True}),
        "hf_clip",
        "causal mask of the text tower",
    ),
    "pooling of the last token": (lambda: openclip.clip(text={"pool_type": "last"}), "hf_clip", "pooling of the text"),
    "a format without a folder": (openclip.clip, "openai", "has no layout of a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_folder_cannot_say_is_refused(name, tmp_path):
    build, form, message = REFUSED[name]
    with pytest.raises(keymap.KeymapError, match=message):
        keymap.save_checkpoint(build(), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


# --- what was there ---


def test_a_folder_that_is_not_empty_is_refused_unless_it_may_be_overwritten(tmp_path):
    model, folder = openclip.clip(seed=1), tmp_path / "out"
    folder.mkdir()
    keymap.save_checkpoint(openclip.clip(seed=3), folder, "hf_clip", max_shard_size="150KB")  # an empty one is taken
    (folder / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(keymap.WriteError, match=r"is not empty; .*overwrite=True"):
        keymap.save_checkpoint(model, folder, "hf_clip")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    keymap.save_checkpoint(model, folder, "hf_clip", overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    written = keymap.save_checkpoint(model, folder, "hf_clip", overwrite=True)
    assert "the folder holds what was there before, too: README.md" in written.notes
    back = openclip.clip(seed=2)
    keymap.load_checkpoint(back, folder)
    assert all(same_bits(value, model.state_dict()[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("name", ["a file", "a missing folder above", "the folder that is read"])
def test_a_folder_in_a_wrong_place_is_refused(name, tmp_path):
    model = openclip.clip(seed=1)
    keymap.save_checkpoint(model, tmp_path / "source", "hf_clip")
    (tmp_path / "file").write_text("mine")
    places = {"a file": "file/", "a missing folder above": "no/such/out", "the folder that is read": "source"}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(keymap.WriteError, match=r"is a file|does not exist|holds the file that is read"):
        keymap.convert_checkpoint(tmp_path / "source", f"{tmp_path}/{places[name]}", "hf_clip", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_on_the_way_leaves_no_folder(tmp_path):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "out", "hf_clip", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_projections_of_two_widths_are_no_model_of_the_owner(tmp_path):
    """Its configuration has one number for both; a file of them can still be written."""
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "a.safetensors", "hf_clip")
    state = load_file(tmp_path / "a.safetensors")
    width = state["text_projection.weight"].shape[0]
    state["text_projection.weight"] = state["text_projection.weight"][: width // 2].clone()
    save_file(state, tmp_path / "two.safetensors")
    facts = {"image.heads": 2, "text.heads": 2, "image.activation": "gelu", "text.activation": "gelu"}
    facts |= {"image.eps": 1e-5, "text.eps": 1e-5, "text.pool": "argmax"}
    with pytest.raises(keymap.PlanError, match=rf"one number, and it is {width} by visual_pro.*, and {width // 2} by"):
        keymap.convert_checkpoint(tmp_path / "two.safetensors", tmp_path / "out", "hf_clip", facts=facts)
    assert not (tmp_path / "out").exists()
    keymap.convert_checkpoint(tmp_path / "two.safetensors", tmp_path / "b.safetensors", "open_clip")
