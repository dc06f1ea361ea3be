"""Meta's Segment Anything, and SamModel of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peers.common import images, randomised

from . import Example

SIDE, PATCH, WIDTH, HEADS, INNER, OUT, MASK = 64, 8, 24, 3, 60, 32, 20
DECODER, HIDDEN = 20, 28  # of the mask decoder: the width of its mlp, and of the head for the quality
GRID = SIDE // PATCH
POINTS = torch.tensor([[[10.0, 20.0], [40.0, 33.0], [50.0, 5.0]]])
LABELS = torch.tensor([[1, 0, 1]])
BOXES = torch.tensor([[5.0, 9.0, 44.0, 60.0]])
MASKS = torch.randn(1, 1, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(4))


def meta() -> nn.Module:
    """Segment Anything at small sizes: block 0 attends within windows, block 1 everywhere."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    def made() -> nn.Module:
        return Sam(
            ImageEncoderViT(
                img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=HEADS, mlp_ratio=INNER / WIDTH,
                out_chans=OUT, norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=3,
                global_attn_indexes=(1,),
            ),
            PromptEncoder(OUT, (GRID, GRID), (SIDE, SIDE), MASK),
            MaskDecoder(
                transformer_dim=OUT, transformer=TwoWayTransformer(2, OUT, 2, DECODER), iou_head_hidden_dim=HIDDEN
            ),
        )  # fmt: skip

    return randomised(made, seed=1)


def hf(kind: str = "SamModel", **vision: Any) -> Callable[[], nn.Module]:
    """Makes a model of transformers, by the name of its class."""

    def made() -> nn.Module:
        import transformers

        sizes = {
            "hidden_size": WIDTH, "output_channels": OUT, "num_hidden_layers": 3, "num_attention_heads": HEADS,
            "image_size": SIDE, "patch_size": PATCH, "mlp_dim": INNER, "window_size": 3, "global_attn_indexes": [1],
            "num_pos_feats": OUT // 2, **vision,
        }  # fmt: skip
        if kind == "SamVisionModel":
            return randomised(transformers.SamVisionModel, transformers.SamVisionConfig(**sizes))
        prompt = {"hidden_size": OUT, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": MASK}
        mask = {"hidden_size": OUT, "mlp_dim": DECODER, "num_attention_heads": 2, "iou_head_hidden_dim": HIDDEN}
        config = transformers.SamConfig(vision_config=sizes, prompt_encoder_config=prompt, mask_decoder_config=mask)
        return randomised(transformers.SamModel, config)

    return made


ASKS = (  # points, a box, a mask; whether several masks are wanted
    ((POINTS, LABELS), None, None, True),
    ((POINTS, LABELS), BOXES, None, False),
    (None, BOXES, MASKS, True),
)


@torch.no_grad()
def masks(peer: nn.Module) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    """The masks and their qualities for each of `ASKS`, and the image's embedding.

    All are brought to the size 1/4, because norms over few channels make errors of rounding larger.
    """
    pixels = images(SIDE, batch=1)
    embedded, wanted = peer.image_encoder(pixels), []
    for points, boxes, mask, several in ASKS:
        sparse, dense = peer.prompt_encoder(points, boxes, mask)
        wanted += peer.mask_decoder(embedded, peer.prompt_encoder.get_dense_pe(), sparse, dense, several)

    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        found, ours = [], model.get_image_embeddings(pixels)
        for points, boxes, mask, several in ASKS:
            made = model(
                image_embeddings=ours,
                input_points=None if points is None else points[0][None],
                input_labels=None if points is None else points[1][None],
                input_boxes=None if boxes is None else boxes[None],
                input_masks=mask,
                multimask_output=several,
            )
            found += [made.pred_masks[0], made.iou_scores[0]]
        both = zip([embedded, *wanted], [ours, *found], strict=True)
        return [(theirs / (4 * theirs.abs().max()), mine / (4 * theirs.abs().max())) for theirs, mine in both]

    return pairs


def segment_anything() -> Example:
    peer = meta()
    return Example(
        "segment_anything",
        peer.state_dict(),
        hf(),
        "segment_anything's Sam",
        outputs=masks(peer),
        wrong={
            "a layer more": hf(num_hidden_layers=4),
            "other windows": hf(window_size=4),
            "another block without windows": hf(global_attn_indexes=[2]),
        },
    )


def encoder_alone() -> Example:
    peer = meta().image_encoder
    return Example(
        "segment_anything",
        {f"image_encoder.{key}": value for key, value in peer.state_dict().items()},
        hf("SamVisionModel"),
        "segment_anything's ImageEncoderViT",
        outputs=lambda model: [(peer(images(SIDE)), model(images(SIDE)).last_hidden_state)],
        wrong={"a layer more": hf("SamVisionModel", num_hidden_layers=4)},
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "segment_anything": segment_anything,
    "segment_anything image encoder": encoder_alone,
}
ROWS = r"""
segment_anything: the relative positions of rows and columns swapped: differs
- attn.rel_pos_(h|w): attn.rel_pos_\1
+ attn.rel_pos_h: attn.rel_pos_w
+ attn.rel_pos_w: attn.rel_pos_h
segment_anything: the embeddings of no point and of no mask swapped: differs
- prompt_encoder.(not_a_point_embed|no_mask_embed).weight: prompt_encoder.\1.weight
+ prompt_encoder.not_a_point_embed.weight: prompt_encoder.no_mask_embed.weight
+ prompt_encoder.no_mask_embed.weight: prompt_encoder.not_a_point_embed.weight
segment_anything: the first two matrices of the hypernetworks crossed: refused
- mlp: {0: proj_in, 1: layers.0, 2: proj_out}
+ mlp: {0: layers.0, 1: proj_in, 2: proj_out}
segment_anything: both kinds of attention between image and words crossed: differs
- (self_attn|cross_attn_token_to_image|cross_attn_image_to_token).(q|k|v|out)_proj.(weight|bias): \1.\2_proj.\3
+ self_attn.(q|k|v|out)_proj.(weight|bias): self_attn.\1_proj.\2
+ cross_attn_token_to_image.(q|k|v|out)_proj.(weight|bias): cross_attn_image_to_token.\1_proj.\2
+ cross_attn_image_to_token.(q|k|v|out)_proj.(weight|bias): cross_attn_token_to_image.\1_proj.\2
segment_anything: q and k of the mask decoder swapped: differs
- (self_attn|cross_attn_token_to_image|cross_attn_image_to_token).(q|k|v|out)_proj.(weight|bias): \1.\2_proj.\3
+ self_attn.q_proj.(weight|bias): self_attn.k_proj.\1
+ self_attn.k_proj.(weight|bias): self_attn.q_proj.\1
+ self_attn.(v|out)_proj.(weight|bias): self_attn.\1_proj.\2
+ (cross_attn_token_to_image|cross_attn_image_to_token).(q|k|v|out)_proj.(weight|bias): \1.\2_proj.\3
segment_anything: the norms of the neck crossed: differs
- neck: {0: 1, 1: 1, 2: 2, 3: 2}
+ neck: {0: 1, 1: 2, 2: 2, 3: 1}
segment_anything image encoder: the norms of a block swapped: differs
- norm(1|2).(weight|bias): layer_norm\1.\2
+ norm1.(weight|bias): layer_norm2.\1
+ norm2.(weight|bias): layer_norm1.\1
"""
