"""Which nodes get roles, and who goes where."""

from __future__ import annotations

from tandem.places import Node, addresses_of, choose, nodes_for_roles


def said(name: str, alive: bool = True, **resources: float) -> dict[str, object]:
    return {
        "NodeName": name,
        "NodeID": f"id-{name}",
        "NodeManagerAddress": f"10.0.0.{name[-1]}" if name[-1].isdigit() else "10.0.0.9",
        "Alive": alive,
        "Resources": resources,
    }


def node(name: str, address: str = "10.0.0.1", **resources: float) -> Node:
    return Node(name, name, address, resources)


def test_roles_go_to_living_nodes_and_to_the_head_only_where_it_is_alone() -> None:
    head = said("a-head", **{"node:__internal_head__": 1.0})
    found = nodes_for_roles([said("n2"), head, said("n1"), said("n0", alive=False)])
    assert [(each.node_id, each.address) for each in found] == [("id-n1", "10.0.0.1"), ("id-n2", "10.0.0.2")]
    assert [each.node_id for each in nodes_for_roles([head, said("n0", alive=False)])] == ["id-a-head"]


def test_several_nodes_of_one_machine_are_one_address() -> None:
    assert addresses_of([node("a", "10.0.0.2"), node("b", "10.0.0.1"), node("c", "10.0.0.2")]) == [
        "10.0.0.2",
        "10.0.0.1",
    ]


def test_prefill_and_decode_workers_are_apart_where_there_are_several_nodes() -> None:
    nodes = [node(name, CPU=8.0) for name in ("a", "b", "c")]
    taken: list[tuple[str, str]] = [("router", "a"), ("pool", "a")]
    for role in ("prefill", "prefill", "decode", "decode", "decode"):
        chosen = choose(nodes, role, {"CPU": 0.001}, taken)
        assert chosen is not None
        taken.append((role, chosen.node_id))
    prefills = {at for role, at in taken if role == "prefill"}
    decodes = {at for role, at in taken if role == "decode"}
    assert not prefills & decodes
    assert prefills == {"b", "c"}


def test_a_role_goes_only_where_what_it_needs_is() -> None:
    nodes = [node("cpu", CPU=8.0), node("gpu", CPU=8.0, GPU=2.0)]
    busy = [("prefill", "gpu"), ("decode", "gpu")]
    chosen = choose(nodes, "decode", {"GPU": 1.0}, busy)
    assert chosen is not None
    assert chosen.name == "gpu"
    assert choose(nodes, "decode", {"GPU": 4.0}, []) is None
