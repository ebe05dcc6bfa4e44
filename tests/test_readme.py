"""What the README says is there, and its example works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from ppo_dist.config import Config
from ppo_dist.config.load import load, merged
from ppo_dist.run import FIXED
from ppo_dist.tracking.local import read_rows
from ppo_dist.tracking.metrics import keys
from tests.conftest import raw_config
from tests.unit.test_cli import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def listed_in_the_tree() -> set[str]:
    """Paths of files and, with a slash, folders, by their indentation."""
    tree = README[README.index("```\nppo_dist/\n") + 4 :]
    found: set[str] = set()
    way: list[str] = []
    for line in tree[: tree.index("```")].splitlines():
        name = line.split()[0]
        way[(len(line) - len(line.lstrip())) // 2 :] = [name]
        assert all(folder.endswith("/") for folder in way[:-1]), line
        found.add("".join(way))
    return found


def test_the_tree_names_every_file_and_no_other() -> None:
    """But for packages' marks, and what is only data: of it the folder may be named."""
    listed = listed_in_the_tree()
    tops = {name.split("/")[0] for name in listed}
    assert tops == {"ppo_dist", "launch", "configs", "docker", "docs", "tests"}
    data = {".json", ".csv", ".png", ".patch", ".pyc", ".typed"}
    there = {
        str(path.relative_to(ROOT))
        for top in tops
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in data and path.name != "__init__.py"
    }
    assert {name for name in listed if not name.endswith("/")} == there
    assert all((ROOT / name).is_dir() for name in listed if name.endswith("/"))


def test_its_config_loads(tmp_path: Path) -> None:
    """The second one shows sections to put into the first."""
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    whole, unlabelled = (yaml.safe_load(b) for b in blocks if not b.startswith("# own.yaml"))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(whole))
    config = load(path)
    assert config.learner.workers == 4 and config.mix.prompts.value == 64
    path.write_text(yaml.safe_dump(merged(whole, unlabelled)))
    config = load(path)
    assert config.semi.gate.share == 0.6 and config.semi.guard.drop.action == "roll_back"


def test_own_data_reward_and_schedule(tmp_path: Path) -> None:
    blocks = re.findall(r"```\w+\n(# (\w+\.\w+): .*?)```", README, flags=re.S)
    for text, name in blocks:
        assert text.count("\n") <= 13, "ten lines or so"
        (tmp_path / name).write_text(text)
    assert sorted(name for _, name in blocks) == ["own.yaml", "reward.py", "rows.py"]
    subprocess.run([sys.executable, "rows.py"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "ppo_dist", "train", "own.yaml", "cluster.kind=local"]
    result = subprocess.run(
        [*command, "tracking.wandb=off"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = read_rows(tmp_path / "runs/own/metrics.jsonl")
    assert [row["semi/mu"] for row in rows[1:]] == [1.0] * 4 + [0.5] * 4 + [0.1] * 4
    assert 0 < rows[-1]["reward/verifiable/mean"] < 1, "the function's values, not only 0 and 1"
    assert (
        rows[-1]["sup/tokens"] > 0 and rows[-1]["eval/held_out/nll"] < rows[0]["eval/held_out/nll"]
    )


def test_it_says_what_may_not_change_on_the_way() -> None:
    words = README.split("`--resume` may change any key but")[1].split(". ")[0]
    for key in FIXED:
        assert f"`{key}`" in words, key


def test_the_tests_that_it_names_exist() -> None:
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 30
    for name in named:
        assert f"def {name}(" in code, name


def test_files_it_names_exist() -> None:
    for name in re.findall(r"(?:launch|configs|docs|tests)/[\w./]*\w", README):
        assert (ROOT / name).exists(), name
    for script in ("quickstart.sh", "test.sh"):
        assert os.access(ROOT / "launch" / script, os.X_OK)


def test_every_command_it_shows_is_one() -> None:
    shown = set(re.findall(r"^ppo-dist ([\w-]+)", README, flags=re.M))
    assert len(shown) > 5 and shown <= {*commands()}


def test_troubleshooting_names_keys_and_metrics_that_exist(tmp_path: Path) -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    words = re.findall(r"`([\w./]+)", page)
    reference = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)$", reference, flags=re.M)
    for word in words:
        if word.split(".")[0] in sections and "." in word:
            section = reference.split(f"\n## {word.split('.')[0]}\n")[1].split("\n## ")[0]
            assert f"`{word.split('.', 1)[1]}" in section, word
    raw = raw_config(tmp_path)
    known = {*keys(Config.model_validate(raw))}
    groups = {key.split("/")[0] for key in known}
    metrics = [word for word in words if "/" in word and word.split("/")[0] in groups]
    assert len(metrics) > 5
    for metric in metrics:
        assert metric in known or metric.startswith("reward/"), metric


def test_troubleshooting_quotes_messages_as_they_are() -> None:
    """Those of our own, which a reader searches the page for."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    files = [*(ROOT / "ppo_dist").rglob("*.py"), *(ROOT / "launch").glob("*.s*")]
    code = re.sub(r'"\s+f?"', "", " ".join(path.read_text(encoding="utf-8") for path in files))
    for words in (
        "no Ray job server can be reached there",
        "refuses this token",
        "needs a token",
        "this run was sent with",
        "and the cluster has",
        "the working directory is larger than the cluster takes",
        "nodes have joined the Ray cluster after 300 s",
        "the cluster is too small",
    ):
        assert words in page and words in code, words
