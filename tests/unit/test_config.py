"""The config: what is read, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ppo_dist.config import Config, InputError, reuses_logprobs, sees_answer
from ppo_dist.config.algorithm import Clip, KlInReward
from ppo_dist.config.base import Constant, Linear
from ppo_dist.config.combinations import impossible
from ppo_dist.config.load import dump, load
from ppo_dist.config.load import merged as on_top_of

MINIMAL = {
    "run": {"dir": "out"},
    "train": {"steps": 3},
    "model": {"path": "models/tiny"},
    "data": {"verifiable": "prompts.jsonl"},
    "reward": {"verifiable": "exact"},
}
LATE = {"mix": {"prompts": {"kind": "piecewise", "values": [[1, 2]]}}}
TWICE = {"mix": {"prompts": {"kind": "piecewise", "values": [[0, 1], [5, 2], [5, 3]]}}}
LABELS = {"data": {"labelled": "labels.jsonl"}, "mix": {"labelled_batch": 4}}


def merged(base: dict, *changes: dict) -> dict:
    made = dict(base)
    for change in changes:
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(made.get(key), dict)
            made[key] = merged(made[key], value) if both else value
    return made


@pytest.fixture
def read(tmp_path: Path):
    """Loads the minimal config with changes."""
    path = tmp_path / "run.yaml"

    def _read(*changes: dict, overrides: tuple[str, ...] = ()) -> Config:
        path.write_text(yaml.safe_dump(merged(MINIMAL, *changes)))
        return load(path, overrides)

    return _read


@pytest.fixture
def refused(read):
    """The message of the refusal, once checked for being one line that names the file."""

    def _refused(*changes: dict, overrides: tuple[str, ...] = ()) -> str:
        with pytest.raises(InputError) as error:
            read(*changes, overrides=overrides)
        message = str(error.value)
        assert "\n" not in message
        if not (overrides and message.startswith("'")):
            assert "run.yaml: " in message
        return message

    return _refused


def test_defaults_of_a_minimal_config(read) -> None:
    config = read()
    assert config.train.steps == 3
    assert config.train.keep_checkpoints == 2
    assert config.algorithm.clip == Clip(low=0.2, high=0.2)
    assert config.mix.prompts == Constant(value=32)
    assert config.tracking.wandb == "auto"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"stepz": 5}}, "train.stepz: unknown key; did you mean train.steps?"),
        ({"trian": {"steps": 5}}, "trian: unknown key; did you mean train?"),
        (
            {"data": {"verifiable": {"kind": "file", "path": "x", "colums": {}}}},
            "data.verifiable.0.colums: unknown key; did you mean data.verifiable.0.columns?",
        ),
        (
            {"reward": {"verifiable": {"kind": "numeric", "tolerence": 1}}},
            "reward.verifiable.tolerence: unknown key; did you mean reward.verifiable.tolerance?",
        ),
        ({"run": {"zzz": 5}}, "run.zzz: unknown key; allowed: dir, seed"),
        ({"run": {"dir": "a\0b"}}, "run.dir: no file can have this name"),
        ({"run": {"dir": ""}}, "run.dir: no file can have this name"),
        ({"data": {"verifiable": "x" * 300}}, "data.verifiable.0.path: no file can have this name"),
        ({"train": {"steps": "many"}}, "train.steps: input should be a valid integer"),
        ({"train": {"steps": 0}}, "train.steps: input should be greater than or equal to 1"),
        ({"learner": {"zero_stage": 4}}, "learner.zero_stage: input should be 0, 1, 2 or 3"),
        ({"learner": {"lr": -1}}, "learner.lr"),
        ({"learner": {"lr": float("nan")}}, "learner.lr"),
        ({"learner": {"lr": {"kind": "cubic"}}}, "learner.lr: kind 'cubic' is not one of"),
        ({"reward": {"verifiable": "exakt"}}, "reward.verifiable: kind 'exakt' is not one of"),
        ({"learner": {"optimizer": "adam"}}, "learner.optimizer: kind 'adam' is not one of"),
        ({"data": {"verifiable": [{"path": "x"}]}}, "data.verifiable.0"),
        ({"rollout": {"engine": "vlm"}}, "rollout.engine"),
        ({"model": {"path": None}}, "model: give exactly one of model.path and model.scratch"),
        ({"model": {"scratch": {}}}, "model: give exactly one of"),
        ({"mix": {"policy_coef": "half"}}, "mix.policy_coef: "),
        ({"rollout": {"top_p": 0.9}}, "rollout: top_p is not for training"),
        ({"rollout": {"top_k": 5}}, "eval.top_p and eval.top_k are for evaluation"),
        ({"algorithm": {"clip": {"low": 1.5}}}, "algorithm.clip.low"),
        ({"algorithm": {"clip": {"dual": 0.5}}}, "algorithm.clip.dual"),
        (
            {"algorithm": {"advantage": "rloo", "truncated": "bootstrap"}},
            "algorithm: truncated: bootstrap needs a critic",
        ),
        ({"algorithm": {"kl": {"kind": "los"}}}, "algorithm.kl"),
        ({"algorithm": {"kl": {"controller": "adaptive"}}}, "algorithm.kl"),
        ({"algorithm": {"advantage": "rloo"}}, "rollout.group_size must be 2 or more"),
        (
            {"algorithm": {"old_logprobs": "behaviour"}, "stream": {"max_lag": 1}},
            "leaves nothing to correct: set algorithm.correction to off",
        ),
        (
            {"algorithm": {"old_logprobs": "behaviour"}, "critic": {"shared": True}},
            "set algorithm.old_logprobs to recompute",
        ),
        (
            {
                "algorithm": {
                    "kl": {"coef": 0, "controller": {"kind": "adaptive", "target": 1, "horizon": 9}}
                }
            },
            "algorithm.kl.coef 0 stays 0 under an adaptive controller",
        ),
        ({"model": {"lora": {}}}, "set reference.reset to never"),
        ({"reference": None, "algorithm": {"kl": 0.1}}, "without one (reference null)"),
        (
            {"reference": None, "algorithm": {"kl": 0}, "semi": {"guard": {"kl": {"limit": 1}}}},
            "without one (reference null)",
        ),
        ({"critic": {"shared": True, "warmup": 3}}, "critic.warmup would move a shared trunk"),
        ({"critic": {"shared": True, "path": "x"}}, "critic.path must be null"),
        (
            {"algorithm": {"advantage": "reinforce_pp"}, "critic": {"warmup": 2}},
            "critic.* has no effect without a critic",
        ),
        (
            {"model": {"path": None, "scratch": {"hidden": 10, "heads": 3}}},
            "model.scratch: hidden (10) must be a multiple of heads (3)",
        ),
        (LATE, "mix.prompts: the first steps must begin at 0 and rise"),
        (TWICE, "mix.prompts: the first steps must begin at 0 and rise"),
        (
            {"reward": {"verifiable": {"kind": "exact", "extract": "after"}}},
            "reward.verifiable.extract.marker: required",
        ),
    ],
)
def test_a_fault_is_one_line_that_names_the_key(refused, change: dict, said: str) -> None:
    assert said in refused(change)


def test_all_faults_are_told_at_once(refused) -> None:
    message = refused({"train": {"steps": "x"}, "run": {"sed": 1}})
    assert "train.steps" in message
    assert "did you mean run.seed?" in message


@pytest.mark.parametrize("section", ["run", "train", "model", "data"])
def test_a_missing_section_is_named(tmp_path: Path, section: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != section}))
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value) == f"{path}: {section}: required"


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a config is a mapping of sections"),
        ("- 1\n- 2\n", "a config is a mapping of sections"),
        ("run: {dir: a\ntrain: [", "not valid YAML"),
        ("run: {dir: 2024-99-99}\n", "not valid YAML"),
        ("run: &a {dir: *a}\n", "not valid YAML: it is nested too deeply, or an alias"),
        ("[" * 1200, "not valid YAML: it is nested too deeply"),
        (BOMB, "not valid YAML: its aliases make more than 100000 values"),
        ("run: !!int ''\n", "not valid YAML"),
        ('run: {dir: "\\ud800"}\n', "not valid YAML"),
        ("base: a\0b\n", "not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {said}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load(tmp_path / "nowhere.yaml")


def test_overrides_set_nested_keys_and_keep_the_rest(read) -> None:
    config = read(
        {"rollout": {"group_size": 3, "chunk": 7}},
        overrides=("rollout.chunk=9", "train.steps=11", "eval.every=2", "learner.lr=1e-3"),
    )
    assert (config.rollout.group_size, config.rollout.chunk) == (3, 9)
    assert config.train.steps == 11
    assert config.eval.every == 2
    assert config.learner.lr == Constant(value=1e-3)
    config = read(overrides=("mix.prompts={kind: linear, start: 1, end: 5, steps: 4}",))
    assert config.mix.prompts == Linear(kind="linear", start=1, end=5, steps=4)


def test_an_override_turns_a_bare_kind_into_a_section(read) -> None:
    config = read(
        {"reward": {"verifiable": "reasoning_gym"}},
        overrides=("reward.verifiable.strict=false", "reward.verifiable.extract.kind=first_line"),
    )
    assert config.reward.verifiable.kind == "reasoning_gym"
    assert config.reward.verifiable.strict is False
    assert config.reward.verifiable.extract.kind == "first_line"


def test_a_bare_kind_of_the_base_becomes_a_section_too() -> None:
    base = {"learner": {"optimizer": "sgd"}, "data": {"labelled": "a.jsonl"}}
    top = {"learner": {"optimizer": {"momentum": 0.9}}, "data": {"labelled": {"path": "b.jsonl"}}}
    assert on_top_of(base, top) == {
        "learner": {"optimizer": {"kind": "sgd", "momentum": 0.9}},
        "data": {"labelled": {"path": "b.jsonl"}},
    }


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", ".steps=3"])
def test_bad_override_syntax(refused, override: str) -> None:
    assert refused(overrides=(override,)) == f"{override!r}: an override is written key.sub=value"


def test_bad_override_values(refused) -> None:
    for value in ("[1", "2024-99-99"):
        assert "not valid YAML" in refused(overrides=(f"train.steps={value}",))
    assert "steps is not a section" in refused(overrides=("train.steps.more=1",))
    assert "did you mean train.steps?" in refused(overrides=("train.step=1",))


def test_numbers_in_scientific_notation_as_yaml_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump(MINIMAL) + "learner: {lr: 1e-3, critic_lr: {kind: constant, value: 2e-4}}"
    assert yaml.safe_load(text)["learner"]["lr"] == "1e-3"  # YAML 1.1 wants a dot
    path.write_text(text + "\nalgorithm: {kl: 1e-2, clip: 1e-1}\n")
    config = load(path)
    assert config.learner.lr == Constant(value=0.001)
    assert config.learner.critic_lr == Constant(value=0.0002)
    assert config.algorithm.kl == KlInReward(coef=0.01)
    assert config.algorithm.clip == Clip(low=0.1, high=0.1)


def test_dump_and_load_give_the_same_config(read, tmp_path: Path) -> None:
    config = read(
        LABELS,
        {
            "data": {"held_out": {"kind": "huggingface", "path": "some/set", "split": "test"}},
            "reward": {
                "labelled": {
                    "kind": "weighted",
                    "parts": [
                        {"weight": 0.9, "reward": "exact"},
                        {"weight": -0.1, "reward": {"kind": "regex", "pattern": "ä\n"}},
                    ],
                }
            },
            "mix": {"schedule": {"kind": "supervised_first", "steps": 2, "then": 1e-05}},
            "learner": {"lr": {"kind": "piecewise", "values": [[0, 1e-3], [5, 1e-4]]}},
            "tracking": {"wandb": "off"},
        },
    )
    again = tmp_path / "config.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load(again) == config
    assert yaml.safe_load(dump(config))["algorithm"]["value_clip"] == 0.2  # defaults are written


def test_bare_shorthands(read) -> None:
    config = read(
        LABELS,
        {
            "data": {"labelled": ["a.jsonl", {"kind": "file", "path": "b.json"}]},
            "reward": {"verifiable": {"kind": "exact", "extract": "last_number"}},
            "mix": {"schedule": 0.3},
            "algorithm": {"advantage": "gae"},
            "learner": {"optimizer": "sgd"},
        },
    )
    assert [s.path for s in config.data.labelled] == ["a.jsonl", "b.json"]
    assert [s.path for s in config.data.verifiable] == ["prompts.jsonl"]
    assert config.reward.verifiable.extract.kind == "last_number"
    assert config.mix.schedule == Constant(value=0.3)
    assert config.algorithm.advantage.lam == 0.95
    assert config.learner.optimizer.momentum == 0.0


def test_off_needs_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    more = "tracking: {wandb: off}\nalgorithm: {correction: off}\n"
    path.write_text(yaml.safe_dump(MINIMAL) + more)
    assert load(path).tracking.wandb == load(path).algorithm.correction.kind == "off"


@pytest.mark.parametrize(
    ("changes", "takes_over"),
    [
        ({}, True),
        ({"algorithm": {"old_logprobs": "recompute"}}, False),
        ({"learner": {"dtype": "bf16", "zero_stage": 1}}, False),
        ({"rollout": {"engine": "vllm"}}, False),
        ({"stream": {"max_lag": 1}}, False),
        ({"algorithm": {"correction": "importance"}}, False),
        ({"critic": {"shared": True}}, False),
        (
            {
                "algorithm": {"old_logprobs": "behaviour", "correction": {"kind": "off"}},
                "stream": {"max_lag": 1},
            },
            True,
        ),
    ],
)
def test_old_log_probabilities_are_taken_over_where_they_are_the_same(
    read, changes, takes_over
) -> None:
    assert reuses_logprobs(read({}, changes)) == takes_over


UNLABELLED = {"data": {"unlabelled": "u.jsonl"}, "mix": {"shares": {"unlabelled": 1}}}
BLIND = {"kind": "regex", "pattern": "a"}
VOTES = merged(
    UNLABELLED,
    {"reward": {"unlabelled": "vote"}, "rollout": {"group_size": 2}, "mix": {"schedule": 0.1}},
)
ADAPTIVE = {"kind": "adaptive", "start": 0.5, "low": 0.1, "high": 1}
IMPOSSIBLE = [
    ({"learner": {"zero_stage": 0, "offload": "cpu"}}, "learner.offload needs learner.zero_"),
    ({"cluster": {"kind": "local"}, "rollout": {"workers": 2}}, "cluster.kind local runs one"),
    ({"cluster": {"kind": "local"}, "learner": {"workers": 2}}, "cluster.kind local runs one"),
    ({"mix": {"labelled_batch": 4}}, "mix.labelled_batch is above 0, but data.labelled is empty"),
    (
        {"mix": {"schedule": {"kind": "supervised_first", "steps": 2}}},
        "mix.schedule supervised_first needs mix.labelled_batch above 0",
    ),
    ({"mix": {"prompts": 0}}, "nothing to train on: mix.prompts is 0"),
    (merged(LABELS, {"mix": {"prompts": 0, "schedule": 0}}), "nothing to train on"),
    (
        {"mix": {"shares": {"unlabelled": 1}}, "reward": {"unlabelled": None}},
        "mix.shares.unlabelled is above 0, but data.unlabelled is empty",
    ),
    (UNLABELLED, "mix.shares.unlabelled is above 0, but reward.unlabelled is not given"),
    ({"mix": {"shares": {"verifiable": 0}}}, "mix.prompts is above 0, but every one of mix.shares"),
    (
        merged(UNLABELLED, {"reward": {"unlabelled": "exact"}}),
        "reward.unlabelled must not see an answer",
    ),
    ({"data": {"held_out": "h.jsonl"}}, "data.held_out needs reward.labelled to be evaluated"),
    ({"data": {"test": "t.jsonl"}}, "data.test needs reward.labelled to be evaluated"),
    (merged(VOTES, {"rollout": {"group_size": 1}}), "reward.unlabelled is a vote: rollout.group_"),
    (
        merged(VOTES, {"reward": {"unlabelled": BLIND}, "semi": {"gate": {"kind": "confidence"}}}),
        "semi.gate confidence judges votes",
    ),
    ({"semi": {"gate": {"kind": "confidence"}}}, "semi.gate confidence has no effect"),
    (
        merged(VOTES, {"semi": {"gate": {"kind": "trajectory", "window": 2}}}),
        "semi.gate trajectory compares with labelled prompts",
    ),
    ({"semi": {"pseudo": {"batch": 1}}}, "semi.pseudo has nothing to take from"),
    (
        merged(VOTES, {"semi": {"pseudo": {"batch": 1}}, "mix": {"schedule": 0}}),
        "semi.pseudo has no effect: μ (mix.schedule) is 0",
    ),
    (merged(VOTES, {"semi": {"probe": 0.1}}), "semi.probe needs reward.labelled"),
    (merged(VOTES, {"reward": {"labelled": "vote"}}), "reward.labelled sees answers"),
    (
        merged(
            VOTES,
            {
                "mix": {"schedule": 0},
                "semi": {"guard": {"kl": {"limit": 1, "action": "raise_mu"}}},
            },
        ),
        "semi.guard.kl cannot raise_mu: μ (mix.schedule) is 0 where it would",
    ),
    ({"mix": {"schedule": ADAPTIVE}}, "an adaptive schedule follows the held-out set: it needs"),
    (
        {"semi": {"guard": {"drop": {"limit": 0.1, "action": "freeze"}}}},
        "semi.guard.drop follows the held-out set: it needs data.held_out and eval.every",
    ),
    (
        {"semi": {"guard": {"kl": {"limit": 1, "action": "roll_back"}}}},
        "semi.guard.kl rolls back to the best held-out accuracy: it needs data.held_out",
    ),
]


@pytest.mark.parametrize(("change", "said"), IMPOSSIBLE)
def test_impossible_combinations(refused, change: dict, said: str) -> None:
    assert f"run.yaml: {said}" in refused(change)


def test_possible_combinations_near_the_impossible_ones(read) -> None:
    for change in (
        {"learner": {"zero_stage": 1, "dtype": "bf16", "offload": "cpu"}},
        {"cluster": {"kind": "local"}},
        merged(LABELS, {"mix": {"prompts": 0}}),
        merged(UNLABELLED, {"reward": {"unlabelled": BLIND}}),
        VOTES,
        merged(VOTES, {"semi": {"pseudo": {"batch": 1}, "gate": {"kind": "confidence"}}}),
        {"semi": {"guard": {"drop": {"limit": 0.1}}}},
    ):
        assert list(impossible(read(change))) == []


def test_sees_answer_looks_inside_weighted_sums(read) -> None:
    regex = {"weight": 1, "reward": {"kind": "regex", "pattern": "a"}}
    blind = {"kind": "weighted", "parts": [regex, regex]}
    inner = {"kind": "weighted", "parts": [regex, {"weight": 1, "reward": "numeric"}]}
    seeing = {"kind": "weighted", "parts": [regex, {"weight": 1, "reward": inner}]}
    assert not sees_answer(read({"reward": {"verifiable": blind}}).reward.verifiable)
    assert sees_answer(read({"reward": {"verifiable": seeing}}).reward.verifiable)
