"""`python deploy/kubernetes/check.py`: what can be said of the manifests without a cluster.

Renders each overlay and holds it against Kubernetes' own schemas, strictly, against the definitions in `crds/` for other kinds,
and against rules of ours: what is there, what a Pod may do, that names meet, that the configuration is one that the program
takes. A kind without a schema is an error. Prints a line for each overlay, or what is wrong; exits 0 only if nothing is.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tandem.config import Config, load_config
from tandem.errors import ConfigError

FOLDER = Path(__file__).resolve().parent
RENDER_S = 60
VERSION = "1.34"
"""The schemas' Kubernetes: the newest feature that is used, `preStop.sleep`, is stable since then."""
NAME = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
DRAIN_MARGIN_S = 15.0
"""After its `drain_s` a process still waits for readers of its blocks, and closes."""

EXPECTED: Mapping[str, Mapping[str, int]] = {
    "cpu-demo": {
        "Namespace": 1, "ConfigMap": 1, "StatefulSet": 1, "Deployment": 2, "DaemonSet": 1, "Job": 1, "Service": 2,
        "PersistentVolumeClaim": 1, "PodDisruptionBudget": 3, "NetworkPolicy": 7,
    },
    "gpu-ucx": {
        "Namespace": 1, "ConfigMap": 1, "StatefulSet": 1, "Deployment": 2, "DaemonSet": 1, "Service": 2,
        "PersistentVolumeClaim": 1, "PodDisruptionBudget": 3, "NetworkPolicy": 6, "ScaledObject": 2, "InferencePool": 1,
    },
    "kuberay": {
        "Namespace": 1, "ConfigMap": 1, "RayCluster": 1, "Job": 1, "Service": 1, "PersistentVolumeClaim": 1,
        "NetworkPolicy": 5,
    },
}  # fmt: skip
"""How many of each kind an overlay has: what is lost by a slip of a patch shows as little else."""

Resource = dict[str, Any]


