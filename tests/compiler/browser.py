"""Headless Chromium, driven through its command line: open a page, run a script in it, return what the script saw."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)
SECONDS = 120  # a cold start on two busy cores takes a few; this only ends a browser that hangs


def look(page: Path, script: str, folder: Path) -> Any:
    """Open a copy of `page` in which `script`, the body of a function, runs at the end; return its result via JSON.

    Fails where no Chromium is installed, unless TOKRED_NO_BROWSER is set, which skips instead.
    """
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        if os.environ.get("TOKRED_NO_BROWSER"):
            pytest.skip("TOKRED_NO_BROWSER is set")
        pytest.fail(f"none of {', '.join(NAMES)} is installed: apt-get install chromium, or set TOKRED_NO_BROWSER=1")
    copy = folder / f"looked-at-{page.name}"
    probe = f"""<pre id="probe"></pre><script>
    document.getElementById('probe').textContent = JSON.stringify((() => {{ {script} }})());
    </script></body>"""
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not run to its end (exit {done.returncode}):\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))
