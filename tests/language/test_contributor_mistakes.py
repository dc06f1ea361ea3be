"""Typical mistakes in a mapping file: each gives one message, at its line and column, that says what to write.

A row is the change that makes the mistake in a mapping without faults, the place of the message, and words of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from keymap.errors import MappingError
from keymap.language.catalogue import Catalogue
from keymap.language.compile import compile_marked
from keymap.language.review import review
from keymap.language.yaml_marks import parse_yaml
from keymap.source.registry import register_mappings, registry

GOOD = r"""format: mine
title: my model
reference: my/code.py (my 1.0)
notes: [an example]
uses: [hf_blocks]
layouts: {image: native_vit, text: native}
detect:
  all: [vision.patch.weight]
  none: [logit_bias]
ignore:
  vision.mask: a buffer that the model computes
towers:
  image:
    vision.patch.weight: visual.conv1.weight
    vision.cls: {to: visual.class_embedding, view: 1 1 d -> d}
    vision.pos: {to: visual.positional_embedding, view: 1 n d -> n d}
    vision.pre.(gamma|beta): visual.ln_pre.<1:norm>
    vision.layers.(\d+).: {to: visual.transformer.resblocks.\1., table: block}
    vision.post.(weight|bias): visual.ln_post.\1
    vision.head: {to: visual.proj, view: out in -> in out, optional: true}
  text:
    text.: {to: text., table: clip_text}
    text.head: {to: text.text_projection, view: out in -> in out}
  scale:
    logit_scale: logit_scale
tables:
  block:
    norm(1|2).(weight|bias): ln_\1.\2
    attn.(q|k|v).(weight|bias): {to: attn.in_proj_\2, concat: 0}
    attn.out.kernel: {to: attn.out_proj.weight, view: h k d -> d (h k), sizes: {h: image.heads}}
    attn.out.bias: attn.out_proj.bias
    mlp.(0|2).weight: mlp.<1:mlp>.weight
    mlp.(0|2).bias: mlp.<1:mlp>.bias
lookups:
  norm: {gamma: weight, beta: bias}
  mlp: {0: c_fc, 2: c_proj}
dtypes:
  vision.patch.weight: float16
config:
  file: config.json
  facts:
    image.heads: num_attention_heads
    image.activation: {path: hidden_act, words: activation}
  defaults: {text.heads: 8}
