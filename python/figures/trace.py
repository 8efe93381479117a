"""Draw ``docs/trace.png``: one decision on the page that ``lbr-kernels trace`` writes of the demo, in Chromium.

    python python/figures/trace.py

The decision is the one in which the router is surest among those whose candidates differ.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

OUT = Path(__file__).resolve().parents[2] / "docs" / "trace.png"


def surest(document: dict[str, Any]) -> int:
    """The step's index."""
    nodes, width = document["nodes"], document["width"]

    def certainty(step: dict[str, Any]) -> float:
        tokens = [nodes[node]["id"] for node in step["slots"][:width]]
        chosen = tokens[step["choice"]]
        shares = [math.exp(value) for token, value in zip(tokens, step["router"], strict=True) if token == chosen]
        return sum(shares) if len(set(tokens)) > 1 else -math.inf

    return max(range(len(document["steps"])), key=lambda number: certainty(document["steps"][number]))


def main() -> None:
    """Decode, choose, take the picture."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium is installed (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = Path(folder) / "trace.html"
        subprocess.run([sys.executable, "-m", "lbr_kernels", "trace", "--html", str(page)], check=True)
        # Its sandbox needs what root in a container does not have.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(
            viewport={"width": 1280, "height": 800}, device_scale_factor=1.5, reduced_motion="reduce"
        )
        view.goto(page.as_uri())
        view.evaluate(f"go({surest(view.evaluate('DATA'))}, PHASES.indexOf('route'))")
        view.screenshot(path=OUT)
        browser.close()


if __name__ == "__main__":
    main()
