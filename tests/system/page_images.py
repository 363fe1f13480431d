"""Pictures of the live page for the docs: a real cluster under some load, as Chromium shows it.

python -m tests.system.page_images [FOLDER]     # docs/images by default
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser

from tandem.drills.processes import REPOSITORY
from tandem.errors import TandemError
from tests.browser import chromium, visit
from tests.system.harness import Answer, RunningCluster

NAMES = ("router", "pool-0", "prefill-0", "decode-0", "decode-1")
PATIENCE_S = 900.0
"""On a machine that does much else."""
WATCHED_MS = 60_000
VIEWS = (("page", 1280, "light"), ("page-narrow", 390, "light"), ("page-dark", 1280, "dark"))
TEXT = (REPOSITORY / "benchmarks/texts/alice.txt").read_text(encoding="utf-8")
SHARED = (TEXT[:2400], TEXT[20_000:21_600])
"""Characters that prompts begin with."""


@contextmanager
def page_cluster(folder: Path) -> Iterator[RunningCluster]:
    """1 prefill worker, 2 decode workers, 1 pool node with HOST and DISK."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    values = {
        "router": {"liveness_s": 60.0, "progress_s": 600.0},
        "decode": {"replicas": 2, "arena_bytes": 192 * 2**20},
        "prefill": {"arena_bytes": 192 * 2**20},
        "pool": {"host_bytes": 128 * 2**20, "disk": {"dirs": [str(disk)], "bytes": 512 * 2**20}},
    }
    cluster = RunningCluster(folder, values, faults=[])
    try:
        cluster.launch(NAMES)
        cluster.wait_ready(NAMES, PATIENCE_S)
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def load(cluster: RunningCluster, num_clients: int = 2) -> Iterator[None]:
    """Clients that ask one request after the other, many of which begin alike."""
    stop = threading.Event()

    def client(number: int) -> None:
        draw = random.Random(number)
        while not stop.is_set():
            start = draw.randrange(len(TEXT) - 1000)
            prompt = draw.choice(SHARED) + TEXT[start : start + draw.randrange(100, 1000)]
            sampling = {"max_tokens": draw.randrange(8, 64), "ignore_eos": True}
            with contextlib.suppress(TandemError):  # a worker that is lost on a busy machine: it is asked again
                Answer(cluster.client, prompt, sampling, PATIENCE_S)
            stop.wait(1.5 * draw.random())

    clients = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(num_clients)]
    for one in clients:
        one.start()
    try:
        yield
    finally:
        stop.set()
        for one in clients:
            one.join(PATIENCE_S)


def take(browser: Browser, cluster: RunningCluster, folder: Path) -> None:
    """One picture of each view."""
    url = f"http://127.0.0.1:{cluster.config.router.admin_port}/"
    for name, width, scheme in VIEWS:
        with visit(browser, url, viewport={"width": width, "height": 900}, color_scheme=scheme) as seen:
            page = seen.page
            page.set_default_timeout(1000 * PATIENCE_S)
            page.locator("#list li[data-outcome=completed]").nth(3).wait_for()
            page.wait_for_timeout(WATCHED_MS if name == "page" else 8_000)
            page.locator("#list li[data-outcome=completed] button").nth(1).click()
            page.wait_for_selector(".why table")
            page.wait_for_selector("#cluster g.flowing", state="attached")
            page.mouse.move(0, 0)
            page.screenshot(path=folder / f"{name}.png", full_page=width > 600)
            assert seen.complaints == [], seen.complaints


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "docs/images"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as run, page_cluster(Path(run)) as cluster, load(cluster), chromium() as browser:
        take(browser, cluster, folder)


if __name__ == "__main__":
    main()
