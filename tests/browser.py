"""Opens a page in headless Chromium and tells what a reader would see: errors, requests, pictures, what overflows."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Runs in the page before its content: an alert would mean that a caption ran.
BEFORE = "<script>window.alert = () => { window.alerted = true; };</script>"
# Runs after it: what was found stands in an attribute, which --dump-dom prints.
AFTER = """<script>
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const background = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const found = channels(getComputedStyle(e).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const contrast = (element) => {
  const [a, b] = [channels(getComputedStyle(element).color), background(element)].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const canvas = document.createElement("canvas").getContext("2d");
const decodes = (image) => {
  try {
    canvas.drawImage(image, 0, 0);
    return image.naturalWidth > 0;
  } catch {
    return false;
  }
};
window.onload = () => {
  const texts = [...document.querySelectorAll("body *")].filter((e) =>
    !e.closest("svg, script") && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  const faint = texts.filter((e) => contrast(e) < 4.5).map((e) => `${e.className} ${contrast(e).toFixed(2)}`);
  const squeezed = texts.filter((e) => e.textContent.trim().length > 3).map((e) => [e, e.getBoundingClientRect()])
    .filter(([e, r]) => r.width && r.width < 60 && r.height > 60).map(([e]) => e.textContent.slice(0, 40));
  const outside = [...document.querySelectorAll("body *")]
    .filter((e) => !e.closest(".wide, svg") && e.getBoundingClientRect().right > innerWidth + 1)
    .map((e) => e.tagName + "." + e.className);
  const decoded = [...document.images].map(decodes);
  parent.document.documentElement.dataset.probe = JSON.stringify({
    width: innerWidth, scroll_width: document.documentElement.scrollWidth, faint, outside, squeezed,
    dark: matchMedia("(prefers-color-scheme: dark)").matches, images: decoded.length,
    broken: decoded.filter((d) => !d).length, alerted: Boolean(window.alerted),
    requests: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
  });
};
</script>"""


def open_page(page: Path, width: int, dark: bool, folder: Path) -> dict:
    """What Chromium finds in a page of HTML at a width in px; `console` are its messages. `folder` is for its files.

    Skips the test where there is no Chromium; in CI that is an error.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        assert not os.environ.get("BROWSER_TESTS"), "Chromium is not installed"  # .ci/run installs it
        pytest.skip("needs Chromium: apt-get install chromium")
    copy, content = folder / "opened.html", page.read_text(encoding="utf-8")
    content = content.replace("<head>", f"<head>{BEFORE}", 1).replace("</body>", f"{AFTER}</body>", 1)
    # In a frame: the window itself is never narrower than 500 px.
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(content)}"></iframe>'
    copy.write_text(f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">{frame}', encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width + 100},1000", "--virtual-time-budget=9999",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    [found] = re.findall(r'data-probe="([^"]*)"', done.stdout)
    return {**json.loads(unescape(found)), "console": re.findall(r".*CONSOLE.*", done.stderr)}
