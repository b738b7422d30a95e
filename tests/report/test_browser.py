"""The page in a real browser: no error, no request, nothing wider than a phone, dark where the reader's system is."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from html import unescape
from pathlib import Path

import pytest

from softlabels.report import report
from tests.report.test_report import make, make_hostile

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")

# Runs in the page, first of all; says what it saw to the frame around it. Sorts the table by its eighth column.
PROBE = """<script>
const violations = [], errors = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("load", () => setTimeout(() => {
  const table = document.querySelector("table.sortable"), milliseconds = () =>
    [...table.tBodies[0].rows].map((row) => Number(row.cells[7].dataset.sort));
  table.querySelectorAll("th button")[7].click(); const down = milliseconds();
  table.querySelectorAll("th button")[7].click(); const up = milliseconds();
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({violations, errors, up, down, title: document.title, width: root.scrollWidth,
    inner: innerWidth, requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    background: getComputedStyle(document.body).backgroundColor,
    small: [...document.querySelectorAll("figure svg text")].map((text) => text.getBoundingClientRect().height)
      .filter((height) => height > 0).sort((a, b) => a - b)[0]}), "*");
}, 300));
</script>"""
FRAME = """<!doctype html><body style="margin:0">
<iframe id="f" style="width:360px;height:800px;border:0"></iframe><pre></pre>
<script>addEventListener("message", (event) => { document.querySelector("pre").textContent = event.data; });
document.getElementById("f").src = "page.html";</script>"""


def look(page: str, folder: Path, *flags: str) -> dict:
    """What the probe saw of `page` in a frame of a phone's width."""
    assert BROWSER is not None
    (folder / "page.html").write_text(page.replace("<title>", PROBE + "<title>", 1))
    (folder / "frame.html").write_text(FRAME)
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--disable-background-networking",
        "--virtual-time-budget=4000",
    ]
    command += [*flags, "--dump-dom", f"file://{folder / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert told is not None and told[1], done.stderr[-2000:]
    return json.loads(unescape(told[1])) | {"console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(["an-unbroken-name-" * 6, "b", "c"]):
        options = {"temperature": str(2**number), "losses": {"kl": 1.0}}
        make(folder, name, 1.0 + number, ms=[3.0, 11.0, 2.0][number], options=options, texts=["w" * 300] * 90)
    report([folder], out=folder / "r.html")
    return (folder / "r.html").read_text()


def test_on_a_phone(page: str, tmp_path: Path) -> None:
    seen = look(page, tmp_path)
    assert (seen["errors"], seen["violations"], seen["requests"], seen["console"]) == ([], [], [], [])
    assert seen["inner"] == 360 and seen["width"] <= 360
    assert seen["down"] == [11.0, 3.0, 2.0] and seen["up"] == [2.0, 3.0, 11.0]
    assert seen["background"] == "rgb(246, 247, 249)" and seen["small"] >= 8


def test_in_the_dark_and_with_hostile_texts(tmp_path: Path) -> None:
    report([make_hostile(tmp_path)], out=tmp_path / "r.html", title="mine")
    seen = look((tmp_path / "r.html").read_text(), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (seen["errors"], seen["violations"], seen["requests"], seen["console"]) == ([], [], [], [])
    assert seen["title"] == "mine" and seen["background"] == "rgb(18, 22, 28)" and seen["width"] <= 360


def test_the_policy_lets_no_request_out(page: str, tmp_path: Path) -> None:
    """Were something to slip into the page, the browser would not ask for it."""
    asked = []

    class Listening(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listening) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        slipped = f'<img src="{place}/img"><script>fetch("{place}/fetch").catch(() => 0)</script></body>'
        seen = look(page.replace("</body>", slipped), tmp_path)
        bare = re.sub(r"<meta http-equiv.*?>", "", page)
        look(bare.replace("</body>", slipped), tmp_path)  # without the policy they are made: the test can fail
        server.shutdown()
    assert sorted(seen["violations"]) == ["connect-src", "img-src"]
    assert sorted(set(asked)) == ["/fetch", "/img"] and len(asked) == 2
