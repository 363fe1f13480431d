"""What must hold after a drill: always, and by its file.

Owns the judgement; asks nobody but the audit. Each check is one line of the report, with its evidence. What a drill expects is
exact: an error that was not expected is a failure, and so is an expected one that did not come.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tandem.drills.faults import Fired, Scene
from tandem.drills.load import Asking, Got
from tandem.drills.spec import Expect

MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a report."""

    check: str
    ok: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Played:
    """What a drill was: its clients, its steps, and the truth by key. `error`: the step that did not happen."""

    asking: Sequence[Asking]
    truth: dict[str, Got]
    fired: Sequence[Fired]
    error: str = ""


def judge(played: Played, expect: Expect, scene: Scene) -> Iterator[Check]:
    """All but the audit and what needs the cluster restored."""
    fired = [one for one in played.fired if one.name]
    said = "; ".join(f"{one.name}: {one.evidence}" for one in fired)
    yield Check("the faults fired", not played.error and bool(fired), played.error or said or "nothing was hurt")
    yield _ends(played.asking, expect)
    yield _answers("tokens, text and logprobs are those of the fault-free run", played, _difference)
    yield _answers("chunks are gap-free, one end each", played, _broken)
    yield _answers("usage is right", played, _usage)
    yield _pauses(played, expect)
    if expect.late_s:
        yield _late(played, expect)
    listed = scene.stage.cluster.listed()
    for what, least in expect.more.items():
        grown = scene.grown(what, listed)
        yield Check(f"{what} grew by {least} at least", grown >= least, f"+{grown}")
    for what, most in expect.at_most.items():
        grown = scene.grown(what, listed)
        yield Check(f"{what} grew by {most} at most", grown <= most, f"+{grown}")
    yield from _ways(played.asking, expect)
    for name, line in scene.stage.lines.items():
        if any(relay.drop or relay.swap for relay in line.relays):
            num_lost = sum(relay.num_dropped for relay in line.relays)
            num_late = sum(relay.num_swapped for relay in line.relays)
            yield Check(
                f"KV events of {name} were lost or late", num_lost + num_late > 0, f"{num_lost} lost, {num_late} late"
            )


def _recomputed(asking: Sequence[Asking], most: int) -> Check:
    """By decode workers that took over: of what prompt and answer they had not computed, they fetched the rest."""
    worst, whose = 0, ""
    for one in asking:
        for run in one.got.completed.runs if one.got.completed is not None else ():
            if run.role == "decode" and run.attempt > 0 and run.computed_tokens > worst:
                worst, whose = run.computed_tokens, one.asked.key
    evidence = f"{worst}{f' ({whose})' if whose else ''}, the limit is {most}"
    return Check("what is computed again is little", worst <= most, evidence)


def _named(wrong: list[str], right: str) -> str:
    if not wrong:
        return right
    more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
    return "; ".join(wrong[:MAX_NAMED]) + more


def _end_of(one: Asking) -> str:
    got = one.got
    if got.left:
        return "left"
    if got.completed is not None:
        return "completed"
    return got.error.code if got.error is not None else "no end"


def _ends(asking: Sequence[Asking], expect: Expect) -> Check:
    ends = Counter(f"{one.asked.spec.name}.{_end_of(one)}" for one in asking)
    said = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
    wrong = []
    due = dict(expect.errors)
    for one in asking:
        name, end = one.asked.spec.name, _end_of(one)
        expected = "left" if one.asked.spec.leaves_at is not None else "completed"
        if end == expected or end in expect.may_fail.get(name, ()):
            continue
        due[f"{name}.{end}"] = due.get(f"{name}.{end}", 0) - 1
        if due[f"{name}.{end}"] < 0:
            wrong.append(f"{one.asked.key}: {end}{f' ({one.got.error})' if one.got.error else ''}")
    wrong += [f"{number} {end} did not come" for end, number in due.items() if number > 0]
    return Check("every request ends once, as it must", not wrong, _named(wrong, said))


def _answers(name: str, played: Played, look: object) -> Check:
    assert callable(look)
    wrong = []
    for one in played.asking:
        found = look(one, played.truth[one.asked.key])
        if found:
            wrong.append(f"{one.asked.key}: {found}")
    num_tokens = sum(one.got.num_tokens for one in played.asking)
    return Check(name, not wrong, _named(wrong, f"{len(played.asking)} answers, {num_tokens} tokens"))


def _difference(one: Asking, truth: Got) -> str:
    """Of what came from the truth; an answer that broke off must be its beginning."""
    got, whole = one.got, one.got.completed is not None
    for index, tokens in got.tokens.items():
        right = truth.tokens.get(index, [])
        if tokens != right[: len(tokens)] or (whole and len(tokens) != len(right)):
            at = next(
                (i for i, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b), min(len(tokens), len(right))
            )
            return f"sample {index} differs at token {at}: {tokens[at : at + 3]}, not {right[at : at + 3]}"
        if not _same(got.logprobs.get(index, []), truth.logprobs.get(index, []), whole):
            return f"sample {index} has other logprobs"
        if whole and (got.text.get(index), got.reasons.get(index)) != (truth.text.get(index), truth.reasons.get(index)):
            return f"sample {index} has another text or end"
    if whole and set(got.tokens) != set(truth.tokens):
        return f"samples {sorted(got.tokens)}, not {sorted(truth.tokens)}"
    return ""


