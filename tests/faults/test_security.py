"""Who may run code here: nobody but those whom the config names."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_dist import build
from ppo_dist.config import Config, InputError
from ppo_dist.config.data import HubSource
from ppo_dist.coordinator.watch import read_update
from ppo_dist.data.sources import read
from ppo_dist.journey import encode
from tests.conftest import raw_config

ROOT = Path(__file__).parent.parent.parent / "ppo_dist"
RUN_WHAT_THEY_READ = {
    *("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "tarfile"),
}
CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = ("AutoTokenizer", "AutoConfig", "AutoModel")  # and all whose names go on from here


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call) -> dict[str | None, str]:
    """Keyword arguments as they are written; None is a ** argument."""
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


SOURCES = sorted(ROOT.rglob("*.py"))


def places(wanted: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for name, _ in calls(path)
        if name == wanted or name.endswith(f".{wanted}")
    }


def test_nothing_that_is_read_is_run() -> None:
    wrong = []
    for path in SOURCES:
        where = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            wrong += [f"{where}: {n}" for n in names if n.split(".")[0] in RUN_WHAT_THEY_READ]
        for name, call in calls(path):
            keywords = given(call)
            if (
                name in CALLS
                or (name == "torch.load" and keywords.get("weights_only") != "True")
                or (name == "np.load" and keywords.get("allow_pickle") != "False")
                or name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
                or name in ("os.system", "os.popen")
                or name.endswith((".extractall", ".extract", "unpack_archive"))
                or keywords.get("shell") == "True"
            ):
                wrong.append(f"{where}:{call.lineno}: {name}")
    assert not wrong, wrong
    assert not places("load_checkpoint"), "DeepSpeed's checkpoints are pickles"
    assert places("exec_module") == {"rewards/user.py"}, "the files that a config names"


def test_models_run_code_by_one_key_alone() -> None:
    wrong = []
    for path in SOURCES:
        for name, call in calls(path):
            if not name.endswith(".from_pretrained") or not name.startswith(LOADERS):
                continue
            keywords, where = given(call), f"{path.relative_to(ROOT)}:{call.lineno}"
            if "trust_remote_code" not in keywords and None not in keywords:
                wrong.append(f"{where}: trust_remote_code is not given")
            reads_weights = name.startswith("AutoModel")
            if reads_weights and keywords.get("use_safetensors") != "True" and None not in keywords:
                wrong.append(f"{where}: use_safetensors is not given")
    assert not wrong, wrong


def config(folder: Path, path: Path, **model: Any) -> Config:
    raw = raw_config(folder / "run")
    raw["model"] = {"path": str(path), **model}
    return Config.model_validate(raw)


@pytest.fixture
def model(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    return tmp_path / "model"


def test_weights_that_are_pickles_are_refused(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, model / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        build.check(config(tmp_path, model))
    assert str(error.value) == (
        f"{model}: is not a model folder: it has no safetensors weights (pytorch_model.bin is a "
        "pickle, and is never loaded: convert it)"
    )
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle"):
        build.check_model(str(model))


def test_weights_that_are_cut_off_are_refused(tmp_path: Path, model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    for content in (whole[:-100], whole[:4], b"", b"\xff" * 100):
        (model / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors: is damaged: "):
            build.check(config(tmp_path, model))


def test_layers_that_would_mix_packed_sequences_are_refused(tmp_path: Path, model: Path) -> None:
    kinds = {
        "model_type": "lfm2",
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
    }
    (model / "config.json").write_text(json.dumps(kinds))
    with pytest.raises(InputError, match="model: has layers of kind conv, which would mix"):
        build.check(config(tmp_path, model))


def test_models_whose_logits_are_not_what_the_head_gives_are_refused(
    tmp_path: Path, model: Path
) -> None:
    found = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(found | {"logits_scaling": 8.0}))
    with pytest.raises(InputError, match="model: models with logits_scaling are not supported"):
        build.check(config(tmp_path, model))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no such"}', "\0"])
def test_a_model_config_that_is_none(tmp_path: Path, model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"model: its config\.json cannot be used: "):
        build.check(config(tmp_path, model))


def planted(folder: Path) -> str:
    """Code that leaves a trace where it is run."""
    return f"open({str(folder / 'trace')!r}, 'w').close()\n"


def test_a_model_folders_own_code_runs_by_its_key_alone(tmp_path: Path, model: Path) -> None:
    found = json.loads((model / "config.json").read_text())
    found |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (model / "config.json").write_text(json.dumps(found))
    (model / "evil.py").write_text(
        planted(tmp_path)
        + "from transformers import LlamaConfig\n"
        + "class Evil(LlamaConfig):\n    model_type = 'evil'\n"
    )
    with pytest.raises(InputError, match=r"which only model\.trust_remote_code lets"):
        build.check(config(tmp_path, model))
    assert not (tmp_path / "trace").exists()
    build.check(config(tmp_path, model, trust_remote_code=True))
    assert (tmp_path / "trace").exists()


def test_a_tokenizers_own_code_does_not_run(tmp_path: Path, model: Path) -> None:
    path = model / "tokenizer_config.json"
    found = json.loads(path.read_text())
    found |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(found))
    (model / "evil.py").write_text(planted(tmp_path))
    made = config(tmp_path, model)
    try:
        encode(made, build.check(made), str(model))
    except InputError as error:
        assert "its tokenizer cannot be loaded" in str(error)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name", ["rows.zip", "rows.tar", "rows.jsonl.gz", "rows.pkl", "loader.py", "deep/er/rows.tgz"]
)
def test_archives_and_code_in_a_data_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(planted(tmp_path))
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    source = HubSource(kind="huggingface", path=str(folder))
    with pytest.raises(InputError) as error:
        read([source], "labelled", "labelled", False)
    assert str(error.value) == f"{folder}: {name} is an archive or code, and is not opened"
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/hostname", "a/../../outside.arrow"])
def test_a_saved_dataset_points_nowhere_else(tmp_path: Path, name: str) -> None:
    import datasets

    folder = tmp_path / "set"
    datasets.Dataset.from_list([{"prompt": "a", "response": "b"}]).save_to_disk(str(folder))
    (path,) = folder.glob("*.arrow")
    shutil.move(path, tmp_path / "outside.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    source = HubSource(kind="huggingface", path=str(folder))
    with pytest.raises(InputError, match=r"set/state\.json: .* is not inside the folder"):
        read([source], "labelled", "labelled", False)


def test_a_skipped_update_with_objects_in_it_is_refused(tmp_path: Path) -> None:
    import numpy as np

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "trace"), "w")

    path = tmp_path / "update.npz"
    np.savez(path, coefficients=np.array([Evil()], dtype=object))
    with pytest.raises(InputError, match="is not a skipped update of a run"):
        read_update(path)
    assert not (tmp_path / "trace").exists()
