"""What each command of `ppo-dist` does with its arguments; all return an exit code. What is heavy
is imported when it is needed, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ppo_dist import submit as submission
from ppo_dist.config.load import load


def train(arguments: argparse.Namespace) -> int:
    """Trains a policy, or checks that it could."""
    submission.check_versions()
    config = load(arguments.config, arguments.overrides)
    from rich.console import Console

    console = Console(markup=False)
    if arguments.dry_run:
        from ppo_dist.inspect import dry_run

        dry_run(config, console)
        return 0
    from ppo_dist import run

    resume = Path(arguments.resume) if isinstance(arguments.resume, str) else arguments.resume
    return run.train(config, resume, console)


def eval(arguments: argparse.Namespace) -> int:
    """Evaluates a policy."""
    config = load(arguments.config, arguments.overrides)
    from rich.console import Console

    from ppo_dist.inspect import evaluate

    evaluate(config, arguments.policy, Console(markup=False))
    return 0


def label_efficiency(arguments: argparse.Namespace) -> int:
    """Runs a study."""
    from ppo_dist.config.load import load_study

    study = load_study(arguments.config, arguments.overrides)
    from rich.console import Console

    from ppo_dist.study import efficiency

    return efficiency.label_efficiency(study, arguments.config, Console(markup=False))


def bench_weights(arguments: argparse.Namespace) -> int:
    """Measures transports."""
    from rich.console import Console

    from ppo_dist.study import bandwidth

    size = bandwidth.Load(
        arguments.megabytes, arguments.workers, arguments.bucket_mb, arguments.repeats
    )
    return bandwidth.bench_weights(size, arguments.kinds, Console(markup=False))


def bench(arguments: argparse.Namespace) -> int:
    """Measures engines."""
    from rich.console import Console

    from ppo_dist.study.bench import Job, bench_rollout

    keys = Job.__dataclass_fields__
    job = Job(**{key: value for key, value in vars(arguments).items() if key in keys})
    return bench_rollout(job, arguments.only, Console(markup=False))


def dashboard(arguments: argparse.Namespace) -> int:
    """Makes a W&B workspace."""
    config = load(arguments.config, arguments.overrides)
    from ppo_dist.tracking.dashboard import publish, write

    if arguments.out is not None:
        write(config, arguments.out)
        print(f"wrote {arguments.out}")
    else:
        print(publish(config, arguments.entity))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Looks for what stands in the way of a run."""
    config = load(arguments.config, arguments.overrides) if arguments.config else None
    from rich.console import Console

    from ppo_dist import doctor as looked

    return looked.doctor(config, Console(markup=False))


def export(arguments: argparse.Namespace) -> int:
    """Turns a checkpoint into a model folder."""
    from ppo_dist import inspect

    inspect.export(arguments.checkpoint, arguments.out)
    return 0


def scale(arguments: argparse.Namespace) -> int:
    """Changes the number of workers."""
    from rich.console import Console

    from ppo_dist.coordinator.scale import Scale
    from ppo_dist.inspect import rescale

    wanted = Scale(arguments.rollout_workers, arguments.learners)
    rescale(arguments.run_folder, wanted, Console(markup=False))
    return 0


def replay(arguments: argparse.Namespace) -> int:
    """Makes a skipped update again."""
    from rich.console import Console

    from ppo_dist import inspect

    inspect.replay(arguments.update, Console(markup=False))
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """Sends a run to a Ray cluster."""
    keys = submission.Submission.__dataclass_fields__
    options = {key: value for key, value in vars(arguments).items() if key in keys}
    return submission.submit(submission.Submission(**options), arguments.follow)


def fetch(arguments: argparse.Namespace) -> int:
    """Gets a small model."""
    from ppo_dist import fetch as found

    found.fetch(arguments.name, arguments.out)
    return 0
