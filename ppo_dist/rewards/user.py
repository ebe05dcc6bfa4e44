"""A user's own functions, loaded from the file that the config names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ppo_dist.config.base import InputError


@lru_cache
def load_function(path: str, name: str) -> Callable[..., Any]:
    """The function of that name in a Python file, which is run once.

    Raises:
        InputError: the file is missing or fails, or has no such function.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file (it should hold the function {name!r})")
    spec = importlib.util.spec_from_file_location(f"ppo_dist_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the names in their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may fail with anything
        raise InputError(f"{path}: cannot be run: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path}: has no function {name!r}")
    return function  # type: ignore[no-any-return]
