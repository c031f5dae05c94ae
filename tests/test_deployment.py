"""What runs for a team: docker-compose.yml against the Compose specification, the cluster's manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import compose
from upvla import stack
from upvla.config import SiteConfig, load

ROOT = Path(__file__).parents[1]
VALUES = {name: value or f"secret-{name.lower()}" for name, value in compose.example().items()} | {"PAGES_URL": ""}
ONE_SHOT = {"deploy"}
OF_ONE_MACHINE = {"UPVLA_HOME", "PREFECT_HOME", "TORCH_EXTENSIONS_DIR", "PATH", "NO_PROXY", "no_proxy"}


def services() -> dict[str, Any]:
    return dict(compose.load(VALUES)["services"])


def test_the_compose_file_follows_the_compose_specification() -> None:
    spec = pytest.importorskip("compose_spec", reason="compose-spec, which knows the specification, is not installed")
    whole = spec.PyCompose.from_json(json.dumps(compose.load(VALUES)))
    assert set(whole.service_names()) == set(services())
    wrong = compose.load(VALUES)
    wrong["services"]["s3"]["healthchek"] = wrong["services"]["s3"].pop("healthcheck")
    with pytest.raises(ValueError, match="healthchek"):
        spec.PyCompose.from_json(json.dumps(wrong))


def test_secrets_come_from_env_and_from_nowhere_else() -> None:
    text = compose.FILE.read_text()
    assert compose.variables(text) == set(compose.example())
    with pytest.raises(KeyError, match="set it in"):
        compose.load({})
    for line in text.splitlines():
        name, is_pair, value = line.strip().partition(": ")
        if is_pair and re.search(r"PASSWORD|SECRET|TOKEN|AUTH_STRING", name) and not name.startswith("#"):
            assert "${" in value, line


def test_every_service_is_pinned_healthy_and_not_root() -> None:
    for name, service in services().items():
        assert re.search(r":\d+\.\d+", service["image"]), name
        assert name in ONE_SHOT or service["healthcheck"]["test"][0] == "CMD", name
        for needed, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
            assert how == {"condition": expected}, (name, needed)
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is published beyond loopback by default"
    dockerfile = (ROOT / "infra/Dockerfile").read_text()
    last_user = re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)[-1]
    own_image = {service["image"] for service in services().values() if not service.get("user")}
    assert (last_user, own_image) == ("upvla", {"upvla:0.1.0"})
    (build,) = [service["build"] for service in services().values() if "build" in service]
    assert set(build["args"]) == set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    assert services()["ray-worker-gpu"]["profiles"] == ["gpu"]


def test_postgres_is_not_healthy_before_its_databases_are_made() -> None:
    """The image's first start makes them with a server that listens on the Unix socket and nowhere else."""
    check = services()["postgres"]["healthcheck"]["test"]
    assert check[check.index("-h") + 1] == "127.0.0.1"


