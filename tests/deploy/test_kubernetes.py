"""The Kubernetes manifests, as far as they can be checked without a cluster: built by kubectl, held against schemas."""

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shared.device.memory_plan import BATCH
from shared.nats.streams import consumers
from shared.nats.subjects import DEC, TOK
from shared.settings import Settings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.34", "1.37")  # the oldest that has what is used here, and the newest whose schemas are at hand
DATA_DIR = "/srv/data"  # of the image
Object = dict[str, Any]


def program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def build(folder: Path) -> list[Object]:
    run = subprocess.run([program("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example overlay with its templates filled in, as docs/kubernetes.md says."""
    deploy = tmp_path_factory.mktemp("kubernetes") / "deploy"
    for name in ("nats", "kubernetes"):
        shutil.copytree(ROOT / "deploy" / name, deploy / name, ignore=shutil.ignore_patterns("*.env", "keys.toml"))
    folder = deploy / "kubernetes" / "overlays" / "example"
    for template in folder.glob("*.example"):
        template.rename(template.with_suffix(""))
    return folder


@pytest.fixture(scope="module")
def objects(example: Path) -> list[Object]:
    return build(example)


@pytest.fixture(scope="module")
def with_components(example: Path) -> list[Object]:
    folder = example.with_name("components")
    shutil.copytree(example, folder)
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    kustomization["components"] = ["../../components/time-slicing", "../../components/webhooks"]
    kustomization["secretGenerator"].append({"name": "webhooks", "envs": ["webhooks.env"]})
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    (folder / "webhooks.env").write_text("HEARTMULA_WEBHOOK_SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    return build(folder)


@pytest.fixture(scope="module")
def fill_ckpt() -> list[Object]:
    return list(yaml.safe_load_all((KUBERNETES / "fill-ckpt.yaml").read_text()))


@pytest.fixture(scope="module")
def values() -> Object:
    found: Object = yaml.safe_load((KUBERNETES / "nats-values.yaml").read_text())
    return found


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Pod templates, by the name of what makes them."""
    for item in objects:
        if item["kind"] in ("Deployment", "Job"):
            yield item["metadata"]["name"], item["spec"]["template"]


def containers(objects: list[Object]) -> dict[str, Object]:
    return {c["name"]: c for _, pod in pods(objects) for c in pod["spec"]["containers"]}


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """Environment of a container's process. Fails if a Secret, a ConfigMap or a key of one is missing."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= one(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container["env"]:
        if "value" in variable:
            found[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], variable["value"])
        else:
            ref = variable["valueFrom"]["secretKeyRef"]
            found[variable["name"]] = base64.b64decode(one(objects, "Secret", ref["name"])["data"][ref["key"]]).decode()
    return found


@pytest.mark.parametrize("built", ["objects", "with_components", "fill_ckpt"])
def test_every_object_fits_the_schemas_of_kubernetes(built: str, request: pytest.FixtureRequest) -> None:
    found: list[Object] = request.getfixturevalue(built)
    assert found
    for item in found:
        if item["kind"] != "ScaledObject":
            for version in VERSIONS:
                kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("built", ["objects", "with_components", "fill_ckpt"])
def test_everything_is_in_one_namespace_and_named_once(built: str, request: pytest.FixtureRequest) -> None:
    found: list[Object] = request.getfixturevalue(built)
    assert {o["metadata"].get("namespace", "heartmula") for o in found} == {"heartmula"}
    assert all("namespace" in o["metadata"] for o in found if o["kind"] != "Namespace")
    names = [(o["kind"], o["metadata"]["name"]) for o in found]
    assert len(set(names)) == len(names)


def test_every_image_comes_from_where_the_overlay_says(objects: list[Object]) -> None:
    images = {name: c["image"] for name, c in containers(objects).items()}
    assert set(images) == {"setup", "gateway", "tokenizer", "codec"}
    assert all(re.fullmatch(r"registry\.example/heartmula/(gateway|worker):[\d.]+", image) for image in images.values())


def test_every_process_starts_with_the_settings_it_is_given(objects: list[Object]) -> None:
    users = {"setup": "bootstrap", "gateway": "gateway", "tokenizer": "tokenizer", "codec": "codec"}
    for name, container in containers(objects).items():
        environ = environment(objects, container)
        settings = Settings.load(environ)
        assert settings.nats_url == f"nats://{users[name]}:change-me@nats:4222"
        if name == "setup":
            assert settings.nats_replicas == 3
        else:
            settings.require_servers()
        if name == "gateway":
            assert settings.host == "0.0.0.0"
            assert settings.api_keys is not None


def test_webhooks_have_their_secret_and_a_way_out(with_components: list[Object]) -> None:
    gateway = containers(with_components)["gateway"]
    assert Settings.load(environment(with_components, gateway)).webhook_secret
    policy = one(with_components, "NetworkPolicy", "webhooks")
    assert selects(policy["spec"]["podSelector"], labels_of(with_components, "gateway"))


def test_volumes_of_every_pod_exist(objects: list[Object]) -> None:
    known = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for _, pod in pods(objects):
        volumes = {v["name"]: v for v in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            assert {m["name"] for m in container.get("volumeMounts", [])} <= set(volumes)
        for volume in volumes.values():
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in known
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in known
                assert volume["persistentVolumeClaim"]["readOnly"]


def test_every_long_running_container_has_probes(objects: list[Object]) -> None:
    for name, container in containers(objects).items():
        if name == "setup":
            continue
        environ = environment(objects, container)
        port = environ.get("HEARTMULA_METRICS_PORT", environ.get("HEARTMULA_PORT", "8000"))
        assert environ["HEARTMULA_HOST" if name == "gateway" else "HEARTMULA_METRICS_HOST"] == "0.0.0.0"
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        for probe in ("startupProbe", "livenessProbe"):
            check = container[probe]["httpGet"]
            assert (check["path"], str(ports[check["port"]])) == ("/livez", port)
    ready = containers(objects)["gateway"]["readinessProbe"]["httpGet"]
    assert ready == {"path": "/readyz", "port": "http"}


def labels_of(objects: list[Object], name: str) -> dict[str, str]:
    found: dict[str, str] = dict(pods(objects))[name]["metadata"]["labels"]
    return found


def selects(selector: Object, labels: dict[str, str]) -> bool:
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


def test_selectors_find_their_pods(objects: list[Object]) -> None:
    gateway, worker = one(objects, "Deployment", "gateway"), one(objects, "Deployment", "worker")
    for deployment in (gateway, worker):
        pod = deployment["spec"]["template"]
        assert selects(deployment["spec"]["selector"], pod["metadata"]["labels"])
        for spread in pod["spec"].get("topologySpreadConstraints", []):
            assert selects(spread["labelSelector"], pod["metadata"]["labels"])
    assert not selects(gateway["spec"]["selector"], labels_of(objects, "worker"))
    budget = one(objects, "PodDisruptionBudget", "gateway")["spec"]
    assert budget["selector"] == gateway["spec"]["selector"]
    assert 1 <= budget["minAvailable"] < gateway["spec"]["replicas"]


def test_the_ingress_leads_to_the_gateway(objects: list[Object]) -> None:
    service, gateway = one(objects, "Service", "gateway")["spec"], containers(objects)["gateway"]
    assert selects({"matchLabels": service["selector"]}, labels_of(objects, "gateway"))
    assert service["ports"][0]["targetPort"] in {p["name"] for p in gateway["ports"]}
    rule = one(objects, "Ingress", "gateway")["spec"]["rules"][0]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert (backend["name"], backend["port"]["name"]) == ("gateway", service["ports"][0]["name"])


def test_both_workers_of_a_pod_share_one_gpu_and_the_lock(objects: list[Object]) -> None:
    worker = one(objects, "Deployment", "worker")["spec"]
    pod = worker["template"]["spec"]
    assert [c["name"] for c in pod["containers"]] == ["tokenizer", "codec"]
    (claim,) = pod["resourceClaims"]
    template = one(objects, "ResourceClaimTemplate", claim["resourceClaimTemplateName"])
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["count"] == 1
    for container in pod["containers"]:
        assert container["resources"]["claims"] == [{"name": claim["name"]}]
        # Beside the claim no runtime may hand out GPUs that belong to others.
        assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container["env"]
    folders = [{m["mountPath"]: m["name"] for m in c["volumeMounts"]} for c in pod["containers"]]
    assert folders[0][DATA_DIR] == folders[1][DATA_DIR]
    (data,) = [v for v in pod["volumes"] if v["name"] == folders[0][DATA_DIR]]
    assert "emptyDir" in data
    ports = [p["containerPort"] for c in pod["containers"] for p in c["ports"]]
    assert len(set(ports)) == len(ports)
    assert "replicas" not in worker  # applying again would undo what KEDA did


def test_a_rollout_does_not_wait_for_pods_that_have_no_gpu(objects: list[Object]) -> None:
    """A pod that is pending counts as unavailable: with a number here, as many pending pods are replaced by pending
    ones for ever, and those that hold the GPUs never go."""
    strategy = one(objects, "Deployment", "worker")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": "100%"}


def test_the_weights_are_fetched_before_any_pod_mounts_their_volume(
    objects: list[Object], fill_ckpt: list[Object]
) -> None:
    """If pods mount it first, and read-only, the kubelet does not give the volume to the group that writes it."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    commands = re.findall(
        r"^kubectl .*(?:apply|wait).*", text[text.index("## Apply") : text.index("## What to set")], re.M
    )
    first, fill, fetched, everything = commands[:4]
    assert fill.startswith("kubectl apply -f fill-ckpt.yaml")
    assert re.match(r"kubectl --namespace heartmula wait .*complete job/fill-ckpt ", fetched)
    assert everything == "kubectl apply -k overlays/mine"
    selector = re.fullmatch(r"kubectl apply -k overlays/mine --selector (\S+)=(\S+) *(#.*)?", first)
    assert selector
    label = {selector[1]: selector[2]}
    chosen = [o for o in objects if label.items() <= o["metadata"].get("labels", {}).items()]
    assert {(o["kind"], o["metadata"]["name"]) for o in chosen} == {
        ("Namespace", "heartmula"),
        ("PersistentVolumeClaim", "ckpt"),
    }
    pod = one(fill_ckpt, "Job", "fill-ckpt")["spec"]["template"]
    claims = [v["persistentVolumeClaim"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": "ckpt"}], "it writes"
    for name in ("gateway", "worker"):
        reader = dict(pods(objects))[name]["spec"]["securityContext"]
        assert reader["runAsGroup"] == pod["spec"]["securityContext"]["fsGroup"]
    # No other policy is there yet, so it says all that the pod needs.
    reached = rules(fill_ckpt, pod["metadata"]["labels"], "Egress")
    dns = namespace("kube-system") | {"podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}
    assert sorted(reached, key=str) == sorted([(None, {443}), (dns, {53})], key=str)


def test_with_time_slices_each_worker_asks_for_one(with_components: list[Object]) -> None:
    pod = one(with_components, "Deployment", "worker")["spec"]["template"]["spec"]
    assert "resourceClaims" not in pod
    assert not [o for o in with_components if o["kind"] == "ResourceClaimTemplate"]
    for container in pod["containers"]:
        assert "claims" not in container["resources"]
        assert container["resources"]["limits"]["nvidia.com/gpu.shared"] == "1"
        assert "NVIDIA_VISIBLE_DEVICES" not in {e["name"] for e in container["env"]}  # the device plugin sets it


@pytest.mark.parametrize(("name", "needed"), [("gateway", 5 + 10), ("worker", 30)])
def test_pods_have_time_to_hand_back_what_they_do(objects: list[Object], name: str, needed: int) -> None:
    assert dict(pods(objects))[name]["spec"]["terminationGracePeriodSeconds"] >= needed


@pytest.mark.parametrize("built", ["objects", "with_components", "fill_ckpt"])
def test_pods_may_run_where_security_is_restricted(built: str, request: pytest.FixtureRequest) -> None:
    for _, template in pods(request.getfixturevalue(built)):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_what_is_written_lies_on_a_volume(objects: list[Object]) -> None:
    for name, container in containers(objects).items():
        if name != "setup":
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert writable == {DATA_DIR, "/tmp"}


def test_no_service_looks_like_a_misspelt_setting(objects: list[Object]) -> None:
    assert all(pod["spec"]["enableServiceLinks"] is False for _, pod in pods(objects))


def rules(objects: list[Object], labels: dict[str, str], way: str) -> list[tuple[Object | None, set[int]]]:
    """Allowed peers (None: any) and ports of a pod in one direction. Fails where no policy restricts it."""
    policies = [
        o["spec"] for o in objects if o["kind"] == "NetworkPolicy" and selects(o["spec"]["podSelector"], labels)
    ]
    assert any(way in p["policyTypes"] for p in policies)
    key, side = ("egress", "to") if way == "Egress" else ("ingress", "from")
    return [
        (peer, {p["port"] for p in rule["ports"]})
        for policy in policies
        for rule in policy.get(key, [])
        for peer in rule.get(side, [None])
    ]


NATS_LABELS = {"app.kubernetes.io/name": "nats", "app.kubernetes.io/component": "nats"}


def namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_services_reach_nats_the_store_and_dns_alone(objects: list[Object], name: str) -> None:
    reached = rules(objects, labels_of(objects, name), "Egress")
    dns = namespace("kube-system") | {"podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}
    nats = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "nats"}}}
    expected = [(dns, {53}), (nats, {4222}), (namespace("s3"), {9000})]
    assert sorted(reached, key=str) == sorted(expected, key=str)


def test_the_setup_needs_no_object_store(objects: list[Object]) -> None:
    assert {port for _, ports in rules(objects, labels_of(objects, "setup"), "Egress") for port in ports} == {53, 4222}


def test_only_the_gateway_is_open(objects: list[Object]) -> None:
    assert rules(objects, labels_of(objects, "gateway"), "Ingress") == [(None, {8000})]
    assert rules(objects, labels_of(objects, "worker"), "Ingress") == [(namespace("monitoring"), {9100, 9101})]
    assert rules(objects, labels_of(objects, "setup"), "Ingress") == []
    assert rules(objects, {"any": "other"}, "Ingress") == []


def test_nats_is_reached_by_the_services_its_own_and_keda(objects: list[Object]) -> None:
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "heartmula"}}}
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "nats"}}}
    assert rules(objects, NATS_LABELS, "Ingress") == [(ours, {4222}), (own, {6222}), (namespace("keda"), {8222})]
    for name in ("gateway", "worker", "setup"):
        assert selects(ours["podSelector"], labels_of(objects, name))


def test_queues_of_songs_decide_how_many_workers_there_are(objects: list[Object]) -> None:
    item = one(objects, "ScaledObject", "worker")
    spec = item["spec"]
    assert item["apiVersion"] == "keda.sh/v1alpha1"
    assert spec.keys() <= {
        *("scaleTargetRef", "minReplicaCount", "maxReplicaCount", "idleReplicaCount", "pollingInterval"),
        *("cooldownPeriod", "initialCooldownPeriod", "fallback", "advanced", "triggers"),
    }
    target = spec["scaleTargetRef"]
    assert one(objects, target["kind"], target["name"])["apiVersion"] == target["apiVersion"]
    assert spec["minReplicaCount"] == 0
    assert spec["maxReplicaCount"] == 2  # as the overlay says
    assert spec["cooldownPeriod"] >= 300
    for trigger in spec["triggers"]:
        assert trigger.keys() == {"type", "metadata"}
        assert trigger["type"] == "nats-jetstream"
        metadata = trigger["metadata"]
        assert metadata.keys() == {
            *("natsServerMonitoringEndpoint", "account", "stream", "consumer", "lagThreshold", "activationLagThreshold")
        }
        assert all(isinstance(value, str) for value in metadata.values())  # KEDA refuses others
        assert metadata["natsServerMonitoringEndpoint"] == "nats-headless.heartmula.svc.cluster.local:8222"
        assert int(metadata["lagThreshold"]) == BATCH
        assert metadata["activationLagThreshold"] == "0"
    watched = {(t["metadata"]["stream"], t["metadata"]["consumer"]) for t in spec["triggers"]}
    assert watched == {(stream, c.durable_name) for stream, c in consumers(1.0) if stream in (TOK, DEC)}


def test_nats_starts_with_the_roles_and_passwords_it_is_given(
    objects: list[Object], values: Object, tmp_path: Path
) -> None:
    """The chart writes /etc/nats-config/nats.conf with our include in it; the server itself reads what comes of it."""
    roles = one(objects, "ConfigMap", "nats-roles")
    (volume,) = [p["value"] for p in values["podTemplate"]["patch"]]
    (mount,) = [p["value"] for p in values["container"]["patch"]]
    assert volume["configMap"]["name"] == roles["metadata"]["name"]
    assert volume["name"] == mount["name"]
    folder = tmp_path / mount["mountPath"].lstrip("/")
    folder.mkdir(parents=True)
    for name, text in roles["data"].items():
        (folder / name).write_text(text)
    config, include = tmp_path / "etc" / "nats-config" / "nats.conf", values["config"]["merge"]["$include"]
    config.parent.mkdir()
    config.write_text(f"include {include};\njetstream {{ store_dir: {tmp_path}/js }}\n")
    variables = [
        {"name": name} | (value if isinstance(value, dict) else {"value": value})
        for name, value in values["container"]["env"].items()
    ]
    environ = environment(objects, {"env": variables})
    run = subprocess.run(
        [program("nats-server"), "-t", "-c", config], env=environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_nats_is_a_cluster_that_keeps_what_it_acknowledged(objects: list[Object], values: Object) -> None:
    config = values["config"]
    replicas = environment(objects, containers(objects)["setup"])["HEARTMULA_NATS_REPLICAS"]
    assert config["cluster"] == {"enabled": True, "replicas": int(replicas)}
    assert config["jetstream"]["enabled"]
    assert config["jetstream"]["merge"]["sync_interval"] == "always"
    assert config["jetstream"]["fileStore"]["pvc"]["size"]
    assert config["monitor"]["enabled"]


def test_secrets_and_overlays_of_ones_own_are_not_committed() -> None:
    names = [
        *("overlays/example/nats.env", "overlays/example/s3.env", "overlays/example/keys.toml"),
        *("overlays/mine/kustomization.yaml", "overlays/mine/nats.env"),
    ]
    for name in names:
        run = subprocess.run(["git", "check-ignore", "-q", KUBERNETES / name], cwd=ROOT, check=False)
        assert run.returncode == 0, name
    templates = [str(path) for path in KUBERNETES.rglob("*.example")]
    shown = subprocess.run(["git", "check-ignore", *templates], cwd=ROOT, check=False)
    assert shown.returncode == 1
