"""What Ray is told before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = (
    "import os, sys\n"
    "from ppo_dist.build.workers import before_ray\n"
    "from ppo_dist.config.workers import Cluster\n"
    "before_ray(Cluster(address=sys.argv[1] or None))\n"
    "print(os.environ.get('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'), os.environ.get('RAY_AUTH_MODE'))\n"
)


@pytest.mark.parametrize(
    ("address", "token", "told"),
    [
        ("", False, "0 None"),
        ("", True, "0 None"),  # a Ray of its own needs none
        ("127.0.0.1:6379", True, "0 token"),
        ("10.0.0.5:6379", True, "None token"),
        ("10.0.0.5:6379", False, "None None"),
    ],
)
def test_where_ray_listens_and_whether_it_shows_a_token(
    tmp_path: Path, address: str, token: bool, told: str
) -> None:
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("secret")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, address],
        env=env | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == told