fixed: {text.pool: argmax, text.causal: true}
"""


class Mistake(NamedTuple):
    old: str
    new: str
    place: str
    words: tuple[str, ...]


def of(old: str, new: str, place: str, *words: str) -> Mistake:
    return Mistake(old, new, place, words)


MISTAKES: dict[str, Mistake] = {
    # the file as YAML
    "no colon": of("title: my model", "title my model", "2:1", "line 2 has no colon", "write `name: value`"),
    "no space after a colon": of("title: my model", "title:my-model", "2:1", "write a space after the colon"),
    "no colon in the first rule": of(
        "    vision.patch.weight: visual.conv1.weight",
        "    vision.patch.weight visual.conv1.weight",
        "14:5",
        "line 14 has no colon",
        "write `name: value`",
    ),
    "no space in the first rule": of(
        "    vision.patch.weight: v",
        "    vision.patch.weight:v",
        "14:5",
        "line 14 has no colon followed by a space",
        "write a space after the colon",
    ),
    "no colon before options": of(
        "    vision.head: {", "    vision.head {", "20:5", "line 20 has no colon before the {", "write `vision.head: {`"
    ),
    "no colon before the entries of a lookup": of("  norm: {", "  norm {", "35:3", "write `norm: {`"),
    "no colon after a section": of("towers:\n", "towers\n", "12:1", "line 12 has no colon", "write `towers:`"),
    "no colon after a tower": of("  image:\n", "  image\n", "13:3", "line 13 has no colon", "write `image:`"),
    "no colon in the only rule": of(
        "    logit_scale: logit_scale",
        "    logit_scale logit_scale",
        "24:3",
        "scale: 'logit_scale logit_scale' has no",
        "write `logit_scale: logit_scale`",
    ),
    "no space in the only rule": of(
        "    logit_scale: logit_scale", "    logit_scale:logit_scale", "24:3", "write a space after the colon"
    ),
    "no space in options": of(
        "{to: visual.proj", "{to:visual.proj", "20:19", "write a space after the colon: `to: visual.proj`"
    ),
    "no space in a lookup": of(
        "{gamma: weight, beta: bias}",
        "{gamma:weight, beta:bias}",
        "35:3",
        "norm: write a space after the colon: {gamma: weight, beta: bias}",
    ),
    "a colon in a value": of("title: my model", "title: CLIP: my model", "2:12", "needs quotes"),
    "a tab": of("  image:\n", "\timage:\n", "13:1", "a tab cannot indent", "two spaces"),
    "a tab after spaces": of("    vision.cls", "  \tvision.cls", "15:1", "a tab cannot indent"),
    "an item indented too little": of("    vision.pos", "   vision.pos", "16:4", "the indentation fits no line before"),
    "a line indented too far": of("reference:", "  reference:", "3:12", "remove the indentation"),
    "an open quote": of("title: my model", "title: 'my model", "2:8", "the quote ' is not closed"),
    "an open bracket": of("uses: [hf_blocks]", "uses: [hf_blocks", "5:7", "the [ is not closed: add ]"),
    "an open brace": of("view: 1 1 d -> d}", "view: 1 1 d -> d", "15:17", "the { is not closed: add }"),
    "the wrong bracket": of("uses: [hf_blocks]", "uses: [hf_blocks}", "5:17", "closes another bracket"),
    "a bracket too many": of("uses: [hf_blocks]", "uses: [hf_blocks]]", "5:18", "this ] closes nothing"),
    "a star": of("visual.conv1.weight\n", "*.weight\n", "14:26", "quote the *", "'*.weight'"),
    "a key that begins with a star": of("    vision.cls:", "    *.cls:", "15:5", "quote the *", "'*.cls'"),
    "an at sign": of("title: my model", "title: @me", "2:8", "quote a text that begins with @"),
    "a percent sign": of("title: my model", "title: %s", "2:8", "quote a text that begins with %"),
    "a backtick": of("title: my model", "title: `my`", "2:8", "backtick"),
    "an exclamation mark": of("title: my model", "title: !my model", "2:8", "leave it out, or quote the text"),
    "an ampersand": of("title: my model", "title: &my model", "2:8", "anchors and aliases", "quote the text"),
    "double quotes around a pattern": of(
        "    vision.head: {", '    "vision.(\\d+).head": {', "20:14", "use single quotes", "'blocks.(\\d+).weight'"
    ),
    "text after a quote": of("title: my model", "title: 'my' model", "2:13", "quote the whole text"),
    "an index in braces": of("{to: visual.proj,", "{to: visual.{i}.proj,", "20:30", "write \\1 for the first"),
    "a missing comma": of("{to: visual.proj,", "{to: visual.proj", "20:39", "write a comma between two entries"),
    "a dash in the line of a name": of("notes: [an example]", "notes: - an example", "4:8", "a line of its own"),
    "a key twice": of("    text.head:", "    text.:", "23:5", "'text.' is given twice (first in line 22)"),
    "two documents": of("towers:\n", "---\ntowers:\n", "12:1", "a second document", "remove the ---"),
    "a date": of("title: my model", "title: 2026-01-01", "2:8", "quote the text"),
    # fields
    "a misspelt field": of("towers:\n", "tower:\n", "12:1", "no field 'tower' here; did you mean 'towers'?"),
    "an old field": of("towers:\n", "groups:\n", "12:1", "'groups' is now called 'towers'"),
    "a field of the hub": of("notes:", "scalars: [a]\nnotes:", "4:1", "'scalars' belongs to kind: hub"),
    "a field of a bridge": of("notes:", "between: {text: [native, flat]}\nnotes:", "4:1", "belongs to kind: bridge"),
    "an option at the top": of("notes:", "view: a -> a\nnotes:", "4:1", "'view' belongs to a rule", "to: target key"),
    "a tower at the top": of("notes:", "image: {a: b}\nnotes:", "4:1", "'image' is a tower", "under `towers:`"),
    "facts at the top": of("notes:", "facts: {text.heads: a}\nnotes:", "4:1", "'facts' belongs under `config:`"),
    "rules under another name": of("towers:\n", "mapping:\n", "12:1", "write `towers: {image:"),
    "a misspelt tower": of("  text:\n", "  texts:\n", "21:3", "'texts' is not a tower; did you mean 'text'?"),
    "an unknown tower": of("  scale:\n", "  audio:\n", "24:3", "'audio' is not a tower", "image, text, decoder, scale"),
    "a misspelt kind": of("title:", "kind: formt\ntitle:", "2:1", "kind: 'formt' is not known; did you mean 'format'?"),
    "a kind of other files": of(
        "title:",
        "kind: tables\ntitle:",
        "2:1",
        "kind: tables has no fields layouts, detect, ignore, towers",
        "write `kind: format`, or leave kind out",
    ),
    "a bridge's kind": of("title:", "kind: bridge\ntitle:", "2:1", "kind: bridge has no fields", "`kind: format`"),
    "a path for the file of the configuration": of(
        "file: config.json", "file: ../config.json", "40:3", "a file name without a folder"
    ),
    "a pattern without a tower": of(
        "notes:", "unsupported: {a.(.+): no}\nnotes:", "4:15", "write a.(.+) under a tower, for example `image:`"
    ),
    "another word for why": of(
        "vision.mask: a buffer that the model computes", "vision.mask: {reason: a buffer}", "11:17", "write `why: "
    ),
    "an old kind": of("title:", "kind: respelling\ntitle:", "2:1", "is now called 'bridge'"),
    "no reference": of("reference: my/code.py (my 1.0)\n", "", "1:1", "reference is missing", "`reference: transfo"),
    "no layouts": of("layouts: {image: native_vit, text: native}\n", "", "1:1", "layouts is missing", "`layouts: {im"),
    "no title": of("title: my model\n", "", "1:1", "title is missing", "for example `title: "),
    "no format": of("format: mine\n", "", "1:1", "format is missing", "`format: hf_clip`"),
    "no evidence": of("detect:\n  all: [vision.patch.weight]\n  none: [logit_bias]\n", "", "1:1", "detect is missing"),
    "a name with a dash": of("format: mine", "format: my-model", "1:1", "'my-model' has the wrong form", "hf_clip"),
    "a text for a list": of("notes: [an example]", "notes: an example", "4:1", "write [an example]"),
    "a file to use, not a list": of("uses: [hf_blocks]", "uses: hf_blocks", "5:1", "write [hf_blocks]"),
    "evidence, not a list": of("  all: [vision.patch.weight]", "  all: vision.patch.weight", "8:3", "write [vision.p"),
    "evidence in a list": of(
        "detect:\n  all: [vision.patch.weight]\n  none: [logit_bias]",
        "detect: [vision.patch.weight]",
        "7:1",
        "is a list; write",
        "{all: [",
    ),
    "an unknown kind of evidence": of("  none: [logit_bias]", "  not: [logit_bias]", "9:3", "write `none: [pattern]`"),
    "empty evidence": of("  none: [logit_bias]", "  none: []", "9:3", "none is empty", "for example [logit_bias]"),
    "layouts as a text": of(
        "layouts: {image: native_vit, text: native}", "layouts: native_vit", "6:1", "write fields, for"
    ),
    "a misspelt layout": of("image: native_vit", "image: nativ_vit", "6:11", "did you mean 'native_vit'?"),
    "a layout of another tower": of(
        "text: native}", "text: trunk}", "6:30", "'trunk' is not known", "flat, native, hf"
    ),
    "a number for a title": of("title: my model", "title: 7", "2:1", "7 is a number", "in quotes: '7'"),
    "an unknown dtype": of("float16", "fp16", "38:3", "'fp16' is not known; did you mean 'float16'?"),
    "no reason to ignore": of(
        "vision.mask: a buffer that the model computes", "vision.mask:", "11:3", "missing (null)"
    ),
    # rules
    "a number for a target": of("visual.conv1.weight", "7", "14:5", "7 is a number; write", "or {to: visual.proj,"),
    "no target": of("visual.conv1.weight", "", "14:5", "the value is missing (null); write"),
    "a list for a target": of("visual.conv1.weight", "[a, b]", "14:5", "[a, b] is a list; write {to: [a, b]}"),
    "a pattern in brackets in a target": of(
        "{to: visual.transformer.resblocks.\\1., t",
        "{to: visual.transformer.resblocks.[0-9]+., t",
        "18:61",
        "write \\1 for the first",
    ),
    "angle brackets in a source": of(
        "vision.layers.(\\d+).:", "vision.layers.<1>.:", "18:5", "'<1>'", "write (\\d+) for an index"
    ),
    "group zero in angle brackets": of("visual.ln_post.\\1", "visual.ln_post.<0>", "19:5", "count from 1, write \\1"),
    "two backslashes in a target": of("ln_\\1.\\2", "ln_\\1.\\\\2", "28:5", "write one backslash: \\2"),
    "a text for an entry of shapes": of(
        "dtypes:", "shapes: {logit_scale: scalar}\ndtypes:", "37:10", "write a list, for example [1]"
    ),
    "a list for a lookup": of(
        "norm: {gamma: weight, beta: bias}", "norm: [weight, bias]", "35:3", "write fields, for example {w: weight"
    ),
    "an item without a space": of("notes: [an example]", "notes:\n  -an example", "4:1", "a space after the -"),
    "options without a target": of("{to: visual.proj, view", "{view", "20:5", "to is missing: add it"),
    "a misspelt option": of("view: 1 1 d -> d", "veiw: 1 1 d -> d", "15:46", "did you mean 'view'?"),
    "a word of another library": of(
        "view: out in -> in out, opt", "transpose: true, opt", "20:36", "write `view: out in"
    ),
    "a cat": of("concat: 0", "cat: 0", "29:55", "no field 'cat' here", "write `concat: 0`"),
    "a text for a flag": of("optional: true", "optional: 'yes'", "20:60", "write true or false"),
    "a number for rows": of(
        "view: 1 1 d -> d", "take: 5", "15:46", "take: 5 is a number; write a list, for example [0, 10]"
    ),
    "a text for rows": of(
        "view: 1 1 d -> d",
        "take: [0, x]",
        "15:56",
        "take: 'x' has the wrong form; write a number, a fact such as text.vocab, or null",
    ),
    "one row": of("view: 1 1 d -> d", "take: [1]", "15:46", "take: 1 entry, at least 2", "[0, 10]"),
    "a negative axis": of("concat: 0", "concat: -1", "29:55", "concat: -1 is less than the least value, 0"),
    "half an axis": of("concat: 0", "concat: 0.5", "29:55", "concat: 0.5 is a number; write for example 0 or d"),
    "an axis that the view lacks": of("concat: 0", "concat: q", "29:5", "axis 'q' is not a single axis"),
    "one target in a list": of("to: visual.proj", "to: [visual.proj]", "20:19", "write visual.proj without [ ]"),
    "a view in words": of(
        "view: out in -> in out, opt", "view: swap, opt", "20:36", "view: 'swap' has the wrong form", "->"
    ),
    "a comma in a view": of(
        "view: out in -> in out, opt", "view: out, in -> in out, opt", "20:47", "a comma ends a value", "with spaces"
    ),
    "rows that are not in pairs": of(
        "vision.post.(weight|bias): visual.ln_post.\\1",
        "vision.post.(weight|bias): {to: visual.ln_post.weight, rows: [0, 2], oneway: true}",
        "19:67",
        "write a list",
    ),
    "axes by number": of("view: out in -> in out, opt", "view: 1 0, opt", "20:36", "the axes before and after ->"),
    "another arrow": of("view: out in -> in out, opt", "view: out in => in out, opt", "20:36", "before and after ->"),
    "a word for a factor": of(
        "view: 1 1 d -> d",
        "times: half, oneway: true",
        "15:46",
        "write a number, sqrt and the number of an axis or a fact, or 1/sqrt",
    ),
    "a root of a fact that is not there": of(
        "view: 1 1 d -> d",
        "times: sqrt image.head",
        "15:46",
        "there is no fact 'image.head'; did you mean 'image.heads'?",
    ),
    "a flag for an axis": of("concat: 0", "concat: true", "29:55", "true is not allowed; write for example 0 or d"),
    "a view that loses an axis": of("view: 1 n d -> n d", "view: 1 n d -> n", "16:5", "do not balance: d"),
    "a view with a number": of(
        "view: 1 n d -> n d", "view: 2 n d -> n d", "16:5", "write axis names, 1 and ( ) groups"
    ),
    "an open group in a view": of("d (h k)", "d (h k", "30:5", "leaves a group open: add the )"),
    "an axis twice": of("view: 1 n d -> n d", "view: n n d -> n d", "16:5", "names an axis twice"),
    "a join that loses nothing": of(
        "{to: visual.proj, view", "{to: visual.proj, concat: 0, view", "20:5", "needs a group (a|b)"
    ),
    "an alternative lost": of(
        "visual.ln_post.\\1", "visual.ln_post.weight", "19:5", "group 1 is captured and not used", "\\1"
    ),
    "rows that cannot be undone": of(
        "view: 1 1 d -> d", "take: [0, 1]", "15:5", "take cannot be undone: add oneway: true"
    ),
    "a size of 0": of("sizes: {h: image.heads}", "sizes: {h: 0}", "30:81", "h: 0 is less than the least value, 1"),
    # patterns
    "dot star": of("vision.layers.(\\d+).:", "vision.layers.*.:", "18:5", "'.*' at character 14", "(\\w+) or ([^.]+)"),
    "dot plus": of("vision.post.(weight|bias)", "vision.post.+", "19:5", "'.+' at character 12", "(.+) for the rest"),
    "a star alone": of(
        "vision.layers.(\\d+).:", "'vision.layers*.':", "18:5", "'*' at character 14", "(\\d+) for an index"
    ),
    "digits in brackets": of("vision.layers.(\\d+).:", "vision.layers.[0-9]+.:", "18:5", "'[0-9]+'", "write (\\d+)"),
    "an escaped dot": of(
        "vision.layers.(\\d+).:", "vision\\.layers.(\\d+).:", "18:5", "'\\.'", "a dot is already a dot"
    ),
    "digits without a group": of(
        "(\\d+).: {to", "\\d+.: {to", "18:5", "'\\d+'", "write (\\d+) for an index, in brackets"
    ),
    "one digit": of("vision.layers.(\\d+).:", "vision.layers.(\\d).:", "18:5", "(\\d) in", "write (\\d+)"),
    "two backslashes": of("vision.layers.(\\d+).:", "vision.layers.(\\\\d+).:", "18:5", "write (\\d+)"),
    "any text in a group": of("vision.layers.(\\d+).:", "vision.layers.(.*).:", "18:5", "(.*) in", "([^.]+)"),
    "a group without a number": of(
        "(weight|bias): visual.ln_post", "(?:weight|bias): visual.ln_post", "19:5", "write (weight|bias)"
    ),
    "a named group": of(
        "vision.layers.(\\d+).:", "vision.layers.(?P<i>\\d+).:", "18:5", "numbers, not names", "write (\\d+)"
    ),
    "an index in braces, in a source": of(
        "vision.layers.(\\d+).:", "vision.layers.{i}.:", "18:5", "'{i}'", "write (\\d+)"
    ),
    "a format of Python": of(
        "vision.layers.(\\d+).:", "vision.layers.%d.:", "18:5", "'%d'", "write (\\d+) for an index"
    ),
    "a caret": of("    vision.cls:", "    ^vision.cls:", "15:5", "leave ^ out"),
    "a dollar": of("    vision.cls:", "    vision.cls$:", "15:5", "leave $ out"),
    "alternatives without brackets": of("    vision.cls:", "    vision.cls|vision.c:", "15:5", "brackets: (a|b)"),
    "a question mark": of("    vision.cls:", "    vision.cls?:", "15:5", "(|x), or mark the rule optional"),
    "an open group": of("vision.post.(weight|bias)", "vision.post.(weight|bias", "19:5", "is not closed"),
    "the rest in the middle": of("vision.layers.(\\d+).:", "vision.(.+).x:", "18:5", "(.+) is allowed only at the end"),
    "a dollar for a group": of("visual.ln_post.\\1", "visual.ln_post.$1", "19:5", "'$1'", "write \\1"),
    "angle brackets for a group": of("visual.ln_post.\\1", "visual.ln_post.<1>", "19:5", "<1> in", "write \\1"),
    "braces for a group": of("visual.ln_post.\\1", "visual.ln_post.{1}", "19:5", "'{1}'", "write \\1"),
    "the source's group in a target": of("visual.ln_post.\\1", "visual.ln_post.(\\w+)", "19:5", "write \\1"),
    "a group that does not exist": of(
        "visual.ln_post.\\1", "visual.ln_post.\\2", "19:5", "uses group 2", "it has 1 group"
    ),
    "group zero": of("visual.ln_post.\\1", "visual.ln_post.\\0", "19:5", "groups count from 1, write \\1"),
    "a name without unstack": of("visual.ln_post.\\1", "visual.ln_post.<i>", "19:5", "<i> goes with unstack: i"),
    "evidence for every file": of("[vision.patch.weight]", "['(.+)']", "8:9", "matches every file: name a key"),
    # tables, lookups and other files
    "a misspelt table": of("table: block}", "table: blok}", "18:5", "there is no table 'blok'; did you mean 'block'?"),
    "a table of a file that is not used": of(
        "table: block}", "table: vit}", "18:5", "table 'vit' is in native_blocks", "`uses: [hf_blocks, native_blocks]`"
    ),
    "a file that is not used": of(
        "uses: [hf_blocks]\n", "", "21:5", "table 'clip_text' is in hf_blocks: add `uses: [hf_blocks]`"
    ),
    "a misspelt file to use": of("uses: [hf_blocks]", "uses: [hf_blcks]", "5:8", "did you mean 'hf_blocks'?"),
    "a misspelt lookup": of("<1:norm>", "<1:nrm>", "17:5", "there is no lookup 'nrm'; did you mean 'norm'?"),
    "a lookup without an entry": of(
        "{gamma: weight, beta: bias}", "{gamma: weight}", "17:5", "has no entry for beta: add it"
    ),
    "a lookup without an entry that several rules need": of(
        "mlp.<1:mlp>.bias\nlookups:\n  norm: {gamma: weight, beta: bias}\n  mlp: {0: c_fc, 2: c_proj}",
        "mlp.<1:mlp>.bias\nlookups:\n  norm: {gamma: weight, beta: bias}\n  mlp: {0: c_fc}",
        "36:3",
        "mlp has no entry for 2: add it (2 rules use it)",
    ),
    "one name for two entries of a lookup": of(
        "{0: c_fc, 2: c_proj}", "{0: c_fc, 2: c_fc}", "36:3", "gives 0 and 2 one name, c_fc", "(2 rules use it)"
    ),
    "a wrong entry of a lookup": of("{0: c_fc, 2: c_proj}", "{0: c_fc, 2: 1.5}", "36:18", "1.5 is a number"),
    "a misspelt lookup of words": of("words: activation}", "words: activatoin}", "43:5", "did you mean 'activation'?"),
    "a prefix rule with a view": of(
        "table: block}", "table: block, view: a b -> b a}", "18:5", "no operation besides sizes"
    ),
    "a prefix rule that loses its index": of(
        "resblocks.\\1., table", "resblocks.0., table", "18:5", "group 1 is captured and not used"
    ),
    "a prefix rule with a wrong group": of("resblocks.\\1., table", "resblocks.\\2., table", "18:5", "uses group 2"),
    "a table that contains itself": of(
        "    attn.out.bias: attn.out_proj.bias", "    attn.: {to: attn., table: block}", "31:5", "contains itself"
    ),
    "a wrong rule of a table": of(
        "    attn.out.bias: attn.out_proj.bias", "    attn.out.*: attn.out_proj.bias", "31:5", "'.*'"
    ),
    "two rules for one key": of(
        "    vision.head:", "    vision.post.weight:", "20:5", "claimed by two rules", "make one of them narrower"
    ),
    "two prefix rules for the same keys": of(
        "    vision.post.(weight|bias): visual.ln_post.\\1",
        "    vision.layers.(0|1).: {to: visual.transformer.resblocks.\\1., table: block}",
        "19:5",
        "claimed by two rules",
        "more keys",
    ),
    "a rule for every key without rest": of(
        "    vision.head:", "    (.+): visual.\\1\n    vision.head:", "20:5", "matches every key", "add rest: true"
    ),
    "a key that is ignored and owned": of(
        "  vision.mask: a", "  vision.cls: a", "15:5", "left out by 'ignore: vision.cls'"
    ),
    # what only a check finds
    "a misspelt target": of(
        "visual.conv1.weight", "visual.conv1.weigth", "14:5", "did you mean 'visual.conv1.weight'?"
    ),
    "a misspelt prefix": of(
        "visual.transformer.resblocks.\\1., table",
        "visual.transformer.resblock.\\1., table",
        "18:5",
        "did you mean 'visual.transformer.resblocks.(\\d+).",
        "more keys of this rule",
    ),
    "a target of another layout": of(
        "visual.conv1.weight",
        "visual.trunk.patch_embed.proj.weight",
        "14:5",
        "is not a key of the model's image tower (native_vit)",
    ),
    "a layout that the rules do not write": of(
        "image: native_vit",
        "image: clip_trunk",
        "6:11",
        "the rules write keys of layout native_vit",
        "for example 'visual.conv1.weight'",
        "write `image: native_vit`",
    ),
    "an open layout that the rules do not write": of("image: native_vit", "image: naflex", "6:11", "native_vit`"),
    "a layout of other libraries for a native tower": of("text: native}", "text: hf}", "6:30", "write `text: native`"),
    "the text layout without a prefix": of("text: native}", "text: flat}", "6:30", "write `text: native`"),
    "a key of another layout of the tower": of(
        "text.head: {to: text.text_projection",
        "text.head: {to: text_projection",
        "23:5",
        "'text_projection' is not a key of the model's text tower (native), but of layout flat",
    ),
    "a misspelt target in a table": of(
        "attn.out.bias: attn.out_proj.bias",
        "attn.out.bias: attn.outproj.bias",
        "31:5",
        "did you mean 'visual.transformer.resblocks.(\\d+).attn.out_proj.bias'? (used at 18:5)",
    ),
    "one misspelt alternative": of(
        "(weight|bias): visual.ln_post",
        "(weight|bais): visual.ln_post",
        "19:5",
        "'visual.ln_post.bais'",
        "did you mean 'visual.ln_post.bias'?",
    ),
    "a prefix without its dot": of(
        "{to: text., table",
        "{to: text, table",
        "22:5",
        "'texttoken_embedding.weight'",
        "did you mean 'text.token_embedding.weight'?",
    ),
    "a tower without a layout": of(
        "layouts: {image: native_vit, text: native}", "layouts: {image: native_vit}", "21:3", "add `text: "
    ),
    "a misspelt fact": of(
        "image.heads: num", "image.head: num", "42:5", "there is no fact 'image.head'; did you mean 'image.heads'?"
    ),
    "a misspelt fact of sizes": of("{h: image.heads}", "{h: image.haeds}", "30:81", "did you mean 'image.heads'?"),
    "an old fact": of("fixed: {", "fixed: {text.pools: tok, ", "45:9", "it is now called 'text.pools_at_end_token'"),
    "a misspelt value of a fact": of("text.pool: argmax", "text.pool: argmx", "45:9", "did you mean 'argmax'?"),
    "an unknown value of a fact": of("text.causal: true", "image.activation: relu7", "45:28", "did you mean 'relu'?"),
    "a text for a number of heads": of("text.heads: 8", "text.heads: eight", "44:14", "eight is not a number"),
    "a table that nothing uses": of(
        "lookups:\n", "  more: {a: b}\nlookups:\n", "34:3", "more is not used", "or remove it"
    ),
    "a lookup that nothing uses": of(
        "lookups:\n", "lookups:\n  more: {a: b}\n", "35:3", "more is not used", "<1:more>"
    ),
    "evidence that no rule owns": of(
        "[vision.patch.weight]",
        "[vision.patch.weight, vision.patches]",
        "8:30",
        "no rule of the file owns 'vision.patches'",
    ),
    "a dtype of a key that no rule has": of(
        "  vision.patch.weight: float16",
        "  vision.patch.wieght: float16",
        "38:3",
        "no rule of the file has a source key",
    ),
    "a size of no axis": of(
        "{h: image.heads}", "{heads: image.heads}", "30:81", "no view has the axis 'heads'", "axes are: d, h, k"
    ),
    "a size without a view": of(
        "vision.post.(weight|bias): visual.ln_post.\\1",
        "vision.post.(weight|bias): {to: visual.ln_post.\\1, sizes: {h: 2}}",
        "19:64",
        "no view has the axis 'h'; the rule has no `view`",
    ),
}


def faults(text: str) -> list[str]:
    """What a check of a file finds, as tools/check_mappings.py does it."""
    shipped = registry()
    try:
        marked = parse_yaml(text, "mine.yaml")
        mapping = compile_marked(marked, shipped.files.get, neighbours=shipped.files)
    except MappingError as error:
        return list(error.faults)
    known = Catalogue({**shipped.mappings, "mine": mapping}, {**shipped.files, "mine": marked})
    return review(known, "mine")


def test_a_mapping_without_mistakes_has_no_faults() -> None:
    assert faults(GOOD) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_message_that_says_what_to_write(name: str) -> None:
    mistake = MISTAKES[name]
    assert GOOD.count(mistake.old) >= 1
    found = faults(GOOD.replace(mistake.old, mistake.new, 1))
    assert len(found) == 1, found
    assert found[0].startswith(f"mine.yaml:{mistake.place}: "), found[0]
    for words in mistake.words:
        assert words in found[0], found[0]


def test_faults_of_the_schema_and_of_the_language_come_in_one_list() -> None:
    text = GOOD.replace("visual.ln_post.\\1", "visual.ln_post.$1").replace("notes: [an example]", "notes: an example")
    text = text.replace("table: block}", "table: blok}").replace("concat: 0", "concat: -1")
    assert [fault.split(":")[1] for fault in faults(text)] == ["4", "18", "19", "29"]


def test_registering_a_file_refuses_what_a_check_finds(tmp_path: Path) -> None:
    text = GOOD.replace("visual.conv1.weight", "visual.conv1.weigth", 1).replace(
        "text.causal: true", "text.causl: true"
    )
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MappingError) as refused:
        register_mappings(file)
    assert [fault.split("mine.yaml:")[1].split(": ")[0] for fault in refused.value.faults] == ["14:5", "45:28"]
    assert "mine" not in registry().mappings
