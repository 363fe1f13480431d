"""Where roles go among the nodes of a Ray: which nodes there are, how they are reached, who goes where.

Owns the choice. Pure: it is told what Ray says of its nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_HEAD = "node:__internal_head__"


@dataclass(frozen=True, slots=True)
class Node:
    """A node that gets roles. `resources` is all that it has, whoever uses it now."""

    node_id: str
    name: str
    address: str
    resources: Mapping[str, float]


def nodes_for_roles(nodes: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Of what `ray.nodes()` says those that live, by their names; the head only where it is alone: what it has dies with it."""
    alive = sorted((node for node in nodes if node["Alive"]), key=lambda node: str(node["NodeName"]))
    others = [node for node in alive if _HEAD not in node["Resources"]]
    return [
        Node(str(node["NodeID"]), str(node["NodeName"]), str(node["NodeManagerAddress"]), dict(node["Resources"]))
        for node in others or alive
    ]


def addresses_of(nodes: Sequence[Node]) -> list[str]:
    """Where the machines are that have them, each once, in their order."""
    return list(dict.fromkeys(node.address for node in nodes))


def choose(
    nodes: Sequence[Node], role: str, needs: Mapping[str, float], taken: Sequence[tuple[str, str]]
) -> Node | None:
    """The node for one more of a role: one that has what it `needs`, apart from the other role of workers where that can be, and
    with as few roles as can be. `taken` says who is where, as role and node. None: no node has what is needed."""
    other = {"prefill": "decode", "decode": "prefill"}.get(role)

    def cost(node: Node) -> tuple[int, int, int]:
        here = [its for its, node_id in taken if node_id == node.node_id]
        return here.count(other or ""), here.count(role), len(here)

    able = [node for node in nodes if all(node.resources.get(name, 0.0) >= amount for name, amount in needs.items())]
    return min(able, key=cost, default=None)
