"""Looks at a page in a real browser: Chromium, as PySide6 ships it. Without PySide6 there is no browser.

    python tests/tools/browser.py PAGE PICTURE [WIDTH [HEIGHT [light|dark]]]

It prints what the page is to a browser, as JSON: requests that the page makes, messages of its console, and what a
script of ours counts in it. PySide6 takes 700 MB, so it may lie in an environment of its own, whose Python the variable
`TIES_RAY_BROWSER` names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COUNT = """
const all = selector => [...document.querySelectorAll(selector)];
const text = id => document.getElementById(id)?.textContent;
JSON.stringify({
  width: document.documentElement.scrollWidth,
  window: window.innerWidth,
  scripts: document.scripts.length,
  figures: all('figure').length,
  unnamed: all('svg[role=img]').filter(svg => !svg.getAttribute('aria-labelledby').split(' ').every(text)).length,
  twice: all('[id]').length - new Set(all('[id]').map(each => each.id)).size,
  headless: all('table').filter(table => !table.caption || !table.querySelector('thead th[scope=col]')).length,
  handlers: all('*').filter(each => [...each.attributes].some(name => name.name.startsWith('on'))).length,
  paper: getComputedStyle(document.body).backgroundColor,
  first: all('.remarks li').filter(each => each.getBoundingClientRect().bottom < 800).map(each => each.textContent),
})
"""
"""Counts what a reader, a keyboard and a screen reader need."""


def python() -> str | None:
    """Return the Python that has a browser; None where there is none."""
    return os.environ.get("TIES_RAY_BROWSER") or (sys.executable if importlib.util.find_spec("PySide6") else None)


WHY_NOT = "" if python() else "no browser: install PySide6, or let TIES_RAY_BROWSER name a Python that has it"


def look(page: Path, picture: Path, *, width: int = 1100, height: int = 800, dark: bool = False) -> dict[str, Any]:
    """Return what the page is to a browser, and save a picture of it. It runs in a process of its own."""
    words = [str(page), str(picture), str(width), str(height), "dark" if dark else "light"]
    environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    environment["QTWEBENGINE_CHROMIUM_FLAGS"] = f"--disable-gpu --no-sandbox {scheme}"
    environment.pop("PYTHONPATH", None)
    command = [str(python()), __file__, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main(page: str, picture: str, width: str = "1100", height: str = "800", scheme: str = "light") -> None:
    """Look at a page. scheme: is set for the process, by `look`."""
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    requests: list[str] = []
    messages: list[str] = []

    class Interceptor(QWebEngineUrlRequestInterceptor):  # type: ignore[misc]
        def interceptRequest(self, info: Any) -> None:
            requests.append(info.requestUrl().toString()[:200])

    class Page(QWebEnginePage):  # type: ignore[misc]
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
            messages.append(message)

    application = QApplication(sys.argv[:1])
    profile, interceptor = QWebEngineProfile(), Interceptor()
    profile.setUrlRequestInterceptor(interceptor)
    view = QWebEngineView()
    view.setPage(Page(profile, view))
    view.resize(int(width), int(height))

    def finish(counts: Any) -> None:
        view.grab().save(picture)
        print(json.dumps({"requests": requests, "messages": messages, **json.loads(counts)}))
        sys.stdout.flush()
        os._exit(0)  # Qt takes its parts down in an order that it complains of

    def count() -> None:
        view.page().runJavaScript(COUNT, finish)

    view.loadFinished.connect(lambda _: QTimer.singleShot(1000, count))
    view.load(QUrl.fromLocalFile(os.path.abspath(page)))
    view.show()
    application.exec()


if __name__ == "__main__":
    main(*sys.argv[1:])
