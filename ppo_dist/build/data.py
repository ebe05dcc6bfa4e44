"""Data and model of a run, checked before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppo_dist.build import engines
from ppo_dist.build.parts import reward_source
from ppo_dist.config import ORIGINS, Config, InputError, Origin, reward_models, sees_answer
from ppo_dist.config.reward import AnyReward
from ppo_dist.data.partition import parted, refuse_overlap, without_answer
from ppo_dist.data.sources import Row, read

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ATTENDING = {"attention", "full_attention", "sliding_attention"}  # transformers' names


@dataclass(frozen=True)
class Rows:
    """All data of a run as rows, already checked.

    Example: Rows(prompts={"labelled": [...], "verifiable": [...]}, held_out=[...], test=[...],
    probe=[])
    """

    prompts: Mapping[Origin, Sequence[Row]]
    held_out: Sequence[Row]
    test: Sequence[Row]
    probe: Sequence[Row]


def check(config: Config) -> Rows:
    """Reads all data and looks at the model folder, without loading a model.

    Raises:
        InputError: something is missing or wrong; names file, row or key.
    """
    for section in (config.model, config.reference, config.critic):
        if section is not None and section.path is not None:
            check_model(section.path, config.model.trust_remote_code)
    for model in reward_models(config):
        check_reward_model(model.path)
    reward_source(config)  # says what is wrong with a pattern
    engines.check(config)
    rewards = dict(config.reward)
    prompts: dict[Origin, Sequence[Row]] = {
        origin: read(dict(config.data)[origin], origin, origin, _compares(rewards[origin]))
        for origin in ORIGINS
    }
    compares = _compares(config.reward.labelled)
    held_out = read(config.data.held_out, "held_out", "labelled", compares)
    test = read(config.data.test, "test", "labelled", compares)
    for name, rows in (("held_out", held_out), ("test", test)):
        for origin in ORIGINS:
            refuse_overlap(name, rows, origin, prompts[origin])
    prompts["labelled"], probe = parted(prompts["labelled"], config.semi.probe, config.run.seed)
    if config.semi.probe and not (probe and prompts["labelled"]):
        raise InputError(
            f"semi.probe {config.semi.probe:g} of {len(probe) + len(prompts['labelled'])} labelled "
            f"prompts is {len(probe)}: some must be in it, and some must not"
        )
    prompts["unlabelled"] = [*prompts["unlabelled"], *map(without_answer, probe)]
    return Rows(prompts, held_out, test, probe)


def _compares(reward: AnyReward | None) -> bool:
    return reward is not None and sees_answer(reward)


def check_model(path: str, may_run_code: bool = False) -> None:
    """Whether a path is a Hugging Face folder with safetensors, or could be a hub name.

    Raises:
        InputError: it is neither, or would run code of its own where it may not.
    """
    folder = Path(path)
    if folder.is_dir():
        for what, pattern in (
            ("config.json", "config.json"),
            ("safetensors weights", "*.safetensors"),
            ("tokenizer", "tokenizer*"),
        ):
            if not any(folder.glob(pattern)):
                raise InputError(
                    f"{path}: is not a model folder: it has no {what}{_pickled(folder)}"
                )
        _check_files(folder, may_run_code)
    elif folder.exists() or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such model folder")
    elif not _on_hub(path):
        raise InputError(
            f"{path}: no such model folder, and no model of that name could be had from the hub"
        )


def _pickled(folder: Path) -> str:
    """What to say where the weights are such as run code when they are read."""
    found = sorted(p.name for kind in PICKLES for p in folder.glob(kind))
    return f" ({found[0]} is a pickle, and is never loaded: convert it)" if found else ""


def _check_files(folder: Path, may_run_code: bool) -> None:
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    from ppo_dist.models.policy import after_the_head

    for weights in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(weights, "numpy"):  # looks at its header and its length alone
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{weights}: is damaged: {error}") from None
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=may_run_code)
    except Exception as error:  # whatever it is, the user must mend the folder
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{folder}: brings Python code of its own, which only model.trust_remote_code "
                "lets a policy, reference or critic run"
            ) from None
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: its config.json cannot be used: {reason}") from None
    if (name := after_the_head(config.get_text_config())) is not None:
        raise InputError(f"{folder}: models with {name} are not supported")
    if others := set(config.to_dict().get("layer_types") or ()) - ATTENDING:
        raise InputError(
            f"{folder}: has layers of kind {', '.join(sorted(others))}, which would mix sequences "
            f"that are packed into one row; those of kind {', '.join(sorted(ATTENDING))} do not"
        )


def check_reward_model(path: str) -> None:
    """Whether a path is, or could be, a sequence-classification model with one output.

    Raises:
        InputError: it is not.
    """
    check_model(path)
    file = Path(path) / "config.json"
    if not file.exists():
        return
    found = json.loads(file.read_text())
    kinds, outputs = found.get("architectures") or [], found.get("id2label") or {"0": "", "1": ""}
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or len(outputs) != 1:
        raise InputError(
            f"{path}: reward kind model needs a sequence-classification model with one output; "
            f"this is {', '.join(kinds) or 'no known model'} with {len(outputs)} output(s)"
        )


def _on_hub(name: str) -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
        if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "ON", "YES"):
            return False
        return HfApi().model_info(name, timeout=5) is not None
    except HFValidationError:
        return False
    except Exception:  # no network, no such model, no access: each means that it cannot be had
        return False


def located(config: Config) -> Config:
    """The same config with absolute folders: workers may run in another working directory."""
    moved = {"run": config.run.model_copy(update={"dir": str(Path(config.run.dir).resolve())})}
    for name in ("model", "reference", "critic"):
        section = dict(config)[name]
        if section is not None and section.path is not None:
            moved[name] = section.model_copy(update={"path": absolute(section.path)})
    return config.model_copy(update=moved)


def absolute(path: str) -> str:
    """A model folder wherever one stands; the name of one on the hub as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def initial_policy(config: Config) -> str:
    """Where the policy that a run begins with is, or will be."""
    return config.model.path or str(Path(config.run.dir) / "model")


def model_folder(config: Config, rows: Rows, is_new: bool = False) -> str:
    """The initial policy's path; a model from scratch is made in the run folder, once, or again for
    a run that begins.
    """
    if config.model.path is not None:
        return config.model.path
    from ppo_dist.files import aside
    from ppo_dist.models.scratch import make_model

    assert config.model.scratch is not None, "the schema demands one of the two"
    folder = Path(initial_policy(config))
    if is_new or not folder.exists():
        every = [*[row for group in rows.prompts.values() for row in group], *rows.held_out]
        texts = [
            text
            for row in every
            for text in (row.prompt, row.response, row.answer)
            if isinstance(text, str)
        ]
        with aside(folder) as made:
            make_model(made, config.model.scratch, texts, config.run.seed)
    return str(folder)
