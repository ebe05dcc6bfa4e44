"""launch/kuberay.yaml: what the API server would refuse or silently drop, and whether its run fits
its pods.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from ppo_dist.config import Config
from ppo_dist.config.load import validated
from tests.launch.rig import ROOT

SCHEMAS = ROOT / "tests" / "schemas"
# as in k8s.io/apimachinery: pkg/api/resource, pkg/util/validation
QUANTITY = r"([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)"
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
VARIABLE = r"[-._a-zA-Z][-._a-zA-Z0-9]*"
OFFERED = ("cpus", "gpus")
LONGEST_JOB_NAME = 47  # KubeRay adds to it
PROBES = {  # those that need no token: Ray's own head and agent
    "ray-head": {"path": "/api/gcs_healthz", "port": 8265},
    "ray-worker": {"path": "/api/local_raylet_healthz", "port": 52365},
}
SECRETS = {"WANDB_API_KEY": "wandb-api-key", "HF_TOKEN": "hf-token"}
UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

Object = dict[str, Any]


def objects() -> dict[str, Object]:
    found = yaml.safe_load_all((ROOT / "launch" / "kuberay.yaml").read_text())
    return {each["kind"]: each for each in found}


def strict(schema: Any) -> Any:
    """The same schema, which also refuses keys that it does not know: a server drops them."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and isinstance(schema.get("type"), str):
        made.setdefault("additionalProperties", False)
    return made


