"""The peer models: random everywhere, sensitive to every tensor, and equal to the library that they are taken from."""

import numpy as np
import pytest
import torch
from peers import big_vision, by_hand, common, hf, openai, openclip, timm_towers
from peers.common import SQUARE, Size, bits, images, max_diff, same_bits, tensors, tokens

TOLERANCE = 2e-5


def two_towers(model, size=28, **text):
    x = images(size).to(next(p for p in model.visual.parameters() if p.ndim == 4).dtype)
    return (
        model.encode_image(x, normalize=False),
        model.encode_text(tokens(**text), normalize=False),
    )


def hf_towers(model, **text):
    found = []
    if hasattr(model, "get_image_features") or model.main_input_name == "pixel_values":
        found.append(hf.image_features(model, images()))
    if hasattr(model, "get_text_features") or model.main_input_name == "input_ids":
        found.append(hf.text_features(model, tokens(**text)))
    return tuple(found)


def coca_towers(model):
    return *two_towers(model), model(images(batch=3), tokens())["logits"]


def openai_towers(model, size=28):
    return openai.image_features(model, images(size)), openai.text_features(model, tokens())


# a factory of its seed, and its outputs
FULL = {"eos": None}
PEERS = {
    "openclip.clip": (lambda seed: openclip.clip(seed=seed), two_towers),
    "openclip.clip.quick_gelu": (lambda seed: openclip.clip(seed=seed, quick_gelu=True), two_towers),
    "openclip.clip.square": (lambda seed: openclip.clip(seed=seed, **SQUARE), two_towers),
    "openclip.clip.bf16": (lambda seed: openclip.clip(seed=seed, precision="bf16"), two_towers),
    "openclip.clip.layerscale": (
        lambda seed: openclip.clip(seed=seed, vision={"ls_init_value": 1e-4, "no_ln_pre": True}),
        two_towers,
    ),
    "openclip.custom": (lambda seed: openclip.custom(seed=seed), two_towers),
    "openclip.resnet": (lambda seed: openclip.resnet(seed=seed), lambda m: two_towers(m, 64)),
    "openclip.resnet.96": (
        lambda seed: openclip.resnet(seed=seed, image_size=96),
        lambda m: two_towers(m, 96),
    ),
    "openclip.convnext": (lambda seed: openclip.convnext(seed=seed), lambda m: two_towers(m, 64)),
    "openclip.convnext.mlp": (
        lambda seed: openclip.convnext(seed=seed, head="mlp"),
        lambda m: two_towers(m, 64),
    ),
    "openclip.clip_trunk": (lambda seed: openclip.clip_trunk(seed=seed), two_towers),
    "openclip.clip_trunk.no_embed_class": (
        lambda seed: openclip.clip_trunk(seed=seed, no_embed_class=True, head_bias=True, quick_gelu=True),
        two_towers,
    ),
    "openclip.siglip": (lambda seed: openclip.siglip(seed=seed), lambda m: two_towers(m, **FULL)),
    "openclip.siglip.no_projection": (
        lambda seed: openclip.siglip(seed=seed, projection=False, logit_bias=False),
        lambda m: two_towers(m, **FULL),
    ),
    "openclip.siglip.wide": (
        lambda seed: openclip.siglip(seed=seed, image_size=(28, 42)),
        lambda m: two_towers(m, (28, 42), **FULL),
    ),
    "openclip.coca": (lambda seed: openclip.coca(seed=seed), coca_towers),
    "openclip.coca.fused": (lambda seed: openclip.coca(seed=seed, text_width=48), coca_towers),
    "openclip.coca.no_pool": (
        lambda seed: openclip.coca(seed=seed, attn_pool=False, text_width=48),
        coca_towers,
    ),
    "openclip.hf_text": (lambda seed: openclip.hf_text(seed=seed), lambda m: two_towers(m, pad=1)),
    "openclip.hf_text.bert": (
        lambda seed: openclip.hf_text(seed=seed, family="bert", pooler="cls_last_hidden_state_pooler", proj="linear"),
        two_towers,
    ),
    "hf.clip": (lambda seed: hf.clip(seed=seed), hf_towers),
    "hf.clip.image": (lambda seed: hf.clip(seed=seed, tower="image"), hf_towers),
    "hf.clip.image_proj": (lambda seed: hf.clip(seed=seed, tower="image_proj"), hf_towers),
    "hf.clip.text": (lambda seed: hf.clip(seed=seed, tower="text"), hf_towers),
    "hf.clip.text_proj": (lambda seed: hf.clip(seed=seed, tower="text_proj"), hf_towers),
    "hf.metaclip2": (lambda seed: hf.metaclip2(seed=seed), lambda m: hf_towers(m, eos=2)),
    "hf.siglip": (lambda seed: hf.siglip(seed=seed), lambda m: hf_towers(m, **FULL)),
    "hf.siglip.i18n": (lambda seed: hf.siglip(seed=seed, eye_head=True), lambda m: hf_towers(m, **FULL)),
    "hf.siglip.image": (lambda seed: hf.siglip(seed=seed, tower="image"), hf_towers),
    "hf.siglip.text": (lambda seed: hf.siglip(seed=seed, tower="text"), lambda m: hf_towers(m, **FULL)),
    "timm.clip_vit": (lambda seed: timm_towers.clip_vit(seed=seed), lambda m: (m(images()),)),
    "timm.clip_vit.head_bias": (
        lambda seed: timm_towers.clip_vit(seed=seed, head_bias=True, no_embed_class=True),
        lambda m: (m(images()),),
    ),
    "timm.siglip_vit": (lambda seed: timm_towers.siglip_vit(seed=seed), lambda m: (m(images()),)),
    "timm.convnext": (lambda seed: timm_towers.convnext(seed=seed), lambda m: (m(images(64)),)),
    "timm.convnext.mlp": (
        lambda seed: timm_towers.convnext(seed=seed, mlp_head=True, head_bias=True),
        lambda m: (m(images(64)),),
    ),
    "timm.resnet_clip": (lambda seed: timm_towers.resnet_clip(seed=seed), lambda m: (m(images(64)),)),
    "openai.vit": (lambda seed: openai.vit(seed=seed), openai_towers),
    "openai.resnet": (lambda seed: openai.resnet(seed=seed), lambda m: openai_towers(m, 64)),
}
# a zero by contract; the identity head of i18n
CONSTANT = {
    "openclip.clip_trunk": {"visual.trunk.head.bias"},
    "timm.clip_vit": {"head.bias"},
    "timm.convnext": {"head.fc.bias"},
    "hf.siglip.i18n": {"text_model.head.weight", "text_model.head.bias"},
}
# what no embedding depends on: the logit scale and bias; the bias of a key, which softmax ignores
UNSEEN = ("logit_scale", "logit_bias", "k_proj.bias", ".key.bias", "head.k.bias")


