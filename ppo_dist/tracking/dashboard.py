"""`ppo-dist dashboard`: the W&B workspace of a run's project as code, a section for each group of
metrics. The only file that imports wandb_workspaces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces

from ppo_dist.config import Config, InputError
from ppo_dist.tracking.metrics import VITALS, keys
from ppo_dist.tracking.wandb import has_key

# in the order in which one looks at them; open are those that say whether it learns
SECTIONS = {
    "eval": True,
    "reward": True,
    "policy": True,
    "critic": False,
    "objective": False,
    "sup": True,
    "semi": False,
    "pseudo": False,
    "guard": True,
    "rollout": False,
    "perf": False,
    "timing_s": False,
    "system": False,
}
TOGETHER = {"timing_s"}  # parts of one whole: curves in one panel
SAMPLES = "samples"


def dashboard(config: Config, entity: str) -> workspaces.Workspace:
    """The workspace, not saved yet. A key that a run of this config has is in exactly one panel."""
    by_group: dict[str, list[str]] = {}
    for key in keys(config):
        by_group.setdefault(key.split("/")[0], []).append(key)
    order = [*SECTIONS, *sorted(by_group.keys() - SECTIONS.keys())]
    sections = [
        workspaces.Section(
            name=group, panels=_panels(group, by_group[group]), is_open=SECTIONS.get(group, False)
        )
        for group in order
        if group in by_group
    ]
    table = panels.WeavePanelSummaryTable(table_name=SAMPLES)
    sections.append(workspaces.Section(name=SAMPLES, panels=[table], is_open=True))
    return workspaces.Workspace(
        entity=entity,
        project=config.tracking.project,
        name="ppo_dist",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="step"),
    )


def spec(config: Config) -> dict[str, Any]:
    """What would be sent, as plain data."""
    view = dashboard(config, "entity")._to_model()
    found: dict[str, Any] = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return found


def publish(config: Config, entity: str) -> str:
    """Saves it to W&B; returns its address.

    Raises:
        InputError: there is no key.
    """
    if not has_key():
        raise InputError("no W&B key: wandb login, or WANDB_API_KEY; --out FILE needs none")
    address: str = dashboard(config, entity).save().url
    return address


def write(config: Config, out: Path) -> None:
    """Writes what would be sent into a file.

    Raises:
        InputError: it is a folder.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(spec(config), indent=1) + "\n", encoding="utf-8")


def _panels(group: str, names: list[str]) -> list[Any]:
    if group == "system":  # all workers in a panel
        of = {kind: [name for name in names if name.endswith(f"/{kind}")] for kind in VITALS}
        return [panels.LinePlot(title=kind, x="step", y=own) for kind, own in of.items()]
    if group in TOGETHER:
        return [panels.LinePlot(title=group, x="step", y=names)]
    return [panels.LinePlot(title=name, x="step", y=[name]) for name in names]