def validator(name: str) -> Draft7Validator:
    schema = strict(json.loads((SCHEMAS / f"ray.io_{name}_v1.schema.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft7Validator(schema)


def repeated(value: Any, schema: Any) -> Iterator[str]:
    """Entries of lists that the server holds apart by keys, and that have the same."""
    if isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        seen = [tuple(each.get(key) for key in keys) for each in value] if keys else []
        yield from (f"{each} twice" for each in set(seen) if seen.count(each) > 1)
        for each in value:
            yield from repeated(each, schema.get("items", {}))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from repeated(each, schema.get("properties", {}).get(key, {}))


def pods(job: Object) -> dict[str, Object]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = {g["groupName"]: g["template"]["spec"] for g in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **groups}


def number(quantity: str) -> float:
    found = re.fullmatch(QUANTITY, quantity)
    assert found, quantity
    return float(found[1]) * UNITS[found[2]]


def faults(made: dict[str, Object]) -> list[str]:
    """What is wrong, in words."""
    job, cluster = made["RayJob"], made["RayJob"]["spec"]["rayClusterSpec"]
    jobs, clusters = validator("rayjobs"), validator("rayclusters")
    found = [f"{e.json_path}: {e.message}" for e in jobs.iter_errors(job)]
    found += [e.message for e in clusters.iter_errors({"spec": cluster})]
    found += repeated(job, jobs.schema)
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("whoever reaches the cluster may use it: no token")
    if f"\nray=={cluster['rayVersion']}\n" not in (ROOT / "docker/constraints.txt").read_text():
        found.append(f"rayVersion {cluster['rayVersion']}: not what is installed")
    claim = made["PersistentVolumeClaim"]["spec"]
    if claim["accessModes"] != ["ReadWriteMany"]:
        found.append("all pods write to the claim")
    if not re.fullmatch(QUANTITY, str(claim["resources"]["requests"]["storage"])):
        found.append(f"{claim['resources']['requests']['storage']}: no quantity")
    if any(cluster["headGroupSpec"]["rayStartParams"].get(f"num-{of}") != "0" for of in OFFERED):
        found.append("workers could stand on the head")
    names = [each["metadata"]["name"] for each in made.values()]
    names += [group["groupName"] for group in cluster["workerGroupSpecs"]]
    for pod in pods(job).values():
        names += [each["name"] for each in (*pod["containers"], *pod["volumes"])]
        found += faults_of_pod(pod, made)
    found += [f"{n}: no name" for n in names if not re.fullmatch(LABEL, n) or len(n) > 63]
    if len(job["metadata"]["name"]) > LONGEST_JOB_NAME:
        found.append("the job's name is too long")
    return found


def faults_of_pod(pod: Object, made: dict[str, Object]) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod["volumes"]}
    for volume in pod["volumes"]:
        for kind, key, named in (
            ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
            ("ConfigMap", "configMap", "name"),
        ):
            if key in volume and volume[key][named] != made[kind]["metadata"]["name"]:
                yield f"{volume['name']}: there is no such {kind}"
    for container in pod["containers"]:
        for mount in container["volumeMounts"]:
            if mount["name"] not in volumes:
                yield f"{mount['name']}: no such volume"
        for probe in ("readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            if any(asked[key] != value for key, value in PROBES[container["name"]].items()):
                yield f"{probe} of {container['name']}: {asked}"
        if not container["securityContext"].get("runAsNonRoot"):
            yield f"{container['name']}: could be root"
        yield from faults_of_secrets(container["env"])
        names = [variable["name"] for variable in container["env"]]
        if len(set(names)) < len(names):
            yield f"{names}: twice the same variable"
        for variable in container["env"]:
            if not re.fullmatch(VARIABLE, variable["name"]):
                yield f"{variable['name']}: no variable"
            if re.search("KEY|TOKEN|SECRET", variable["name"]) and "value" in variable:
                yield f"{variable['name']}: a secret, in plain text"
        limits, requests = (container["resources"][key] for key in ("limits", "requests"))
        quantities = [*limits.values(), *requests.values()]
        wrong = [q for q in quantities if not re.fullmatch(QUANTITY, str(q))]
        yield from (f"{quantity}: no quantity" for quantity in wrong)
        if not wrong and any(number(requests[name]) > number(limits[name]) for name in requests):
            yield "more requested than the limit"


def faults_of_secrets(env: list[Object]) -> Iterator[str]:
    name, made = secret()
    values = {variable["name"]: variable.get("valueFrom", {}) for variable in env}
    for variable, key in SECRETS.items():
        from_secret = values.get(variable, {}).get("secretKeyRef", {})
        if (from_secret.get("name"), from_secret.get("key")) != (name, key) or key not in made:
            yield f"{variable}: not from the secret that the README makes"


def commands(text: str) -> list[str]:
    """Lines that call kubectl, in their order."""
    lines = [re.sub(r" +#.*", "", line.lstrip("# ")) for line in text.splitlines()]
    return [line for line in lines if re.match(r"(until )?kubectl ", line)]


def secret() -> tuple[str, list[str]]:
    """Name and keys of the secret that the README makes."""
    [line] = [c for c in commands((ROOT / "README.md").read_text()) if " create secret " in c]
    words = line.split()
    return words[4], re.findall(r"--from-literal=([\w-]+)=", line)


def test_nothing_is_wrong() -> None:
    assert faults(objects()) == []


GONE = object()


def put(path: str, value: Any) -> Any:
    def change(made: dict[str, Object]) -> None:
        *way, last = path.split("/")
        node: Any = made["RayJob"]["spec"]
        if path.startswith("claim/"):
            node = {"claim": made["PersistentVolumeClaim"]["spec"]}
        for part in way:
            node = node[int(part)] if isinstance(node, list) else node[part]
        if value is GONE:
            del node[int(last) if isinstance(node, list) else last]
        else:
            node[int(last) if isinstance(node, list) else last] = value

    return change


HEAD = "rayClusterSpec/headGroupSpec/template/spec"
WORKER = "rayClusterSpec/workerGroupSpecs/1/template/spec"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("backofLimit", 3), "backofLimit"),
        (put("backoffLimit", "three"), "three"),
        (put("rayClusterSpec/authOptions/mode", "open"), "open"),
        (put("rayClusterSpec/workerGroupSpecs/0/groupName", "Learners"), "Learners"),
        (put(f"{HEAD}/containers/0/resources/limits/memory", "64 GB"), "64 GB"),
        (put(f"{HEAD}/containers/0/resources/requests/memory", "65Gi"), "more requested"),
        (put(f"{HEAD}/containers/0/env/1/name", "WANDB_API_KEY"), "twice"),
        (put(f"{HEAD}/containers/0/env/0", {"name": "MY_TOKEN", "value": "x"}), "plain text"),
        (put(f"{HEAD}/containers/0/volumeMounts/0/name", "share"), "no such volume"),
        (put(f"{HEAD}/volumes/0/persistentVolumeClaim/claimName", "mine"), "no such Pers"),
        (put(f"{HEAD}/containers/0/readinessProbe/httpGet/prot", 1), "prot"),
        (put(f"{HEAD}/containers/0/livenessProbe/httpGet/path", "/"), "livenessProbe of ray-head"),
        (put(f"{WORKER}/containers/0/livenessProbe/httpGet/port", 1), "livenessProbe of ray-w"),
        (put(f"{WORKER}/containers/0/securityContext/runAsNonRoot", GONE), "could be root"),
        (put("rayClusterSpec/headGroupSpec/rayStartParams/num-gpus", GONE), "on the head"),
        (put("claim/accessModes/0", "ReadWriteOnce"), "all pods"),
        (put("claim/resources/requests/storage", "500 GB"), "500 GB: no quantity"),
        (put("rayClusterSpec/authOptions", GONE), "no token"),
        (put("rayClusterSpec/rayVersion", "2.59.0"), "rayVersion 2.59.0"),
        (put(f"{HEAD}/containers/0/env/0", GONE), "WANDB_API_KEY: not from the secret"),
        (put(f"{WORKER}/containers/0/env/1/valueFrom/secretKeyRef/name", "mine"), "HF_TOKEN: not"),
        (put(f"{WORKER}/containers/0/env/1/valueFrom/secretKeyRef/key", "token"), "HF_TOKEN: not"),
    ],
)
def test_a_fault_is_found(change: Any, words: str) -> None:
    made = copy.deepcopy(objects())
    change(made)
    assert any(words in fault for fault in faults(made)), faults(made)


