"""Judges one router, message by message, by rules of its own.

Owns what it has seen of the router's dispatches. It trusts no decision of the core: a dispatch is over when an abort was sent,
its worker was given up, or it said so itself; nothing of it counts from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.control import Abort, Aborted, Ack, Dispatch, Failed, Fence, Hello, Tokens, ToRouter, Welcome
from protos.kv_events import BlockStored, EventBatch
from router.actions import Action, Emit, Send, Unsubscribe
from tandem.sim.faults.fake_model import BLOCK_SIZE
from tandem.sim.faults.truth import Truth
from tandem.sim.faults.world import Violation

if TYPE_CHECKING:
    from tandem.sim.faults.router_node import RouterNode

Who = tuple[str, bytes]


class RouterWatch:
    """Raises Violation."""

    def __init__(self, node: RouterNode, truth: Truth) -> None:
        self._node = node
        self._truth = truth
        self._live: dict[Fence, Who] = {}
        self._is_member = False
        self._is_stale = False

    def hears(self, who: Who, message: ToRouter) -> None:
        """A message comes in."""
        member = self._node.core.membership.get(who[0])
        self._is_member = member is not None and member.epoch == who[1]
        if isinstance(message, Tokens):
            self._is_stale = self._live.get(message.fence) != who
            self._check_durable(message)
        elif isinstance(message, Failed | Aborted) and self._live.get(message.fence) == who:
            del self._live[message.fence]

    def says(self, who: Who, message: ToRouter, actions: list[Action]) -> list[Action]:
        """What the core made of it; returned as it is."""
        if not self._is_member and not isinstance(message, Hello):
            for action in actions:
                if not (isinstance(action, Send) and isinstance(action.message, Welcome)):
                    raise Violation(
                        f"{self._node.name} acted on {type(message).__name__} of {who[0]}, whose epoch is no member's: {action}"
                    )
        if isinstance(message, Tokens) and self._is_stale:
            for action in actions:
                if isinstance(action, Emit) or (isinstance(action, Send) and isinstance(action.message, Ack)):
                    raise Violation(f"{self._node.name} accepted tokens of a dispatch that is over: {message.fence}")
        return actions

    def does(self, action: Action) -> None:
        match action:
            case Send(process=process, epoch=epoch, message=Dispatch(fence=fence)):
                if fence in self._live:
                    raise Violation(f"{self._node.name} used the fence {fence} twice")
                self._live[fence] = (process, epoch)
            case Send(message=Abort(fence=fence)):
                self._live.pop(fence, None)
            case Unsubscribe(process=process, epoch=epoch):
                self._live = {fence: who for fence, who in self._live.items() if who != (process, epoch)}

    def hears_events(self, batch: EventBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlockStored):
                for key in event.block_hashes:
                    if key in self._truth.partial:
                        raise Violation(f"a partial block was announced: {key!r}")
                    if key not in self._truth.blocks:
                        raise Violation(f"a block was announced that is of no request: {key!r}")

    def _check_durable(self, message: Tokens) -> None:
        """Every block before the position that is said to be durable was at a pool node some time."""
        asked = self._truth.asked.get(message.fence.request_id)
        if not message.durable_position or asked is None:
            return
        keys = asked.keys[message.index]
        num_blocks = -(-(len(asked.prompt) + message.durable_position) // BLOCK_SIZE)
        if num_blocks > len(keys) or not self._truth.kept.issuperset(keys[:num_blocks]):
            raise Violation(
                f"{message.fence} reports {message.durable_position} durable tokens, which no pool node has ever held"
            )
