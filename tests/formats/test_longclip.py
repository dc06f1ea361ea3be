"""Long-CLIP loads, and computes what its owners' code computes; it is read and not written."""

from __future__ import annotations

import pytest
import torch
from broken import Case, rule_tests
from checks import assert_bits, assert_parity
from peers import by_hand, openclip, relatives
from peers.common import Size, images, tokens

import keymap

pytestmark = pytest.mark.formats("longclip")

OPENAI_SQUARE = {"embed_dim": 128, "text_width": 128}  # OpenAI's package fixes what else could be square


@pytest.mark.parametrize("shape", ["distinct", "square"])
@pytest.mark.parametrize("target", ["flat", "custom"])
def test_longclip_loads(target, shape, file, proves):
    size = {**relatives.LONG, **(OPENAI_SQUARE if shape == "square" else {})}
    peer = relatives.longclip(**size)
    model = {"flat": openclip.clip, "custom": openclip.custom}[target](quick_gelu=True, seed=5, **size)
    result = keymap.load_checkpoint(model, file(peer.state_dict()))
    assert result.report.plan.format == "longclip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image, ids = images(), tokens(size["context_length"])
    assert_parity(model, image, peer.encode_image(image), ids, relatives.longclip_text(peer, ids))
    assert_bits(model, by_hand.longclip(peer.state_dict(), "text." if target == "custom" else ""))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_longclip_is_read_and_not_written():
    hub = keymap.convert_state_dict(relatives.longclip().state_dict(), to="open_clip")
    with pytest.raises(keymap.PlanError, match="positional_embedding"):
        keymap.convert_state_dict(hub, to="longclip")


def test_the_sizes_of_long_clip_need_both_tables():
    assert Size(**relatives.LONG).context_length > relatives.SPLIT


# --- broken rules ---


@torch.no_grad()
def square() -> Case:
    size = {**relatives.LONG, **OPENAI_SQUARE}
    peer, image, ids = relatives.longclip(**size), images(), tokens(size["context_length"])
    outputs = [peer.encode_image(image), relatives.longclip_text(peer, ids), peer.logit_scale]
    model = openclip.clip(quick_gelu=True, seed=5, **size)
    return Case("longclip", peer.state_dict(), model, outputs, image, ids)


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
"""

LOOKUPS = "  turned: {1: 2, 2: 1}\n"  # that the rows use

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, {"longclip": square}, LOOKUPS)