def test_flows_run_on_a_node_of_ray_that_sees_the_same_recordings() -> None:
    """Ray connects a program to a node on its own machine only; tasks read what the flow has listed."""
    joins = re.search(r"^ *ray start (.*)$", (ROOT / "infra/flow_worker.sh").read_text(), re.MULTILINE)
    assert joins is not None and {'--address="$RAY_ADDRESS"', "--num-cpus=0"} <= set(joins[1].split())
    assert (ROOT / "infra/flow_worker.sh").stat().st_mode & 0o111
    assert services()["worker"]["command"] == "/app/infra/flow_worker.sh"
    assert services()["worker"]["volumes"] == services()["ray-worker"]["volumes"] == ["home:/var/lib/upvla"]
    cluster, _, worker, claim = manifests()
    flows, (ray_pod,) = pod_of(worker), (pod_of(group) for group in cluster["spec"]["workerGroupSpecs"])
    assert flows["containers"][0]["command"] == ["/app/infra/flow_worker.sh"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    shared = {"name": "home", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    for pod in (flows, ray_pod):
        assert shared in pod["volumes"]
        assert {"name": "home", "mountPath": "/var/lib/upvla"} in pod["containers"][0]["volumeMounts"]


def test_compose_cluster_and_local_stack_give_clients_the_same_variables(tmp_path: Path) -> None:
    """A variable that only one of them sets is a run that behaves differently after it has moved."""
    config = stack.StackConfig(home=tmp_path, auth=True)
    stack.prepare(config)
    local = set(stack.environment(config)) - OF_ONE_MACHINE - {"AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    local -= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_worker_niceness", "DS_ACCELERATOR"}
    in_containers = set(services()["worker"]["environment"]) - {"PREFECT_WORKER_QUERY_SECONDS"}
    assert in_containers - {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "RAY_AUTH_TOKEN"} == local
    site, secret = (names_in(ROOT / "infra/kuberay" / name) for name in ("site.env", "secret.env.example"))
    assert not site & secret
    assert (site | secret) - {"DS_ACCELERATOR"} == in_containers
    given = services()["worker"]["environment"]
    assert given["UPVLA_PAGES_URL"] == "http://localhost:5000", "links are for people's browsers"
    proof = {name for name, value in given.items() if "secret-" in value} | {"MLFLOW_TRACKING_USERNAME"}
    assert secret == proof, "a cluster's pods get a client's secrets, all of them and no server's"


def test_schedules_run_on_the_site_of_the_topology_that_they_are_deployed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They name none, and a flow takes the one of the worker that runs it; so does whoever types a verb there."""
    from flows import steps

    config = stack.StackConfig(home=tmp_path)
    stack.prepare(config)
    lines = (ROOT / "infra/kuberay/site.env").read_text().splitlines()
    workers: dict[str, dict[str, str]] = {
        "local": stack.environment(config),
        "box": stack.environment(config.model_copy(update={"site": "box"})),
        "compose": services()["worker"]["environment"],
        "cluster": {name: value for name, _, value in (line.partition("=") for line in lines)},
    }
    with_gpus = compose.load({**VALUES, "SITE": "compose-gpu"})["services"]
    workers["compose-gpu"] = with_gpus["worker"]["environment"]
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    for site, environment in workers.items():
        monkeypatch.setenv("UPVLA_SITE", environment["UPVLA_SITE"])
        for deployment in deployments:
            assert steps.site_here(deployment["parameters"]["site"]) == site, deployment["name"]
        assert steps.site_here("moon") == "moon"
    monkeypatch.delenv("UPVLA_SITE")
    assert steps.site_here() == "local"


def names_in(path: Path) -> set[str]:
    return {line.partition("=")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")}


def test_a_site_file_says_where_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    sites = {path.stem: load(f"site/{path.stem}", SiteConfig) for path in (ROOT / "configs/site").glob("*.yaml")}
    assert sites.keys() == {"local", "compose", "compose-gpu", "cluster"}
    assert sites["cluster"].tracking_url == "https://mlflow.example.org"
    assert {name for name, site in sites.items() if site.use_gpu} == {"compose-gpu", "cluster"}
    assert [name for name, site in sites.items() if site.stack is not None] == ["local"]


def manifests() -> list[dict[str, Any]]:
    folder = ROOT / "infra/kuberay"
    return [document for path in sorted(folder.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]


def pod_of(owner: dict[str, Any]) -> dict[str, Any]:
    return dict(owner.get("spec", owner)["template"]["spec"])


def test_the_clusters_manifests_name_one_image_and_run_as_nobody_special() -> None:
    kinds = [manifest["kind"] for manifest in manifests()]
    assert kinds == ["RayCluster", "RayJob", "Deployment", "PersistentVolumeClaim"]
    assert {manifest["metadata"]["namespace"] for manifest in manifests()} == {"upvla"}
    cluster, job, worker, _ = manifests()
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for pod in map(pod_of, (*groups, worker)):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["image"] == "upvla:0.1.0"
            assert {"secretRef": {"name": "upvla"}} in container["envFrom"]
        for container in pod["containers"]:
            assert container["resources"]["limits"] and not container["securityContext"]["allowPrivilegeEscalation"]
    (submitter,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    nodes = [pod_of(group)["containers"][0] for group in groups]
    for container in (submitter, cluster["spec"]["autoscalerOptions"], *nodes):
        assert [variable["name"] for variable in container["env"]] == ["RAY_AUTH_TOKEN"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    locked = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert locked is not None and cluster["spec"]["rayVersion"] == locked[1]
