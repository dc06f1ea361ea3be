"""As test_broken_rules, for Long-CLIP, TinyCLIP, Chinese-CLIP, AltCLIP, text encoders and timm's other towers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from broken import LIMIT, assert_seen, edited, names, parsed, text_of, use
from peers import hf, hf_text, openai, openclip, relatives
from peers.common import SQUARE, images, max_diff, tokens
from safetensors.torch import save_file
from test_relatives import BERT, resnet_and_bert
from test_timm_towers import TOWERS, old_swin

import keymap

REFUSALS = (keymap.DetectionError, keymap.PlanError, keymap.VerifyError)
WIDE = {"embed_dim": 128, "text_width": 128}
ENCODERS = {
    "hf_bert": "RobertaForMaskedLM",
    "hf_mt5": "MT5ForConditionalGeneration",
    "hf_m2m100": "M2M100ForConditionalGeneration",
}


@cache
def setting(name):
    """The peer's state dict, a maker of models to load, the peer's outputs, the inputs, the towers."""
    image, text, towers = images(), tokens(), None
    with torch.no_grad():
        if name == "longclip":
            size = {**relatives.LONG, **WIDE}
            peer, text = relatives.longclip(**size), tokens(size["context_length"])
            state, make = peer.state_dict(), lambda: openclip.clip(quick_gelu=True, seed=5, **size)
            out = [peer.encode_image(image), relatives.longclip_text(peer, text), peer.logit_scale]
        elif name.startswith("tinyclip"):
            resnet = name.endswith("resnet")
            size = relatives.TINY_RESNET if resnet else {**openai.VIT, **WIDE}
            peer = relatives.tinyclip(resnet=resnet, wrapped=True, **size)
            image = images(64) if resnet else image
            layers = {"layers": openai.RESNET_LAYERS} if resnet else {}
            state = peer.state_dict()

            def make():
                return (openclip.resnet if resnet else openclip.clip)(seed=5, **layers, **size)

            out = [*relatives.tinyclip_features(peer, image, text), peer.whole.logit_scale]
        elif name.startswith("chinese_clip"):
            resnet = name.endswith("resnet")
            size = {} if resnet else {**SQUARE, **relatives.CN_VIT}
            peer = relatives.cn_clip(resnet=resnet, **size)
            image = images(64) if resnet else image
            out = [peer.encode_image(image), peer.encode_text(text), peer.logit_scale]
            state = relatives.cn_clip_flash({k: v.clone() for k, v in peer.state_dict().items()})

            def make():
                return resnet_and_bert(seed=5) if resnet else openclip.hf_text(**BERT, quick_gelu=True, seed=5, **size)
        elif name == "hf_chinese_clip":
            peer = relatives.hf_chinese_clip(**SQUARE)
            state, make = hf.disk_keys(peer), lambda: openclip.hf_text(**BERT, quick_gelu=True, seed=5, **SQUARE)
            features = peer.get_text_features(input_ids=text, attention_mask=(text != 0).long()).pooler_output
            out = [hf.image_features(peer, image), features, peer.logit_scale]
        elif name == "hf_altclip":
            peer, towers = relatives.hf_altclip(**SQUARE), ("image", "scale")
            state, make = hf.disk_keys(peer), lambda: openclip.clip(quick_gelu=True, seed=5, **SQUARE)
            out = [hf.image_features(peer, image), None, peer.logit_scale]
        elif name in ENCODERS:
            peer, towers = hf_text.model(ENCODERS[name], **SQUARE), ("text",)
            family = hf_text.CLASSES[ENCODERS[name]]
            state, text = hf_text.old_keys(peer), hf_text.ids(peer)

            def make():
                return openclip.hf_text(family=family, proj=None, seed=5, **SQUARE)

            out = [None, hf_text.features(peer, make().text, text), None]
        else:
            tower, towers = TOWERS[name.removeprefix("timm ")], ("image",)
            width = tower.peer().num_features
            peer, image = tower.peer(embed_dim=width), images(tower.size)
            state = old_swin(peer.state_dict()) if "swin" in name else peer.state_dict()
            make, out = (lambda: tower.target(embed_dim=width)), [peer(image), None, None]
    return state, make, out, (image, text), towers


@torch.no_grad()
def distance(name, folder, mapping):
    """Load the peer's file and compare; the largest difference of any output."""
    state, make, out, (image, text), towers = setting(name)
    model, path = make(), folder / "peer.safetensors"
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    keymap.load_checkpoint(model, path, mapping=mapping, towers=towers)
    got = [
        None if out[0] is None else model.encode_image(image),
        None if out[1] is None else model.encode_text(text),
        model.logit_scale,
    ]
    return max(max_diff(a.reshape(b.shape), b) for a, b in zip(got, out, strict=True) if b is not None)


