"""The command `keymap`: what it prints, its exit codes, its JSON, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
import torch
from peers import full_size, openclip
from rich.console import Console
from safetensors.torch import save_file

import keymap
from keymap.cli import commands, names, targets
from keymap.cli.main import main
from keymap.cli.screen import Bar, Screen
from keymap.paths import data_folder
from keymap.source.registry import registry

ROOT = Path(__file__).parents[2]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SCHEMA = json.loads((data_folder("schemas") / "command.schema.json").read_text(encoding="utf-8"))
VALID = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of one small model: hf.safetensors, own.safetensors (OpenCLIP's names), and of another: other.pt."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = openclip.clip(seed=1)
    keymap.save_checkpoint(model, folder / "hf.safetensors", "hf_clip")
    keymap.save_checkpoint(model, folder / "own.safetensors", "open_clip")
    keymap.save_checkpoint(openclip.clip(seed=2), folder / "other.pt", "openai")
    return folder


@pytest.fixture
def small(folder, monkeypatch):
    """The working folder, and any --model is the small model without memory."""

    def named(_name):
        return openclip.clip(seed=3).to("meta")

    monkeypatch.setattr(targets, "named", named)
    monkeypatch.chdir(folder)


def run(capsys, *words):
    """The exit code, standard output and standard error of a command."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def as_json(capsys, *words):
    """The exit code and the document of a command with --json."""
    code, out, err = run(capsys, *words, "--json")
    assert err == ""
    assert out.isascii() and out.count("\n") == 1 and out.endswith("\n")
    found = json.loads(out)
    VALID.validate(found)
    return code, found


