"""What every process is doing, as this router sees it: its last report, and our own dispatches that it doesn't include yet.

Owns one row a process, by a number that the prefix index shares: a table of columns, so that a policy weighs a thousand workers
with a handful of operations. Pure; it decides nothing.

    reported     the row is what the report says, and on top of it our dispatches that it doesn't include
    dispatched   is added at once
    computed     a prompt is there: what is left of its predicted time is no longer waited for
    ended        is taken off at once, whatever way it ended
    time         passes: work that was predicted to be done by now is done

Workers compute prompts in the order in which they are due (`Dispatch.due_s`), so what a prompt waits for is the step that runs,
and what is due before it: `waits_s`. Each row's work is kept in `NUM_SLOTS` slots: the running step, then by due time; the last
one is all the rest.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from protos.control import Capacity, Fence, Link, Load, Role, StepPrices
from router.traffic import Traffic

TOUCHED_AT, SEQUENCES, CONTEXT, FREE_BLOCKS, MAX_RUNNING = range(5)
BASE_S, TOKEN_S, PAIR_S, SEQUENCE_S, CONTEXT_S, STEP_TOKENS, FETCH_RATE, SENDS_UNTIL = range(5, 13)
OUTSTANDING, UNCOMPUTED, DISK_RATE = range(13, 16)
NUM_COLUMNS = 16
"""When the slots were right; sequences that generate or will, and the tokens they attend to; blocks that can be allocated; the
most sequences in a step; the five prices of a step (`StepPrices`); tokens of a step; bytes a second that it fetches; when what
others are to fetch from it will have left; our dispatches that have not ended, tokens of theirs that are not computed yet;
bytes a second that a pool node reads from its DISK tier."""

NUM_SLOTS = 8

Table = NDArray[np.float64]
Numbers = NDArray[np.int64]

GUESSED_PRICES = StepPrices(base_s=2e-3, token_s=5e-4, pair_s=2e-8, sequence_s=1e-3, context_s=1e-6)
GUESSED_FETCH_BYTES_PER_S = 3e9
GUESSED_DISK_BYTES_PER_S = 2e9
GUESSED_STEP_TOKENS = 512.0
"""Before anybody has measured or said anything."""
FILL_IN_S = 1.0
"""So often what some have measured is taken over for those that have not: it looks at everybody."""
ALMOST_S = 1e-9
"""What is left of a prompt when it is done, but for rounding."""
ARRIVALS_OVER_S = 20.0
"""Over how long the arrivals are averaged."""
_PRICES = ((BASE_S,), (TOKEN_S, PAIR_S), (SEQUENCE_S, CONTEXT_S))
"""Columns that are measured together."""


class Work(NamedTuple):
    """What a dispatch means to a worker: tokens to compute, pairs of one of them and one that it attends to, sequences that will
    generate, tokens that those attend to, blocks that it takes; and what it fetches, from whom."""

    num_tokens: int = 0
    num_pairs: float = 0.0
    num_sequences: int = 0
    context_tokens: float = 0.0
    num_blocks: int = 0
    source: int = -1
    num_bytes: float = 0.0
    due_s: float = 0.0
    """When its first token is due: its place in line."""


@dataclass(slots=True, eq=False)
class _Own:
    """One dispatch of ours."""

    serial: int
    work: Work
    compute_s: float
    """Predicted seconds to compute its prompt."""
    left_s: float
    """Of them, what is still to come."""
    computed: bool = False


def _due_s(own: _Own) -> float:
    return own.work.due_s


def _cells(column: Table) -> memoryview[float]:
    return cast("memoryview[float]", column.data)


@dataclass(slots=True)
class _Account:
    """What is known of a process beside its row. `row`, `work_s` and `due_s` are its columns of the fleet's tables, as views that
    read and write a number in half the time that numpy takes."""

    role: Role
    machine: str
    group: object
    measured: list[bool]
    serves_blocks: bool
    slab_bytes: int
    row: memoryview[float]
    work_s: memoryview[float]
    due_s: memoryview[float]
    prices: StepPrices | None = None
    """As last reported, like `speeds`: of fetches, of the DISK tier."""
    speeds: tuple[float, float] = (0.0, 0.0)
    serial: int = 0
    own: dict[Fence, _Own] = field(default_factory=dict)
    line: list[_Own] = field(default_factory=list)
    """Those whose prompts are not there yet, by when they are due."""
    excess_s: float = 0.0
    """What the worker has to compute beyond our predictions: others' prompts, and our errors, and what is left of a step whose
    prompt was overtaken. First in line."""
    draining: bool = False
    """It takes no more dispatches."""
    num_slots: int = 0
    """That say anything; the rest is 0."""
    overtaken: _Own | None = None
    """Whose step it is, if it is a step."""


class Fleet:
    """Rows by number. A dispatch is counted where it went as the worker counts it in `Load.num_dispatches`; both begin at 0
    when it joins, also when the same epoch comes back (a worker that lost its router forgets what that had sent)."""

    def __init__(self) -> None:
        self.table: Table = np.zeros((NUM_COLUMNS, 0))
        self.due_s: Table = np.zeros((NUM_SLOTS, 0))
        self.work_s: Table = np.zeros((NUM_SLOTS, 0))
        """By slot: when it is due, and how long it takes. Unused ones take 0."""
        self.rates: NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)
        """`[sink, source]`, bytes a second as the sink measured; 0 is not known."""
        self.names: tuple[str, ...] = ()
        """By number; "" is free. A new tuple with each change."""
        self.homes: Numbers = np.zeros(0, dtype=np.int64)
        """The pool node of each process' machine; itself where there is none."""
        self.prefills: Numbers = np.zeros(0, dtype=np.int64)
        self.decodes: Numbers = np.zeros(0, dtype=np.int64)
        self.workers: Numbers = np.zeros(0, dtype=np.int64)
        """Of the served group, those that take dispatches: prefill workers, decode workers, and both in that order."""
        self.reachable: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        """Which processes serve blocks of the served group."""
        self.slab_bytes = 0
        """Of a block of the served group; 0 while nobody has said it."""
        self._numbers: dict[str, int] = {}
        self._accounts: dict[int, _Account] = {}
        self._group: object = None
        self._filled_in_s = -math.inf
        self._arrivals = _Decayed()
        self.traffic = Traffic()
        self.overhead_s = 0.0
        """What messages take until the first token is there, smoothed."""
        self.answer_tokens = 0.0
        """Of a sample, smoothed; 0 before the first has ended."""

    # --- who is there ----------------------------------------------------------------------------------------------------

    def number(self, process: str) -> int | None:
        return self._numbers.get(process)

    def processes(self) -> set[str]:
        return set(self._numbers)

    def join(
        self,
        process: str,
        role: Role,
        machine: str,
        capacity: Capacity,
        group: object,
        now_s: float,
        serves_blocks: bool = True,
    ) -> int:
        """A process joined; returns its number, the lowest free one. What an older incarnation had is forgotten. Workers of other
        systems serve no blocks: nobody fetches from them."""
        self.forget(process)
        number = self.names.index("") if "" in self.names else len(self.names)
        if number == len(self.names):
            self.names += ("",)
            if number >= self.table.shape[1]:
                self._grow(max(16, 2 * number))
        self.names = (*self.names[:number], process, *self.names[number + 1 :])
        self._numbers[process] = number
        self._accounts[number] = _Account(
            role, machine, group, [False] * len(_PRICES), serves_blocks, capacity.slab_bytes, *self._columns(number)
        )
        self.table[:, number] = self.work_s[:, number] = self.due_s[:, number] = 0.0
        self.table[FREE_BLOCKS, number] = capacity.num_blocks or math.inf
        self.table[MAX_RUNNING, number] = capacity.max_running or math.inf
        self.table[STEP_TOKENS, number] = capacity.max_step_tokens or GUESSED_STEP_TOKENS
        self.table[FETCH_RATE, number] = GUESSED_FETCH_BYTES_PER_S
        self.table[DISK_RATE, number] = GUESSED_DISK_BYTES_PER_S
        self._fill_in()
        self._arrange()
        return number

    def regroup(self, process: str, group: object) -> None:
        """A process routes elsewhere now."""
        number = self._numbers.get(process)
        if number is not None:
            self._accounts[number].group = group
            self._arrange()

    def drain(self, process: str) -> bool:
        """A worker takes no more dispatches. Whether that is news."""
        number = self._numbers.get(process)
        if number is None or self._accounts[number].draining:
            return False
        self._accounts[number].draining = True
        self._arrange()
        return True

    def serve(self, group: object) -> None:
        """The served group is this one now; None: there is none."""
        if group != self._group:
            self._group = group
            self._arrange()

    def forget(self, process: str) -> None:
        """A process is lost: its row is free."""
        number = self._numbers.pop(process, None)
        if number is None:
            return
        del self._accounts[number]
        self.names = (*self.names[:number], "", *self.names[number + 1 :])
        self.rates[number, :] = self.rates[:, number] = 0.0
        self._arrange()

    def _grow(self, size: int) -> None:
        old = self.table.shape[1]
        for name, rows in (("table", NUM_COLUMNS), ("due_s", NUM_SLOTS), ("work_s", NUM_SLOTS), ("rates", size)):
            smaller = getattr(self, name)
            bigger = np.zeros((rows, size), dtype=smaller.dtype)
            bigger[: len(smaller), :old] = smaller
            setattr(self, name, bigger)
        self.table[FREE_BLOCKS, old:] = math.inf
        for number, account in self._accounts.items():
            account.row, account.work_s, account.due_s = self._columns(number)

    def _columns(self, number: int) -> tuple[memoryview[float], memoryview[float], memoryview[float]]:
        return _cells(self.table[:, number]), _cells(self.work_s[:, number]), _cells(self.due_s[:, number])

    def _arrange(self) -> None:
        served = {n: a for n, a in sorted(self._accounts.items()) if self._group is not None and a.group == self._group}
        taking = [(number, account.role) for number, account in served.items() if not account.draining]
        prefills = [number for number, role in taking if role == "prefill"]
        decodes = [number for number, role in taking if role == "decode"]
        self.prefills, self.decodes, self.workers = (
            np.array(numbers, dtype=np.int64) for numbers in (prefills, decodes, prefills + decodes)
        )
        self.slab_bytes = next((account.slab_bytes for account in served.values() if account.slab_bytes), 0)
        size = self.table.shape[1]
        self.reachable = np.zeros(size, dtype=np.bool_)
        self.reachable[[number for number, account in served.items() if account.serves_blocks]] = True
        pools = {a.machine: number for number, a in served.items() if a.role == "pool" and a.machine}
        self.homes = np.arange(size, dtype=np.int64)
        for number, account in served.items():
            self.homes[number] = pools.get(account.machine, number)

    # --- what they do ----------------------------------------------------------------------------------------------------

    def reported(self, process: str, load: Load, links: Iterable[Link], step_age_s: float, now_s: float) -> None:
        """A heartbeat: dispatches up to `num_dispatches` are in it and are not counted twice. A step that has run for
        `step_age_s` has so much less to go."""
        number = self._numbers.get(process)
        if number is None:
            return
        account = self._accounts[number]
        row = account.row
        self._learn(number, account, load, now_s)
        num_said = load.num_dispatches
        late = [own for own in account.own.values() if own.serial > num_said] if account.serial > num_said else []
        self._pass(account, row[TOUCHED_AT], now_s)
        row[SEQUENCES], row[CONTEXT], row[FREE_BLOCKS] = load.num_generating, load.context_tokens, load.free_blocks
        for own in late:
            row[SEQUENCES] += own.work.num_sequences
            row[CONTEXT] += own.work.context_tokens
            row[FREE_BLOCKS] -= own.work.num_blocks
        account.overtaken = None
        left_s = max(0.0, self.compute_s(number, load.waiting_tokens, load.waiting_pairs) - step_age_s)
        ours = [own for own in account.line if own.serial <= num_said] if late else account.line
        account.excess_s = left_s - sum([own.left_s for own in ours]) if ours else left_s
        if account.excess_s < 0.0:
            spent_s, account.excess_s = -account.excess_s, 0.0
            self._spend(ours, spent_s)
            account.line = [own for own in account.line if own.left_s > 0.0]
        self._set_slots(account, now_s)
        for link in links:
            source = self._numbers.get(link.process)
            if source is not None and link.bytes_per_s:
                self.rates[number, source] = link.bytes_per_s

    def _learn(self, number: int, account: _Account, load: Load, now_s: float) -> None:
        prices, known = load.prices, account.measured
        if prices is not account.prices:
            account.prices = prices
            known = [prices.base_s > 0, prices.token_s > 0, prices.sequence_s > 0]
            values = ((prices.base_s,), (prices.token_s, prices.pair_s), (prices.sequence_s, prices.context_s))
            for columns, is_known, new in zip(_PRICES, known, values, strict=True):
                if is_known:
                    self.table[columns, number] = new
        speeds = (load.fetch_bytes_per_s, load.disk_bytes_per_s)
        if speeds != account.speeds:
            account.speeds = speeds
            for column, speed in zip((FETCH_RATE, DISK_RATE), speeds, strict=True):
                if speed:
                    self.table[column, number] = speed
        if known != account.measured or now_s >= self._filled_in_s + FILL_IN_S:
            account.measured = known
            self._filled_in_s = now_s
            self._fill_in()

    def _fill_in(self) -> None:
        """What a worker has not met yet costs as much as it costs the others on average; a guess where nobody has."""
        guess = GUESSED_PRICES
        guesses = ((guess.base_s,), (guess.token_s, guess.pair_s), (guess.sequence_s, guess.context_s))
        for kind, (columns, values) in enumerate(zip(_PRICES, guesses, strict=True)):
            known = [number for number, account in self._accounts.items() if account.measured[kind]]
            missing = [number for number, account in self._accounts.items() if not account.measured[kind]]
            for column, value in zip(columns, values, strict=True):
                self.table[column, missing] = self.table[column, known].mean() if known else value

    def compute_s(self, number: int, num_tokens: float, num_pairs: float) -> float:
        """Predicted seconds in which a worker computes so much of prompts; what generates there goes on meanwhile."""
        if not num_tokens:
            return 0.0
        row = self._accounts[number].row
        steps = math.ceil(num_tokens / row[STEP_TOKENS])
        return steps * self.step_s(number) + num_tokens * row[TOKEN_S] + num_pairs * row[PAIR_S]

    def dispatched(self, number: int, fence: Fence, work: Work, now_s: float) -> None:
        """We sent it this."""
        account = self._accounts[number]
        account.serial += 1
        compute_s = self.compute_s(number, work.num_tokens, work.num_pairs)
        own = account.own[fence] = _Own(account.serial, work, compute_s, compute_s, computed=not work.num_tokens)
        row = account.row
        if work.num_tokens:
            self._pass(account, row[TOUCHED_AT], now_s)
            if account.line and work.due_s < account.line[0].work.due_s:
                self._overtake(account)
            insort(account.line, own, key=_due_s)
            self._set_slots(account, now_s)
        row[SEQUENCES] += work.num_sequences
        row[CONTEXT] += work.context_tokens
        row[FREE_BLOCKS] -= work.num_blocks
        row[OUTSTANDING] += 1
        row[UNCOMPUTED] += work.num_tokens
        if work.num_tokens:
            self._arrivals.add(now_s, compute_s)
            if account.role == "decode":
                self.traffic.computed_here(work.num_tokens, work.num_pairs)
        if work.source >= 0 and work.num_bytes:
            rate = self.rates[number, work.source] or row[FETCH_RATE]
            sender = self.table[:, work.source]
            sender[SENDS_UNTIL] = max(sender[SENDS_UNTIL], now_s) + work.num_bytes / float(rate)

    def computed(self, process: str, fence: Fence, now_s: float) -> None:
        """The worker says that the prompt of this dispatch is there: nothing of it is waited for any more. Unknown ones are
        ignored."""
        number = self._numbers.get(process)
        own = self._accounts[number].own.get(fence) if number is not None else None
        if number is not None and own is not None:
            self._computed(number, own, now_s)

    def _computed(self, number: int, own: _Own, now_s: float) -> None:
        """It is out of the line, and so is what was before it: the line is computed in order."""
        if own.computed:
            return
        own.computed = True
        account = self._accounts[number]
        account.row[UNCOMPUTED] -= own.work.num_tokens
        self._pass(account, account.row[TOUCHED_AT], now_s)
        if own.left_s > 0.0:
            own.left_s = 0.0
            account.line.remove(own)
        if not account.line or own is account.overtaken:
            account.excess_s, account.overtaken = 0.0, None
        self._set_slots(account, now_s)

    @classmethod
    def _pass(cls, account: _Account, since_s: float, now_s: float) -> None:
        """Time passes: what is first in line gets done."""
        spent_s = now_s - since_s
        if spent_s <= 0.0 or not (account.line or account.excess_s):
            return
        if spent_s < account.excess_s - ALMOST_S:
            account.excess_s -= spent_s
            return
        spent_s = max(0.0, spent_s - account.excess_s)
        account.excess_s = 0.0
        done = cls._spend(account.line, spent_s)
        del account.line[:done]

    @staticmethod
    def _spend(line: list[_Own], spent_s: float) -> int:
        """Computes so long in the order of the line; returns how many are done."""
        for done, own in enumerate(line):
            if spent_s < own.left_s - ALMOST_S:
                own.left_s -= spent_s
                return done
            spent_s = max(0.0, spent_s - own.left_s)
            own.left_s = 0.0
        return len(line)

    @staticmethod
    def _step_left_s(account: _Account) -> float:
        """How long the running step, of the first in line, goes on."""
        if account.excess_s > 0.0 or not account.line:
            return 0.0
        own = account.line[0]
        step_s = own.compute_s * min(1.0, account.row[STEP_TOKENS] / own.work.num_tokens)
        return min(own.left_s, step_s - (own.compute_s - own.left_s) % step_s)

    def _overtake(self, account: _Account) -> None:
        """Another one goes before the first in line, once the step that runs is over."""
        step_s = self._step_left_s(account)
        if step_s > 0.0:
            first = account.overtaken = account.line[0]
            account.excess_s = step_s
            first.left_s -= step_s
            if first.left_s <= ALMOST_S:
                first.left_s = 0.0
                del account.line[0]

    def _set_slots(self, account: _Account, now_s: float) -> None:
        account.row[TOUCHED_AT] = now_s
        has_work = bool(account.line) or account.excess_s > 0.0
        if not has_work and not account.num_slots:
            return
        work_s, due_s = account.work_s, account.due_s
        step_s = self._step_left_s(account)
        due_s[0], work_s[0] = -math.inf, account.excess_s + step_s
        last = NUM_SLOTS - 1
        for slot, own in enumerate(account.line[:last], 1):
            work_s[slot], due_s[slot] = own.left_s, own.work.due_s
        for own in account.line[last:]:
            work_s[last] += own.left_s
            due_s[last] = own.work.due_s
        num_slots = 1 + min(len(account.line), last)
        for slot in range(num_slots, account.num_slots):
            work_s[slot] = due_s[slot] = 0.0
        if account.line:
            work_s[1] -= step_s
        account.num_slots = num_slots if has_work else 0

    def waits_s(self, numbers: Numbers, due_s: float, now_s: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each of `numbers`: predicted seconds until a prompt that is due then would be computed there, and how many that are
        there would wait for it. What is done meanwhile is what is due first."""
        work_s = self.work_s[:, numbers]
        before = self.due_s[:, numbers] <= due_s
        passed_s = now_s - self.table[TOUCHED_AT, numbers]
        waits_s = np.maximum((work_s * before).sum(axis=0) - passed_s, 0.0)
        behind = (work_s > 0) & ~before
        return waits_s, behind.sum(axis=0) * (work_s.sum(axis=0) > passed_s)

    def ended(self, process: str, fence: Fence, now_s: float) -> None:
        """A dispatch is over, whatever way. Unknown ones are ignored."""
        number = self._numbers.get(process)
        own = self._accounts[number].own.pop(fence, None) if number is not None else None
        if number is None or own is None:
            return
        row = self._accounts[number].row
        row[SEQUENCES] = max(0.0, row[SEQUENCES] - own.work.num_sequences)
        row[CONTEXT] = max(0.0, row[CONTEXT] - own.work.context_tokens)
        row[FREE_BLOCKS] += own.work.num_blocks
        row[OUTSTANDING] -= 1
        self._computed(number, own, now_s)

    def step_s(self, number: int) -> float:
        """Predicted seconds of a decode step."""
        row = self._accounts[number].row
        return row[BASE_S] + row[SEQUENCES] * row[SEQUENCE_S] + row[CONTEXT] * row[CONTEXT_S]

    def took_longer(self, seconds: float) -> None:
        """A first token took so much longer than what was computed, fetched and waited for."""
        self.overhead_s = max(0.0, self.overhead_s + 0.1 * (min(seconds, 1.0) - self.overhead_s))

    def answered(self, num_tokens: int) -> None:
        """A sample ended after so many tokens."""
        self.answer_tokens += (num_tokens - self.answer_tokens) * (0.05 if self.answer_tokens else 1.0)

    # --- what is known of all of them --------------------------------------------------------------------------------------

    def arrivals(self, now_s: float) -> tuple[float, float]:
        """Prompts a second that were sent to workers of late, and seconds a second that they take to compute."""
        return self._arrivals.per_s(now_s)

    def dispatched_to(self, process: str) -> int:
        """Dispatches of ours to that process that have not ended."""
        number = self._numbers.get(process)
        return 0 if number is None else len(self._accounts[number].own)

    def num_dispatched(self) -> int:
        """Dispatches of ours that have not ended."""
        return sum(len(account.own) for account in self._accounts.values())


class _Decayed:
    """How often, and how much, with exponential forgetting."""

    def __init__(self) -> None:
        self._at_s = 0.0
        self._count = 0.0
        self._amount = 0.0
        self._began_s: float | None = None

    def add(self, now_s: float, amount: float) -> None:
        if self._began_s is None:
            self._began_s = self._at_s = now_s
        decay = math.exp((self._at_s - now_s) / ARRIVALS_OVER_S)
        self._count = self._count * decay + 1.0
        self._amount = self._amount * decay + amount
        self._at_s = now_s

    def per_s(self, now_s: float) -> tuple[float, float]:
        if self._began_s is None:
            return 0.0, 0.0
        decay = math.exp((self._at_s - now_s) / ARRIVALS_OVER_S)
        # Since the begin, if that is not long ago: the forgotten part of a steady rate is not there yet.
        over_s = ARRIVALS_OVER_S * (1.0 - math.exp((self._began_s - now_s) / ARRIVALS_OVER_S))
        over_s = max(over_s, 1.0)
        return self._count * decay / over_s, self._amount * decay / over_s
