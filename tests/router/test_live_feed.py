"""Who watches a router: nothing is done for nobody, one look serves all, and who doesn't read is cut off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from router import live_feed
from router.live import Live
from router.live_feed import MAX_BEHIND, MAX_WATCHERS, LiveFeed
from router.live_views import Message
from tandem.errors import Overloaded
from tests.router.test_router import cluster


class CountedLive(Live):
    """Counts how often it was looked at."""

    num_looks = 0

    def changes(self, now_s: float) -> Message:
        self.num_looks += 1
        return super().changes(now_s)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "EVERY_S", 0.005)


def feed() -> tuple[LiveFeed, CountedLive]:
    bench = cluster()
    live = CountedLive(bench.core, "model")
    return LiveFeed(live, lambda: bench.now_s), live


def within(seconds: float, story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await story

    asyncio.run(bounded())


async def read(events: AsyncIterator[bytes], number: int) -> list[dict[str, Any]]:
    return [json.loads((await anext(events)).split(b"data: ")[1]) for _ in range(number)]


def test_nobody_watching_costs_nothing() -> None:
    async def story() -> None:
        shown, live = feed()
        await asyncio.sleep(0.05)
        assert live.num_looks == 0
        watcher = shown.watch("admin")
        await read(aiter(watcher), 3)
        shown.leave(watcher)
        num_looks = live.num_looks
        assert num_looks >= 2
        await asyncio.sleep(0.05)
        assert live.num_looks == num_looks
        assert shown.num_watchers == 0

    within(20, story())


def test_all_get_the_same_look_and_each_begins_with_everything() -> None:
    async def story() -> None:
        shown, live = feed()
        watchers = [shown.watch("admin"), shown.watch("client"), shown.watch("client")]
        got = [await read(aiter(watcher), 4) for watcher in watchers]
        for messages in got:
            assert [message["whole"] for message in messages] == [True, False, False, False]
            assert [message["number"] for message in messages[1:]] == [1, 2, 3]
        assert [messages[1]["admin"] for messages in got] == [True, False, False]
        for watcher in watchers:
            shown.leave(watcher)
        assert live.num_looks <= 3 + MAX_BEHIND

    within(20, story())


def test_one_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    async def story() -> None:
        shown, _ = feed()
        slow, good = shown.watch("admin"), shown.watch("admin")
        await read(aiter(good), 3 * MAX_BEHIND)
        assert shown.num_watchers == 1
        assert len([event async for event in slow]) == MAX_BEHIND
        shown.leave(slow)
        shown.leave(good)

    within(20, story())


def test_there_is_room_for_so_many_and_no_more() -> None:
    async def story() -> None:
        shown, _ = feed()
        watchers = [shown.watch("client") for _ in range(MAX_WATCHERS)]
        with pytest.raises(Overloaded, match=f"the limit is {MAX_WATCHERS}"):
            shown.watch("client")
        shown.leave(watchers[0])
        watchers[0] = shown.watch("client")
        shown.close()
        for ended in watchers:
            assert len([event async for event in ended]) <= MAX_BEHIND
        with pytest.raises(Overloaded):
            shown.watch("client")

    within(20, story())


def test_a_look_that_fails_does_not_end_the_feed(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        shown, live = feed()
        told = live.changes

        def fails_once(now_s: float) -> Message:
            live.changes = told  # type: ignore[method-assign]
            raise RuntimeError("planted")

        live.changes = fails_once  # type: ignore[method-assign]
        watcher = shown.watch("admin")
        assert [message["whole"] for message in await read(aiter(watcher), 2)] == [True, False]
        shown.leave(watcher)

    within(20, story())
    assert "planted" in caplog.text