def _same(got: list[tuple[int, float]], right: list[tuple[int, float]], whole: bool) -> bool:
    if whole and len(got) != len(right):
        return False
    pairs = zip(got, right, strict=False)
    return all(a[0] == b[0] and (a[1] == b[1] or (math.isnan(a[1]) and math.isnan(b[1]))) for a, b in pairs)


def _broken(one: Asking, truth: Got) -> str:
    got = one.got
    if got.faults:
        return got.faults[0]
    if got.num_ends + got.left != 1:
        return f"{got.num_ends} terminal messages"
    return ""


def _usage(one: Asking, truth: Got) -> str:
    """What `Completed` counts."""
    completed, right = one.got.completed, truth.completed
    if completed is None or right is None:
        return ""
    counts = (completed.num_prompt_tokens, completed.num_generated_tokens)
    if counts != (right.num_prompt_tokens, one.got.num_tokens):
        return f"says {counts[0]} + {counts[1]} tokens, it were {right.num_prompt_tokens} + {one.got.num_tokens}"
    if completed.num_cached_tokens > completed.num_prompt_tokens:
        return f"{completed.num_cached_tokens} of {completed.num_prompt_tokens} prompt tokens were cached"
    return ""


def _pauses(played: Played, expect: Expect) -> Check:
    worst, whose = 0.0, ""
    for one in played.asking:
        spec, times_s = one.asked.spec, one.got.times_s
        if spec.pause_s or one.got.completed is None:
            continue
        pause_s = max((b - a for a, b in itertools.pairwise(times_s)), default=0.0)
        if pause_s > worst:
            worst, whose = pause_s, one.asked.key
    last_s = max((one.at_s for one in played.fired), default=math.inf)
    ends_s = max((one.got.ended_s or last_s for one in played.asking), default=last_s) - last_s
    evidence = f"{worst:.2f} s{f' ({whose})' if whose else ''}, the limit is {expect.pause_s:g} s; "
    evidence += f"all was over {max(0.0, ends_s):.1f} s after the last step, the limit is {expect.end_s:g} s"
    return Check("recovery is within its bound", worst <= expect.pause_s and ends_s <= expect.end_s, evidence)


def _late(played: Played, expect: Expect) -> Check:
    """How much later than without the fault first tokens came."""
    worst, whose = 0.0, ""
    for one in played.asking:
        truth = played.truth[one.asked.key]
        if one.got.completed is None or not truth.times_s or not one.got.times_s:
            continue
        late_s = (one.got.times_s[0] - one.got.began_s) - (truth.times_s[0] - truth.began_s)
        if late_s > worst:
            worst, whose = late_s, one.asked.key
    evidence = f"{worst:.2f} s{f' ({whose})' if whose else ''}, the limit is {expect.late_s:g} s"
    return Check("first tokens are not much later than without the fault", worst <= expect.late_s, evidence)


def _ways(asking: Sequence[Asking], expect: Expect) -> Iterator[Check]:
    """How the answers came about."""
    completed = [one.got.completed for one in asking if one.got.completed is not None]
    for role, least in expect.again.items():
        again = sum(any(run.role == role and run.attempt > 0 for run in done.runs) for done in completed)
        yield Check(f"{least} requests at least were dispatched again to {role}", again >= least, f"{again} were")
    if expect.recomputed_tokens is not None:
        yield _recomputed(asking, expect.recomputed_tokens)
    if expect.never_again:
        again = sum(any(run.attempt > 0 for run in done.runs) for done in completed)
        yield Check("no request was dispatched again", not again, f"{again} were")
    ends = Counter(f"{one.asked.spec.name}.{_end_of(one)}" for one in asking)
    for end, least in expect.ends.items():
        yield Check(f"{least} {end} at least", ends[end] >= least, f"{ends[end]}")
    if expect.resumed:
        resumed = sum(one.got.num_resumes > 0 for one in asking)
        yield Check(
            f"{expect.resumed} answers at least went on at another router", resumed >= expect.resumed, f"{resumed} did"
        )
    for name, sources in expect.fetched_from.items():
        seen: dict[str, set[str]] = {}
        for one in asking:
            if one.asked.spec.name == name and (done := one.got.completed) is not None:
                fetched = [source for run in done.runs for source in run.fetched]
                seen[one.asked.key] = {source.process for source in fetched if source.num_blocks}
        came = [key for key, processes in seen.items() if processes & set(sources)]
        evidence = (
            f"{len(came)} of {len(seen)} did; all sources: {', '.join(sorted(set().union(*seen.values()))) or 'none'}"
        )
        yield Check(f"some of {name} got KV from {' or '.join(sources)}", bool(came), evidence)
    inexact = [one.asked.key for one in asking if one.got.completed is not None and not one.got.completed.exact]
    if expect.exact:
        yield Check("every answer is exact", not inexact, _named(inexact, f"{len(completed)} answers"))
