"""The page in headless Chromium: no console error, search, folding, keys, contrast, a screenshot that is not blank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from browser import chromium, console, needs_chromium, run, save
from PIL import Image
from plans import HOSTILE, clip_plan, hostile_plan

from keymap.picture import format_page, plan_page

pytestmark = [needs_chromium, pytest.mark.slow]

LAYERS = "visual.trunk.blocks.0\u20132"
FILE_LAYERS = "vision_model.encoder.layers.0\u20132"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return plan_page(clip_plan(tmp_path_factory.mktemp("clip"), stray=torch.zeros(3)))


@pytest.mark.parametrize("state", ["", "#search=attn", "#open=all", "#open=layers&search=qkv+kind%3Aconcat"])
def test_the_page_draws_itself_without_a_console_error(state, page, tmp_path):
    """Also the hash of its script in its policy is right, or nothing would be drawn."""
    done = chromium(tmp_path, save(page, tmp_path) + state, "--dump-dom")
    assert console(done) == []
    assert done.stdout.count('class="row ') > 10 and done.stdout.count("<path ") > 10


def test_a_console_error_would_be_seen(page, tmp_path):
    broken = page.replace("</body>", "<script>alert(1)</script></body>")
    assert any(
        "Content Security Policy" in line for line in console(chromium(tmp_path, save(broken, tmp_path), "--dump-dom"))
    )


def test_equal_layers_are_one_row_with_a_count(page, tmp_path):
    found = run(page, f"return [labels(1), row(1, '{LAYERS}').textContent, labels(0)];", tmp_path)
    labels, words, sources = found
    assert "(\u00d73)" in words and "concat" in words and FILE_LAYERS in sources
    assert not any(label.startswith("visual.trunk.blocks.1") for label in labels)
    assert "visual.trunk.blocks.3.norm1.bias" in labels  # stored in another dtype


def test_folding_opens_both_sides_and_closes_again(page, tmp_path):
    code = f"""
      const before = labels(0).length + labels(1).length;
      row(1, '{LAYERS}').click();
      const open = labels(0).concat(labels(1)), expanded = row(1, '{LAYERS}').getAttribute('aria-expanded');
      row(1, '{LAYERS}.attn.qkv.bias').click();
      const keys = labels(0).concat(labels(1));
      row(0, '{FILE_LAYERS}').click();
      return [before, open, expanded, keys, labels(0).length + labels(1).length,
        row(1, '{LAYERS}').getAttribute('aria-expanded')];"""
    before, opened, expanded, keys, after, folded = run(page, code, tmp_path)
    assert f"{LAYERS}.attn.qkv.bias" in opened and f"{FILE_LAYERS}.self_attn.q_proj.bias" in opened
    assert expanded == "true" and folded == "false" and before == after
    inner = {f"visual.trunk.blocks.{n}.attn.qkv.bias" for n in range(3)}
    inner |= {f"vision_model.encoder.layers.{n}.self_attn.{x}_proj.bias" for n in range(3) for x in "qkv"}
    assert inner <= set(keys) and not inner & set(opened)


def test_the_buttons_unfold_and_fold_everything(page, tmp_path):
    code = """
      const at = id => document.getElementById(id), counts = [];
      for (const what of ['none', 'layers', 'all', 'none']) { at(what).click(); counts.push(labels(1).length); }
      return counts;"""
    none, layers, everything, again = run(page, code, tmp_path)
    assert none == again < layers < everything


def test_search_shows_only_what_fits_and_opens_layers(page, tmp_path):
    code = """
      search('blocks.1. qkv');
      const found = [labels(0), labels(1), document.getElementById('count').textContent, location.hash];
      search('kind:fill'); const filled = labels(1);
      search('hf_clip.yaml'); const byFile = labels(1).length;
      search('zzz'); const none = [labels(1), document.getElementById('count').textContent];
      search(''); return [...found, filled, byFile, none, labels(1).length];"""
    left, right, count, state, filled, by_file, none, everything = run(page, code, tmp_path)
    assert f"{LAYERS}.attn.qkv.bias" in right and "visual.trunk.blocks.1.attn.qkv.bias" in right
    assert "visual.trunk.blocks.0.attn.qkv.bias" not in right
    assert sum(label.startswith("vision_model.encoder.layers.1.self_attn") for label in left) == 6
    assert count.startswith("6 of ") and state.startswith("#search=blocks.1.%20qkv")
    assert filled == ["visual.trunk.head.bias"] and by_file > 0 and everything > 20
    assert none[0] == [] and none[1].endswith("nothing matches")


def test_the_address_holds_a_state_of_the_page(page, tmp_path):
    assert run(page, "return labels(1)", tmp_path, "#search=kind:resize") == ["visual.trunk.pos_embed"]
    opened = run(page, f"row(1, '{LAYERS}').click(); return [location.hash, labels(1)]", tmp_path)
    assert run(page, "return labels(1)", tmp_path, opened[0]) == opened[1]


def test_pointing_shows_rule_place_and_shapes(page, tmp_path):
    code = """
      enter(row(1, 'text.text_projection'));
      const text = document.getElementById('details').innerText, hot = document.querySelectorAll('path.hot').length;
      const path = document.querySelector('path.hot');
      enter(row(1, 'visual.trunk.pos_embed')); const other = document.getElementById('details').innerText;
      enter(path); return [text, hot, other, document.getElementById('details').innerText];"""
    text, hot, other, ribbon = run(page, code, tmp_path)
    assert "text_projection.weight [24, 32] float32" in text and "text.text_projection [32, 24] float32" in text
    assert "transpose" in text and "mappings/open_clip/hf_clip.yaml:" in text and hot == 1
    assert "resized from 2x2" in other and ribbon == text


def test_the_keyboard_is_enough(page, tmp_path):
    code = """
      press('/', document.body); const box = document.activeElement.id;
      press('Escape'); rows(0)[0].focus();
      const seen = []; const note = () => seen.push(document.activeElement.querySelector('.key').title);
      note();
      for (const key of ['ArrowRight', 'ArrowLeft', 'ArrowDown', 'ArrowUp']) { press(key); note(); }
      const every = rows(0).concat(rows(1)).every(one => one.tagName === 'BUTTON' && one.tabIndex === 0);
      return [box, seen, every, rows(1).every(one => one.getAttribute('aria-label').length > 5)];"""
    box, seen, reached, labelled = run(page, code, tmp_path)
    assert box == "search" and reached and labelled
    assert seen[0] == seen[2] == seen[4] == "logit_scale" == seen[1]
    assert seen[3] != seen[0]


def test_the_lists_are_below(page, tmp_path):
    code = "return Object.fromEntries([...document.querySelectorAll('details')].map(one => [one.id, one.textContent]))"
    lists = run(page, code, tmp_path)
    assert {"resized", "filled", "cast", "dropped", "unexpected"} <= set(lists)
    assert lists["filled"].startswith("Filled (1)visual.trunk.head.bias: ")


def test_hostile_names_are_text(tmp_path):
    page = plan_page(hostile_plan(tmp_path))
    code = "return [labels(0), document.images.length, document.querySelectorAll('script').length]"
    labels, images, scripts = run(page, code, tmp_path)
    assert {HOSTILE, "<!--<script>", "a&lt;b", "{{data}}"} <= set(labels)
    assert images == 0 and scripts == 3  # the data, the page's own, the test's


CONTRAST = """
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = colour => [.2126, .7152, .0722].reduce((sum, part, n) => sum + part * linear(colour[n] / 255), 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  const back = node => {
    for (;; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
  };
  const page = back(document.body), text = [], ribbon = [], kind = [];
  const write = node => [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  for (const hot of [false, true]) {
    document.querySelectorAll('.row').forEach(one => one.classList.toggle('hot', hot));
    for (const node of document.querySelectorAll('body *')) if (node.checkVisibility() && write(node))
      text.push([ratio(rgb(getComputedStyle(node).color), back(node)), node.className + ': ' + node.textContent]);
  }
  for (const path of document.querySelectorAll('svg path')) {
    const style = getComputedStyle(path), stub = path.classList.contains('stub'), part = Number(style.fillOpacity);
    const blend = rgb(style.fill).slice(0, 3).map((c, n) => c * part + page[n] * (1 - part));
    ribbon.push([ratio(stub ? rgb(style.stroke) : blend, page), style.fill]);
  }
  for (const [name] of JSON.parse(document.getElementById('data').textContent).kinds) {
    const probe = document.body.appendChild(document.createElement('i'));
    probe.style.color = 'var(--' + name + ')';
    kind.push([ratio(rgb(getComputedStyle(probe).color), page), name]);
  }
  const low = list => list.sort((a, b) => a[0] - b[0])[0];
  return [matchMedia('(prefers-color-scheme: dark)').matches, text.length, low(text), low(ribbon), low(kind)];
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_ribbons_have_contrast(dark, page, tmp_path):
    """4.5 for text in every state of a row and for every kind's colour, 3 for ribbons."""
    mode, count, text, ribbon, kind = run(page, CONTRAST, tmp_path, "#open=all", dark=dark)
    assert mode is dark and count > 300
    assert text[0] >= 4.5, text
    assert kind[0] >= 4.5, kind
    assert ribbon[0] >= 3, ribbon


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_screenshot_is_not_blank(dark, page, tmp_path):
    picture = tmp_path / "page.png"
    options = (f"--screenshot={picture}", "--window-size=1200,900", "--run-all-compositor-stages-before-draw")
    assert console(chromium(tmp_path, save(page, tmp_path), *options, dark=dark)) == []
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (900, 1200, 3)
    back = pixels[0, 0]
    assert (back.sum() < 200) is np.True_ if dark else (back == 255).all()
    drawn = (np.abs(pixels - back).sum(2) > 60).mean()
    assert 0.03 < drawn < 0.6
    middle = pixels[300:780, 450:650]  # the ribbons
    coloured = (middle.max(2) - middle.min(2) > 60).mean()
    assert coloured > 0.05


def test_a_printed_page_has_the_picture_without_the_tools(page, tmp_path):
    file = tmp_path / "page.pdf"
    assert console(chromium(tmp_path, save(page, tmp_path), f"--print-to-pdf={file}")) == []
    assert file.read_bytes().startswith(b"%PDF") and file.stat().st_size > 10_000
    printed = page.replace("@media print", "@media all")
    hidden = "return ['search', 'details', 'help', 'all'].map(id => document.getElementById(id).checkVisibility())"
    assert run(printed, hidden, tmp_path) == [False, False, False, False]


@pytest.mark.parametrize("name", ["hf_clip", "openai", "big_vision_siglip", "mobileclip_s", "native_vit_clip_trunk"])
def test_the_page_of_a_format_draws_itself(name, tmp_path):
    done = chromium(tmp_path, save(format_page(name), tmp_path) + "#open=layers", "--dump-dom")
    assert console(done) == [] and done.stdout.count("<path ") > 1 and 'class="row ' in done.stdout
