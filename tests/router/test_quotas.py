"""What a tenant may ask, by the minute and at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.keyring import TenantRules
from router.quotas import Quotas, TokenBucket
from tandem.errors import Overloaded


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 50)), min_size=1, max_size=100),
)
def test_over_any_time_no_more_is_taken_than_a_minutes_worth_the_rate_and_one_overdraft(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    bucket, now_s, taken = TokenBucket(per_minute, 0.0), 0.0, 0
    for pause_s, amount in steps:
        now_s += pause_s
        wait_s = bucket.wait_s(1.0, now_s)
        if wait_s == 0.0:
            bucket.take(amount, now_s)
            taken += amount
        else:
            assert bucket.wait_s(1.0, now_s + wait_s * 1.0001 + 1e-6) == 0.0, "whoever waits as told is let in"
            now_s += wait_s * 1.0001 + 1e-6
        assert taken <= per_minute * (1 + now_s / 60.0) + 50 + 1e-6


def test_requests_are_counted_by_the_minute_and_the_wait_is_said() -> None:
    quotas, rules = Quotas(), TenantRules(requests_per_minute=6)
    for _ in range(6):
        quotas.begin("acme", rules, 0.0)
    with pytest.raises(Overloaded, match="tenant 'acme' has used its 6 requests a minute; retry in 10.0 s") as caught:
        quotas.begin("acme", rules, 0.0)
    assert caught.value.retry_after_s == pytest.approx(10.0)
    quotas.begin("bolt", rules, 0.0)
    quotas.begin("acme", rules, 10.01)
    with pytest.raises(Overloaded):
        quotas.begin("acme", rules, 10.02)


def test_tokens_are_taken_as_they_come_and_a_debt_is_waited_for() -> None:
    quotas, rules = Quotas(), TenantRules(tokens_per_minute=60)
    with quotas.begin("acme", rules, 0.0) as use:
        use.tokens(50, 0.0)
        use.tokens(40, 0.0)
    with pytest.raises(Overloaded, match="its 60 tokens a minute; retry in 31.0 s"):
        quotas.begin("acme", rules, 0.0)
    with pytest.raises(Overloaded):
        quotas.begin("acme", rules, 30.9)
    quotas.begin("acme", rules, 31.01)


def test_so_many_at_a_time_and_whatever_ends_one_gives_its_place_back() -> None:
    quotas, rules = Quotas(), TenantRules(max_concurrent=1)

    def fail() -> None:
        with quotas.begin("acme", rules, 0.0):
            with pytest.raises(Overloaded, match="has 1 requests at a time, the limit is 1"):
                quotas.begin("acme", rules, 0.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with quotas.begin("acme", rules, 0.0):
        pass


def test_an_answer_that_broke_off_may_go_on_up_to_twice_the_limits() -> None:
    quotas, rules = Quotas(), TenantRules(requests_per_minute=2, max_concurrent=2)
    for _ in range(2):
        quotas.begin("acme", rules, 0.0)
    with pytest.raises(Overloaded):
        quotas.begin("acme", rules, 0.0)
    for _ in range(2):
        quotas.begin("acme", rules, 0.0, resumed=True)
    with pytest.raises(Overloaded):
        quotas.begin("acme", rules, 0.0, resumed=True)


def test_without_limits_nothing_is_counted_and_new_limits_keep_what_was_used() -> None:
    quotas = Quotas()
    for _ in range(10_000):
        with quotas.begin("acme", TenantRules(), 0.0) as use:
            use.tokens(10**9, 0.0)
    for _ in range(5):
        quotas.begin("acme", TenantRules(requests_per_minute=10), 0.0)
    rules = TenantRules(requests_per_minute=6)
    quotas.begin("acme", rules, 0.0)
    with pytest.raises(Overloaded):
        quotas.begin("acme", rules, 0.0)
    quotas.begin("bolt", TenantRules(requests_per_minute=1), 0.0)
