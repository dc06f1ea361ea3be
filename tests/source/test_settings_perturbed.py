"""Every field of a configuration that changes the embeddings of the same weights is compared, or documented as not.

Each field in turn gets other values. Where the weights still fit and the embeddings differ, a load into the model of
the first configuration warns of the setting, lists it as not verified, or is refused; or docs/settings.md says that
keymap does not compare it. Without a change there is no warning.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from peers import hf, hf_text, naflex, openclip, relatives, timm_towers
from peers.common import Size, images, max_diff, randomise, tokens
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import nn

import keymap

transformers.logging.set_verbosity_error()
PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
FAR = 1e-5
SIZE = Size()

# --- other values of a field ---

ACTIVATIONS = ["gelu", "quick_gelu", "gelu_pytorch_tanh", "gelu_tanh", "mish"]  # all are in test_settings_values.py
VALUES: dict[str, list[Any]] = {
    "hidden_act": ACTIVATIONS,
    "activation_function": ACTIVATIONS,
    "act_layer": ACTIVATIONS,
    "feed_forward_proj": ["gated-gelu", "gated-silu", "gated-relu"],
    "dense_act_fn": ["silu"],
    "pool_type": ["tok", "avg", "first", "last", "argmax", "eos"],
    "timm_pool": ["token", "avg", "max", "avgmax", "map", ""],
    "global_pool": ["token", "avg", "max", "avgmax", "map", ""],
    "hf_pooler_type": ["mean_pooler", "cls_pooler", "max_pooler", "cls_last_hidden_state_pooler"],
    "hf_proj_type": ["linear", "mlp"],
    "attentional_pool": [True, False, "parallel", "cascade"],
    "pos_embed_type": ["learnable", "sin_cos_2d"],
    "act_kwargs": [{"approximate": "tanh"}, {"approximate": "none"}],
    "norm_kwargs": [{"eps": 1e-2}],
    "block_type": ["default", "custom"],
    "proj_type": ["linear", "none"],
    "timm_proj": ["linear", "mlp", "none", None],
    "norm_layer": ["layernorm", "rmsnorm", "simplenorm"],
    "pos_embed": ["learn", "none"],
    "rope_type": ["cat", "mixed", "dinov3"],
    "rope_grid_indexing": ["ij", "xy"],
    "attn_type": ["eva", "rope"],
    "ref_feat_shape": [3],
    "rope_shift_coords": [0.5],
}


def others(name: str, value: Any) -> list[Any]:
    """Other values for a field."""
    if name in VALUES:
        return [other for other in VALUES[name] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return sorted({value // 2, value + 1} - {value})
    if isinstance(value, float):
        return [value * 10 or 0.5, 1e-2]
    return [1] if value is None else []


# --- what the page says ---


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a title of the page."""
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def fields(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def compared() -> dict[str, set[str]]:
    """The settings of the reports, by the name of a configuration's field."""
    found: dict[str, set[str]] = {}
    for label, *cells in rows("What keymap compares"):
        for name in (name for cell in cells for name in fields(cell)):
            found.setdefault(name, set()).add(label)
    return found


def not_compared() -> set[str]:
    return {name for row in rows("What keymap does not compare") for name in fields(row[0])}


# --- the cases ---


@dataclasses.dataclass
class Case:
    """A configuration and what depends on it.

    Attributes:
        config: the configuration, of nested dicts.
        paths: the fields to change, as paths in it.
        build: a model from a configuration.
        save: writes a model and its configuration to a folder.
        run: the embeddings of a model.
        target: OpenCLIP's model of the first configuration.
    """

    config: Mapping[str, Any]
    paths: list[tuple[str, ...]]
    build: Callable[[Any], nn.Module]
    save: Callable[[nn.Module, Any, Path], None]
    run: Callable[[nn.Module], list[torch.Tensor]]
    target: Callable[[], nn.Module]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def value_at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = config.get(name)
    return config


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    found = copy.deepcopy(config)
    inside = found
    for name in path[:-1]:
        inside = inside.setdefault(name, {})
    inside[path[-1]] = value
    return found


NOT_SETTINGS = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}


def of_transformers(peer: nn.Module, target: Callable[[], nn.Module], run: Any, only: str = "", **options: Any) -> Case:
    """A case of transformers' class; `only` names the section whose fields change, "" all."""
    config = peer.config.to_dict()
    sections = [name for name, value in config.items() if name in ("text_config", "vision_config")]
    paths = [(name,) for name in config if name not in NOT_SETTINGS | set(sections)]
    paths += [(section, name) for section in sections for name in config[section] if name not in NOT_SETTINGS]
    paths = [path for path in paths if only in ("", path[0])]

    def build(changed: Any) -> nn.Module:
        return type(peer)(type(peer.config).from_dict(copy.deepcopy(changed))).eval()

    return Case(config, paths, build, lambda model, _, folder: model.save_pretrained(folder), run, target, options)


