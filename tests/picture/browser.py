"""Open a page in headless Chromium, run a script in a copy of it, and read what the script returns."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
RESULT = re.compile(r'<pre id="result">(.*?)</pre>', re.DOTALL)
POLICY = re.compile(r"script-src [^;]*;")
# The script is the body of a function. What it returns, or why it failed, goes into the page as JSON.
CALL = """<script>
(() => {
const rows = side => [...document.querySelectorAll("ul.keys")].filter((list, n) => n % 2 === side)
  .flatMap(list => [...list.querySelectorAll(".row")]);
const row = (side, text) => rows(side).find(one => one.querySelector(".key").title === text);
const labels = side => rows(side).map(one => one.querySelector(".key").title);
const press = (key, target) => (target || document.activeElement)
  .dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const enter = node => node.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
const search = text => {
  document.getElementById("search").value = text;
  document.getElementById("search").dispatchEvent(new Event("input"));
};
let result;
try { result = {value: (() => { CODE })()}; } catch (error) { result = {error: String(error)}; }
const out = document.createElement("pre");
out.id = "result";
out.textContent = JSON.stringify(result);
document.body.append(out);
})();
</script>"""


def chromium(folder: Path, url: str, *options: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Chromium once; console messages are in stderr."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *options,
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The messages of the page's console: errors, warnings, and refusals of its security policy."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def save(page: str, folder: Path) -> str:
    """The address of a page."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    return file.as_uri()


def run(page: str, code: str, folder: Path, state: str = "", dark: bool = False) -> Any:
    """What JavaScript returns in a copy of the page, whose policy allows this one script more."""
    copy = POLICY.sub("script-src 'unsafe-inline';", page, count=1)
    copy = copy.replace("</body>", CALL.replace("CODE", code) + "</body>")
    done = chromium(folder, save(copy, folder) + state, "--dump-dom", dark=dark)
    assert console(done) == []
    found = json.loads(html.unescape(RESULT.search(done.stdout).group(1)))
    assert "error" not in found, found
    return found.get("value")
