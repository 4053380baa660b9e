"""Take the pictures of `docs/demo.md`, and the trace that `docs/trace.png` shows.

python examples/make_screenshots.py [demo | photo | trace …]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.cbook import get_sample_data
from PIL import Image

from ipn_core.testing.browser import (
    DESKTOP,
    PHONE,
    Visitor,
    chromium,
    open_browser,
    served_demo,
)

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "examples" / "scene.png"
QUESTION = "What is to the left of the dog?"


def main() -> None:
    """Write `demo.png`, `demo-phone.png`, `demo-photo.png` and `trace.png` into `docs`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(PICTURES)}")
    names = parser.parse_args().names or list(PICTURES)
    if unknown := [name for name in names if name not in PICTURES]:
        parser.error(f"there is no picture '{unknown[0]}'")
    executable = chromium()
    if executable is None:
        sys.exit("there is no chromium here: 'make chromium' installs it where it may.")
    with open_browser(executable) as browser, tempfile.TemporaryDirectory() as folder:
        # Photographs that were fetched are not ours to show.
        os.environ["IPN_STAMPS"] = folder
        for name in names:
            PICTURES[name](browser, Path(folder))


def take_demo(browser, folder: Path) -> None:
    """The page of the starter, on a desk and on a phone."""
    with served_demo() as address:
        for name, size in (("demo", DESKTOP), ("demo-phone", PHONE)):
            visitor = Visitor(browser, address, size)
            visitor.drop(SCENE)
            if size == DESKTOP:
                both = visitor.page.locator("#ipn-second")
                both.get_by_label("static", exact=True).check()
            # The second question is shown: both strategies have read the picture by then.
            for question in ("Is there a dog?", QUESTION):
                visitor.ask(question)
                if size == DESKTOP:
                    visitor.answered("right")
            _shoot(visitor.page, name)
            visitor.close()


def take_photo(browser, folder: Path) -> None:
    """The page of the model `photo`, asked about a photograph."""
    with served_demo("--model", "photo") as address:
        visitor = Visitor(browser, address)
        visitor.drop(Path(get_sample_data("grace_hopper.jpg", asfileobj=False)))
        for question in ("Is there a dog?", "What is this?"):
            visitor.ask(question)
        _shoot(visitor.page, "demo-photo")
        visitor.close()


def take_trace(browser, folder: Path) -> None:
    """What `ipn ask --trace` writes."""
    trace = folder / "trace.html"
    ask = [Path(sys.executable).with_name("ipn"), "ask", str(SCENE), QUESTION]
    subprocess.run([*ask, "--trace", str(trace)], check=True)
    page = browser.new_page(viewport={"width": 900, "height": 800})
    page.goto(trace.as_uri())
    _shoot(page, "trace")


PICTURES = {"demo": take_demo, "photo": take_photo, "trace": take_trace}


def _shoot(page, name: str) -> None:
    """Write the whole page into `docs`, as small as it gets without a loss."""
    path = ROOT / "docs" / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as taken:
        taken.convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main()
