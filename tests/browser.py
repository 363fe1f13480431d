"""A real browser for tests of the live page: Debian's Chromium, by Playwright, without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

DEADLINE_MS = 60_000
NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str:
    """Where it is. A machine without one fails the test: it would prove nothing."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.fail(
        "the live page is tested in Chromium, and there is none here: install it (Debian: apt-get install chromium)"
    )


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of its own."""
    with sync_playwright() as playwright:
        # Its sandbox doesn't run as root, as which containers test; it opens our own page alone.
        browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A page that is looked at: what it has complained of, and whom it has asked."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _request(self, request: Request) -> None:
        self.asked.append(request.url)


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """Opens `url` in a context of its own, with Playwright's `options`."""
    context = browser.new_context(**options)
    context.set_default_timeout(DEADLINE_MS)
    try:
        visited = Visit(context.new_page())
        visited.page.goto(url)
        yield visited
    finally:
        context.close()
