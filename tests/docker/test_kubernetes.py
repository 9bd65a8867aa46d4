"""KubeRay's files: valid for its CRDs and its operator, and their commands run."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.cli.options import parse_options
from pipeline.cli.yaml12 import load_yaml
from schemas.extract import PRESETS, ExtractConfig
from schemas.run import RunConfig
from tests.faults.environments import Nodes, process_variables
from tests.faults.processes import kill_all
from tests.s3 import SeaweedFS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
CRDS = ROOT.parent / "shared" / "data" / "kuberay_crds"
FILES = sorted(FOLDER.glob("*.yaml"))
JOBS = [file for file in FILES if file.name.startswith("rayjob")]
METADATA = {"name", "generateName", "namespace", "labels", "annotations"}
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
each_job = pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)


def read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = load_yaml(file.read_text(encoding="utf-8"))
    return values


def cluster_of(values: dict[str, Any]) -> dict[str, Any]:
    """The spec of the RayCluster, which a RayJob contains."""
    spec: dict[str, Any] = values["spec"]
    return spec["rayClusterSpec"] if values["kind"] == "RayJob" else spec


def pods_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(values)
    return [g["template"]["spec"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@cache
def crd(kind: str) -> dict[str, Any]:
    """KubeRay's schema of version v1, in which unknown fields are errors."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip("the CRDs of KubeRay are not beside the project")
    versions = load_yaml(file.read_text(encoding="utf-8"))["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema = closed(schema)
    schema["properties"]["metadata"] = {
        "properties": {key: {} for key in METADATA},
        "required": ["name"],
        "additionalProperties": False,
    }
    return {**schema, "required": ["apiVersion", "kind", "metadata", "spec"]}


def closed(schema: Any) -> Any:
    """A structural schema as the API server's strict field validation takes it."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        kept = schema.get("x-kubernetes-preserve-unknown-fields", False)
        result.setdefault("additionalProperties", bool(kept))
    return result


def problems(values: dict[str, Any]) -> list[str]:
    """Violations of the CRD's schema, and refusals of the operator."""
    validator = jsonschema.Draft202012Validator(crd(values["kind"]))
    found = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(values)]
    return found or list(refusals(values))


def refusals(values: dict[str, Any]) -> Iterator[str]:
    """Rules of KubeRay 1.7.0 that a schema cannot express (its controllers/ray/utils/
    validation.go, and the CEL rules of the CRDs), as far as these files touch them."""
    spec, cluster = values["spec"], cluster_of(values)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", values["metadata"]["name"]):
        yield "name: not a DNS label of at most 47 characters"
    token = cluster.get("authOptions", {}).get("mode") == "token"
    version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
    if token and version < (2, 52):
        yield "authOptions: token needs rayVersion >= 2.52"
    scales = cluster.get("enableInTreeAutoscaling", False)
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas outside minReplicas to maxReplicas"
    if scales and any(pod.get("restartPolicy", "Never") != "Never" for pod in pods_of(values)):
        yield "restartPolicy: must be Never with autoscaler v2"
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    seen: dict[tuple[str, str], int] = {}
    for rule in rules:
        condition, policy = rule["condition"], rule["policy"]
        if ("jobStatus" in condition) == ("jobDeploymentStatus" in condition):
            yield "deletionRules: one of jobStatus and jobDeploymentStatus is needed"
            continue
        if policy == "DeleteWorkers" and scales:
            yield "deletionRules: DeleteWorkers does not go with autoscaling"
        status = condition.get("jobStatus") or condition["jobDeploymentStatus"]
        if (status, policy) in seen:
            yield f"deletionRules: two rules {policy} for {status}"
        seen[status, policy] = condition.get("ttlSeconds", 0)
    for (status, policy), seconds in seen.items():
        if policy == "DeleteSelf" and seconds < seen.get((status, "DeleteCluster"), 0):
            yield f"deletionRules: DeleteSelf before DeleteCluster for {status}"


def test_there_are_files() -> None:
    names = {file.name for file in FILES}
    assert names == {"raycluster.yaml", "rayjob-extract.yaml", "rayjob-train.yaml"}


@each_file
def test_kuberay_accepts(file: Path) -> None:
    assert problems(read(file)) == []


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for part in path[:-1]:
            values = values[part]  # type: ignore[index]
        values[path[-1]] = to  # type: ignore[index]

    return change