def render(overlay: str) -> list[Resource]:
    """The overlay's resources. Raises CalledProcessError, with Kustomize's words in `stderr`."""
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [str(kubectl), "kustomize", str(FOLDER / "overlays" / overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=RENDER_S, check=True)
    return [resource for resource in yaml.safe_load_all(rendered.stdout) if resource]


def title(resource: Resource) -> str:
    """As people say it: `Deployment/decode`."""
    return f"{resource['kind']}/{resource['metadata']['name']}"


def pod_template(resource: Resource) -> Resource | None:
    """What the resource makes Pods from, if it makes any."""
    spec = resource.get("spec", {})
    if resource["kind"] == "RayCluster":
        template: Resource = spec["headGroupSpec"]["template"]
        return template
    found: Resource | None = spec.get("template")
    return found


def containers(template: Resource) -> Iterator[Resource]:
    """Those that run before the others first."""
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def config_of(resources: Sequence[Resource]) -> Config:
    """What the rendered ConfigMap says. Raises ConfigError."""
    text = next(r for r in resources if r["kind"] == "ConfigMap")["data"]["tandem.yaml"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_config(file.name)


def problems(overlay: str, resources: Sequence[Resource]) -> list[str]:
    """What is wrong with an overlay's resources; empty if nothing is."""
    found = Counter(str(resource["kind"]) for resource in resources)
    wrong = []
    if found != EXPECTED[overlay]:
        wrong.append(f"it has {dict(sorted(found.items()))}, must have {dict(sorted(EXPECTED[overlay].items()))}")
        return wrong
    for resource in resources:
        wrong += [f"{title(resource)}: {problem}" for problem in _against_schema(resource)]
        template = pod_template(resource)
        if template is not None:
            wrong += [f"{title(resource)}: {problem}" for problem in _pod_problems(template)]
    return wrong or [*_names(resources), *_configuration(resources)]


# --- schemas ---------------------------------------------------------------------------------------------------------


def _against_schema(resource: Resource) -> list[str]:
    try:
        kubernetes_validate.validate(resource, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [_said(error)]
    except kubernetes_validate.SchemaNotFoundError:
        schema = _definitions().get((resource["apiVersion"], resource["kind"]))
        if schema is None:
            return [f"there is no schema of {resource['apiVersion']} {resource['kind']}, nor a definition in crds/"]
        validator = jsonschema.Draft202012Validator(schema)
        return [_said(error) for error in validator.iter_errors(resource)]
    return []


def _said(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path)) or 'the resource'}: {error.message[:500]}"


@cache
def _definitions() -> dict[tuple[str, str], Any]:
    """By API version and kind, closed: a cluster would drop unknown fields without a word."""
    found = {}
    for file in sorted((FOLDER / "crds").glob("*.yaml")):
        for definition in yaml.load_all(file.read_text(encoding="utf-8"), _Loader):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = version["schema"]["openAPIV3Schema"]
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = _closed(schema)
    return found


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        closed["additionalProperties"] = False
    return closed


# --- what a Pod may do -----------------------------------------------------------------------------------------------


def _pod_problems(template: Resource) -> Iterator[str]:
    spec = template["spec"]
    security = spec.get("securityContext", {})
    rules = {
        "automountServiceAccountToken is not false": spec.get("automountServiceAccountToken") is False,
        "enableServiceLinks is not false: variables of Services would be taken for ours": spec.get("enableServiceLinks")
        is False,
        "runAsNonRoot is not true": security.get("runAsNonRoot") is True,
        "runAsUser is root or not said": security.get("runAsUser", 0) > 0,
        "seccompProfile is not RuntimeDefault": security.get("seccompProfile") == {"type": "RuntimeDefault"},
        "it uses a namespace of its machine": not any(
            spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers")
        ),
    }
    yield from (problem for problem, ok in rules.items() if not ok)
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for volume in volumes.values():
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no size limit"
    is_service = spec.get("restartPolicy", "Always") == "Always"
    initial = {container["name"] for container in spec.get("initContainers", [])}
    for container in containers(template):
        problems_of = _container_problems(container, volumes, is_probed=is_service and container["name"] not in initial)
        yield from (f"container {container['name']}: {problem}" for problem in problems_of)


def _container_problems(container: Resource, volumes: Mapping[str, Resource], *, is_probed: bool) -> Iterator[str]:
    security = container.get("securityContext", {})
    resources = container.get("resources", {})
    rules = {
        "allowPrivilegeEscalation is not false": security.get("allowPrivilegeEscalation") is False,
        "readOnlyRootFilesystem is not true": security.get("readOnlyRootFilesystem") is True,
        "not all capabilities are dropped, or some are added": security.get("capabilities") == {"drop": ["ALL"]},
        "it is privileged": not security.get("privileged"),
        "it has no tag of its own": ":" in container["image"] and not container["image"].endswith(":latest"),
    }
    yield from (problem for problem, ok in rules.items() if not ok)
    for key in ("requests", "limits"):
        if missing := {"cpu", "memory"} - resources.get(key, {}).keys():
            yield f"resources.{key} lack {', '.join(sorted(missing))}"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"there is no volume {mount['name']}"
        elif "emptyDir" not in volumes[mount["name"]] and not mount.get("readOnly") and not _is_ours(mount):
            yield f"{mount['mountPath']} may be written"
    if is_probed:
        yield from (f"there is no {probe}" for probe in ("startupProbe", "readinessProbe") if probe not in container)
    ports = {port.get("name"): port["containerPort"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = container.get(probe, {}).get("httpGet", {}).get("port")
        if isinstance(port, str) and port not in ports:
            yield f"{probe} asks port {port!r}, which it doesn't have"


def _is_ours(mount: Resource) -> bool:
    """Where we write on purpose: drives of a pool node, and a model while it is fetched."""
    return str(mount["mountPath"]).startswith("/disk") or mount["mountPath"] == "/cache/models"


# --- names that must meet --------------------------------------------------------------------------------------------


def _names(resources: Sequence[Resource]) -> Iterator[str]:
    templates = {title(r): template for r in resources if (template := pod_template(r)) is not None}
    labels = [template["metadata"]["labels"] for template in templates.values()]
    by_kind: dict[str, list[Resource]] = {}
    for resource in resources:
        by_kind.setdefault(resource["kind"], []).append(resource)
        if resource["kind"] != "Namespace" and resource["metadata"].get("namespace") != "tandem":
            yield f"{title(resource)} is not in the namespace tandem"
    names = {kind: {resource["metadata"]["name"] for resource in many} for kind, many in by_kind.items()}
    for resource in (*by_kind.get("Service", []), *by_kind["NetworkPolicy"], *by_kind.get("PodDisruptionBudget", [])):
        selector = resource["spec"].get("selector", resource["spec"].get("podSelector"))
        if not any(_selects(selector, each) for each in labels):
            yield f"{title(resource)} selects no Pod of this overlay"
    deny = [policy["spec"] for policy in by_kind["NetworkPolicy"] if policy["metadata"]["name"] == "default-deny"]
    if deny != [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]:
        yield "there is no NetworkPolicy that denies all"
    for who, template in templates.items():
        for volume in template["spec"].get("volumes", []):
            for key, kind, field in (
                ("configMap", "ConfigMap", "name"),
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            ):
                if key in volume and volume[key][field] not in names.get(kind, set()):
                    yield f"{who}: there is no {kind} {volume[key][field]}"
        for container in containers(template):
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("configMapKeyRef", {})
                if reference and reference["name"] not in names["ConfigMap"]:
                    yield f"{who}: there is no ConfigMap {reference['name']}"
    for scaled in by_kind.get("ScaledObject", []):
        target = scaled["spec"]["scaleTargetRef"]
        if f"{target['kind']}/{target['name']}" not in templates:
            yield f"{title(scaled)} scales {target['kind']}/{target['name']}, which is not there"


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A Service's selector is the labels themselves."""
    wanted = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    expressions = selector.get("matchExpressions", [])
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


# --- the configuration -----------------------------------------------------------------------------------------------

_MEMORY_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _MEMORY_UNITS[quantity[-2:]]


def _configuration(resources: Sequence[Resource]) -> Iterator[str]:
    try:
        config = config_of(resources)
    except ConfigError as error:
        yield str(error)
        return
    workloads = {r["metadata"]["name"]: r for r in resources if pod_template(r) is not None}
    for resource in workloads.values():
        for container in containers(pod_template(resource) or {}):
            for port in container.get("ports", []):
                if (number := getattr(config.router, f"{port['name']}_port")) != port["containerPort"]:
                    yield f"{title(resource)}: port {port['name']} is {port['containerPort']}, router says {number}"
    if "router" in workloads:
        count = workloads["router"]["spec"]["replicas"]
        if config.router.addresses != [f"router-{number}.routers" for number in range(count)]:
            yield f"router.addresses are {config.router.addresses}, of {count} routers"
    roles = (
        ("prefill", config.prefill.drain_s, config.prefill.arena_bytes),
        ("decode", config.decode.drain_s, config.decode.arena_bytes),
        ("pool", config.pool.drain_s, config.pool.host_bytes),
    )
    for role, drain_s, num_bytes in roles:
        if role not in workloads:
            continue
        if "shm" in config.transfer.transports:
            yield "transfer.transports has shm, which meets nobody from Pod to Pod"
        spec = workloads[role]["spec"]["template"]["spec"]
        if spec["terminationGracePeriodSeconds"] < drain_s + DRAIN_MARGIN_S:
            yield f"{role}.drain_s is {drain_s:g}, its Pods get {spec['terminationGracePeriodSeconds']} s to end"
        limit = spec["containers"][0]["resources"]["limits"]["memory"]
        if _bytes(limit) <= num_bytes:
            yield f"{role} keeps {num_bytes} bytes of KV, its memory is limited to {limit}"
        mounted = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        needed = {config.run_dir, *(config.pool.disk.dirs if role == "pool" else ())}
        if missing := needed - mounted:
            yield f"{role}: nothing is mounted at {', '.join(sorted(missing))}"


def main() -> int:
    """Checks all overlays; the number of those with something wrong."""
    failed = 0
    overlays = sorted(path.name for path in (FOLDER / "overlays").iterdir())
    assert overlays == sorted(EXPECTED), f"overlays {overlays}, known {sorted(EXPECTED)}"
    for overlay in overlays:
        try:
            resources = render(overlay)
            wrong = problems(overlay, resources)
        except subprocess.CalledProcessError as error:
            resources, wrong = [], [error.stderr.strip()]
        for problem in wrong:
            print(f"error: {overlay}: {problem}", file=sys.stderr)
        if not wrong:
            known = {kind for _, kind in _definitions()}
            by_crds = sum(resource["kind"] in known for resource in resources)
            print(f"{overlay}: {len(resources)} resources, {by_crds} of them of kinds in crds/, Kubernetes {VERSION}")
        failed += bool(wrong)
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
