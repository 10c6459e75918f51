"""Deployment files, which nobody here can run: their shape by schema, their `dsv4c` commands by the parser itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dsv4c.cli import parser
from dsv4c.runtime.dynamo.version import TESTED

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "dynamo"
STRING = {"type": "string"}
STRINGS = {"type": "array", "items": STRING}


def shape(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object of these properties and no others."""
    found = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": found, "additionalProperties": False}


LABELS = {"type": "object", "additionalProperties": STRING}
FIELD = shape({"fieldRef": shape({"fieldPath": STRING})})
ENV = {
    "type": "array",
    "items": {"oneOf": [shape({"name": STRING, "value": STRING}), shape({"name": STRING, "valueFrom": FIELD})]},
}
MOUNT = shape({"name": STRING, "mountPath": STRING}, {"readOnly": {"type": "boolean"}})
CONTAINER = shape(
    {"name": STRING, "image": STRING, "command": STRINGS, "args": STRINGS},
    {
        "env": ENV,
        "resources": shape({"limits": LABELS}),
        "volumeMounts": {"type": "array", "items": MOUNT},
    },
)  # fmt: skip
CLAIM = shape(
    {"name": STRING, "persistentVolumeClaim": shape({"claimName": STRING}, {"readOnly": {"type": "boolean"}})}
)
POD = shape(
    {"metadata": shape({"labels": LABELS}), "spec": shape(
        {"containers": {"type": "array", "items": CONTAINER, "minItems": 1}},
        {"volumes": {"type": "array", "items": CLAIM}, "terminationGracePeriodSeconds": {"type": "integer"}},
    )},
)  # fmt: skip
# The part of deploy/operator/api/v1beta1 of ai-dynamo/dynamo that is used: names, patterns and limits are its own.
COMPONENT = shape(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$", "maxLength": 63},
        "type": {"enum": ["frontend", "worker", "prefill", "decode", "planner", "epp"]},
        "runtimeVersionOverride": {
            "type": "string",
            "pattern": r"^(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})$",
        },
        "podTemplate": POD,
    },
    {"replicas": {"type": "integer", "minimum": 0}},
)
GRAPH = shape(
    {
        "apiVersion": {"const": "nvidia.com/v1beta1"},
        "kind": {"const": "DynamoGraphDeployment"},
        "metadata": shape({"name": STRING}),
        "spec": shape({"components": {"type": "array", "items": COMPONENT, "maxItems": 25}}, {"env": ENV}),
    }
)
SERVICE = shape(
    {"image": STRING, "command": STRINGS, "networks": STRINGS, "volumes": STRINGS, "environment": LABELS},
    {
        "build": shape({"context": STRING, "dockerfile": STRING}),
        "ports": STRINGS,
        "restart": STRING,
        "stop_grace_period": STRING,
    },
)
COMPOSE = {
    **shape(
        {"name": STRING, "services": {"type": "object", "additionalProperties": SERVICE}},
        {"networks": {"type": "object"}, "volumes": {"type": "object"}},
    ),
    "patternProperties": {"^x-": {}},
}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def commands() -> Iterator[tuple[str, list[str]]]:
    graph = documents("kubernetes.yaml")[0]
    for component in graph["spec"]["components"]:
        main = component["podTemplate"]["spec"]["containers"][0]
        yield f"kubernetes {component['name']}", [*main["command"], *main["args"]]
    for name, service in documents("compose.yaml")[0]["services"].items():
        yield f"compose {name}", service["command"]


def test_the_kubernetes_manifest_is_of_the_operators_shape() -> None:
    graph, policy = documents("kubernetes.yaml")
    jsonschema.validate(graph, GRAPH)
    components = graph["spec"]["components"]
    names = [component["name"].lower() for component in components]
    assert len(set(names)) == len(names)
    for component in components:
        containers = component["podTemplate"]["spec"]["containers"]
        assert [c["name"] for c in containers] == ["main"] and component["runtimeVersionOverride"] in TESTED
        mounted = {m["name"] for c in containers for m in c.get("volumeMounts", ())}
        assert mounted == {v["name"] for v in component["podTemplate"]["spec"].get("volumes", ())}
        assert (
            component["podTemplate"]["metadata"]["labels"].items()
            >= policy["spec"]["podSelector"]["matchLabels"].items()
        )
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["ingress"][0]["from"]


def test_the_compose_file_publishes_the_api_alone_and_on_loopback() -> None:
    (compose,) = documents("compose.yaml")
    jsonschema.validate(compose, COMPOSE)
    published = {name: s["ports"] for name, s in compose["services"].items() if "ports" in s}
    assert list(published) == ["frontend"] and all(p.startswith("127.0.0.1:") for p in published["frontend"])
    assert compose["networks"]["inside"]["internal"] is True
    for service in compose["services"].values():
        assert set(service["networks"]) <= set(compose["networks"])


@pytest.mark.parametrize(
    ("where", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_commands_are_understood(where: str, command: list[str]) -> None:
    if command[0] != "dsv4c":
        assert command[:3] == ["python", "-m", "dynamo.frontend"]
        return
    args = parser().parse_args(command[1:])
    role = where.split()[1].lower()
    assert args.command == "dynamo" and args.role == role
    assert (getattr(args, "bootstrap_advertise", None) is not None) == (role == "prefill")


@pytest.mark.parametrize("name", ["kubernetes.yaml", "compose.yaml", "Dockerfile"])
def test_they_say_that_nobody_has_run_them(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8").startswith("# NOT RUN HERE")