def two_towers(model: nn.Module, texts: torch.Tensor) -> list[torch.Tensor]:
    return [hf.image_features(model, images()), hf.text_features(model, texts)]


def naflex_towers(model: nn.Module) -> list[torch.Tensor]:
    return [
        naflex.image_features(model, naflex.naflex_batch(list(images()), SIZE.patch)),
        hf.text_features(model, tokens(eos=None)),
    ]


def hf_text_case(name: str) -> Case:
    peer = hf_text.model(name)
    family = hf_text.CLASSES[name]

    def run(model: nn.Module) -> list[torch.Tensor]:
        ids = hf_text.ids(peer)
        mask = (ids != model.config.pad_token_id).long()  # as OpenCLIP's text tower makes it
        with torch.no_grad():
            return [hf_text.encoder(model)(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]]

    return of_transformers(peer, lambda: openclip.hf_text(family=family, seed=3), run, towers=("text",), strict=False)


CHINESE = {"family": "bert", "pooler": "cls_last_hidden_state_pooler", "proj": "linear", "quick_gelu": True}
TRANSFORMERS: dict[str, Callable[[], Case]] = {
    "CLIPModel": lambda: of_transformers(
        hf.clip(), lambda: openclip.clip(seed=9), lambda model: two_towers(model, tokens())
    ),
    "CLIPModel of OpenAI": lambda: of_transformers(
        hf.clip(eos=2, quick_gelu=True),
        lambda: openclip.clip(seed=9, quick_gelu=True),
        lambda m: two_towers(m, tokens()),
        "text_config",
    ),
    "MetaClip2Model": lambda: of_transformers(
        hf.metaclip2(),
        lambda: openclip.clip(seed=9, text={"pool_type": "eos"}),
        lambda model: two_towers(model, tokens(eos=2)),
        "text_config",
    ),
    "SiglipModel": lambda: of_transformers(
        hf.siglip(), lambda: openclip.siglip(seed=9), lambda model: two_towers(model, tokens(eos=None))
    ),
    "Siglip2Model": lambda: of_transformers(
        naflex.siglip2(), lambda: naflex.model(seed=9), naflex_towers, "vision_config"
    ),
    "ChineseCLIPModel": lambda: of_transformers(
        relatives.hf_chinese_clip(),
        lambda: openclip.hf_text(**CHINESE, seed=9),
        lambda model: two_towers(model, tokens()),
    ),
    **{name: (lambda name=name: hf_text_case(name)) for name in ("BertModel", "RobertaModel", "XLMRobertaModel")},
    **{name: (lambda name=name: hf_text_case(name)) for name in ("MT5EncoderModel", "M2M100Model")},
}

# --- OpenCLIP's own configurations ---


def of_open_clip(
    kind: type[nn.Module],
    config: dict[str, Any],
    texts: torch.Tensor | None = None,
    size: int = 28,
    only: tuple[str, ...] = ("", "vision_cfg", "text_cfg", "multimodal_cfg"),
) -> Case:
    """A case of OpenCLIP's class; `only` names the sections whose fields change, "" the top level."""
    texts = tokens() if texts is None else texts
    sections = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    paths: list[tuple[str, ...]] = [
        (name,)
        for name in inspect.signature(kind.__init__).parameters
        if name not in ("self", *sections) and "" in only
    ]
    full: dict[str, Any] = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    full |= config
    for section, cfg in sections.items():
        if section in config and section in only:
            full[section] = {f.name: f.default for f in dataclasses.fields(cfg)} | config[section]
            paths += [(section, f.name) for f in dataclasses.fields(cfg)]
    explicit = copy.deepcopy(config)

    def build(changed: Any) -> nn.Module:
        return randomise(kind(**copy.deepcopy(changed)))

    def save(model: nn.Module, changed: Any, folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
        # as published configurations are: only what differs from the defaults
        short = {
            name: {key: v for key, v in value.items() if key in explicit[name] or v != full[name].get(key)}
            if isinstance(value, dict)
            else value
            for name, value in changed.items()
            if name in explicit or value != full[name]
        }
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": short}))

    @torch.no_grad()
    def run(model: nn.Module) -> list[torch.Tensor]:
        if kind is CoCa:
            full_text = tokens(eos=None)
            out = model(images(size, batch=3), full_text)
            return [out["image_features"], out["text_features"], out["logits"], model.encode_text(texts)]
        outputs = [model.encode_image(images(size)), model.encode_text(texts)]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]  # without the tokens

    return Case(full, paths, build, save, run, lambda: build(full))