CLUSTER = ("spec", "rayClusterSpec")
GROUP = (*CLUSTER, "workerGroupSpecs", 0)
POD = (*GROUP, "template", "spec")
BAD = {
    "unknown field": _set("spec", "backofLimit", to=3),
    "unknown field of a pod": _set(*POD, "toleration", to=[]),
    "unknown field of a container": _set(*POD, "containers", 0, "volumeMount", to=[]),
    "unknown metadata": _set("metadata", "label", to={}),
    "text for a number": _set("spec", "backoffLimit", to="ten"),
    "no such mode": _set(*CLUSTER, "authOptions", to={"mode": "tokens"}),
    "no such version": _set(*CLUSTER, "autoscalerOptions", "version", to="v3"),
    "number for a parameter": _set(*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus", to=0),
    "no quantity": _set(*POD, "containers", 0, "resources", "limits", "memory", to="256 GB"),
    "no group name": lambda values: cluster_of(values)["workerGroupSpecs"][0].pop("groupName"),
    "no such policy": _set("spec", "deletionStrategy", "deletionRules", 0, "policy", to="Delete"),
    "workers deleted under the autoscaler": _set(
        "spec", "deletionStrategy", "deletionRules", 0, "policy", to="DeleteWorkers"
    ),
    "job deleted before its cluster": _set(
        "spec", "deletionStrategy", "deletionRules", 3, "condition", "ttlSeconds", to=1
    ),
    "both ways to delete": _set("spec", "shutdownAfterJobFinishes", to=True),
    "token without a version": lambda values: cluster_of(values).pop("rayVersion"),
    "more than the maximum": _set(*GROUP, "replicas", to=99),
    "pods restart": _set(*POD, "restartPolicy", to="Always"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_found(change: Callable[[dict[str, Any]], Any]) -> None:
    values = copy.deepcopy(read(FOLDER / "rayjob-train.yaml"))
    change(values)
    assert problems(values)


@each_file
def test_pods_are_what_the_readme_says(file: Path) -> None:
    values = read(file)
    cluster = cluster_of(values)
    (pin,) = re.findall(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pin
    assert cluster["authOptions"]["mode"] == "token"
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (
        True,
        "v2",
    )
    for pod in pods_of(values):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        uid = re.search(r"^USER (\d+)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
        assert uid is not None
        assert pod["securityContext"]["runAsUser"] == int(uid[1])
        assert container["image"] == "REGISTRY/haste:TAG"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["envFrom"][0]["secretRef"]["name"] == "s3-credentials"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["medium"] == "Memory"
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
            hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
            notice = int(re.search(r"--deadline-remaining-seconds (\d+)", hook)[1])  # type: ignore
            assert f"sleep {notice}" in hook
            assert pod["terminationGracePeriodSeconds"] >= notice + 30


def arguments_of(file: Path) -> list[str]:
    """Words of the entry point without the program, which is checked."""
    words = shlex.split(read(file)["spec"]["entrypoint"])
    assert words[0] == "python"
    if words[1] == "-m":
        assert words[2] == "pipeline.extract"
        return words[3:]
    assert words[1] == "/opt/haste/jobs/train_haste.py"
    return [word.replace("/opt/haste", str(ROOT)) for word in words[2:]]


def test_options_of_the_extraction_exist() -> None:
    config = parse_options(
        ExtractConfig,
        arguments_of(FOLDER / "rayjob-extract.yaml"),
        command="",
        about="",
        presets=PRESETS,
        preset_key="dataset",
    )
    assert config.source != config.store


def test_options_of_the_training_exist() -> None:
    values = read(FOLDER / "rayjob-train.yaml")
    words = arguments_of(FOLDER / "rayjob-train.yaml")
    config = parse_options(RunConfig, words, command="", about="")
    (group,) = cluster_of(values)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.workers.min_count == gpus * group["minReplicas"]
    assert config.workers.count == gpus * group["maxReplicas"]
    assert config.data.cache_dir in {mount["mountPath"] for mount in container["volumeMounts"]}
    environment = load_yaml(values["spec"]["runtimeEnvYAML"])["env_vars"]
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) <= grace


def rendered(file: Path, bucket: str, cache_dir: Path) -> str:
    """The entry point for a bucket of this test."""
    entrypoint: str = read(file)["spec"]["entrypoint"]
    return (
        entrypoint.replace("s3://BUCKET", bucket)
        .replace("/opt/haste", str(ROOT))
        .replace("--data.cache-dir /cache", f"--data.cache-dir {cache_dir}")
        .replace("sit_xl2_haste.yaml", "demo.yaml")
        .replace(f"--dataset imagenet --source {bucket}/imagenet", "--dataset demo")
        .replace("python ", f"{sys.executable} ")
    )


TINY = {
    "rayjob-extract.yaml": "--shard-size 600",
    "rayjob-train.yaml": "--workers.count 2 --workers.min-count 1 --steps 12 "
    "--alignment.termination.step 6",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_entry_points_run_on_a_cluster_of_two_nodes(s3: SeaweedFS, tmp_path: Path) -> None:
    """The commands in the files, with S3 and the sizes of the demo; the second time, each finds its
    work done, as a retry of the job would."""
    bucket = s3.bucket()
    with ExitStack() as stack:
        ray_folder = Path(tempfile.mkdtemp(prefix="hk-", dir="/tmp"))  # short socket paths
        stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        mark = uuid.uuid4().hex
        stack.callback(kill_all, mark)
        variables = process_variables(mark, tmp_path, ray_folder) | s3.environment
        (tmp_path / "nodes").mkdir()
        nodes = stack.enter_context(Nodes(tmp_path / "nodes", variables))
        variables |= {"RAY_ADDRESS": str(nodes.address), "PYTHONPATH": str(ROOT)}

        def run(name: str) -> str:
            command = f"{rendered(FOLDER / name, bucket, tmp_path / 'cache')} {TINY[name]}"
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,  # no checkout is the working folder of a job in a pod
                env=variables,
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "1797 samples in 3 shards" in run("rayjob-extract.yaml")
        assert "nothing to do" in run("rayjob-extract.yaml")
        summary = json.loads(run("rayjob-train.yaml"))
        assert summary["termination_step"] == 6
        assert summary["bytes_read"]["maps"]["after"] == 0
        assert json.loads(run("rayjob-train.yaml")) == summary
