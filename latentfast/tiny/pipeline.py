"""Loading the embedded text-to-video pipeline."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import WanPipeline

DEFAULTS: dict[str, int | float] = {
    "height": 128,
    "width": 128,
    "num_frames": 25,
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
}


def require(module: str) -> ModuleType:
    """Imports an optional module, or says in one line how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.split(".")[0]
        raise ImportError(f"latentfast.tiny needs {package}: pip install 'latentfast[diffusers]' ({e})") from e


def model_path() -> Path:
    """The folder of the embedded model in diffusers' format, inside the package."""
    return Path(__file__).parent / "weights"


def recommended(folder: Path) -> dict[str, int | float]:
    """Settings to call a pipeline with: ``folder / "recommended.json"``, which the choice on validation prompts
    (``tools/train_tiny``) leaves beside the weights, over the defaults.
    """
    path = folder / "recommended.json"
    return DEFAULTS | (json.loads(path.read_text()) if path.exists() else {})


# Of the model in the package; pass it to the pipeline: ``pipe(prompt, **RECOMMENDED)``.
RECOMMENDED = recommended(model_path())


def load_pipeline(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanPipeline:
    """Loads the embedded model as a plain ``diffusers.WanPipeline``; nothing is downloaded.

    Args:
        device: where the modules go.
        dtype: of their weights, which are stored in float16. On a CPU float32 is both the fastest and the most
            exact.

    Returns:
        WanPipeline: called with a prompt and :data:`RECOMMENDED` it makes a clip of 25 frames of 128 x 128.
            Prompts are padded as the
        pipeline does by default (512); shorter ``max_sequence_length`` from 48 on works too.

    Raises:
        ImportError: diffusers or transformers is not installed.
        FileNotFoundError: the package was installed without its weights.

    Example:
        >>> pipe = load_pipeline()
        >>> call = {**RECOMMENDED, "num_inference_steps": 2, "output_type": "latent"}  # 2, to be quick here
        >>> pipe("a red circle and a small blue star moving left", **call).frames.shape
        torch.Size([1, 16, 7, 16, 16])
    """
    require("transformers")
    diffusers = require("diffusers")
    folder = model_path()
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"the embedded model is missing: {folder}; see tools/train_tiny")
    return diffusers.WanPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True).to(device)