NATIVE = {
    "embed_dim": SIZE.embed_dim,
    "vision_cfg": openclip._native_vision(SIZE),
    "text_cfg": openclip.native_text(SIZE),
}


def native(**changes: Any) -> dict[str, Any]:
    """The configuration of the native towers with these fields of sections changed."""
    config = copy.deepcopy(NATIVE)
    for name, value in changes.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return config


def with_timm(name: str, pool: str, proj: str | None, size: int = 28) -> dict[str, Any]:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {**native(), "vision_cfg": vision}


def coca() -> Case:
    vision = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 7, "output_tokens": True}
    decoder = {k: v for k, v in openclip.native_text(SIZE).items() if k != "mlp_ratio"} | {"layers": 2}
    config = native(vision_cfg=vision, text_cfg={"embed_cls": True, "output_tokens": True}, embed_dim=SIZE.text_width)
    return of_open_clip(CoCa, {**config, "multimodal_cfg": decoder})


def with_hf_text() -> Case:
    folder = tempfile.mkdtemp()
    openclip.hf_config("roberta", SIZE).save_pretrained(folder)
    text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_proj_type": "linear"}
    return of_open_clip(CustomTextCLIP, {**native(), "text_cfg": text}, tokens(pad=1), only=("text_cfg",))


RESNET = {"layers": [1, 1, 2, 1], "width": 16, "image_size": 64, "patch_size": None}
OPEN_CLIP: dict[str, Callable[[], Case]] = {
    "CLIP": lambda: of_open_clip(CLIP, native()),
    "CLIP of OpenAI": lambda: of_open_clip(CLIP, native(quick_gelu=True), only=("",)),
    "CustomTextCLIP": lambda: of_open_clip(CustomTextCLIP, native(), only=("text_cfg",)),
    "end token": lambda: of_open_clip(
        CustomTextCLIP, native(text_cfg={"pool_type": "eos"}), tokens(eos=2), only=("text_cfg",)
    ),
    "average pool": lambda: of_open_clip(CLIP, native(vision_cfg={"pool_type": "avg"}), only=("vision_cfg",)),
    "ModifiedResNet": lambda: of_open_clip(CLIP, {**native(), "vision_cfg": RESNET}, size=64, only=("vision_cfg",)),
    "CoCa": coca,
    "SigLIP of timm": lambda: of_open_clip(
        CustomTextCLIP,
        with_timm(timm_towers.siglip_vit_name(), "map", "none") | {"embed_dim": 48},
        only=("vision_cfg",),
    ),
    "ViT of timm": lambda: of_open_clip(
        CustomTextCLIP, with_timm(timm_towers.clip_vit_name(), "token", "linear"), only=("vision_cfg",)
    ),
    "ConvNeXt of timm": lambda: of_open_clip(
        CLIP, with_timm(timm_towers.convnext_name(), "avg", "linear", 64), size=64, only=("vision_cfg",)
    ),
    "RoBERTa": with_hf_text,
}

# --- timm's configurations ---

TINY = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}


def of_timm(base: str, arguments: dict[str, Any], pool: str, size: int = 28) -> Case:
    """A timm tower without its classifier; OpenCLIP adds a projection, which the file lacks."""
    constructor = inspect.signature(type(timm.create_model(base, num_classes=0, **arguments)).__init__).parameters
    known = {name: p.default for name, p in constructor.items() if p.default is not inspect.Parameter.empty}
    plain = {k: v for k, v in known.items() if v is None or isinstance(v, (bool, int, float, str))}
    given = {"num_classes": 0, "global_pool": pool, **arguments}

    def build(changed: Any) -> nn.Module:
        asked = {k: v for k, v in changed.items() if k in given or v != plain.get(k)}
        return randomise(timm.create_model(base, **asked))

    @torch.no_grad()
    def run(model: nn.Module) -> list[torch.Tensor]:
        return [model(images(size))]

    def target() -> nn.Module:
        name = timm_towers.register(base, **arguments)
        return randomise(CustomTextCLIP(**with_timm(name, pool, "linear", size)), 5)

    def save(model: nn.Module, changed: Any, folder: Path) -> None:
        save_for_hf(model, folder, safe_serialization=True)

    paths = [(name,) for name in plain if name not in ("device", "dtype")]
    return Case(plain | given, paths, build, save, run, target, {"towers": ("image",), "strict": False})


