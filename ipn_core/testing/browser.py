"""The web page of `ipn demo` in a real browser, as somebody who uses it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

__all__ = ["DESKTOP", "PHONE", "Visitor", "chromium", "open_browser", "served_demo"]

DESKTOP = (1200, 900)
PHONE = (390, 844)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_MS = 60_000
_DROP = """([data, name]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const transfer = new DataTransfer();
  const type = name.endsWith('.png') ? 'image/png' : 'image/jpeg';
  transfer.items.add(new File([bytes], name, {type}));
  return transfer;
}"""


def chromium() -> str | None:
    """Return where a Chromium or Chrome lies, None where there is none."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@contextmanager
def open_browser(executable: str) -> Iterator[Browser]:
    """Start a browser without a window, until the block ends."""
    from playwright.sync_api import sync_playwright

    # Its sandbox refuses to run as root, which containers do; it opens local pages alone here.
    words = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=words)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def served_demo(*words: str) -> Iterator[str]:
    """Run `ipn demo` at a free port; yields its address.

    Args:
        words: further ones of the command line.
    """
    code = "import sys; from ipn_core.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "demo", "--port", "0", *words],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"waits for questions at (http://\S+)", line):
                yield found[1]
                break
        else:
            raise RuntimeError("ipn demo has ended: " + "".join(said))
    finally:
        process.terminate()
        process.wait(timeout=30)


class Visitor:
    """Somebody at the page, in a browser profile of their own.

    Attributes:
        page: of playwright.
        foreign: the addresses beyond the page's own that it asked the browser for.
        errors: what its scripts raised.
    """

    def __init__(self, browser: Browser, address: str, size: tuple[int, int] = DESKTOP) -> None:
        """Open the page.

        Args:
            browser: from `open_browser`.
            address: from `served_demo`.
            size: width and height of the window.
        """
        viewport: Any = {"width": size[0], "height": size[1]}
        self.context: BrowserContext = browser.new_context(
            viewport=viewport, is_mobile=size[0] < 600, has_touch=size[0] < 600
        )
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(_PATIENCE_MS)
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.page.on("response", lambda got: self._note(got.url, address))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.get_by_role("button", name="Ask", exact=True).wait_for()

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.foreign.append(url)

    def close(self) -> None:
        """Leave."""
        self.context.close()

    def drop(self, picture: Path) -> None:
        """Drop a picture's file onto the page, and wait until it is shown."""
        data = [base64.b64encode(picture.read_bytes()).decode(), picture.name]
        self.page.evaluate(
            "document.querySelectorAll('#ipn-picture img').forEach(i => i.dataset.old = '1')"
        )
        if self.page.locator("#ipn-picture img").count():
            self.page.get_by_label("Clear").first.click()
        handle = self.page.evaluate_handle(_DROP, data)
        target = self.page.locator("#ipn-picture button").first
        target.dispatch_event("drop", {"dataTransfer": handle})
        self.page.locator("#ipn-picture img:not([data-old])").wait_for()

    def ask(self, question: str) -> str:
        """Type a question, press Ask, and return the answer on the left."""
        box = self.page.get_by_label("Question", exact=True)
        box.fill(question)
        self.press_ask()
        return self.answered()

    def press_ask(self) -> None:
        """Press Ask; what stands on the page until then is no answer to it."""
        self.page.evaluate(
            "document.querySelectorAll('#ipn-answers [data-state]')"
            ".forEach(one => one.dataset.state = 'old')"
        )
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def answered(self, side: str = "left") -> str:
        """Wait until a side has its answer; returns it."""
        done = self.page.locator(f"#ipn-{side} [data-state=done]")
        done.wait_for()
        return done.inner_text()

    def maps(self, side: str = "left") -> list[str]:
        """Return the maps of a side as they are drawn."""
        found = self.page.locator(f"#ipn-{side} .ipn-look img").all()
        return [str(one.get_attribute("src")) for one in found]

    def overflows(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.page.evaluate(wide))
