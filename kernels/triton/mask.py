"""Masks: the launchers of the stem `mask`, each operator's kernels in a file of their own."""

from latentfast.kernels.triton.heatmap_to_mask import heatmap_to_mask
from latentfast.kernels.triton.token_heatmap import token_heatmap

__all__ = ["heatmap_to_mask", "token_heatmap"]