TIMM: dict[str, Callable[[], Case]] = {
    "VisionTransformer": lambda: of_timm("vit_base_patch16_clip_224", TINY, "token"),
    "VisionTransformer, average": lambda: of_timm("vit_base_patch16_clip_224", TINY, "avg"),
    "SigLIP": lambda: of_timm("vit_base_patch16_siglip_224", TINY, "map"),
    "ConvNeXt": lambda: of_timm("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 40)}, "avg", 64),
    "Eva": lambda: of_timm("eva02_tiny_patch14_224", TINY, "token"),
    "SwinTransformer": lambda: of_timm(
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "window_size": 7, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)},
        "avg",
        56,
    ),
    "SwinTransformerV2": lambda: of_timm(
        "swinv2_tiny_window8_256",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)},
        "avg",
        64,
    ),
}
CASES = {
    f"{owner}: {name}": make
    for owner, cases in (("transformers", TRANSFORMERS), ("open_clip", OPEN_CLIP), ("timm", TIMM))
    for name, make in cases.items()
}


SEEN = {  # fields that must be among those that change embeddings, so that the test can fail
    "transformers: CLIPModel": {"hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id"},
    "transformers: BertModel": {"hidden_act", "num_attention_heads", "layer_norm_eps", "is_decoder", "pad_token_id"},
    "transformers: XLMRobertaModel": {"hidden_act", "is_decoder", "pad_token_id"},
    "transformers: MT5EncoderModel": {"dense_act_fn", "relative_attention_max_distance", "layer_norm_epsilon"},
    "transformers: M2M100Model": {"encoder_attention_heads", "activation_function", "scale_embedding"},
    "open_clip: CLIP": {
        "quick_gelu",
        "head_width",
        "heads",
        "pool_type",
        "no_causal_mask",
        "norm_kwargs",
        "act_kwargs",
    },
    "open_clip: end token": {"eos_id", "pool_type"},
    "open_clip: average pool": {"final_ln_after_pool", "pool_type"},
    "open_clip: ModifiedResNet": {"head_width"},
    "open_clip: CoCa": {"attn_pooler_heads", "heads", "pad_id", "quick_gelu"},
    "open_clip: ViT of timm": {"timm_pool"},
    "open_clip: RoBERTa": {"hf_pooler_type"},
    "timm: VisionTransformer": {"num_heads", "act_layer", "global_pool"},
    "timm: Eva": {"rope_temperature", "num_heads"},
}


def same_keys(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}


def changes(case: Case, base: nn.Module) -> Iterator[tuple[tuple[str, ...], Any, Any, nn.Module, float]]:
    """Fields and values under which the same weights give other embeddings: with the model, and how far it is."""
    state, first = base.state_dict(), case.run(base)
    for path in case.paths:
        for value in others(path[-1], value_at(case.config, path)):
            config = changed(case.config, path, value)
            try:
                model = case.build(config)
                if not same_keys(model.state_dict(), state):
                    continue
                model.load_state_dict(state)
                outputs = case.run(model.eval())
            except Exception:  # the library refuses the value
                continue
            shapes = [x.shape for x in outputs] == [x.shape for x in first]
            far = max(max_diff(x, y) for x, y in zip(outputs, first, strict=True)) if shapes else float("inf")
            if far > FAR:
                yield path, value, config, model, far


def load(case: Case, model: nn.Module, folder: Path) -> tuple[set[str], set[str]]:
    """The settings that a load warns of, and those that it lists as not verified."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = keymap.load_checkpoint(model, folder, **case.options)
    texts = [str(w.message).split(": ")[1] for w in caught if issubclass(w.category, keymap.ConfigurationWarning)]
    return set(texts), set(result.report.plan.unverified)


def silent(case: Case, seen: set[str]) -> list[str]:
    """The changes that a load says nothing of, apart from those of the page; adds all changed fields to ``seen``."""
    known, left_out, found = compared(), not_compared(), []
    base, target = case.build(case.config), case.target()
    for path, value, config, model, far in changes(case, base):
        seen.add(path[-1])
        with tempfile.TemporaryDirectory() as folder:
            case.save(model, config, Path(folder))
            try:
                warned, unverified = load(case, target, Path(folder))
            except keymap.KeymapError:
                continue
        settings = known.get(path[-1], set())
        if not settings & (warned | unverified) and path[-1] not in left_out:
            found.append(f"{'.'.join(path)} = {value!r}: {far:.2g} apart; warned of {sorted(warned)}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_field_that_changes_embeddings(name):
    seen: set[str] = set()
    assert silent(CASES[name](), seen) == []
    assert seen >= SEEN.get(name, set())


@pytest.mark.parametrize("name", CASES)
def test_the_same_configuration_gives_no_warning(name, tmp_path):
    case = CASES[name]()
    case.save(case.build(case.config), case.config, tmp_path)
    assert load(case, case.target(), tmp_path)[0] == set()


def test_the_page_names_the_settings_of_the_reports():
    from keymap.source.registry import registry

    labels = {fact.label for fact in registry().hub.facts.values() if fact.label}
    assert {row[0] for row in rows("What keymap compares")} == labels
    assert not compared().keys() & not_compared()