def config() -> Config:
    return validated(Config, yaml.safe_load(objects()["ConfigMap"]["data"]["run.yaml"]), "run.yaml")


def test_its_run_fits_its_pods() -> None:
    """Every worker finds its GPU, and the files of the run are on the claim."""
    made = objects()
    groups = made["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = {
        g["groupName"]: g["replicas"]
        * int(g["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for g in groups
    }
    run = config()
    assert gpus == {"learners": run.learner.workers, "rollouts": run.rollout.workers}
    for pod in pods(made["RayJob"]).values():
        [container] = pod["containers"]
        mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        [claim] = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        [memory] = [v["name"] for v in pod["volumes"] if "emptyDir" in v]
        assert Path(run.run.dir).is_relative_to(mounted[claim])
        assert mounted[memory] == "/dev/shm"
        assert {"readinessProbe", "livenessProbe"} <= container.keys()


def test_the_commands_that_are_shown(tmp_path: Path) -> None:
    """README and the file's head show the same; the log's waits until there is one."""
    shown = commands((ROOT / "README.md").read_text())
    head = commands((ROOT / "launch" / "kuberay.yaml").read_text())
    assert len(shown) == 3 and head[:3] == shown
    assert shown[1] == "kubectl apply -f launch/kuberay.yaml"
    assert f"job/{objects()['RayJob']['metadata']['name']};" in shown[2]
    for name, text in {
        "kubectl": 'echo x >> "$AT/asked"; [ $(wc -l < "$AT/asked") -eq 3 ] && echo "$@"',
        "sleep": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "AT": str(tmp_path)}
    done = subprocess.run(["bash", "-c", shown[2]], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "logs --follow job/ppo-dist\n"


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (1, 1), (2, 2), (3, 0), (130, 130)])
def test_it_resumes_and_tries_again_unless_it_was_stopped(
    tmp_path: Path, code: int, seen: int
) -> None:
    """Its script, with a `ppo-dist` that ends as told."""
    program = tmp_path / "ppo-dist"
    program.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    program.chmod(0o755)
    made = objects()
    script = made["ConfigMap"]["data"]["train.sh"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == seen
    assert result.stdout == "train /etc/ppo-dist/run.yaml --resume\n"
    assert made["RayJob"]["spec"]["backoffLimit"] > 0
    assert made["RayJob"]["spec"]["entrypoint"] == "bash /etc/ppo-dist/train.sh"
