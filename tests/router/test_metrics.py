"""The /metrics page says what happened, and docs/metrics.md says what the page has."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric

from protos.control import Fence, FetchedFrom, RoleReport, Sampling
from router.actions import Emit, TokensEvent
from router.journal import Request, Run, Summary
from router.metrics import Metrics
from router.reports import hit_tokens_by_tier, num_cached_tokens
from router.router import RouterCore, Settings
from tests.router.watched import NUM_TOKENS, page_of, value, watched_cluster

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(tandem_\w+)` \| (counter|gauge|histogram) \| (.*?) \| (\S.*) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Metric]]:
    with watched_cluster() as router:
        yield page_of(router)


def labels_of(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def test_the_document_and_the_page_have_the_same_metrics(page: dict[str, Metric]) -> None:
    rows = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    documented = {
        name.removesuffix("_total") if kind == "counter" else name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _ in rows
    }
    assert len(documented) == len(rows), "a metric is documented twice"
    assert not [name for name, kind, *_ in rows if (kind == "counter") != name.endswith("_total")]
    shown = {name: (family.type, labels_of(family)) for name, family in page.items()}
    assert not [name for name, family in page.items() if not family.samples], "no sample to see the labels of"
    assert documented == shown


def test_names_that_the_mappings_use_are_metrics(page: dict[str, Metric]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    mapping = text[text.index("## As others name it") :]
    names = set(re.findall(r"`(tandem_\w+)", mapping))
    assert names
    assert not {name for name in names if name.removesuffix("_total") not in page}


def test_no_label_takes_values_from_requests(page: dict[str, Metric]) -> None:
    bounded = {
        "class": {"interactive", "batch"},
        "outcome": {"completed", "failed", "cancelled", "exported", "dropped"},
        "kept": {"yes", "no"},
        "objective": {"ttft", "tpot"},
        "form": {"handover", "prefill_here"},
        "tier": {"local", "DEVICE", "HOST", "DISK"},
        "role": {"router", "prefill", "decode", "pool"},
        "phase": {"waiting", "fetching", "prefill", "decode"},
        "transport": {"shm", "ucx", "tcp"},
        "process": {"prefill-0", "decode-0", "decode-1", "pool-0"},
    }
    free = {"code", "reason", "cause", "le", "router", "model", "block_size", "num_blocks"}
    """Of error codes, causes, and the configuration."""
    for family in page.values():
        for sample in family.samples:
            for label, found in sample.labels.items():
                assert label in free or found in bounded[label], (sample.name, label, found)


def test_the_page_counts_what_happened(page: dict[str, Metric]) -> None:
    assert value(page, "tandem_requests_total", **{"class": "interactive", "outcome": "completed"}) == 2
    assert value(page, "tandem_requests_total", **{"class": "batch", "outcome": "completed"}) == 1
    assert value(page, "tandem_errors_total", code="invalid_request") == 1
    assert value(page, "tandem_redispatches_total", role="decode", reason="closed") == 1
    assert value(page, "tandem_lost_processes_total", role="decode", cause="closed") == 1
    assert value(page, "tandem_prefix_hit_tokens_total", tier="HOST") == 32
    assert value(page, "tandem_prefix_hit_tokens_total", tier="DISK") == 16
    assert value(page, "tandem_generated_tokens_total") == NUM_TOKENS + 2 + 30
    # Of each stream but the first token; a few come in one frame when the stream is taken up again.
    assert value(page, "tandem_inter_token_seconds_count") == NUM_TOKENS - 1 + 1 + 29
    assert value(page, "tandem_fetch_seconds_count", role="prefill") == 1
    assert value(page, "tandem_e2e_seconds_count", **{"class": "batch"}) == 1
    assert value(page, "tandem_slo_requests_total", **{"class": "interactive", "objective": "tpot", "kept": "yes"}) == 2
    assert value(page, "tandem_process_disk_used_blocks", process="pool-0", role="pool") == 500
    assert value(page, "tandem_process_transferred_bytes_total", process="pool-0", role="pool", transport="tcp") == 1024


def test_gaps_between_tokens_are_counted_for_each_token_and_forgotten_with_the_request() -> None:
    metrics = Metrics()

    def show(num_tokens: int, now_s: float, index: int = 0) -> None:
        metrics.emitted(Emit("q", TokensEvent(index, 0, tuple(range(num_tokens)), (), None)), now_s)

    show(1, 10.0)
    show(4, 10.1)
    show(1, 20.0, index=1)
    found = metrics.registry.get_sample_value
    assert found("tandem_inter_token_seconds_count") == 4
    assert found("tandem_inter_token_seconds_sum") == pytest.approx(0.1)
    assert (
        found("tandem_inter_token_seconds_bucket", {"le": "0.02"}),
        found("tandem_inter_token_seconds_bucket", {"le": "0.03"}),
    ) == (0, 4)
    core = RouterCore(Settings("router", b"r" * 8), random.Random(1))
    core.submit(Request("q", (1, 2), Sampling(max_tokens=1), 1, 60.0), 0.0)
    (ended,) = [action for action in core.cancel("q", 1.0) if isinstance(action, Emit)]
    metrics.emitted(ended, 1.0)
    show(1, 30.0)
    assert found("tandem_inter_token_seconds_count") == 4


def summary_of(local: int, fetched: int, *items: tuple[str, int], prompt: int = 100) -> Summary:
    sources = [FetchedFrom("pool-0", tier, "shm", blocks, 0) for tier, blocks in items]  # type: ignore[arg-type]
    report = RoleReport(Fence("q", 0, "prefill", 0), local, fetched, prompt - local - fetched, sources, 0.0, 0.0, 0.0)
    return Summary("q", "completed", "", prompt, 1, 1, 1.0, 1.0, (0, 0), (), (), (Run("prefill-0", 0.0, report, 0.0),))


def test_hits_by_tier_add_up_to_all_hits() -> None:
    found = summary_of(10, 50, ("HOST", 1), ("DISK", 2), ("HOST", 1))
    assert hit_tokens_by_tier(found) == {"local": 10, "HOST": 25, "DISK": 25}
    assert num_cached_tokens(found) == 60
    odd = summary_of(0, 7, ("DEVICE", 1), ("HOST", 1), ("DISK", 1))
    assert sum(hit_tokens_by_tier(odd).values()) == 7
    # A prompt that is found whole is computed again from its last token: never more hits than prompt.
    assert num_cached_tokens(summary_of(90, 20, ("HOST", 2))) == 100
