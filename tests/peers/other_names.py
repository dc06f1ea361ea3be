"""The weights of small or full-size models of OpenCLIP and transformers under the names that other projects give them.

Written by hand from the owners' code, which the mapping of each format names; tensors may be on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]


def slip(state: Mapping[str, Tensor]) -> State:
    """SLIP's and LaCLIP's names for a CLIP with a ViT of timm and a linear projection."""
    found = {}
    for key, value in state.items():
        if key == "visual.head.proj.weight":
            found["image_projection"] = value.T
        else:
            found[key.replace("visual.trunk.", "visual.")] = value
    return found


def meru(state: Mapping[str, Tensor]) -> State:
    """The names of MERU's CLIP baseline for the same model."""
    text = {"token_embedding.weight": "textual.token_embed.weight", "positional_embedding": "textual.posit_embed"}
    found = {}
    for key, value in state.items():
        if key == "visual.head.proj.weight":
            found["visual_proj.weight"] = value
        elif key == "text_projection":
            found["textual_proj.weight"] = value.T
        elif key in text:
            found[text[key]] = value
        elif key.startswith(("transformer.", "ln_final.")):
            found[f"textual.{key.removeprefix('transformer.')}"] = value
        else:
            found[key.replace("visual.trunk.", "visual.")] = value
    return found


WAN = [  # OpenCLIP's names, Wan's
    (r"visual\.conv1\.weight", "visual.patch_embedding.weight"),
    (r"visual\.ln_(pre|post)\.", r"visual.\1_norm."),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_(1|2)\.", r"visual.transformer.\1.norm\2."),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"visual.transformer.\1.attn.to_qkv."),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"visual.transformer.\1.attn.proj."),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"visual.transformer.\1.mlp.0."),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"visual.transformer.\1.mlp.2."),
    (r"visual\.proj", "visual.head"),
    (r"text\.transformer\.embeddings\.word_embeddings\.", "textual.token_embedding."),
    (r"text\.transformer\.embeddings\.token_type_embeddings\.", "textual.type_embedding."),
    (r"text\.transformer\.embeddings\.position_embeddings\.", "textual.pos_embedding."),
    (r"text\.transformer\.embeddings\.LayerNorm\.", "textual.norm."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.attention\.self\.query\.", r"textual.blocks.\1.attn.q."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.attention\.self\.key\.", r"textual.blocks.\1.attn.k."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.attention\.self\.value\.", r"textual.blocks.\1.attn.v."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"textual.blocks.\1.attn.o."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"textual.blocks.\1.norm1."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"textual.blocks.\1.ffn.0."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.output\.dense\.", r"textual.blocks.\1.ffn.2."),
    (r"text\.transformer\.encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"textual.blocks.\1.norm2."),
    (r"text\.proj\.", "textual.head."),
    (r"logit_scale", "log_scale"),
]


def wan(state: Mapping[str, Tensor]) -> State:
    """Wan's names for a CustomTextCLIP with an XLM-RoBERTa, pooled by the mean and projected by an MLP."""
    found = {}
    for key, value in state.items():
        if key == "visual.class_embedding":
            found["visual.cls_embedding"] = value[None, None]
        elif key == "visual.positional_embedding":
            found["visual.pos_embedding"] = value[None]
        else:
            pattern, name = next(pair for pair in WAN if re.match(pair[0], key))
            found[re.sub(f"^{pattern}", name, key)] = value
    return found


def flax(state: Mapping[str, Tensor]) -> State:
    """The names and axes of FlaxCLIPModel for the weights of CLIPModel."""
    found = {}
    for key, value in state.items():
        start, _, last = key.rpartition(".")
        if "position_ids" in key:
            continue
        if last != "weight":
            found[key] = value
        elif start.endswith("patch_embedding"):
            found[f"{start}.kernel"] = value.permute(2, 3, 1, 0)
        elif start.endswith(("token_embedding", "position_embedding")):
            found[f"{start}.embedding"] = value
        elif value.ndim == 1:
            found[f"{start}.scale"] = value
        else:
            found[f"{start}.kernel"] = value.T
    return found