@pytest.fixture(scope="module", autouse=True)
def one_thread(_threads):
    """A thousand tiny forwards: on busy cores a second thread mostly spins."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(PEERS))
def peer(request):
    build, outputs = PEERS[request.param]
    return request.param, build(0), torch.no_grad()(outputs)


def test_every_tensor_is_random_and_no_two_are_equal(peer):
    name, model, _ = peer
    stored = model.state_dict()
    seen, counters = {}, []
    for key, tensor in stored.items():
        if not tensor.is_floating_point():
            counters += [tensor.item()] if tensor.ndim == 0 else []
            continue
        assert tensor.isfinite().all(), key
        if key in CONSTANT.get(name, ()):
            continue
        if tensor.numel() > 1:  # low precision repeats values
            assert len(tensor.float().unique()) > 0.1 * min(tensor.numel(), 2000), key
        for other, same_shape in seen.setdefault(tuple(tensor.shape), []):
            assert not torch.equal(tensor, same_shape), (key, other)
        seen[tuple(tensor.shape)].append((key, tensor))
        assert "running_var" not in key or (tensor > 0).all(), key
    assert len(counters) == len(set(counters))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(peer):
    name, model, _ = peer
    build, _ = PEERS[name]
    common.assert_unchanged(build(0), bits(model))
    other = build(1).state_dict()
    same = {k for k, v in model.state_dict().items() if same_bits(v, other[k])}
    assert {k for k in same if not k.endswith(("position_ids", "token_type_ids"))} == CONSTANT.get(name, set())


def test_the_outputs_are_finite_and_each_tensor_changes_them(peer):
    name, model, outputs = peer
    before = outputs(model)
    for output in before:
        assert output.isfinite().all()
        assert 0.05 < output.float().std() < 20
        assert output.float().std(0).mean() > 0.005, "the input hardly matters"
    blind = []
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or key.endswith(UNSEEN) or key in CONSTANT.get(name, ()):
            continue
        keep = tensor.clone()
        tensor.copy_(keep.reshape(-1).roll(1).reshape(keep.shape) if keep.numel() > 1 else keep + 1)
        if max(max_diff(a, b) for a, b in zip(before, outputs(model), strict=True)) < 100 * TOLERANCE:
            blind.append(key)
        tensor.copy_(keep)
    assert not blind


def test_the_default_sizes_all_differ():
    s = Size()
    sizes = [
        s.embed_dim, s.patch, s.image_width, 3 * s.image_width, s.image_hidden, s.context_length, s.vocab,
        s.text_width, 3 * s.text_width, s.text_hidden, 3, 5,
    ]  # fmt: skip
    assert len(sizes) == len(set(sizes))
    square = openclip.custom(**SQUARE).state_dict()
    assert square["visual.proj"].shape == square["text.text_projection"].shape == (48, 48)
    assert square["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape == (48, 48)


@pytest.mark.parametrize(
    ("precision", "projection", "norm"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_has_the_values_of_open_clip(precision, projection, norm):
    state = openclip.clip(precision=precision).state_dict()
    assert (state["visual.proj"].dtype, state["ln_final.weight"].dtype) == (projection, norm)


def test_assert_unchanged_sees_one_bit_and_accepts_nan():
    model = openclip.clip()
    with torch.no_grad():
        model.visual.proj[0, 0] = float("nan")
        model.visual.proj[0, 1] = 0.0
    before = bits(model)
    assert "attn_mask" in before, "buffers outside the state dict count"
    common.assert_unchanged(model, before)
    for name, value in (("visual.proj", -0.0), ("attn_mask", 1.0)):
        tensor = tensors(model)[name]
        keep = tensor[0, 1].clone()
        with torch.no_grad():
            tensor[0, 1] = value
            with pytest.raises(AssertionError, match=name):
                common.assert_unchanged(model, before)
            tensor[0, 1] = keep
    common.assert_unchanged(model, before)


def test_max_diff_is_infinite_where_it_must_be():
    nan, inf = float("nan"), float("inf")
    assert max_diff(torch.zeros(2), np.ones(2)) == 1
    assert max_diff(torch.zeros(2), torch.zeros(3)) == inf
    assert max_diff(torch.tensor([nan]), torch.tensor([0.0])) == inf
    assert max_diff(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.5])) == 0.5
    assert max_diff(torch.tensor([inf]), torch.tensor([-inf])) == inf


def test_random_tokens_end_with_the_end_token():
    clip, meta, full = tokens(), tokens(eos=2), tokens(eos=None)
    assert len({int(row.argmax()) for row in clip}) == len(clip)
    assert ((clip == 98).sum(1) == 1).all()
    assert ((meta == 2).sum(1) == 1).all()
    assert (full >= 3).all()
    assert tokens(vocab=64).max() == 63


# ------------------------------------------------------------------------- what transformers writes to disk
@pytest.mark.parametrize(
    ("model", "v5", "v4"),
    [
        (lambda: hf.clip(tower="image"), "embeddings.", "vision_model.embeddings."),
        (lambda: hf.clip(tower="text"), "embeddings.", "text_model.embeddings."),
        (lambda: hf.siglip(tower="image"), "embeddings.", "vision_model.embeddings."),
        (lambda: hf.siglip(tower="text"), "embeddings.", "text_model.embeddings."),
        (lambda: hf.clip(tower="image_proj"), "vision_model.embeddings.", "vision_model.embeddings."),
        (lambda: hf.clip(tower="text_proj"), "text_model.embeddings.", "text_model.embeddings."),
    ],
)
def test_a_lone_tower_has_its_prefix_only_in_version_4(model, v5, v4):
    model = model()
    for written_by, prefix in ((5, v5), (4, v4)):
        keys = hf.disk_keys(model, written_by)
        assert f"{prefix}position_embedding.weight" in keys
        assert len(keys) == len(model.state_dict())


def test_disk_keys_of_the_whole_models():
    clip, siglip = hf.clip(), hf.siglip()
    for model in (clip, hf.metaclip2(), siglip):
        assert hf.disk_keys(model).keys() == hf.disk_keys(model, 4).keys() == model.state_dict().keys()
    old = hf.disk_keys(clip, 4, position_ids=True)
    added = {k: v for k, v in old.items() if k not in clip.state_dict()}
    assert {k: (v.dtype, tuple(v.shape)) for k, v in added.items()} == {
        "vision_model.embeddings.position_ids": (torch.int64, (1, 5)),
        "text_model.embeddings.position_ids": (torch.int64, (1, 16)),
    }
    layer = "vision_model.encoder.layers.0.self_attn."
    order = [k.removeprefix(layer) for k in hf.disk_keys(clip) if k.startswith(layer) and "weight" in k]
    assert order == ["k_proj.weight", "out_proj.weight", "q_proj.weight", "v_proj.weight"], "never q, k, v"
    assert hf.disk_keys(siglip)["logit_bias"].shape == (1,)
    assert hf.disk_keys(siglip)["vision_model.head.probe"].shape == (1, 1, 48)


# --------------------------------------------------------------------------------- OpenAI's way of storing
@pytest.mark.parametrize("build", [openai.vit, openai.resnet])
def test_the_archive_holds_the_published_keys_and_dtypes(build, tmp_path):
    model = build()
    openai.save_archive(model, tmp_path / "model.pt")
    with pytest.warns(FutureWarning):
        archive = torch.jit.load(tmp_path / "model.pt").state_dict()
    expected = openai.state_dict(model)
    assert list(archive) == list(expected)
    assert all(same_bits(archive[k], expected[k]) for k in archive)
    assert set(archive) - set(openai.state_dict(model, extras=False)) == set(openai.EXTRAS)
    half = {k for k, v in archive.items() if v.dtype == torch.float16}
    assert {"text_projection", "visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_bias"} <= half
    full = {k for k, v in archive.items() if v.dtype == torch.float32}
    assert {"logit_scale", "positional_embedding", "token_embedding.weight", "ln_final.weight"} <= full
    integers = {k for k, v in archive.items() if v.dtype == torch.int64 and v.ndim == 0}
    assert len(half) + len(full) + len(integers) == len(archive)
    openai.save_state_dict(model, tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True).keys() == archive.keys()


# ------------------------------------------------------------------------------------------- flax's SigLIP
def test_flax_is_big_vision():
    flat = dict(np.load(big_vision.DATA / "siglip.npz"))
    reference = np.load(big_vision.DATA / "siglip_ref.npz")
    pixels = torch.from_numpy(reference["img"]).permute(0, 3, 1, 2)
    for output, expected in zip(
        big_vision.forward(flat, pixels, torch.from_numpy(reference["txt"])),
        (reference["zimg"], reference["ztxt"]),
        strict=True,
    ):
        assert max_diff(output / (output.norm(dim=1, keepdim=True) + 1e-8), expected) < 1e-5


def test_flax_names_the_keys_as_big_vision_does():
    flat = dict(np.load(big_vision.DATA / "siglip.npz"))
    sizes = {"image_mlp": 2.0, "text_mlp": 2.0, "text_width": 48, "text_heads": 3, "text_depth": 2}
    ours = big_vision.with_prefix(big_vision.init(**sizes))
    assert ours.keys() == flat.keys()
    for key, value in flat.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
    assert all(len(np.unique(v)) > 0.9 * v.size for v in ours.values())


def test_an_npz_loads_under_every_form_of_its_keys():
    flat = big_vision.init()
    scanned = big_vision.scan(big_vision.with_prefix(flat), ("img",))
    block = "encoderblock/MultiHeadDotProductAttention_0/query/kernel"
    assert flat[f"img/Transformer/{block.replace('/', '_0/', 1)}"].shape == (48, 3, 16)
    assert scanned[f"params/img/Transformer/{block}"].shape == (2, 48, 3, 16)
    assert f"params/txt/Encoder_0/{block}" not in scanned
    assert big_vision.scan(flat)[f"txt/Encoder_0/{block}"].shape == (3, 32, 4, 8)
    plain = big_vision.plain(scanned)
    assert plain.keys() == flat.keys()
    assert all(np.array_equal(plain[k], flat[k]) for k in flat)
    void = big_vision.to_bfloat16_void(flat)
    assert {v.dtype.str for v in void.values()} == {"|V2"}
    rounded = torch.from_numpy(flat["t"]).bfloat16().float()
    assert np.array_equal(big_vision.plain(void)["t"], rounded)
    assert not [k for k in big_vision.init(head=False) if "head" in k]


# ------------------------------------------------------------ the same function once the weights are the same
def clip_pair(make, **options):
    text = {"text": {"pool_type": "eos", "eos_id": 2}} if make is hf.metaclip2 else {}
    source = make(seed=1, **options)
    return source, openclip.custom(**options, **text), by_hand.hf_clip(hf.disk_keys(source), "text.")


def big_vision_pair(head=True, image_size=28, **sizes):
    def make():
        flat = big_vision.init(head=head, image_size=image_size, **sizes)
        target = openclip.siglip(projection=head, image_size=image_size, **sizes)
        return flat, target, by_hand.big_vision(flat)

    return (
        make,
        lambda flat: big_vision.forward(flat, images(image_size), tokens(**FULL)),
        lambda m: two_towers(m, image_size, **FULL),
    )


# (source, target, the target's state dict by hand), the source's outputs, the target's outputs
PAIRS = {
    "hf.clip": (lambda: clip_pair(hf.clip), hf_towers, two_towers),
    "hf.clip.square": (lambda: clip_pair(hf.clip, **SQUARE), hf_towers, two_towers),
    "hf.clip.quick_gelu": (lambda: clip_pair(hf.clip, quick_gelu=True), hf_towers, two_towers),
    "hf.metaclip2": (
        lambda: clip_pair(hf.metaclip2),
        lambda m: hf_towers(m, eos=2),
        lambda m: two_towers(m, eos=2),
    ),
    "hf.clip.flat": (
        lambda: ((m := hf.clip(eos=2)), openclip.clip(), by_hand.hf_clip(hf.disk_keys(m))),
        hf_towers,
        two_towers,
    ),
    **{
        f"hf.siglip.{act}": (
            lambda act=act: (
                (m := hf.siglip(act=act)),
                openclip.siglip(act=act),
                by_hand.hf_siglip(hf.disk_keys(m)),
            ),
            lambda m: hf_towers(m, **FULL),
            lambda m: two_towers(m, **FULL),
        )
        for act in ("gelu", "gelu_tanh")
    },
    "hf.siglip.i18n": (
        lambda: (
            (m := hf.siglip(eye_head=True)),
            openclip.siglip(projection=False),
            by_hand.hf_siglip(hf.disk_keys(m), head=False),
        ),
        lambda m: hf_towers(m, **FULL),
        lambda m: two_towers(m, **FULL),
    ),
    "openai.vit": (
        lambda: (
            (m := openai.vit()),
            openclip.clip(**openai.VIT, quick_gelu=True),
            by_hand.openai(openai.state_dict(m)),
        ),
        openai_towers,
        two_towers,
    ),
    "openai.resnet": (
        lambda: (
            (m := openai.resnet()),
            openclip.resnet(**openai.RESNET, quick_gelu=True),
            by_hand.openai(openai.state_dict(m)),
        ),
        lambda m: openai_towers(m, 64),
        lambda m: two_towers(m, 64),
    ),
    "big_vision": big_vision_pair(),
    "big_vision.no_head": big_vision_pair(head=False),
    "big_vision.square": big_vision_pair(**SQUARE),
    "big_vision.wide": big_vision_pair(image_size=(28, 42)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_tower_peers_agree_with_open_clip(name):
    make, theirs, ours = PAIRS[name]
    source, target, state = make()
    with torch.no_grad():
        expected, before = theirs(source), ours(target)
        target.load_state_dict(state, strict=True)
        for x, y, z in zip(expected, ours(target), before, strict=True):
            assert max_diff(x, y) <= TOLERANCE
            assert max_diff(x, z) > 0.1, "the target was right before it was loaded"


TOWERS = {
    "clip_vit -> native": (timm_towers.clip_vit, openclip.custom, by_hand.timm_clip, 28),
    "clip_vit -> trunk": (timm_towers.clip_vit, openclip.clip_trunk, by_hand.timm_trunk, 28),
    "clip_vit quick_gelu -> native": (
        lambda: timm_towers.clip_vit(quick_gelu=True),
        lambda: openclip.custom(quick_gelu=True),
        by_hand.timm_clip,
        28,
    ),
    "clip_vit without class position -> trunk": (
        lambda: timm_towers.clip_vit(no_embed_class=True, head_bias=True),
        lambda: openclip.clip_trunk(no_embed_class=True),
        by_hand.timm_trunk,
        28,
    ),
    "siglip_vit -> trunk": (timm_towers.siglip_vit, openclip.siglip, by_hand.timm_trunk, 28),
    "convnext -> trunk": (timm_towers.convnext, openclip.convnext, by_hand.timm_convnext, 64),
    "convnext mlp -> trunk": (
        lambda: timm_towers.convnext(mlp_head=True),
        lambda: openclip.convnext(head="mlp"),
        by_hand.timm_convnext,
        64,
    ),
    "resnet -> native": (timm_towers.resnet_clip, openclip.resnet, by_hand.timm_resnet, 64),
}


@pytest.mark.parametrize("name", TOWERS)
def test_timm_towers_agree_with_open_clip(name):
    make, make_target, convert, size = TOWERS[name]
    source, target = make(), make_target()
    state = convert(source.state_dict())
    assert state.keys() == {k for k in target.state_dict() if k.startswith("visual.")}
    with torch.no_grad():
        assert max_diff(source(images(size)), target.encode_image(images(size))) > 0.1
        target.load_state_dict(state, strict=False)
        assert max_diff(source(images(size)), target.encode_image(images(size))) <= TOLERANCE


@pytest.mark.parametrize(("tower", "projected"), [("image", False), ("image_proj", True)])
def test_a_lone_clip_tower_needs_the_targets_projection(tower, projected):
    source, target = hf.clip(tower=tower, seed=1), openclip.custom()
    whole = hf.clip(seed=1)
    image = {f"{'' if projected else 'vision_model.'}{k}": v for k, v in source.state_dict().items()}
    state = by_hand.hf_clip(whole.state_dict() | image)
    if not projected:
        state["visual.proj"] = target.visual.proj
    target.load_state_dict({k: v for k, v in state.items() if k.startswith("visual.")}, strict=False)
    projection = None if projected else target.visual.proj
    with torch.no_grad():
        assert max_diff(hf.image_features(source, images(), projection), target.encode_image(images())) <= TOLERANCE
