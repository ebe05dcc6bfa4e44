"""The import table of docs/design.md: who may import whom, and where the heavy libraries may
appear.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "ppo_dist"
BASE = {"config", "types", "reports", "protocols", "device", "files", "heap", "vitals"}
LEAF = {*BASE, "models"}
ALLOWED = {
    "config": {"config"},
    "types": {"config"},
    "reports": set(),
    "protocols": {"config", "types", "reports"},
    "heap": set(),
    "device": {"config", "types", "heap"},
    "files": {"config"},
    "vitals": {"device", "reports"},
    "algo": {"algo", "types", "config"},
    "semi": {"semi", "types", "config"},
    "data": {"data", *BASE},
    "rewards": {"rewards", "data.batching", *LEAF},
    "models": {"models", *BASE},
    "transport": {"transport", *BASE},
    "tracking": {"tracking", *BASE},
    "rollout": {"rollout", "models", "transport", "tracking", *BASE},
    "learner": {
        "learner", "algo", "models", "transport", "data.batching", "tracking.metrics", *BASE
    },
    "cluster": {"cluster", "rollout", "learner", "rewards", *BASE},
    "coordinator": {
        "coordinator", "algo", "semi", "data", "tracking.metrics", "config", "types", "reports",
        "protocols", "files",
    },
}  # fmt: skip
HEAVY = {
    "torch": {"types", "protocols", "device", "algo", "semi", "models", "transport", "rollout",
              "learner", "coordinator", "rewards.model", "fetch", "study.bench"},
    "deepspeed": {"learner.engine", "learner.process_group"},
    "ray": {"cluster", "transport.store", "submit", "follow"},
    "wandb": {"tracking.wandb"},
    "vllm": {"rollout.vllm", "rollout.vllm_end"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_import_table() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        package = name.split(".")[0]
        for module in imports(path):
            inner = module.removeprefix("ppo_dist.")
            known = inner.split(".")[0] in ALLOWED
            judged = package in ALLOWED and module.startswith("ppo_dist.") and known
            allowed = ALLOWED.get(package, set())
            if judged and not any(inside(inner, {a}) or inside(a, {inner}) for a in allowed):
                wrong.append(f"{name} imports {module}")
            top = module.split(".")[0]
            if top in HEAVY and not inside(name, HEAVY[top]):
                wrong.append(f"{name} imports {module}")
    assert not wrong, "\n".join(wrong)


def depends_on_cuda(node: ast.AST) -> bool:
    """Whether it is torch.cuda, a comparison with "cuda", or a device of that name."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) == "torch.cuda"
    if isinstance(node, ast.Compare):
        return any(ast.unparse(part) == "'cuda'" for part in (node.left, *node.comparators))
    return isinstance(node, ast.Call) and ast.unparse(node).startswith("torch.device('cuda'")


def test_one_module_knows_cuda() -> None:
    """Whatever depends on the device stands in device.py, but for what is fastest for a layer
    (models/kernels.py); others may say its name.
    """
    asked = {
        (str(path.relative_to(ROOT)), ast.unparse(node))
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if depends_on_cuda(node)
    }
    assert ("device.py", "torch.cuda") in asked
    others = {(file, text) for file, text in asked if file != "device.py"}
    assert others == {
        ("cluster/layout.py", "device == 'cuda'"),  # whether workers take GPUs of a cluster
        ("cluster/layout.py", "made.device == 'cuda'"),
        ("doctor.py", "config.cluster.device != 'cuda'"),  # what a user asks for
        ("models/kernels.py", "query.device.type == 'cuda'"),  # what an attention can be told
    }


def test_config_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, ppo_dist.config.load, ppo_dist.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