def process(*words, **options):
    """A process of its own; PYTHONPATH is this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment, check=False, stdin=subprocess.DEVNULL, **options
    )


# --- documents -----------------------------------------------------------------------------------------------

COMMANDS = {
    "inspect": ["inspect", "hf.safetensors"],
    "plan": ["plan", "hf.safetensors", "--model", "ViT-B-32"],
    "plan with an explanation": ["plan", "hf.safetensors", "--model", "ViT-B-32", "--explain", "visual.proj"],
    "plan like": ["plan", "hf.safetensors", "--like", "own.safetensors"],
    "load": ["load", "hf.safetensors", "--model", "ViT-B-32"],
    "convert": ["convert", "hf.safetensors", "written.pt", "--to", "open_clip", "--dtype", "float16"],
    "formats": ["formats"],
    "explain": ["explain", "hf_siglip"],
    "explain a bridge": ["explain", "open_clip_flat"],
    "explain the hub": ["explain", "open_clip"],
    "check": ["check", str(ROOT / "mappings" / "open_clip" / "longclip.yaml")],
    "completion": ["completion", "zsh"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_a_document_that_the_schema_describes(name, small, capsys):
    code, found = as_json(capsys, *COMMANDS[name])
    assert code == 0
    assert (found["command"], found["version"]) == (COMMANDS[name][0], keymap.__version__)
    assert "error" not in found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_plain_lines_in_a_pipe(name, small, capsys):
    code, out, err = run(capsys, *COMMANDS[name])
    assert (code, err) == (0, "")
    assert "\x1b" not in out and "\u2500" not in out


def test_the_schema_has_every_command():
    assert set(SCHEMA["$defs"]["results"]["$defs"]) == set(commands.cli.commands)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_wrong_document_is_found():
    """The schema is strict: a field more, a field less, and neither result nor error."""
    right = {"command": "formats", "version": "1", "result": {"formats": []}}
    VALID.validate(right)
    for wrong in (
        {**right, "more": 1},
        {"command": "formats", "version": "1"},
        {**right, "error": {"type": "", "message": "", "faults": []}},
        {**right, "result": {}},
        {**right, "result": {"formats": [], "more": 1}},
        {**right, "command": "check"},
    ):
        assert not VALID.is_valid(wrong), wrong


def test_a_document_holds_what_the_library_returns(small, capsys):
    found = as_json(capsys, *COMMANDS["inspect"])[1]["result"]
    assert found == json.loads(json.dumps(keymap.inspect_checkpoint("hf.safetensors").to_dict()))
    found = as_json(capsys, *COMMANDS["plan"])[1]["result"]
    assert found["plan"] == json.loads(json.dumps(keymap.plan_load(targets.named(""), "hf.safetensors").to_dict()))
    written = as_json(capsys, *COMMANDS["convert"])[1]["result"]
    assert written["files"] == ["written.pt"] and written["casts"] == {"float32 to float16": written["tensors"]}


def test_numbers_that_json_lacks_and_halves_of_characters_are_texts(capsys):
    from keymap.cli.answer import document

    out = document("formats", {"a": float("inf"), "b": (1, float("nan")), "c": "\udcff\x7f\x1b"})
    assert out.isascii() and "\x7f" not in out
    assert json.loads(out)["result"] == {"a": "inf", "b": [1, "nan"], "c": "\\udcff\x7f\x1b"}


# --- exit codes ----------------------------------------------------------------------------------------------

REFUSED = {
    "no such file": (["inspect", "nothing.pt"], "CheckpointError"),
    "no such format": (["explain", "hf_clp"], "MappingError"),
    "no such target": (["convert", "hf.safetensors", "x.pt", "--to", "hf_clp"], "MappingError"),
    "no such tower": (["plan", "hf.safetensors", "--model", "x", "--tower", "sound"], "PlanError"),
    "no such fact": (["plan", "hf.safetensors", "--model", "x", "--fact", "x.heads=3"], "PlanError"),
    "no such key": (["plan", "hf.safetensors", "--model", "x", "--explain", "visual.prj"], "PlanError"),
    "another architecture": (["load", "hf.safetensors", "--model", "x", "--mapping", "openai"], "DetectionError"),
    "no folder": (["convert", "hf.safetensors", "no/x.pt", "--to", "open_clip"], "WriteError"),
    "no mapping file": (["check", "nothing.yaml"], "MappingError"),
    "like nothing": (["plan", "hf.safetensors", "--like", "nothing.pt"], "CheckpointError"),
}
WRONG = {
    "no such command": ["inspct"],
    "no such option": ["inspect", "hf.safetensors", "--wrap", "x"],
    "no path": ["inspect"],
    "neither model nor checkpoint": ["plan", "hf.safetensors"],
    "both": ["plan", "hf.safetensors", "--model", "x", "--like", "own.safetensors"],
    "a fact without a number": ["plan", "hf.safetensors", "--model", "x", "--fact", "image.heads=many"],
    "a grid without a width": ["plan", "hf.safetensors", "--model", "x", "--source-grid", "14"],
    "wrappers of towers and of none": ["plan", "hf.safetensors", "--model", "x", "--wrapper", "a", "--wrapper", "b"],
    "no such shell": ["completion", "cmd"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_message_and_exit_code_1(name, small, capsys):
    words, kind = REFUSED[name]
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert err.startswith("keymap: ") and "Traceback" not in err
    code, found = as_json(capsys, *words)
    assert (code, found["error"]["type"], found["command"]) == (1, kind, words[0])
    assert found["error"]["message"] in err


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_exit_code_2(name, small, capsys):
    code, out, err = run(capsys, *WRONG[name])
    assert (code, out) == (2, "")
    assert "Error: " in err and "Traceback" not in err
    code, found = as_json(capsys, *WRONG[name])
    assert (code, found["error"]["type"]) == (2, "UsageError")


def test_a_refusal_lists_all_faults_as_json_and_some_in_words(small, capsys, tmp_path):
    file = tmp_path / "own.safetensors"
    state = {key: value.detach().clone()[..., None] for key, value in openclip.clip(seed=1).state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    words = ("plan", file, "--model", "x")
    with pytest.raises(keymap.PlanError) as refused:
        keymap.plan_load(targets.named(""), file)
    assert as_json(capsys, *words)[1]["error"]["faults"] == list(refused.value.faults)
    lines = run(capsys, *words)[2].splitlines()
    assert len(refused.value.faults) > 24
    assert lines[-1] == f"  and {len(refused.value.faults) - 24} more; --json lists all"


def test_a_file_of_no_known_format_is_described(capsys, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    code, found = as_json(capsys, "inspect", tmp_path / "x.safetensors")
    assert (code, found["result"]["format"]) == (0, None)
    code, out, _ = run(capsys, "inspect", tmp_path / "x.safetensors", "--tensors")
    assert code == 0 and "unknown format" in out and "weight  [2]    float32" in out.splitlines()


def test_a_mapping_with_faults_is_exit_code_1(capsys, tmp_path):
    text = (
        (ROOT / "mappings" / "open_clip" / "longclip.yaml")
        .read_text(encoding="utf-8")
        .replace("format: longclip", "format: mine")
    )
    (tmp_path / "mine.yaml").write_text(text.replace("layouts:", "layuts:"), encoding="utf-8")
    code, out, _ = run(capsys, "check", tmp_path / "mine.yaml")
    assert code == 1 and re.search(r"mine\.yaml:\d+:\d+: .*layuts", out) and "0 of 1 files are right" in out
    code, found = as_json(capsys, "check", tmp_path)
    assert code == 1 and "layuts" in found["result"]["faults"][0] and found["result"]["right"] == []


def test_openclip_that_is_not_there_is_a_refusal(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    code, _, err = run(capsys, "plan", folder / "hf.safetensors", "--model", "ViT-B-32")
    assert code == 1 and "pip install open_clip_torch" in err


def test_a_text_tower_whose_configuration_cannot_be_had_is_a_refusal(folder, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError("no network\x1b[31m")

    monkeypatch.setattr("open_clip.create_model", fails)
    code, _, err = run(capsys, "plan", folder / "hf.safetensors", "--model", "ViT-B-32")
    assert code == 1 and "HF_HUB_OFFLINE" in err and "\x1b" not in err


# --- what the commands do ------------------------------------------------------------------------------------


def test_a_plan_for_a_configuration_of_openclip_is_made_without_memory(capsys, tmp_path):
    model = targets.named("ViT-B-32")
    assert all(value.is_meta for value in model.state_dict().values())
    file = full_size.sparse_file(tmp_path / "x.safetensors", model.state_dict())
    code, found = as_json(capsys, "plan", file, "--model", "ViT-B-32")
    assert code == 0 and sum(found["result"]["plan"]["loaded"].values()) == len(model.state_dict())


def test_a_load_reads_the_weights_and_compares_both_sides(small, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        keymap,
        "load_checkpoint",
        lambda model, *args, real=keymap.load_checkpoint, **options: (
            loaded.append(model),
            real(model, *args, **options),
        )[1],
    )
    code, found = as_json(capsys, "load", "hf.safetensors", "--model", "x")
    want = openclip.clip(seed=1).state_dict()
    assert code == 0 and all(torch.equal(value, want[key]) for key, value in loaded[0].state_dict().items())
    rows = {row["name"]: row for row in found["result"]["parity"]["rows"]}
    assert (rows["loaded"]["file"], rows["loaded"]["equal"]) == (len(want), True)
    assert (rows["image.width"]["file"], rows["image.width"]["model"], rows["image.width"]["equal"]) == (48, 48, True)
    assert rows["image.heads"] == {
        "group": "settings", "name": "image.heads", "file": None, "model": 3, "equal": None, "origin": "",
    }  # fmt: skip


def test_a_setting_that_differs_is_shown_and_is_no_refusal(small, capsys, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(Path("hf.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 6}}')
    code, found = as_json(capsys, "load", tmp_path, "--model", "x")
    rows = {row["name"]: row for row in found["result"]["parity"]["rows"]}
    assert code == 0 and found["result"]["parity"]["equal"] is False
    assert (rows["image.heads"]["file"], rows["image.heads"]["model"], rows["image.heads"]["equal"]) == (6, 3, False)
    assert "num_attention_heads" in rows["image.heads"]["origin"] and found["result"]["report"]["warnings"]
    code, out, err = run(capsys, "load", tmp_path, "--model", "x")
    assert code == 0 and err == "" and re.search(r"^image\.heads +6 +3 +differs$", out, re.MULTILINE)


def test_the_rows_of_settings_agree_with_the_warnings(small):
    plan = keymap.plan_load(targets.named(""), "hf.safetensors")
    stated = {row.label: row.equal for row in plan.settings}
    assert {label for label, equal in stated.items() if equal is None} == set(plan.unverified)
    assert not any(equal is False for equal in stated.values()) and not plan.warnings


def test_like_takes_names_and_shapes_of_another_checkpoint(small, capsys, tmp_path):
    code, found = as_json(capsys, "plan", "other.pt", "--like", "own.safetensors")
    assert code == 0 and found["result"]["plan"]["settings"] == []
    assert sum(found["result"]["plan"]["loaded"].values()) == len(openclip.clip().state_dict())
    keymap.save_checkpoint(openclip.clip(image_width=96), tmp_path / "wide.safetensors", "hf_clip")
    code, _, err = run(capsys, "plan", "other.pt", "--like", tmp_path / "wide.safetensors")
    assert code == 1 and "visual.conv1.weight: shape" in err


def test_options_become_the_arguments_of_the_library(small, capsys, monkeypatch):
    asked = {}

    def plan_load(_model, path, **arguments):
        asked.update(arguments, path=path)
        raise keymap.PlanError("seen")

    monkeypatch.setattr(keymap, "plan_load", plan_load)
    words = (
        "plan hf.safetensors --model x --no-strict --mapping hf_clip --wrapper image=a --wrapper text=b --tower image"
    )
    words += (
        " --tower text --fact image.heads=3 --source-grid 2x3 --allow-missing a.* --allow-unexpected b --unsafe-pickle"
    )
    assert run(capsys, *words.split())[0] == 1
    assert asked == {
        "path": "hf.safetensors",
        "strict": False,
        "mapping": "hf_clip",
        "hub": None,
        "wrapper": {"image": "a", "text": "b"},
        "towers": ("image", "text"),
        "facts": {"image.heads": 3},
        "source_grid": (2, 3),
        "allow_missing": ("a.*",),
        "allow_unexpected": ("b",),
        "weights_only": False,
    }


def test_a_conversion_is_that_of_the_library(small, capsys, tmp_path):
    code, out, _ = run(capsys, "convert", "hf.safetensors", tmp_path / "x.safetensors", "--to", "open_clip")
    assert code == 0 and "-> " in out
    assert (tmp_path / "x.safetensors").read_bytes() == Path("own.safetensors").read_bytes()
    words = ("convert", "hf.safetensors", tmp_path / "y.safetensors", "--to", "open_clip", "--max-shard-size", "150000")
    code, found = as_json(capsys, *words)
    assert code == 0 and len(found["result"]["files"]) > 2
    assert run(capsys, *words)[0] == 1  # the shards are there
    assert run(capsys, *words, "--overwrite")[0] == 0


def test_diff_compares_and_its_exit_code_says_the_result(small, capsys):
    assert run(capsys, "diff", "hf.safetensors", "own.safetensors")[0] == 0
    assert as_json(capsys, "diff", "hf.safetensors", "own.safetensors")[0] == 0
    code, out, _ = run(capsys, "diff", "hf.safetensors", "other.pt", "--tower", "image")
    assert code == 1 and "visual.proj" in out
    code, found = as_json(capsys, "diff", "hf.safetensors", "other.pt")
    assert code == 1 and found["result"]["equal"] is False
    code, found = as_json(capsys, "diff", "hf.safetensors", "nothing.pt")
    assert code == 1 and found["error"]["type"] == "CheckpointError"


def test_html_is_written_whole(small, capsys, tmp_path):
    for words in (("plan", "hf.safetensors", "--model", "x"), ("explain", "hf_clip")):
        code, found = as_json(capsys, *words, "--html", tmp_path / "page.html")
        assert (code, found["result"]["html"]) == (0, str(tmp_path / "page.html"))
        assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")
        assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
        assert run(capsys, *words, "--html", tmp_path / "no" / "page.html")[0] == 1


def test_html_through_a_link_is_written_to_its_target(small, capsys, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "page.html").symlink_to(tmp_path / "kept" / "real.html")
    for text in ("not there", "an older page"):
        assert run(capsys, "explain", "hf_clip", "--html", tmp_path / "page.html")[0] == 0
        assert (tmp_path / "page.html").is_symlink(), text
        assert "</html>" in (tmp_path / "kept" / "real.html").read_text(encoding="utf-8")
        (tmp_path / "kept" / "real.html").write_text("an older page")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["real.html"]


# --- terminals and pipes -------------------------------------------------------------------------------------


@contextmanager
def terminal(monkeypatch, **environment):
    """What is printed on a terminal of 80 columns."""
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=80, highlight=False, _environ={"TERM": "xterm", **environment}
    )
    real = Screen.__init__
    monkeypatch.setattr(Screen, "__init__", lambda self: real(self, console))
    yield out


@pytest.mark.parametrize("name", ["inspect", "plan", "load", "explain", "formats", "check"])
def test_lines_on_a_terminal_have_80_columns_and_no_text_is_lost(name, small, capsys, monkeypatch):
    piped = run(capsys, *COMMANDS[name])[1]
    with terminal(monkeypatch) as out:
        assert main(COMMANDS[name]) == 0
    printed = ESCAPE.sub("", out.getvalue())
    assert max(map(len, printed.splitlines())) <= 80
    assert "\u2026" not in printed  # an ellipsis

    def letters(text):
        return sorted(re.sub(r"[\s:]|\b\d+\.\d+ s\b", "", text))

    assert letters(printed) == letters(piped)


def test_no_color_is_obeyed(small, monkeypatch):
    with terminal(monkeypatch, NO_COLOR="1") as out:
        assert main(COMMANDS["explain"]) == 0
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])m", out.getvalue())


def test_no_key_is_cut_in_a_pipe(capsys, tmp_path):
    key = ".".join(["layer"] * 60)
    save_file({key: torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    out = run(capsys, "inspect", tmp_path / "x.safetensors", "--tensors")[1]
    assert f"{key}  [2, 3]  float32" in out.splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="no such names on Windows")
def test_characters_of_control_in_a_name_never_reach_the_terminal(small, capsys, monkeypatch, tmp_path):
    hostile = tmp_path / "a\x1b[31m\n\x9b\u202eb"
    hostile.mkdir()
    (hostile / "model.safetensors").write_bytes(Path("hf.safetensors").read_bytes())
    for words in (["inspect", hostile], ["inspect", hostile / "no.pt"], ["plan", hostile, "--model", "x"]):
        for extra in ([], ["--json"]):
            text = "".join(map(str, run(capsys, *words, *extra)[1:]))
            assert "x1b" in text or "u001b" in text
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
            assert not any(line.startswith("\\x9b") for line in text.splitlines())
    with terminal(monkeypatch) as out:
        assert main(["inspect", str(hostile)]) == 0
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", ESCAPE.sub("", out.getvalue()))
    assert "\x1b[31m" not in out.getvalue()


def test_markup_of_the_terminal_library_in_a_name_is_text(capsys, monkeypatch, tmp_path):
    save_file({"[bold]a[/bold] :smile:": torch.zeros(2)}, tmp_path / "x.safetensors")
    with terminal(monkeypatch) as out:
        assert main(["inspect", str(tmp_path / "x.safetensors"), "--tensors"]) == 0
    assert "[bold]a[/bold] :smile:" in ESCAPE.sub("", out.getvalue())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_streams_that_are_full_or_closed_lose_no_exit_code_and_give_no_traceback(small):
    def shell(words, streams):
        command = f"{shlex.quote(sys.executable)} -m keymap {words} {streams}"
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    for words in ("inspect hf.safetensors", "inspect hf.safetensors --json"):
        done = shell(words, "> /dev/full")
        assert (done.returncode, done.stderr) == (1, "keymap: the answer cannot be printed: No space left on device\n")
    done = shell("convert hf.safetensors streams.safetensors --to open_clip", ">&-")
    assert (done.returncode, done.stderr) == (0, "") and Path("streams.safetensors").is_file()
    done = shell("inspect no.safetensors", "2>&-")
    assert (done.returncode, done.stdout) == (1, "")
    done = shell("inspect hf.safetensors --tensors", "| head -c 10")
    assert done.stdout == Path("hf.safetensors").name[:10] and done.stderr == ""


def test_a_bar_appears_after_a_second_and_goes_away():
    out, now = io.StringIO(), [0.0]
    bar = Bar("convert", Console(file=out, force_terminal=True, width=80), clock=lambda: now[0])
    bar.update(0, 4_000_000)
    now[0] = 0.9
    bar.update(1_000_000, 4_000_000)
    assert out.getvalue() == ""
    now[0] = 1.1
    bar.update(2_000_000, 4_000_000)
    bar.stop()
    assert "convert" in out.getvalue() and "2.0/4.0 MB" in ESCAPE.sub("", out.getvalue())


@pytest.mark.parametrize("name", ["load", "convert"])
def test_a_load_and_a_conversion_report_their_bytes(name, small, capsys, monkeypatch):
    seen = []

    @contextmanager
    def bar(_label):
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr(commands, "progress_bar", bar)
    assert run(capsys, *COMMANDS[name])[0] == 0
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0


def test_no_bar_in_a_pipe(small, capsys, monkeypatch):
    given = []
    real = keymap.convert_checkpoint
    monkeypatch.setattr(
        keymap, "convert_checkpoint", lambda *a, progress, **o: (given.append(progress), real(*a, **o))[1]
    )
    assert run(capsys, *COMMANDS["convert"])[0] == 0
    assert given == [None]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes that are closed")
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_pipe_whose_reader_is_gone_ends_quietly(extra, folder):
    read, write = os.pipe()
    os.close(read)
    done = process("-m", "keymap", "completion", "fish", *extra, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


# --- Ctrl-C --------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys
import keymap
from keymap.cli import commands
from keymap.cli.main import main
from contextlib import contextmanager

@contextmanager
def bar(label):
    def progress(done, total):
        if done:  # some tensors are written, and others not
            files = [name for name in os.listdir(sys.argv[2]) if name.endswith(".part")]
            assert files and done < total, (files, done)
            os.kill(os.getpid(), signal.SIGINT)
    yield progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
commands.progress_bar = bar
source, folder, suffix, *others = sys.argv[1:]
sys.exit(main(["convert", source, os.path.join(folder, "x" + suffix), "--to", "open_clip", *others]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_an_interrupt_during_a_conversion_leaves_nothing_half(suffix, folder, tmp_path):
    words = ("-c", INTERRUPTED, folder / "hf.safetensors", tmp_path, suffix)
    (tmp_path / f"x{suffix}").write_bytes(b"before")
    done = process(*words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr.strip() == "keymap: interrupted"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(f"x{suffix}", b"before")]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_is_a_document_too(folder, tmp_path):
    words = ("-c", INTERRUPTED, folder / "hf.safetensors", tmp_path, ".pt", "--json")
    done = process(*words, capture_output=True, text=True)
    assert done.returncode == 130
    VALID.validate(json.loads(done.stdout))
    assert json.loads(done.stdout)["error"]["type"] == "Interrupted" and list(tmp_path.iterdir()) == []


# --- imports and completion ----------------------------------------------------------------------------------

HEAVY = (
    "assert not {'torch', 'numpy', 'jsonschema', 'yaml', 'rich', 'open_clip'} & set(sys.modules), sys.modules.keys()"
)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([name, "--help"] for name in sorted(commands.cli.commands))]
)
def test_help_imports_no_torch(words):
    code = f"import sys\nfrom keymap.cli.main import main\nassert main({words!r}) == 0\n{HEAVY}"
    done = process("-c", code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("keymap " if words == ["--version"] else "Usage: keymap ")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_module_is_the_command(capsys):
    done = process("-m", "keymap", "--version", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"keymap {keymap.__version__}\n")
    assert 'keymap = "keymap.cli.main:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_names_that_are_completed_are_those_that_are_known():
    own = keymap.list_formats()
    assert set(names.format_names()) <= set(own) and "hf_clip" in names.format_names()
    shipped = {file.stem for file in (ROOT / "mappings").rglob("*.yaml")}
    assert set(names.format_names()) == shipped & set(keymap.list_formats())
    assert names.model_names() == sorted(name for entry in registry().configurations for name in entry.names)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("keymap expl", ["explain"]),
        ("keymap explain hf_cl", ["hf_clip"]),
        ("keymap convert a b --to open_cl", ["open_clip", "open_clip_flat"]),
        ("keymap plan a --model ViT-B-32-q", ["ViT-B-32-quickgelu"]),
    ],
)
def test_a_shell_completes_commands_and_names_without_torch(line, wanted):
    words = line.split(" ")
    code = "import atexit, sys\natexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n"
    code += "from keymap.cli.main import main\nmain([])"
    environment = {"_KEYMAP_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = process("-c", code, capture_output=True, text=True, env=environment)
    assert [row.partition(",")[2] for row in done.stdout.splitlines()] == wanted, done.stderr
    assert done.stderr == "False"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_calls_the_command(shell, capsys):
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0 and "_KEYMAP_COMPLETE" in out


# --- a mapping to a model's own names ---

MINE = """format: mine
hub: any
title: theirs to mine
towers:
  model:
    kernel: {to: layer.weight, view: in out -> out in}
