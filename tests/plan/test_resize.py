"""Position embeddings at other sizes: the values of open_clip where it resizes too, of plain torch elsewhere.

Every tower with positions, any grid (h, w) to any grid, text of any length, every float dtype. Doubtful resizes are
refused, and the report lists the others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from peers import hf, openclip, timm_towers
from peers.common import assert_unchanged, bits, images, same_bits
from safetensors.torch import save_file
from torch import Tensor, nn

import keymap

Grid = tuple[int, int]
State = dict[str, Tensor]
PATCH = 14


@pytest.fixture
def st(tmp_path) -> Callable[..., Path]:
    def save(state: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
        return tmp_path / name

    return save


def state_of(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def pixels(grid: Grid) -> Grid:
    return grid[0] * PATCH, grid[1] * PATCH


def siglip(grid: Grid, seed: int) -> nn.Module:
    return openclip.siglip(image_size=pixels(grid), seed=seed)


def trunk(grid: Grid, seed: int) -> nn.Module:
    return openclip.clip_trunk(image_size=pixels(grid), seed=seed)


def no_embed_class(grid: Grid, seed: int) -> nn.Module:
    return openclip.clip_trunk(image_size=pixels(grid), seed=seed, no_embed_class=True)


def _timm(base: str, pool: str, grid: Grid, **more: object) -> dict[str, Any]:
    """open_clip's configuration of a small timm ViT."""
    arguments = {"img_size": pixels(grid), "patch_size": PATCH, "embed_dim": 48, "depth": 1, "num_heads": 3, **more}
    return {
        **dict.fromkeys(["layers", "width", "head_width", "mlp_ratio"]),
        "timm_model_name": timm_towers.register(base, **arguments),
        "timm_pool": pool,
        "timm_proj": "linear",
        "image_size": pixels(grid),
    }


def registers(grid: Grid, seed: int) -> nn.Module:
    """A class token and four registers, all with a row in front of the grid."""
    return openclip.custom(vision=_timm("vit_base_patch16_224", "token", grid, reg_tokens=4), seed=seed)


def registers_apart(grid: Grid, seed: int) -> nn.Module:
    """A class token and four registers, none of which has a row."""
    vision = _timm("vit_base_patch16_224", "token", grid, reg_tokens=4, no_embed_class=True)
    return openclip.custom(vision=vision, seed=seed)


def eva(grid: Grid, seed: int) -> nn.Module:
    return openclip.custom(vision=_timm("eva02_base_patch16_clip_224", "token", grid), seed=seed)


def native(grid: Grid, seed: int) -> nn.Module:
    return openclip.clip(image_size=pixels(grid), seed=seed)


def custom(grid: Grid, seed: int) -> nn.Module:
    return openclip.custom(image_size=pixels(grid), seed=seed)


def coca(grid: Grid, seed: int) -> nn.Module:
    return openclip.coca(image_size=pixels(grid), seed=seed)


# tower: builder, key, rows in front of the grid
TOWERS: dict[str, tuple[Callable[[Grid, int], nn.Module], str, int]] = {
    "native ViT": (native, "visual.positional_embedding", 1),
    "native ViT, CustomTextCLIP": (custom, "visual.positional_embedding", 1),
    "native ViT, CoCa": (coca, "visual.positional_embedding", 1),
    "timm CLIP ViT": (trunk, "visual.trunk.pos_embed", 1),
    "timm CLIP ViT, no_embed_class": (no_embed_class, "visual.trunk.pos_embed", 0),
    "timm SigLIP ViT": (siglip, "visual.trunk.pos_embed", 0),
    "timm ViT with registers": (registers, "visual.trunk.pos_embed", 5),
    "timm ViT with registers, no_embed_class": (registers_apart, "visual.trunk.pos_embed", 0),
    "timm EVA": (eva, "visual.trunk.pos_embed", 1),
}
AMBIGUOUS = "timm ViT with registers, no_embed_class"  # 9 rows are 3x3, or five tokens and 2x2
UNAMBIGUOUS = [tower for tower in TOWERS if tower != AMBIGUOUS]
STEPS: list[tuple[Grid, Grid]] = [
    ((2, 2), (4, 4)),
    ((4, 4), (2, 2)),
    ((3, 3), (2, 5)),
    ((2, 2), (1, 4)),
    ((2, 4), (4, 2)),
    ((2, 4), (4, 4)),
    ((1, 4), (2, 2)),
    ((2, 5), (3, 4)),
    ((3, 1), (1, 3)),
]


