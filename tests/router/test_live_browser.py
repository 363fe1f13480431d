"""The live page in a real browser, before a real router with fake workers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Locator, expect
from starlette.exceptions import HTTPException

from protos.control import Link, Load
from router.access import Access, Caller
from tests.browser import DEADLINE_MS, chromium, visit
from tests.router.fake_cluster import LONG, Router, collect, wait_for
from tests.system.harness import free_port

pytestmark = pytest.mark.browser
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 390, "height": 844}


@pytest.fixture(autouse=True, scope="module")
def patience() -> Iterator[None]:
    expect.set_options(timeout=DEADLINE_MS)
    yield
    expect.set_options(timeout=5_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


class Site:
    """A router with its pages, on ports that stay when it is started again."""

    def __init__(self, make_router: Callable[..., Router]) -> None:
        self._make = make_router
        self.client, self.admin = free_port(), free_port()
        self.start()

    def start(self) -> None:
        ports = {"http_port": self.client, "admin_port": self.admin, "liveness_s": 10.0}
        self.router = self._make(router=ports)
        self.router.add("prefill-0", "prefill", step_s=0.02)
        self.decode = self.router.add("decode-0", "decode", step_s=0.02)
        self.pool = self.router.add("pool-0", "pool")

    def stop(self) -> None:
        self.router.stop.set()
        self.router.thread.join(20)

    def url(self, *, admin: bool = True) -> str:
        return f"http://127.0.0.1:{self.admin if admin else self.client}/"


@pytest.fixture
def site(make_router: Callable[..., Router]) -> Site:
    return Site(make_router)


def phases(row: Locator) -> set[str]:
    return set(row.locator("svg rect").evaluate_all("rects => rects.map(rect => rect.getAttribute('class'))"))


def test_a_request_appears_runs_ends_and_is_explained(site: Site, browser: Browser) -> None:
    with visit(browser, site.url(), viewport=WIDE) as seen:
        page = seen.page
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#no-requests")).to_be_visible()
        call = site.router.ask(LONG, max_tokens=150)
        request_id = next(call).accepted.request_id
        row = page.locator(f"#list li[data-id='{request_id}']")
        expect(row).to_have_attribute("data-outcome", "active")
        button = row.get_by_role("button")
        button.click()
        expect(row.locator(".why")).to_contain_text("prefill-0 computes its prompt, decode-0 generates")
        for _ in call:
            pass
        expect(row).to_have_attribute("data-outcome", "completed")
        assert {"prefill", "decode"} <= phases(row.locator("button")) <= {"queue", "prefill", "handover", "decode"}
        expect(row.locator(".answer")).to_have_text("150")
        expect(button).to_have_attribute("aria-label", expected_label(request_id))
        # What was open is explained by itself once there is something to explain.
        why = row.locator(".why")
        expect(why.locator("tr.chosen th")).to_contain_text(["prefill-0 chosen", "decode-0 chosen"])
        expect(why).to_contain_text("had been predicted")
        expect(why).to_contain_text("regret")
        expect(why).to_contain_text("How it turned out")
        button.click()
        expect(why).to_be_hidden()
        assert "quick brown" not in page.content()
        assert seen.complaints == []
        assert all(url.startswith(site.url()) for url in seen.asked), seen.asked


def expected_label(request_id: str) -> re.Pattern[str]:
    return re.compile(
        f"^Request {request_id[:8]}, completed, {len(LONG)} prompt tokens, .*150 tokens drawn, first token after"
    )


def test_the_picture_shows_tiers_and_blocks_on_their_way(site: Site, browser: Browser) -> None:
    site.decode.load = Load(free_blocks=700, cached_blocks=400, empty_blocks=300, num_running=3)
    site.pool.load = Load(cached_blocks=250, empty_blocks=750, disk_blocks=4000, disk_used_blocks=1000)
    with visit(browser, site.url(admin=False), viewport=WIDE) as seen:
        page = seen.page
        wait_for(lambda: page.locator("#cluster li.process").count() == 4, 60)
        names = page.locator("#cluster li.process").evaluate_all("cards => cards.map(card => card.dataset.name)")
        assert names == ["router", "prefill-0", "decode-0", "pool-0"]
        decode = page.locator("[data-name=decode-0]")
        expect(decode).to_contain_text("3 run")
        expect(decode.get_by_role("img")).to_have_attribute(
            "aria-label", "DEVICE: 300 blocks in use, 400 cached, of 1000; 0 leased"
        )
        widths = decode.locator("rect").evaluate_all("rects => rects.map(rect => rect.getAttribute('width'))")
        assert widths == ["30.00%", "40.00%"]
        expect(page.locator("[data-name=pool-0] .tier-name")).to_have_text(["HOST", "DISK"])
        flowing = page.locator("#cluster g.flowing")
        assert flowing.count() == 0
        moved = 0
        end_s = time.monotonic() + 60.0
        while not flowing.count():
            assert time.monotonic() < end_s, "nothing is shown to flow"
            moved += 10_000_000
            site.decode.links = [Link("prefill-0", "shm", moved, 1e9)]
            page.wait_for_timeout(100)
        expect(flowing.locator("text")).to_contain_text("B/s")
        expect(flowing).to_have_count(0)  # nothing more comes
        expect(page.locator("#cluster ul.unseen")).to_contain_text("from prefill-0 over shm")
        assert seen.complaints == []


def test_an_audit_is_started_by_those_who_run_the_cluster_alone(site: Site, browser: Browser) -> None:
    with visit(browser, site.url(admin=False)) as seen:
        expect(seen.page.locator("#state")).to_have_text("ready")
        expect(seen.page.locator("#audit")).to_be_hidden()
    with visit(browser, site.url()) as seen:
        page = seen.page
        page.get_by_role("button", name="Audit now").click()
        verdict = page.locator("#audited .verdict")
        expect(verdict).to_contain_text("checks hold")
        expect(page.locator("#audited li.ok").first).to_contain_text("every process says what it owns")
        assert page.locator("#audited li.bad").count() == 0
        page.get_by_role("button", name="Close").click()
        expect(page.locator("#audited")).to_be_hidden()
        assert page.evaluate("document.activeElement.id") == "audit"
        assert seen.complaints == []


def test_the_page_goes_on_when_the_router_is_started_again(site: Site, browser: Browser) -> None:
    collect(site.router.ask(LONG, max_tokens=5))
    with visit(browser, site.url(admin=False)) as seen:
        page = seen.page
        expect(page.locator("#list li")).to_have_count(1)
        site.stop()
        expect(page.locator("#state")).to_have_attribute("data-state", "lost")
        site.start()
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#list li")).to_have_count(0)
        request_id = collect(site.router.ask(LONG, max_tokens=5)).accepted.request_id
        expect(page.locator(f"#list li[data-id='{request_id}']")).to_have_attribute("data-outcome", "completed")
        # The browser itself says that nobody answered; the page says nothing.
        assert all("Failed to load resource" in text for text in seen.complaints), seen.complaints


class Locked(Access):
    """Takes one key alone."""

    def caller(self, authorization: str, tenant: str) -> Caller:
        if authorization != "Bearer right":
            raise HTTPException(401, "no such key")
        return super().caller(authorization, tenant)


def test_a_router_that_asks_for_a_key_gets_it_from_who_looks(site: Site, browser: Browser) -> None:
    site.router.server.access = Locked()
    with visit(browser, site.url()) as seen:
        page = seen.page
        expect(page.locator("#state")).to_have_text("a key is needed")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#key")).to_be_visible()
        page.get_by_label("API key").fill("right")
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#key")).to_be_hidden()
        page.get_by_role("button", name="Audit now").click()
        expect(page.locator("#audited .verdict")).to_contain_text("checks hold")


def test_shared_prefixes_are_a_tree(site: Site, browser: Browser) -> None:
    for words in ("one", "two"):
        collect(site.router.ask(LONG + words, max_tokens=2))
    with visit(browser, site.url()) as seen:
        row = seen.page.locator("#prefixes li")
        expect(row).to_have_count(1)
        expect(row).to_contain_text("2×")
        name = row.locator("code").inner_text()
        assert len(name) == 8
        int(name, 16)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits_wide_and_narrow_light_and_dark_and_goes_by_keyboard(
    site: Site, browser: Browser, viewport: dict[str, int], scheme: str
) -> None:
    for number in range(3):
        collect(site.router.ask(LONG + str(number), max_tokens=8))
    with visit(browser, site.url(), viewport=viewport, color_scheme=scheme, reduced_motion="reduce") as seen:
        page = seen.page
        rows = page.locator("#list li button")
        expect(rows).to_have_count(3)
        rows.first.focus()
        page.keyboard.press("Enter")
        expect(page.locator(".why table").first).to_be_visible()
        expect(rows.first).to_have_attribute("aria-expanded", "true")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('role')") == "region", "tables scroll by keyboard"
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(part) for part in ground.removeprefix("rgb(").removesuffix(")").split(","))
        assert (brightness > 600) == (scheme == "light")
        assert page.evaluate(
            "[...document.querySelectorAll('button, input')].every(e => e.ariaLabel || e.textContent || e.labels?.length)"
        )
        assert seen.complaints == []
