"""Numbers of workers that a run is asked for while it goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ppo_dist import files
from ppo_dist.config import Config

SCALE = "scale.json"


@dataclass(frozen=True)
class Scale:
    """Who asks writes it into the run folder, where the loop looks before every step. None: as it
    is.

    Example: Scale(rollout_workers=8, learners=None)
    """

    rollout_workers: int | None = None
    learners: int | None = None

    @classmethod
    def of(cls, folder: Path) -> Scale:
        """What a run is asked for; nothing, if nobody asked or it cannot be read."""
        try:
            told = json.loads((folder / SCALE).read_text(encoding="utf-8"))
            made = cls(**told)
        except (OSError, ValueError, TypeError):
            return cls()
        numbers = (made.rollout_workers, made.learners)
        return made if all(n is None or (isinstance(n, int) and n > 0) for n in numbers) else cls()

    def ask(self, folder: Path) -> None:
        """Asks the run in a folder for it."""
        files.write_text(folder / SCALE, json.dumps(asdict(self)))

    def changes_learners(self, config: Config) -> bool:
        """Whether it takes others than a config has."""
        return self.learners not in (None, config.learner.workers)

    def at_start(self, config: Config) -> Config:
        """A config with no more rollout workers than are asked for. Those beyond the config's come
        later: there may be no room for them yet.
        """
        workers = min(self.rollout_workers or config.rollout.workers, config.rollout.workers)
        changed = config.rollout.model_copy(update={"workers": workers})
        return config.model_copy(update={"rollout": changed})