# One row: the file, what is wrong, what follows; then what is taken out (-) and what is put there instead (+).
ROWS = r"""
longclip: a row too many of the first table: differs
- rows: [[0, 20], [20, null]]
+ rows: [[0, 21], [21, null]]
longclip: the tables exchanged: differs
- (positional_embedding|positional_embedding_res):
+ (positional_embedding_res|positional_embedding):
longclip: a row that no table gives: refused
- rows: [[0, 20], [20, null]]
+ rows: [[0, 20], [21, null]]
longclip: the text projection transposed: differs
- text_projection: text_projection
+ text_projection: {to: text_projection, view: a b -> b a}
longclip: ln_1 and ln_2 swapped: differs
- ln_(1|2).(weight|bias): ln_\1.\2
+ ln_(1|2).(weight|bias): ln_<1:turned>.\2
tinyclip: the norms before and after exchanged: differs
- ln_(pre|post).(weight|bias): ln_\1.\2
+ ln_(pre|post).(weight|bias): ln_<1:other>.\2
tinyclip: the image projection transposed: differs
- (class_embedding|positional_embedding|proj): \1
+ (class_embedding|positional_embedding): \1
+ proj: {to: proj, view: a b -> b a}
tinyclip: the wrappers of the towers forgotten: refused
- (_image_encoder|_text_encoder|_logit_scale).module.(.+): \1.\2
+ (_image_encoder|_text_encoder|_logit_scale).wrapped.(.+): \1.\2
tinyclip: out_proj transposed: differs
- attn.out_proj.(weight|bias): attn.out_proj.\1
+ attn.out_proj.weight: {to: attn.out_proj.weight, view: a b -> b a}
+ attn.out_proj.bias: attn.out_proj.bias
tinyclip resnet: q and k of the pool swapped: differs
- attnpool.(q|k|v|c)_proj.(weight|bias): attnpool.\1_proj.\2
+ attnpool.(q|k|v|c)_proj.(weight|bias): attnpool.<1:pool>_proj.\2
tinyclip resnet: mean and variance swapped: differs
- (weight|bias|running_mean|running_var): \1
+ (weight|bias|running_mean|running_var): <1:stats>
chinese_clip: the text projection not transposed: differs
- text.proj.weight, view: in out -> out in
+ text.proj.weight
chinese_clip: q and k of FlashAttention swapped in the text tower: differs
- (query|key|value).\2', split
+ (key|query|value).\2', split
chinese_clip: FlashAttention forgotten in the image tower: refused
- attn.Wqkv.(weight|bias): visual
+ attn.Wkqv.(weight|bias): visual
chinese_clip: out_proj of FlashAttention taken for another layer: refused
- attention.self.out_proj.(weight|bias): bert.encoder.layer.\1.attention.output.dense.\2
+ attention.self.out_proj.(weight|bias): bert.encoder.layer.\1.output.dense.\2
chinese_clip: the norms of a text layer exchanged: differs
- attention.output.(dense|LayerNorm).(weight|bias): attention.output.\1.\2
- intermediate.dense.(weight|bias): intermediate.dense.\1
- output.(dense|LayerNorm).(weight|bias): output.\1.\2
+ attention.output.dense.(weight|bias): attention.output.dense.\1
+ attention.output.LayerNorm.(weight|bias): output.LayerNorm.\1
+ intermediate.dense.(weight|bias): intermediate.dense.\1
+ output.dense.(weight|bias): output.dense.\1
+ output.LayerNorm.(weight|bias): attention.output.LayerNorm.\1
chinese_clip resnet: the norms of the stem shifted: differs
- bn(1|2|3).: {to: bn\1.,
+ bn(1|2|3).: {to: bn<1:stem>.,
hf_chinese_clip: the text projection transposed: differs
- text_projection.weight: text.proj.weight
+ text_projection.weight: {to: text.proj.weight, view: a b -> b a}
hf_chinese_clip: the image projection not transposed: differs
- visual.proj, view: out in -> in out
+ visual.proj
hf_chinese_clip: query and key of the text tower swapped: differs
- attention.self.(query|key|value).(weight|bias): attention.self.\1.\2
+ attention.self.(query|key|value).(weight|bias): attention.self.<1:qkv>.\2
hf_chinese_clip: q and k of the image tower swapped: differs
- self_attn.(q|k|v)_proj
+ self_attn.(k|q|v)_proj
hf_altclip: the image projection not transposed: differs
- visual.proj, view: out in -> in out
+ visual.proj
hf_altclip: the norms before and after exchanged: differs
- pre_layrnorm.(weight|bias): ln_pre.\1
+ post_layernorm.(weight|bias): ln_pre.\1
- post_layernorm.(weight|bias): ln_post.\1
+ pre_layrnorm.(weight|bias): ln_post.\1
hf_altclip: what transformers 5 calls a layer forgotten: refused
- vision_model.encoder.layer.(\d+).(.+): vision_model.encoder.layers.\1.\2
+ vision_model.encoder.leyer.(\d+).(.+): vision_model.encoder.layers.\1.\2
hf_bert: the dense layers of a block exchanged: differs
- attention.output.(dense|LayerNorm).(weight|bias): attention.output.\1.\2
+ attention.output.LayerNorm.(weight|bias): attention.output.LayerNorm.\1
+ attention.output.dense.(weight|bias): intermediate.dense.\1
- intermediate.dense.(weight|bias): intermediate.dense.\1
+ intermediate.dense.(weight|bias): attention.output.dense.\1
hf_bert: query and key swapped: differs
- attention.self.(query|key|value).(weight|bias): attention.self.\1.\2
+ attention.self.(query|key|value).(weight|bias): attention.self.<1:qkv>.\2
hf_bert: words and positions exchanged: refused
- (word_embeddings|position_embeddings|token_type_embeddings).weight: \1.weight
+ (word_embeddings|position_embeddings|token_type_embeddings).weight: <1:embedding>.weight
hf_bert: the head of the language model not left out: refused
- (cls|lm_head).(.+): the head
+ (cls|lm_tail).(.+): the head
hf_mt5: q and k swapped: differs
- text.transformer.block.\1.layer.0.SelfAttention.\2.weight
+ text.transformer.block.\1.layer.0.SelfAttention.<2:qkv>.weight
hf_mt5: the norms of a block exchanged: differs
- text.transformer.block.\1.layer.\2.layer_norm.weight
+ text.transformer.block.\1.layer.<2:turned>.layer_norm.weight
hf_mt5: the gate and what it gates exchanged: differs
- text.transformer.block.\1.layer.1.DenseReluDense.\2.weight
+ text.transformer.block.\1.layer.1.DenseReluDense.<2:gate>.weight
hf_mt5: the encoder's copy of the embedding compared with the last norm: refused
- same_as: shared.weight
+ same_as: encoder.final_layer_norm.weight
hf_m2m100: the norms of a layer exchanged: differs
- text.transformer.layers.\1.\2_layer_norm.\3
+ text.transformer.layers.\1.<2:norm>_layer_norm.\3
hf_m2m100: q and k swapped: differs
- text.transformer.layers.\1.self_attn.\2_proj.\3
+ text.transformer.layers.\1.self_attn.<2:qkv>_proj.\3
hf_m2m100: fc1 and fc2 swapped: differs
- text.transformer.layers.\1.fc\2.\3
+ text.transformer.layers.\1.fc<2:turned>.\3
hf_m2m100: the table of positions not left out: refused
- (encoder|decoder).embed_positions.weights: sin
+ (encoder|decoder).embed_position.weights: sin
timm swin: an old file's downsampling left where it was: refused
- layers.<1+1>.downsample.\2.\3
+ layers.<1+0>.downsample.\2.\3
timm swin: an old file's classifier left as it was: refused
- head.(weight|bias): head.fc.\1
+ header.(weight|bias): head.fc.\1
timm pooled by average: the head transposed: differs
- head.weight: visual.head.proj.weight
+ head.weight: {to: visual.head.proj.weight, view: a b -> b a}
timm relative positions: the head left in the trunk: refused
- blocks.0.attn.rel_pos.mlp.fc1.weight]} # a ViT
+ blocks.0.attn.rel_position.mlp.fc1.weight]} # a ViT
"""
LOOKUPS = """
  turned: {0: 1, 1: 0}
  other: {pre: post, post: pre}
  pool: {q: k, k: q, v: v, c: c}
  stem: {1: 2, 2: 1, 3: 3}
  stats: {weight: weight, bias: bias, running_mean: running_var, running_var: running_mean}
  qkv: {query: key, key: query, value: value, q: k, k: q, v: v, o: o, out: out}
  gate: {wi_0: wi_1, wi_1: wi_0, wo: wo}
  norm: {self_attn: final, final: self_attn}
  embedding:
    word_embeddings: position_embeddings
    position_embeddings: word_embeddings
    token_type_embeddings: token_type_embeddings
"""


def loaded(name, edits, folder, monkeypatch):
    form = name.split(" ")[0]
    lookups = LOOKUPS.replace("{0: 1, 1: 0}", "{1: 2, 2: 1}") if form in ("longclip", "hf_m2m100") else LOOKUPS
    if form == "hf_bert":  # it has a lookup of this name
        lookups = lookups.replace("  norm: {self_attn: final, final: self_attn}\n", "")
    text = edited(form, text_of(form, lookups.lstrip("\n")), edits)
    return distance(name, folder, use(form, text, folder, monkeypatch))


@pytest.mark.parametrize("name", names(ROWS))
def test_the_intact_copy_passes(name, tmp_path, monkeypatch):
    assert loaded(name, [], tmp_path, monkeypatch) <= LIMIT


@pytest.mark.parametrize(("name", "follows", "edits"), parsed(ROWS))
def test_a_broken_rule_is_seen(name, follows, edits, tmp_path, monkeypatch):
    assert_seen(follows, lambda: loaded(name, edits, tmp_path, monkeypatch), REFUSALS)
