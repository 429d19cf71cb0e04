"""A text-to-video pipeline from a folder, or the embedded one; never from the network."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from latentfast.cli.errors import UserError, one_line

__all__ = ["DTYPES", "load_pipeline", "quiet", "resolve_device", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What a text-to-video pipeline's call must take for this tool to drive it through public means alone.
NEEDED = ("prompt", "num_frames", "latents", "output_type", "callback_on_step_end")


def quiet() -> None:
    """Silence the libraries' own progress bars and warnings: the terminal belongs to this tool's lines."""
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub|torch)\b")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is the first GPU if torch sees one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got '{name}'") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got '{name}'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: '{name}' asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; ``"auto"`` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype: expected auto, {', '.join(DTYPES)}, got '{name}'")
    return DTYPES[name]


def load_pipeline(folder: Path | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a diffusers text-to-video pipeline.

    Args:
        folder: a folder in diffusers' format (it holds ``model_index.json`` and safetensors weights); ``None`` is the
            model embedded in latentfast.
        device: where the pipeline runs.
        dtype: of the components; a Wan VAE stays in float32, as its model cards ask.

    Returns:
        A ``DiffusionPipeline``.

    Raises:
        UserError: no such folder, not a pipeline's folder, or not a text-to-video pipeline.
    """
    quiet()
    pipeline: Any
    if folder is None:
        from latentfast import tiny

        pipeline = tiny.load_pipeline(device=device, dtype=dtype)
    else:
        pipeline = _from_folder(folder, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKLWan, DiffusionPipeline

    if not folder.is_dir():
        raise UserError(f"--model: no such folder: {folder}")
    class_name = _class_name(folder)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            os.fspath(folder), dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except Exception as error:
        # diffusers raises a dozen types for a damaged folder; the one line must name the folder whichever it is.
        raise UserError(f"--model: cannot load {folder} as {class_name}: {one_line(error)}") from error
    missing = set(NEEDED) - set(inspect.signature(type(pipeline).__call__).parameters)
    if missing or getattr(pipeline, "vae", None) is None:
        what = f"its call has no {', '.join(sorted(missing))}" if missing else "it has no VAE"
        raise UserError(f"--model: {class_name} in {folder} is not a latent text-to-video pipeline: {what}")
    is_wan = isinstance(pipeline.vae, AutoencoderKLWan)
    if is_wan:
        pipeline.vae.to(torch.float32)
    return pipeline


def _class_name(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--model: {folder} is not a diffusers pipeline: it holds no model_index.json")
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return str(content["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model: {index} names no pipeline class") from error