def by_hand(rows: Tensor, prefix: int, source: Grid, target: Grid) -> Tensor:
    """Plain torch: the rows in front as they are, the grid resampled as an image."""
    flat = rows.reshape(-1, rows.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    assert flat.shape[0] == prefix + source[0] * source[1]
    image = torch.stack([flat[prefix + h * source[1] : prefix + (h + 1) * source[1]] for h in range(source[0])])
    image = image.movedim(2, 0)[None]
    image = torch.nn.functional.interpolate(image, target, mode="bicubic", antialias=True, align_corners=False)
    new = torch.cat([flat[:prefix], image[0].flatten(1).T])
    return new.reshape(*rows.shape[:-2], *new.shape)


def assert_only(model: nn.Module, source: Mapping[str, Tensor], **resized: Tensor) -> None:
    """Every tensor is the file's, but for those that are named (dots as double underscores)."""
    new = {k.replace("__", "."): v for k, v in resized.items()}
    expected = {**source, **new}
    for key, value in model.state_dict().items():
        assert same_bits(value, expected[key].to(value.dtype).contiguous()), key


def refuses(model: nn.Module, path: Path, *words: str, **options: Any) -> str:
    before = bits(model)
    with pytest.raises(keymap.KeymapError) as caught:
        keymap.load_checkpoint(model, path, **options)
    assert_unchanged(model, before)
    message = str(caught.value)
    assert [word for word in (*words, path.name, "nothing was changed") if word not in message] == [], message
    return message


# --- every tower, every grid ---


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_any_grid_into_any_grid(tower, step, st):
    build, key, prefix = TOWERS[tower]
    source, model = state_of(build(step[0], 1)), build(step[1], 2)
    result = keymap.load_checkpoint(model, st(source), source_grid=step[0])
    expected = by_hand(source[key], prefix, *step)
    assert_only(model, source, **{key: expected})
    words = f"{step[0][0]}x{step[0][1]} to {step[1][0]}x{step[1][1]}, bicubic"
    assert result.report.plan.resized == {key: words}
    assert f"resized: {key} from {words}" in str(result)
    assert result.to_dict()["resized"] == {key: words}
    with torch.no_grad():
        out = model.encode_image(images(pixels(step[1])))
        assert torch.isfinite(out[0] if isinstance(out, tuple) else out).all()


@pytest.mark.parametrize("grid", [(2, 2), (2, 4), (1, 3), None], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_the_same_grid_is_copied_as_it_is(tower, grid, st):
    build, _, _ = TOWERS[tower]
    source, model = state_of(build(grid or (3, 3), 1)), build(grid or (3, 3), 2)
    result = keymap.load_checkpoint(model, st(source), source_grid=grid)
    assert result.report.plan.resized == {}
    assert_only(model, source)


@pytest.mark.parametrize("grid", [(2, 6), (1, 6)], ids=str)
@pytest.mark.parametrize("tower", UNAMBIGUOUS)
def test_a_grid_that_is_not_square_needs_source_grid(tower, grid, st):
    build, _, _ = TOWERS[tower]
    refuses(build((4, 4), 2), st(state_of(build(grid, 1))), "source_grid=(h, w)", f"{grid[0]}x{grid[1]}")


@pytest.mark.parametrize("grid", [(2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_equal_shapes_are_taken_to_be_on_the_models_grid(tower, grid, st):
    """The same rows could be on another grid, which a note says."""
    build, key, _ = TOWERS[tower]
    source, model = state_of(build(grid, 1)), build(grid, 2)
    result = keymap.load_checkpoint(model, st(source))
    assert_only(model, source)
    note = f"{key}: taken as the model's grid of {grid[0]}x{grid[1]}"
    assert any(note in line and "source_grid=(h, w)" in line for line in result.report.plan.notes)


@pytest.mark.parametrize("tower", TOWERS)
def test_equal_shapes_are_resized_where_source_grid_says_another_grid(tower, st):
    build, key, prefix = TOWERS[tower]
    source, model = state_of(build((2, 4), 1)), build((4, 2), 2)
    result = keymap.load_checkpoint(model, st(source), source_grid=(2, 4))
    assert_only(model, source, **{key: by_hand(source[key], prefix, (2, 4), (4, 2))})
    assert not any("taken as" in line for line in result.report.plan.notes)


@pytest.mark.parametrize("target", [(4, 4), (2, 5), (1, 4), (5, 2)], ids=str)
@pytest.mark.parametrize("tower", UNAMBIGUOUS)
def test_a_square_grid_needs_no_source_grid(tower, target, st):
    build, key, prefix = TOWERS[tower]
    source, model = state_of(build((3, 3), 1)), build(target, 2)
    result = keymap.load_checkpoint(model, st(source))
    assert_only(model, source, **{key: by_hand(source[key], prefix, (3, 3), target)})
    assert "3x3 (assumed to be square) to" in result.report.plan.resized[key]


@pytest.mark.parametrize("step", [((2, 2), (4, 4)), ((1, 1), (3, 3)), ((2, 2), (4, 2)), ((2, 3), (3, 2))], ids=str)
def test_modified_resnet_attention_pool(step, st):
    (sh, sw), (th, tw) = step
    key = "visual.attnpool.positional_embedding"
    source = state_of(openclip.resnet(seed=1))
    source[key] = torch.randn(1 + sh * sw, source[key].shape[1])
    model = openclip.resnet(seed=2, image_size=32 * th)
    if th != tw:  # open_clip builds square pools only: give the model the rows and the size of another
        pool = model.visual.attnpool
        pool.positional_embedding = nn.Parameter(torch.randn(1 + th * tw, source[key].shape[1]))
        model.visual.image_size = (32 * th, 32 * tw)
    result = keymap.load_checkpoint(model, st(source), source_grid=step[0])
    assert_only(model, source, **{key: by_hand(source[key], 1, *step)})
    assert result.report.plan.resized == {key: f"{sh}x{sw} to {th}x{tw}, bicubic"}


@pytest.mark.parametrize("target", [(4, 4), (3, 2)], ids=str)
def test_other_formats_are_resized_in_the_layout_of_the_model(target, st):
    keys = hf.disk_keys(hf.clip())
    table = keys["vision_model.embeddings.position_embedding.weight"]
    expected = by_hand(table, 1, (2, 2), target)
    path = st(keys)
    for build, key in ((native, "visual.positional_embedding"), (trunk, "visual.trunk.pos_embed")):
        model = build(target, 2)
        result = keymap.load_checkpoint(model, path)
        assert same_bits(model.state_dict()[key].reshape(expected.shape), expected)
        assert list(result.report.plan.resized) == [key]


# --- open_clip's own functions ---


@pytest.mark.parametrize("target", [(4, 4), (1, 1), (2, 5), (7, 3)], ids=str)
@pytest.mark.parametrize("build", [native, custom, coca])
def test_images_equal_open_clip_bit_for_bit(build, target, st):
    source, model = state_of(build((3, 3), 1)), build(target, 2)
    path, expected = st(source), dict(source)
    resize_pos_embed(expected, model)
    keymap.load_checkpoint(model, path)
    assert_only(model, expected)
    assert expected["visual.positional_embedding"].shape[0] == 1 + target[0] * target[1]


@pytest.mark.parametrize("length", [1, 7, 15, 17, 32, 77])
@pytest.mark.parametrize("build", [openclip.clip, openclip.custom, openclip.siglip, openclip.coca])
def test_text_equals_open_clip_bit_for_bit(build, length, st):
    source, model = state_of(build(seed=1)), build(seed=2, context_length=length)
    path, expected = st(source), dict(source)
    resize_text_pos_embed(expected, model)
    result = keymap.load_checkpoint(model, path)
    assert_only(model, expected)
    key = "text.positional_embedding" if "text.positional_embedding" in source else "positional_embedding"
    rows = source[key].shape[0]
    assert result.report.plan.resized == {key: f"{rows} to {expected[key].shape[0]}, linear"}
    assert f"resized: {key}" in str(result)


def test_image_and_text_at_once_from_flat_to_custom(st):
    source, model = state_of(native((2, 2), 1)), openclip.custom(seed=2, image_size=pixels((3, 5)), context_length=9)
    path, expected = st(source), dict(source)
    resize_pos_embed(expected, model)
    resize_text_pos_embed(expected, model)
    result = keymap.load_checkpoint(model, path)
    for key, value in expected.items():
        spelled = key if key.startswith(("visual.", "logit_")) else f"text.{key}"
        assert same_bits(model.state_dict()[spelled], value), key
    assert len(result.report.plan.resized) == 2


def test_text_width_is_never_resized(st):
    model = openclip.clip(seed=2, text_width=64)
    refuses(model, st(state_of(openclip.clip(seed=1))), "positional_embedding", "[16, 32]", "[16, 64]", "width")


# --- dtypes ---


@pytest.mark.parametrize("target", [(4, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tower", UNAMBIGUOUS)
def test_dtypes_of_the_file(tower, dtype, target, st):
    """Halves are widened first; float64 is resampled as float64 and rounded at the end."""
    build, key, prefix = TOWERS[tower]
    source = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_of(build((3, 3), 1)).items()}
    model = build(target, 2)
    keymap.load_checkpoint(model, st(source))
    expected = by_hand(source[key], prefix, (3, 3), target)
    assert expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_only(model, source, **{key: expected})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_text_dtypes_of_the_file(dtype, st):
    source = {k: v.to(dtype) for k, v in state_of(openclip.clip(seed=1)).items()}
    model = openclip.clip(seed=2, context_length=21)
    keymap.load_checkpoint(model, st(source))
    rows = source["positional_embedding"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.nn.functional.interpolate(rows.T[None], size=21, mode="linear", align_corners=False)[0].T
    assert_only(model, source, positional_embedding=expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_fp16", "pure_bf16"])
def test_dtypes_of_the_model(precision, st):
    source = state_of(native((3, 3), 1))
    model = openclip.clip(image_size=pixels((4, 5)), precision=precision, seed=2)
    keymap.load_checkpoint(model, st(source))
    key = "visual.positional_embedding"
    assert_only(model, source, **{key: by_hand(source[key], 1, (3, 3), (4, 5))})


def test_a_half_precision_file_into_a_half_precision_model_is_rounded_once(st):
    source = {k: v.half() for k, v in state_of(native((3, 3), 1)).items()}
    model = openclip.clip(image_size=pixels((4, 5)), precision="pure_fp16", seed=2)
    keymap.load_checkpoint(model, st(source))
    key = "visual.positional_embedding"
    assert_only(model, source, **{key: by_hand(source[key], 1, (3, 3), (4, 5)).half()})


def test_assign_resizes_too(st):
    source = state_of(native((3, 3), 1))
    model = native((4, 5), 2).to("meta")
    result = keymap.load_checkpoint(model, st(source), assign=True)
    key = "visual.positional_embedding"
    assert_only(model, source, **{key: by_hand(source[key], 1, (3, 3), (4, 5))})
    assert key in result.report.materialised


# --- prefix rows ---


def test_a_class_token_without_a_position_gets_zeros_and_the_report_lists_it(st):
    """The file was trained without a position for its class token: the model's own row must add nothing."""
    source, model = state_of(no_embed_class((2, 2), 1)), trunk((2, 2), 2)
    key = "visual.trunk.pos_embed"
    result = keymap.load_checkpoint(model, st(source))
    zero = torch.zeros(1, 1, source[key].shape[2])
    assert_only(model, source, **{key: torch.cat([zero, source[key]], dim=1)})
    assert "zeros" in result.report.plan.resized[key] and "zeros" in str(result)
    reference = no_embed_class((2, 2), 1)
    with torch.no_grad():
        assert torch.allclose(model.encode_image(images()), reference.encode_image(images()), atol=2e-5)


def test_a_class_token_without_a_row_and_another_grid(st):
    source, model = state_of(no_embed_class((2, 4), 1)), trunk((3, 3), 2)
    key = "visual.trunk.pos_embed"
    keymap.load_checkpoint(model, st(source), source_grid=(2, 4))
    grid = by_hand(source[key], 0, (2, 4), (3, 3))
    assert_only(model, source, **{key: torch.cat([torch.zeros(1, 1, grid.shape[2]), grid], dim=1)})


def test_a_row_for_the_class_token_without_a_place_in_the_model_is_refused(st):
    source, model = state_of(trunk((2, 2), 1)), no_embed_class((2, 2), 2)
    refuses(model, st(source), "visual.trunk.pos_embed", "1 rows before its grid", "the model has 0")


def test_registers_without_rows_are_not_filled_in_part(st):
    """One row of a class token cannot stand for five."""
    source = state_of(registers((2, 2), 1))
    source["visual.trunk.pos_embed"] = source["visual.trunk.pos_embed"][:, 4:]
    refuses(registers((3, 3), 2), st(source), "visual.trunk.pos_embed")


# --- what is doubtful is refused ---


WRONG_GRIDS = {
    "one row too many": (3, 2),
    "too large": (5, 5),
    "of one patch": (1, 1),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grid", WRONG_GRIDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_source_grid_that_does_not_fit(tower, grid, strict, st):
    build, key, _ = TOWERS[tower]
    source, model = state_of(build((2, 2), 1)), build((4, 4), 2)
    path, given = st(source), WRONG_GRIDS[grid]
    rows = source[key].shape[-2]
    words = [key, f"source_grid={given!r}", f"{rows} positions"]
    if strict:
        refuses(model, path, *words, source_grid=given)
        return
    before = state_of(model)
    result = keymap.load_checkpoint(model, path, strict=False, source_grid=given)
    assert result.missing_keys == [key]
    assert [word for word in words if word not in str(result)] == []
    assert_only(model, source, **{key: before[key]})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "grid",
    [(2,), (2, 2, 2), (0, 4), (-1, -4), (2.0, 2.0), ("2", "2"), "22", 4, True],
    ids=repr,
)
def test_a_malformed_source_grid_is_refused(grid, strict, st):
    path, model = st(state_of(native((2, 2), 1))), native((4, 4), 2)
    before = bits(model)
    with pytest.raises(keymap.KeymapError, match=r"source_grid=.*expected the rows and columns of patches"):
        keymap.load_checkpoint(model, path, strict, source_grid=grid)
    assert_unchanged(model, before)


def test_rows_that_no_square_grid_explains_are_refused(st):
    """Neither 17 nor 12 rows are a square; 21 are five tokens and 4x4."""
    key = "visual.trunk.pos_embed"
    state = state_of(registers((2, 2), 1))
    refuses(registers((2, 2), 2), st({**state, key: torch.randn(1, 17, 48)}), key, "17 positions", "source_grid=(h, w)")
    table, model = torch.randn(1, 21, 48), registers((2, 2), 2)
    keymap.load_checkpoint(model, st({**state, key: table}))
    assert_only(model, state, **{key: by_hand(table, 5, (4, 4), (2, 2))})


def test_a_number_of_rows_with_two_square_readings_is_refused(st):
    """9 rows: a class token, four registers and 2x2, or 3x3 without a row for any of them."""
    key = "visual.trunk.pos_embed"
    state = state_of(registers((2, 2), 1))
    assert state[key].shape[1] == 9
    path = st(state)
    refuses(registers((4, 4), 2), path, key, "9 positions", "source_grid=(h, w)")
    for grid, prefix in (((2, 2), 5), ((3, 3), 0)):
        model = registers((4, 4), 2)
        keymap.load_checkpoint(model, path, source_grid=grid)
        rows = by_hand(state[key], prefix, grid, (4, 4))
        expected = rows if prefix else torch.cat([torch.zeros(1, 5, 48), rows], dim=1)
        assert same_bits(model.state_dict()[key], expected)


def test_the_advice_for_two_readings_names_grids_that_are_accepted(st):
    path = st(state_of(registers((2, 2), 1)))
    message = refuses(registers((4, 4), 2), path, "source_grid=(h, w)")
    assert "2x2 after" in message and "3x3 after" in message


def test_the_grid_is_read_from_the_configuration_beside_the_file(st, tmp_path):
    config = {"model_cfg": {"vision_cfg": {"image_size": [28, 56], "patch_size": 14}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    source, model = state_of(native((2, 4), 1)), native((4, 2), 2)
    keymap.load_checkpoint(model, st(source))
    key = "visual.positional_embedding"
    assert_only(model, source, **{key: by_hand(source[key], 1, (2, 4), (4, 2))})


@pytest.mark.parametrize("size", [[70, 14], [28, 28], "28", None, [0, 0], {"h": 28}], ids=str)
def test_a_configuration_that_does_not_fit_is_not_believed(size, st, tmp_path):
    config = {"model_cfg": {"vision_cfg": {"image_size": size, "patch_size": 14}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    source = state_of(native((2, 4), 1))
    refuses(native((4, 4), 2), st(source), "source_grid=(h, w)", "2x4")


def test_source_grid_goes_before_the_configuration(st, tmp_path):
    config = {"model_cfg": {"vision_cfg": {"image_size": [56, 28], "patch_size": 14}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    source, model = state_of(native((2, 4), 1)), native((4, 4), 2)
    keymap.load_checkpoint(model, st(source), source_grid=(2, 4))
    key = "visual.positional_embedding"
    assert_only(model, source, **{key: by_hand(source[key], 1, (2, 4), (4, 4))})


def test_source_grid_is_ignored_for_a_text_tower(st):
    source, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=2, context_length=20)
    before = state_of(model)
    keymap.load_checkpoint(model, st(source), towers=("text",), source_grid=(2, 4))
    assert same_bits(model.state_dict()["visual.positional_embedding"], before["visual.positional_embedding"])


@pytest.mark.parametrize("tower", UNAMBIGUOUS)
def test_a_resized_load_leaves_the_file_and_other_models_alone(tower, st):
    build, _, _ = TOWERS[tower]
    source, model = state_of(build((3, 3), 1)), build((2, 2), 2)
    path = st(source)
    raw, twin = path.read_bytes(), copy.deepcopy(model)
    before = bits(twin)
    keymap.load_checkpoint(model, path)
    assert path.read_bytes() == raw
    assert_unchanged(twin, before)


# --- a timm tower without a row for its class token, into open_clip's own ViT ---


@pytest.mark.parametrize("with_source_grid", [True, False])
def test_a_timm_file_without_a_row_for_the_class_token_into_the_native_vit(with_source_grid, st):
    peer, model = timm_towers.clip_vit(no_embed_class=True), native((2, 2), 2)
    path = st(peer.state_dict())
    result = keymap.load_checkpoint(model, path, towers=("image",), source_grid=(2, 2) if with_source_grid else None)
    assert "zeros" in result.report.plan.resized["visual.positional_embedding"]
    with torch.no_grad():
        assert torch.allclose(model.encode_image(images()), peer(images()), atol=2e-5)


def test_the_advice_for_a_table_without_a_row_is_not_a_wrong_grid(st):
    path = st(timm_towers.clip_vit(no_embed_class=True, image_size=(28, 42)).state_dict())
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(native((2, 2), 2), path, towers=("image",))
    message = str(caught.value)
    assert "pass source_grid=(h, w), one of" in message and "2x3" in message
    assert "source_grid=(1, 5)" not in message and "2x3 after 0 rows" in message
