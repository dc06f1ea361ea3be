"""Folders of text towers, of pairs of towers and of every OpenCLIP model: their owners open them."""

from __future__ import annotations

import json
import tempfile

import open_clip
import pytest
import timm
import torch
import transformers
from peers import hf, layouts, naflex, openclip
from peers.common import images, max_diff, randomise, same_bits, tokens

import keymap

BERTS = {
    "bert": transformers.BertModel,
    "roberta": transformers.RobertaModel,
    "xlm-roberta": transformers.XLMRobertaModel,
}


def opened(owner, folder, **options):
    """The model that the owner's loader makes of a folder; no tensor is missing, too many or of another shape."""
    peer, info = owner.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return peer.eval()


@pytest.mark.parametrize("tower", [None, "image", "text"])
def test_siglip2(tower, tmp_path):
    model = naflex.model(seed=1).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_siglip2_naflex", towers=tower)
    owner = {None: transformers.Siglip2Model, **naflex.TOWERS}[tower]
    peer = opened(owner, tmp_path / "out")
    if tower != "text":  # of which transformers has no AutoModel
        assert type(transformers.AutoModel.from_pretrained(tmp_path / "out")) is owner
    if tower != "text":
        batch = naflex.naflex_batch([images(28)[0], images((14, 42))[0]], 14)
        assert max_diff(naflex.image_features(peer, batch), model.visual(batch)) < 1e-5
    if tower != "image":
        ids = tokens(eos=None)
        assert max_diff(hf.text_features(peer, ids), model.encode_text(ids)) < 1e-5
    if tower is None:
        back = naflex.model(seed=2)
        plan = keymap.load_checkpoint(back, tmp_path / "out").report.plan
        assert (plan.warnings, plan.unverified) == ((), ())
        assert all(same_bits(value, model.state_dict()[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("family", BERTS)
def test_a_dual_encoder(family, tmp_path):
    model = openclip.hf_text(family=family, pooler="cls_pooler", proj="linear", seed=1).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_vision_text_dual_encoder")
    peer = opened(transformers.VisionTextDualEncoderModel, tmp_path / "out")
    assert isinstance(peer.text_model, BERTS[family])
    pad = model.text.config.pad_token_id
    ids = tokens(pad=pad)
    text = peer.get_text_features(input_ids=ids, attention_mask=(ids != pad).long()).pooler_output
    assert max_diff(text, model.encode_text(ids)) < 1e-5
    assert max_diff(hf.image_features(peer, images()), model.encode_image(images())) < 1e-5
    back = openclip.hf_text(family=family, pooler="cls_pooler", proj="linear", seed=2)
    keymap.load_checkpoint(back, tmp_path / "out")
    assert all(same_bits(value, model.state_dict()[key]) for key, value in back.state_dict().items())


def test_the_text_tower_of_a_dual_encoder_alone_is_read_with_its_projection(tmp_path):
    """Chinese-CLIP's has the same keys: the model decides, with a warning."""

    def build(seed):
        return openclip.hf_text(family="bert", pooler="cls_pooler", proj="linear", seed=seed)

    model, back = build(1), build(2)
    keymap.save_checkpoint(model, tmp_path / "text.pt", "hf_vision_text_dual_encoder", towers="text")
    with pytest.warns(keymap.ConfigurationWarning, match="of hf_vision_text_dual_encoder and of hf_chinese_clip"):
        plan = keymap.load_checkpoint(back, tmp_path / "text.pt", towers="text").report.plan
    assert plan.format == "hf_vision_text_dual_encoder"
    assert all(same_bits(value, model.text.state_dict()[key]) for key, value in back.text.state_dict().items())


def test_chinese_clip_without_a_tensor_of_its_first_text_layer_is_told_which(tmp_path):
    model = openclip.hf_text(family="bert", pooler="cls_last_hidden_state_pooler", proj="linear", seed=1)
    state = keymap.convert_state_dict(model.state_dict(), "hf_chinese_clip")
    missing = "text_model.encoder.layer.0.attention.self.query.weight"
    torch.save({key: value for key, value in state.items() if key != missing}, tmp_path / "part.pt")
    with pytest.raises(keymap.PlanError, match=rf"the text tower is incomplete; missing keys: {missing}"):
        keymap.load_checkpoint(model, tmp_path / "part.pt")


@pytest.mark.parametrize("pooler", ["cls_pooler", "mean_pooler"])
@pytest.mark.parametrize("family", BERTS)
def test_a_text_tower_of_berts_family(family, pooler, tmp_path):
    model = openclip.hf_text(family=family, pooler=pooler, proj=None, text_width=24, seed=1).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_bert", towers="text")
    peer = opened(transformers.AutoModel, tmp_path / "out", add_pooling_layer=pooler == "cls_pooler")
    assert isinstance(peer, BERTS[family])
    assert_same_tower(model, peer, peer.state_dict())


def test_a_text_tower_of_mt5(tmp_path):
    model = openclip.hf_text(family="mt5", proj=None, text_width=24, seed=1).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_mt5", towers="text")
    peer = opened(transformers.MT5EncoderModel, tmp_path / "out")
    assert_same_tower(model, peer, peer.encoder.state_dict())


def assert_same_tower(model, peer, weights):
    """The owner's model has the tower's bits and its hidden states."""
    assert all(same_bits(value, weights[key]) for key, value in model.text.transformer.state_dict().items())
    pad = model.text.config.pad_token_id
    ids = tokens(pad=pad)
    inputs = {"input_ids": ids, "attention_mask": (ids != pad).long()}
    with torch.no_grad():
        ours, theirs = (tower(**inputs).last_hidden_state for tower in (model.text.transformer, peer))
    assert max_diff(ours, theirs) < 1e-5


def test_text_that_is_pooled_at_the_end_token_2_is_a_metaclip2(tmp_path):
    model = openclip.clip(text={"pool_type": "eos", "eos_id": 2}, seed=1).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_clip")
    peer, ids = opened(transformers.AutoModel, tmp_path / "out"), tokens(eos=2)
    assert isinstance(peer, transformers.MetaClip2Model)
    assert max_diff(hf.text_features(peer, ids), model.encode_text(ids)) < 1e-5
    assert max_diff(hf.image_features(peer, images()), model.encode_image(images())) < 1e-5
    keymap.save_checkpoint(model, tmp_path / "text", "hf_clip", towers="text")
    peer = opened(transformers.MetaClip2TextModelWithProjection, tmp_path / "text")
    assert max_diff(peer(input_ids=ids).text_embeds, model.encode_text(ids)) < 1e-5
    back = openclip.clip(text={"pool_type": "eos", "eos_id": 2}, seed=2)
    assert keymap.load_checkpoint(back, tmp_path / "text", towers="text").report.plan.warnings == ()


# --- OpenCLIP ---

_SCALES = {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True, "qk_norm": True}
OPTIONS = {
    "a norm after the average": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "an end token": {"text": {"pool_type": "eos", "eos_id": 5}},
    "a bias of the logits": {"init_logit_bias": -10, "nonscalar_logit_scale": True},
    "norms within the blocks": {"vision": _SCALES, "text": {"qk_norm": True}},
    "scales of layers": {"vision": {"ls_init_value": 1e-5}, "text": {"ls_init_value": 1e-5, "proj_bias": True}},
    "no projection of the text": {"text": {"proj_type": "none"}, "text_width": 24},
}
BUILDS = {
    **layouts.MODELS,
    **{name: lambda seed, more=more: openclip.custom(seed=seed, **more) for name, more in OPTIONS.items()},
    "two attention pools": lambda seed: openclip.coca(
        seed=seed, image_width=32, image_heads=2, vision={"attentional_pool": "parallel"}
    ),
    "NaFlexVit": lambda seed: naflex.model(seed=seed),
    "NaFlexVit with class token": lambda seed: naflex.token_model(seed=seed),
}


@pytest.fixture
def kept_folders(monkeypatch, tmp_path):
    """Folders of text configurations stay: an OpenCLIP model of a Hugging Face tower holds their name only."""

    class Kept:
        def __enter__(self):
            return tempfile.mkdtemp(dir=tmp_path)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Kept)


@pytest.mark.parametrize("name", BUILDS)
def test_openclip_opens_the_folder_of_every_layout(name, kept_folders, tmp_path):
    model = BUILDS[name](seed=1).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "open_clip")
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    theirs = peer.state_dict()
    for key, value in model.state_dict().items():
        assert same_bits(value, theirs[key if key in theirs else f"text.{key}"])
    assert len(theirs) == len(model.state_dict())
    size = model.visual.image_size
    image, ids = images(size if isinstance(size, int) else tuple(size)), tokens()
    with torch.no_grad():
        assert torch.equal(peer.encode_image(image), model.encode_image(image))
        assert torch.equal(peer.encode_text(ids), model.encode_text(ids))
        if name == "coca_ViT-B-32":
            both = image[:2], ids[:2]
            assert torch.equal(peer(*both)["logits"], model(*both)["logits"])


def test_an_openclip_folder_is_the_source_of_another(kept_folders, tmp_path):
    keymap.save_checkpoint(
        openclip.siglip(seed=1), tmp_path / "one", "open_clip", facts={"text.tokenizer": "some/name"}
    )
    keymap.convert_checkpoint(tmp_path / "one", tmp_path / "two", "open_clip")
    one, two = (json.loads((tmp_path / name / "open_clip_config.json").read_text()) for name in ("one", "two"))
    assert one == two and one["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "some/name"


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_of_siglip(tower, tmp_path):
    keymap.save_checkpoint(openclip.siglip(seed=1), tmp_path / "out", "hf_siglip", towers=tower)
    assert opened(hf.SIGLIP_TOWERS[tower], tmp_path / "out").config.hidden_size == (48 if tower == "image" else 32)


def test_timm_gets_the_size_and_the_pooling_of_a_trunk(tmp_path):
    model = openclip.custom(seed=1)
    model.visual = torch.nn.Module()
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=240, global_pool="avg").eval()
    model.visual.trunk = trunk
    keymap.save_checkpoint(model, tmp_path / "out", "timm", towers="image")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(peer(images(240)), trunk(images(240)))


def test_a_tower_whose_projection_has_no_bias_opens_in_timm_which_has_one(tmp_path):
    vision = {"image_size": 224, "patch_size": 16, "width": 256, "layers": 10, "head_width": 64}
    text = {"width": 64, "heads": 2, "layers": 1, "vocab_size": 99, "context_length": 16}
    model = randomise(open_clip.model.CLIP(512, vision, text)).eval()
    facts = {"image.architecture": "vit_xsmall_patch16_clip_224"}
    result = keymap.save_checkpoint(model, tmp_path / "out", "timm", towers="image", facts=facts)
    assert any("filled with 0, which its absence means: the loader of timm needs it" in note for note in result.notes)
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert max_diff(peer(pixels), model.visual(pixels)) < 1e-4


@pytest.mark.parametrize("to", ["open_clip", "timm"])
def test_the_image_size_of_a_configuration_of_transformers_is_known(to, tmp_path):
    hf.siglip(seed=1).save_pretrained(tmp_path / "own")
    size = json.loads((tmp_path / "own" / "config.json").read_text())["vision_config"]["image_size"]
    options = {"towers": "image" if to == "timm" else None, "facts": {"image.architecture": "vit_x"}}
    keymap.convert_checkpoint(tmp_path / "own", tmp_path / "out", to, **options)
    (file,) = (tmp_path / "out").glob("*config.json")
    assert f'_size": {size}' in file.read_text()
