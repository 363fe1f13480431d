"""The live page before a real cluster: what it shows is what happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import chromium, visit
from tests.system.page_images import PATIENCE_S, SHARED, TEXT, page_cluster


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(1500)
def test_a_hand_over_and_a_prefix_of_a_real_cluster_are_shown(tmp_path: Path) -> None:
    with page_cluster(tmp_path) as cluster, chromium() as browser:
        url = f"http://127.0.0.1:{cluster.config.router.admin_port}/"
        with visit(browser, url) as seen:
            page = seen.page
            page.set_default_timeout(1000 * PATIENCE_S)
            page.wait_for_selector("#state[data-state=ready]")
            answers = [
                cluster.generate(SHARED[0] + TEXT[start : start + 300], max_tokens=24, ignore_eos=True)
                for start in (40_000, 50_000, 60_000)
            ]
            shown = {"queue", "fetch", "prefill", "handover", "decode"}
            for answer in answers:
                assert answer.accepted is not None
                assert answer.completed is not None
                row = page.locator(f"#list li[data-id='{answer.accepted.request_id}']")
                page.wait_for_selector(f"#list li[data-id='{answer.accepted.request_id}'][data-outcome=completed]")
                rects = row.locator("button rect").evaluate_all("rects => rects.map(r => r.getAttribute('class'))")
                assert {"prefill", "decode"} <= set(rects) <= shown
                assert row.locator(".answer").inner_text() == "24"
                cached, prompt = answer.completed.num_cached_tokens, answer.completed.num_prompt_tokens
                assert row.locator(".found").inner_text() == f"{round(100 * cached / prompt)} %"
            assert answers[-1].completed is not None
            assert answers[-1].completed.num_cached_tokens > 0, "nothing was reused: there is no prefix to show"
            page.wait_for_selector("#prefixes li")
            assert page.locator("#prefixes li").first.locator(".number").first.inner_text() == "3×"
            tiers = page.locator("[data-name=pool-0] .tier-name").all_inner_texts()
            assert tiers == ["HOST", "DISK"]
            said = page.locator("#cluster ul.unseen").inner_text()
            assert "pool-0 has fetched" in said
            page.get_by_role("button", name="Audit now").click()
            page.wait_for_selector("#audited .verdict.ok")
            assert seen.complaints == []