"""


@pytest.mark.parametrize("more", [[], ["--hub", "any"]])
def test_a_plan_with_a_mapping_for_any_model_needs_no_hub(more, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    torch.save({"kernel": torch.ones(3, 2)}, tmp_path / "theirs.pt")
    torch.save({"layer.weight": torch.zeros(2, 3)}, tmp_path / "own.pt")
    words = [tmp_path / "theirs.pt", "--mapping", tmp_path / "mine.yaml", "--like", tmp_path / "own.pt", *more]
    code, found = as_json(capsys, "plan", *words)
    plan = found["result"]["plan"]
    assert code == 0 and (plan["format"], plan["missing_keys"]) == ("mine", [])
    torch.save({"layer.weight": torch.zeros(2, 4)}, tmp_path / "own.pt")
    assert run(capsys, "plan", *words)[0] == 1


def test_a_checkpoint_of_no_format_as_the_model_is_taken_as_it_is_where_the_advice_is_followed(capsys, tmp_path):
    torch.save({"layer.weight": torch.zeros(2, 3)}, tmp_path / "own.pt")
    code, _, err = run(capsys, "plan", tmp_path / "own.pt", "--like", tmp_path / "own.pt")
    assert code == 1 and "pass --hub any" in err
    assert run(capsys, "plan", tmp_path / "own.pt", "--like", tmp_path / "own.pt", "--hub", "any")[0] == 0
