"""What the router's log says of requests: where each was dispatched, and how it ended.

Owns these lines, and what must not be in them: no texts, no tokens, no tenants. The usual is told at DEBUG, what went wrong
above.
"""

from __future__ import annotations

import logging

from protos.control import Dispatch
from router.actions import Send
from router.journal import Summary
from tandem.errors import InvalidRequest
from tandem.logs import about

log = logging.getLogger(__name__)


def sent(action: Send) -> None:
    """A message goes to a process; dispatches are told."""
    message = action.message
    if isinstance(message, Dispatch):
        fence = message.fence
        level = logging.INFO if fence.attempt else logging.DEBUG
        log.log(level, "%s dispatched to %s", fence.role, action.process, extra=about(fence.request_id, fence.attempt))


def ended(summary: Summary) -> None:
    """A request has ended. The words of an InvalidRequest may be its client's, and are not told."""
    for leg in summary.legs:
        if leg.failed:
            said = about(summary.request_id, leg.fence.attempt)
            log.info("%s at %s had ended: %s", leg.fence.role, leg.process, leg.end, extra=said)
    if summary.outcome == "failed":
        why = "" if summary.error_code == InvalidRequest.code else f": {summary.error}"
        log.warning("failed, %s%s", summary.error_code, why, extra=about(summary.request_id))
        return
    log.debug(
        "%s after %.3f s: %d prompt tokens, %d generated, first token after %s s, %d dispatches",
        summary.outcome,
        summary.total_s,
        summary.num_prompt_tokens,
        summary.num_generated_tokens,
        "-" if summary.ttft_s is None else f"{summary.ttft_s:.3f}",
        len(summary.legs),
        extra=about(summary.request_id),
    )
