"""What can be done beside training: a dry run, other numbers of workers, an evaluation, an export,
a replay.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ppo_dist import build
from ppo_dist.config import ORIGINS, Config, InputError
from ppo_dist.config.load import merged, read_yaml, validated
from ppo_dist.coordinator.experience import supervised
from ppo_dist.coordinator.scale import Scale
from ppo_dist.coordinator.state import Checkpoints, read_state
from ppo_dist.coordinator.watch import not_finite, read_update
from ppo_dist.lock import is_taken
from ppo_dist.run import CONFIG
from ppo_dist.tracking.metrics import Row
from ppo_dist.types import Prompt


def rescale(folder: Path, scale: Scale, console: Console) -> None:
    """Asks the run in a folder for other numbers of workers.

    Raises:
        InputError: nothing is asked for, no run goes on there, or its workers' numbers cannot
            change.
    """
    if scale == Scale():
        raise InputError("say how many: --rollout-workers, --learners, or both")
    if not is_taken(folder):
        raise InputError(
            f"{folder}: no run goes on here; --resume takes rollout.workers and learner.workers"
        )
    raw = read_yaml(folder / CONFIG)
    for section, number in (("rollout", scale.rollout_workers), ("learner", scale.learners)):
        if number is not None:
            raw[section]["workers"] = number
    config = validated(Config, raw, folder / CONFIG)
    if config.cluster.kind == "local" or config.cluster.placement == "colocated":
        raise InputError(
            f"{folder}: the number of workers can change with cluster.kind: ray and "
            "cluster.placement: split alone"
        )
    before = Scale.of(folder)
    Scale(scale.rollout_workers or before.rollout_workers, scale.learners or before.learners).ask(
        folder
    )
    console.print("asked: rollout workers change at the next step, learners at a checkpoint")


def dry_run(config: Config, console: Console) -> None:
    """Checks config, data and model folder, and shows one sequence of each kind with what is
    learned of it.

    Raises:
        InputError: as training would.
    """
    from transformers import AutoTokenizer

    from ppo_dist.journey import encode

    rows = build.check(config)
    build.check_servers(config)
    with tempfile.TemporaryDirectory() as scratch:
        here = config.model_copy(update={"run": config.run.model_copy(update={"dir": scratch})})
        model_path = build.model_folder(here, rows)
        encoded = encode(config, rows, model_path)
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, trust_remote_code=config.model.trust_remote_code
        )
    table = Table("data", "rows", "of them kept", "longest prompt")
    for name, before, after in [
        *((o, rows.prompts[o], encoded.prompts[o]) for o in ORIGINS),
        ("held_out", rows.held_out, [example.prompt for example in encoded.held_out]),
        ("test", rows.test, [example.prompt for example in encoded.test]),
    ]:
        if before:
            table.add_row(
                name,
                str(len(before)),
                str(len(after)),
                f"{max(len(p.tokens_P) for p in after)} tokens",
            )
    console.print(table)
    for origin in ORIGINS:
        if encoded.prompts[origin]:
            _show_prompt(console, origin, encoded.prompts[origin][0])
    if encoded.examples:
        sequence = supervised(encoded.examples[0])
        title = "\na labelled example as a training sequence (the supervised loss is on ●)"
        console.print(title, style="bold")
        weights = [0.0] * sequence.prompt_tokens + sequence.ce_weight_R.tolist()
        marks = Table("token", "text", "loss", show_lines=False)
        for token, weight in zip(sequence.tokens_T.tolist(), weights, strict=True):
            marks.add_row(str(token), repr(tokenizer.decode([token])), "●" if weight else "")
        console.print(marks)
    console.print("everything is in order; nothing was trained")


def _show_prompt(console: Console, origin: str, prompt: Prompt) -> None:
    title = f"\na prompt of origin {origin} ({prompt.uid}, {len(prompt.tokens_P)} tokens)"
    console.print(title, style="bold")
    console.print(prompt.text, markup=False, highlight=False)
    seen = prompt.answer if prompt.answer is not None else "none"
    console.print(f"answer that the reward compares with: {seen}", markup=False, highlight=False)


def evaluate(config: Config, policy: str | None, console: Console) -> None:
    """Evaluates a policy on the held-out set, greedy and sampled, and prints the metrics as a table
    and as JSON.

    Raises:
        InputError: there is no held-out set or no policy.
    """
    from ppo_dist.coordinator.evaluate import Evaluator
    from ppo_dist.journey import encode

    if not config.data.held_out and not config.data.test:
        raise InputError("data.held_out and data.test are empty: there is nothing to evaluate on")
    path = policy or str(Path(config.run.dir) / "policy")
    build.check_model(path, config.model.trust_remote_code)
    config = build.located(config)
    path = build.absolute(path)
    encoded = encode(config, build.check(config), path)
    build.check_servers(config)
    sets = {"held_out": encoded.held_out, "test": encoded.test}
    row: Row = {}
    alone = build.cluster(config, has_learners=False)
    with alone, build.rollout_pool(config, path) as (pool, reward):
        for name, examples in sets.items():
            if examples:
                evaluator = Evaluator(config, name, examples, pool, reward, None)
                made, _, dropped = evaluator(version=0)
                row |= made
                if dropped:
                    console.print(f"{name}: {len(dropped)} have no reward: {dropped[0].reason}")
    table = Table("metric", "")
    for name, value in row.items():
        if value is not None:
            table.add_row(name, f"{value:.4f}")
    console.print(table)
    console.print(
        json.dumps({"policy": path, **row}), markup=False, highlight=False, soft_wrap=True
    )


def export(checkpoint: Path, out: Path) -> None:
    """Writes the policy of a checkpoint as a Hugging Face folder.

    Raises:
        InputError: the checkpoint is not whole or not part of a run, or the folder exists already.
    """
    from ppo_dist.learner.export import export as write

    if out.exists():
        raise InputError(f"{out}: exists already")
    read_state(checkpoint)
    config = _config_of(checkpoint.resolve().parent.parent)
    path = build.initial_policy(config)
    build.check_model(path, config.model.trust_remote_code)
    write(config, path, checkpoint, out)
    print(f"wrote {out}")


def replay(update: Path, console: Console) -> None:
    """Makes a skipped update again, from the run's newest whole checkpoint, and says what is in it
    that is not finite. Nothing is written.

    Raises:
        InputError: the file is not a skipped update of a run.
    """
    sequences, coefficients = read_update(update)
    folder = update.resolve().parent.parent
    config = _config_of(folder)
    checkpoint, _ = Checkpoints(folder, config.train.keep_checkpoints).newest_whole()
    console.print(
        f"{len(sequences)} sequences, from {checkpoint.name if checkpoint else 'the initial model'}"
    )
    for sequence in sequences:
        if columns := not_finite(sequence):
            console.print(f"{sequence.uid}: not finite: {', '.join(columns)}", highlight=False)
    model_path = build.model_folder(config, build.check(config))
    alone = build.cluster(config, has_rollouts=False)
    with alone, build.learners(config, model_path, checkpoint) as group:
        report = group.update([sequences], coefficients).updates[0]
    made = Table("of this update", "")
    for name, value in {**vars(report.counts), **vars(report.sums)}.items():
        made.add_row(name, f"{value:g}")
    for name in ("grad_norm", "critic_grad_norm"):
        made.add_row(name, f"{vars(report)[name]}")
    console.print(made)


def _config_of(run: Path) -> Config:
    file = run / CONFIG
    if not file.exists():
        raise InputError(f"{run}: is not a run folder: it has no {CONFIG}")
    raw = merged(read_yaml(file), {"run": {"dir": str(run)}})  # wherever the folder is by now
    return build.located(validated(Config, raw, file))
