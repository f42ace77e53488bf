"""The manifests in ``deploy/kubernetes``: valid by Kubernetes' own schemas, confined, and true of this daemon."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sidecar_daemon.adapters.http.application import _ENDPOINTS
from sidecar_daemon.settings.environment import Environment
from tests.monitoring import DEPLOY, metric_names

FOLDER = DEPLOY / "kubernetes"
FOREIGN = {"PodMonitor", "ScaledObject", "Kustomization"}
"""Kinds that Kubernetes' schemas do not hold: they are checked by hand below."""
OLDEST = "1.27"
"""From here on a disruption budget may let pods go that are not ready."""


def manifest(name: str) -> dict[str, Any]:
    """The one document of a file."""
    (found,) = yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BUILT_IN = [name for name in NAMES if manifest(name)["kind"] not in FOREIGN]


def pod() -> dict[str, Any]:
    """The specification of the daemon's pods."""
    found: dict[str, Any] = manifest("deployment")["spec"]["template"]["spec"]
    return found


def daemon() -> dict[str, Any]:
    """Its only container."""
    (found,) = pod()["containers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_manifest_is_valid_for_kubernetes(name: str, version: str) -> None:
    kubernetes_validate.validate(manifest(name), version, strict=True)


def test_the_validator_notices_a_misspelt_field() -> None:
    broken = manifest("deployment")
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


def test_every_file_is_listed_and_every_object_is_about_the_same_pods() -> None:
    listed = manifest("kustomization")
    assert sorted(listed["resources"]) == [f"{name}.yaml" for name in NAMES if name != "kustomization"]
    assert {image["name"] for image in listed["images"]} == {daemon()["image"]}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", image["newTag"]) for image in listed["images"])
    deployment = manifest("deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selected = {
        "deployment": deployment["spec"]["selector"]["matchLabels"],
        "service": manifest("service")["spec"]["selector"],
        "poddisruptionbudget": manifest("poddisruptionbudget")["spec"]["selector"]["matchLabels"],
        "podmonitor": manifest("podmonitor")["spec"]["selector"]["matchLabels"],
        "spread": pod()["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    }
    assert selected == dict.fromkeys(selected, labels)


def test_every_container_is_confined() -> None:
    whole = pod()["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert whole["runAsUser"] == whole["runAsGroup"] == whole["fsGroup"] == 10001
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod()["containers"], *pod()["initContainers"]):
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
    assert pod()["automountServiceAccountToken"] is False
    account = manifest("serviceaccount")
    assert account["automountServiceAccountToken"] is False
    assert account["metadata"]["name"] == pod()["serviceAccountName"]


def test_the_probes_ask_what_the_daemon_answers_and_the_database_restarts_no_pod() -> None:
    container = daemon()
    (port,) = container["ports"]
    assert port == {"name": "http", "containerPort": Environment.model_fields["http_port"].default}
    asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in asked.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    assert {probe["path"] for probe in asked.values()} <= _ENDPOINTS.keys()
    assert {probe["port"] for probe in asked.values()} == {"http"}
    assert pod()["terminationGracePeriodSeconds"] > Environment.model_fields["drain_seconds"].default


def test_the_database_url_comes_from_a_mounted_secret_and_every_variable_is_a_setting() -> None:
    known = {f"SIDECAR_{name.upper()}" for name in Environment.model_fields} | {"SIDECAR_DATABASE_URL_FILE"}
    secret = next(volume for volume in pod()["volumes"] if "secret" in volume)
    for container in (*pod()["containers"], *pod()["initContainers"]):
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert variables.keys() <= known
        assert "SIDECAR_DATABASE_URL" not in variables
        mount = next(mount for mount in container["volumeMounts"] if mount["name"] == secret["name"])
        assert variables["SIDECAR_DATABASE_URL_FILE"] == f"{mount['mountPath']}/database_url"
        assert mount["readOnly"] is True
    # The file's name in the secret is what the comment on making it says.
    assert f"{secret['secret']['secretName']} --from-file=database_url" in (FOLDER / "kustomization.yaml").read_text()


def test_the_pod_monitor_scrapes_the_metrics_port_under_the_job_that_the_rules_expect() -> None:
    found = manifest("podmonitor")
    assert found["apiVersion"] == "monitoring.coreos.com/v1"
    (endpoint,) = found["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in daemon()["ports"]}
    assert endpoint["path"] == "/metrics"
    assert endpoint["path"] in _ENDPOINTS
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels[found["spec"]["jobLabel"]] == "sidecar-daemon"


def test_the_scaler_scales_the_deployment_on_the_depth_of_the_queues() -> None:
    found = manifest("scaledobject")
    assert found["apiVersion"] == "keda.sh/v1alpha1"
    target = manifest("deployment")
    assert found["spec"]["scaleTargetRef"] == {"name": target["metadata"]["name"]}
    assert "replicas" not in target["spec"], "two would quarrel over the number of replicas"
    assert 1 <= found["spec"]["minReplicaCount"] < found["spec"]["maxReplicaCount"]
    (trigger,) = found["spec"]["triggers"]
    assert trigger["type"] == "prometheus"
    settings = trigger["metadata"]
    assert settings.keys() == {"serverAddress", "query", "threshold"}
    assert all(isinstance(value, str) for value in settings.values()), "KEDA takes strings only"
    assert float(settings["threshold"]) > 0
    assert "sidecar_queue_depth" in metric_names(settings["query"])
