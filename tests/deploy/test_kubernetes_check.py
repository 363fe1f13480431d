"""The manifests pass their check, and the check notices what a slip would do to them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from deploy.kubernetes import check
from router.metrics import Metrics

OVERLAYS = sorted(check.EXPECTED)


@cache
def rendered(overlay: str) -> list[check.Resource]:
    return check.render(overlay)


def of(resources: list[check.Resource], title: str) -> check.Resource:
    return next(resource for resource in resources if check.title(resource) == title)


def pod(resources: list[check.Resource], title: str) -> dict[str, Any]:
    template = check.pod_template(of(resources, title))
    assert template is not None
    return template["spec"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_wrong_with_an_overlay(overlay: str) -> None:
    assert check.problems(overlay, rendered(overlay)) == []


Slip = Callable[[list[check.Resource]], Any]


def a_config(**changes: str) -> Slip:
    """Text of the configuration, replaced."""

    def slip(resources: list[check.Resource]) -> None:
        data = next(r for r in resources if r["kind"] == "ConfigMap")["data"]
        for old, new in changes.items():
            before = data["tandem.yaml"]
            data["tandem.yaml"] = re.sub(rf"\b{old}:.*", new, before)
            assert data["tandem.yaml"] != before

    return slip


SLIPS: list[tuple[str, str, Slip, str]] = [
    ("nothing is rendered", "cpu-demo", lambda r: r.clear(), "must have"),
    ("a resource is gone", "cpu-demo", lambda r: r.pop(), "must have"),
    (
        "a field is misspelt",
        "cpu-demo",
        lambda r: of(r, "Deployment/decode")["spec"].update(replica=2),
        "Deployment/decode: spec: Additional properties",
    ),
    (
        "a field of a kind that isn't Kubernetes' own is misspelt",
        "kuberay",
        lambda r: of(r, "RayCluster/tandem")["spec"]["headGroupSpec"].update(rayStart={}),
        "RayCluster/tandem: spec.headGroupSpec: Additional properties",
    ),
    (
        "such a kind has a wrong value",
        "gpu-ucx",
        lambda r: of(r, "ScaledObject/decode")["spec"].update(maxReplicaCount="many"),
        "ScaledObject/decode: spec.maxReplicaCount",
    ),
    (
        "a kind has no schema",
        "gpu-ucx",
        lambda r: of(r, "InferencePool/tandem").update(apiVersion="inference.networking.k8s.io/v9"),
        "there is no schema of inference.networking.k8s.io/v9 InferencePool",
    ),
    (
        "a container may write its root",
        "cpu-demo",
        lambda r: pod(r, "StatefulSet/router")["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
        "container router: readOnlyRootFilesystem",
    ),
    (
        "a container gets a capability",
        "gpu-ucx",
        lambda r: pod(r, "Deployment/decode")["containers"][0]["securityContext"]["capabilities"].update(
            add=["IPC_LOCK"]
        ),
        "not all capabilities are dropped",
    ),
    (
        "a Pod gets a token",
        "kuberay",
        lambda r: pod(r, "RayCluster/tandem").update(automountServiceAccountToken=True),
        "automountServiceAccountToken",
    ),
    ("a Pod runs as root", "cpu-demo", lambda r: pod(r, "DaemonSet/pool")["securityContext"].update(runAsUser=0), "root"),
    (
        "a Pod joins its machine's network",
        "cpu-demo",
        lambda r: pod(r, "DaemonSet/pool").update(hostNetwork=True),
        "namespace of its machine",
    ),
    (
        "a limit is missing",
        "cpu-demo",
        lambda r: pod(r, "Deployment/prefill")["containers"][0]["resources"]["limits"].pop("memory"),
        "resources.limits lack memory",
    ),
    (
        "a probe asks a port that isn't there",
        "cpu-demo",
        lambda r: pod(r, "StatefulSet/router")["containers"][0]["readinessProbe"]["httpGet"].update(port="web"),
        "readinessProbe asks port 'web'",
    ),
    (
        "a Service selects nobody",
        "cpu-demo",
        lambda r: of(r, "Service/routers")["spec"]["selector"].update({check.COMPONENT: "routers"}),
        "Service/routers selects no Pod",
    ),
    (
        "traffic is not denied by default",
        "cpu-demo",
        lambda r: of(r, "NetworkPolicy/default-deny")["spec"].update(policyTypes=["Ingress"]),
        "denies all",
    ),
    (
        "a ConfigMap has another name",
        "kuberay",
        lambda r: next(x for x in r if x["kind"] == "ConfigMap")["metadata"].update(name="other"),
        "there is no ConfigMap tandem-",
    ),
    (
        "what is scaled is not there",
        "gpu-ucx",
        lambda r: of(r, "ScaledObject/decode")["spec"]["scaleTargetRef"].update(kind="StatefulSet"),
        "scales StatefulSet/decode",
    ),
    ("the program has no such key", "cpu-demo", a_config(run_dir="run_folder: /run/tandem"), "there is no such key"),
    ("a port is another one", "cpu-demo", a_config(addresses="grpc_port: 9000"), "port grpc is 8050, router says 9000"),
    (
        "a router is missing from the list",
        "gpu-ucx",
        a_config(addresses="addresses: [router-0.routers]"),
        "of 2 routers",
    ),
    ("a drain takes longer than a Pod has", "cpu-demo", a_config(drain_s="drain_s: 50"), "get 60 s to end"),
    ("KV doesn't fit into the Pod", "cpu-demo", a_config(host_bytes="host_bytes: 4294967296"), "limited to 3Gi"),
    ("Pods would share memory", "cpu-demo", a_config(transports="transports: [shm, tcp]"), "shm"),
    ("a drive is not mounted", "cpu-demo", a_config(dirs="dirs: [/disk, /disk-1]"), "nothing is mounted at /disk-1"),
]  # fmt: skip


@pytest.mark.parametrize(("overlay", "slip", "said"), [each[1:] for each in SLIPS], ids=[each[0] for each in SLIPS])
def test_the_check_notices_that(overlay: str, slip: Slip, said: str) -> None:
    resources = copy.deepcopy(rendered(overlay))
    slip(resources)
    found = check.problems(overlay, resources)
    assert any(said in problem for problem in found), found


def test_autoscaling_asks_for_metrics_that_a_router_has() -> None:
    queries = [
        trigger["metadata"]["query"]
        for resource in rendered("gpu-ucx")
        if resource["kind"] == "ScaledObject"
        for trigger in resource["spec"]["triggers"]
    ]
    asked = set(re.findall(r"\btandem_\w+", " ".join(queries)))
    families = list(Metrics().registry.collect())
    known = {family.name for family in families} | {f"{family.name}_bucket" for family in families}
    assert len(asked) == 3
    assert asked <= known
