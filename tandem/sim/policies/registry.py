"""The policies by name, each as it is published and with the settings that it may be tuned over.

Owns the list. Every `make` builds a new policy: some remember what they sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import Any, TypeVar

from router.policy.base import Policy
from tandem.errors import ConfigError
from tandem.sim.policies.dynamo import Dynamo, DynamoTerms
from tandem.sim.policies.least_loaded import LeastLoaded
from tandem.sim.policies.llm_d import LlmD, LlmDTerms
from tandem.sim.policies.mooncake import Mooncake, MooncakeTerms
from tandem.sim.policies.power_of_two import PowerOfTwo
from tandem.sim.policies.preble import Preble, PrebleTerms
from tandem.sim.policies.random_choice import RandomChoice
from tandem.sim.policies.round_robin import RoundRobin
from tandem.sim.policies.session_hash import SessionHash
from tandem.sim.policies.sglang import Sglang, SglangTerms

Terms = TypeVar("Terms", bound="Any")


@dataclass(frozen=True, slots=True)
class Setting:
    """One choice of a policy's parameters. `label` says how they differ from the published ones; "" if they don't."""

    label: str
    make: Callable[[], Policy]


@dataclass(frozen=True, slots=True)
class Published:
    """A policy of others. `settings` are what to tune over, the published one first; if alone, there is nothing to tune."""

    name: str
    settings: tuple[Setting, ...]

    def make(self) -> Policy:
        """A new one, with the parameters as published."""
        return self.settings[0].make()


def policy_named(name: str) -> Published:
    """Raises ConfigError for one that isn't known."""
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} is not known ({', '.join(POLICIES)} are)")
    return POLICIES[name]


def _fixed(name: str, make: Callable[[], Policy]) -> Published:
    return Published(name, (Setting("", make),))


def _tuned(name: str, make: Callable[[Terms], Policy], default: Terms, others: Sequence[Terms]) -> Published:
    settings = {terms: Setting(_label(terms, default), partial(make, terms)) for terms in (default, *others)}
    return Published(name, tuple(settings.values()))


def _label(terms: Any, default: Any) -> str:
    changed = {field.name: getattr(terms, field.name) for field in fields(terms)}
    return " ".join(f"{name}={value:g}" for name, value in changed.items() if value != getattr(default, name))


_LIST = (
    _fixed("random", RandomChoice),
    _fixed("round-robin", RoundRobin),
    _fixed("least-loaded", LeastLoaded),
    _fixed("power-of-two", PowerOfTwo),
    _fixed("session-hash", SessionHash),
    _tuned(
        "sglang",
        Sglang,
        SglangTerms(),
        # Older releases', and balances that bite at the queues of a prefill worker.
        [SglangTerms(0.5, 32, 1.1)]
        + [SglangTerms(*terms) for terms in product((0.3, 0.5, 0.8), (1, 2, 8), (1.1, 1.5))],
    ),
    _tuned(
        "dynamo",
        Dynamo,
        DynamoTerms(),
        [
            DynamoTerms(temperature=temperature, decay=decay, device_credit=credit)
            for temperature, decay, credit in product((0.0, 0.2), (0.0, 0.5, 1.0), (0.5, 1.0))
        ],
    ),
    _tuned(
        "llm-d",
        LlmD,
        LlmDTerms(),
        [
            LlmDTerms(*weights)
            for weights in ((2, 1, 1), (2, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 2), (3, 1, 1), (1, 4, 0))
        ],
    ),
    _tuned(
        "preble",
        Preble,
        PrebleTerms(),
        [PrebleTerms(window, balance) for window, balance in product((2, 5, 15, 180), (1.5, 3))],
    ),
    _tuned("mooncake", Mooncake, MooncakeTerms(), [MooncakeTerms(ratio) for ratio in (1.0, 1.25, 4.0, 1e9)]),
)

POLICIES: dict[str, Published] = {published.name: published for published in _LIST}
