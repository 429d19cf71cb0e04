"""The private operators: one table of schemas, the same signature on every backend.

Every operator writes into tensors that its caller allocated and returns nothing. So the public functions decide
shapes in one place, the "fake" implementation of every operator is empty, and a preview loop can hand in its own
buffers.

Three implementations share a signature; all are opaque to `torch.compile`:

* ``latentfast::NAME``         native C++ (dispatch key CPU) and native CUDA (key CUDA), from ``csrc/``;
* ``latentfast_triton::NAME``  the launchers of ``kernels/triton/``;
* ``latentfast_eager::NAME``   ``latentfast/_eager/``, which calls ``latentfast/reference/``.

What holds for all of them. Tensors are contiguous, of one device; halves are computed in float32 at least. Scalars
that live on the device (``t``, ``strengths``) are float32, or float64 beside float64 latents. A mask has the latents'
dtype or float32, and each of its dimensions is 1 or full, aligned at the right. Arguments have been validated.

What each of them takes and means stands above its schema.
"""

import importlib
from collections.abc import Callable

import torch

#: The layout's sizes: symbols to torch.compile, so that other shapes need no other graph. Native libraries get them as
#: integers; that torch's stable ABI hands them over was seen from 2.13 on. Before, other sizes compile again.
_SIZE = "SymInt" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else "int"
_SIZES = ", ".join(f"{_SIZE} {name}" for name in "pnqm")

#: For each stem, the file name of its kernels in every layer, its operators and their schemas.
TABLE: dict[str, dict[str, str]] = {
    "interpolate": {
        # The tensors are seen as (p, n, q, m): p·q vectors of n·m elements; element (i, j) of vector (u, w) lies at
        # ((u·n + i)·q + w)·m + j. `kind`: 0 lerp, 1 nlerp, 2 slerp (not "mode": torch's functionalisation takes that
        # name). K values of t, either `t` (K, p·q or 1) on the device or `ts` (K) on the host. `out` has K times the
        # elements of `a`.
        "interpolate": f"(Tensor a, Tensor b, Tensor? t, float[] ts, int kind, {_SIZES}, Tensor(a!) out) -> ()",
        # The gradients of the above; `grad` is shaped like its `out`. `grad_t` (K, p·q), float32 or float64. A
        # gradient that is None is not wanted.
        "interpolate_bwd": "(Tensor grad, Tensor a, Tensor b, Tensor? t, float[] ts, int kind, "
        f"{_SIZES}, Tensor(a!)? grad_a, Tensor(b!)? grad_b, Tensor(c!)? grad_t) -> ()",
        # x (N, …), y (K, …) of vectors as above -> out (K, p·q, N): their inner products, float64.
        "vector_dots": f"(Tensor x, Tensor y, {_SIZES}, Tensor(a!) out) -> ()",
        # out[k] = Σ_n coefficients[k, v, n] · x[n]; a coefficient of exactly 0 leaves its vector out.
        # `coefficients` (K, p·q or 1, N), float32 or float64.
        "vector_mix": f"(Tensor x, Tensor coefficients, {_SIZES}, Tensor(a!) out) -> ()",
    },
    "edit": {
        # z (…), directions (N or 1, …) broadcastable to (N, *z.shape), strengths (N,) or (N, B) on the device, or
        # `host_strengths` (N); mask broadcastable to (N, *z.shape).
        "edit": "(Tensor z, Tensor directions, Tensor? strengths, float[] host_strengths, Tensor? mask, "
        "Tensor(a!) out) -> ()",
        # base, edited of one shape, mask broadcastable to it.
        "blend": "(Tensor base, Tensor edited, Tensor mask, Tensor(a!) out) -> ()",
    },
    "temporal": {
        # `norm`: 0 l2, 1 l1, 2 charbonnier. `loss`: B elements, float32 or float64; `grad` gets
        # grad_scale · d loss[b] / d z.
        "temporal_loss": "(Tensor z, Tensor? ref, Tensor? mask, float first, float second, int norm, float eps, "
        "float grad_scale, int frame_dim, Tensor(a!) loss, Tensor(b!)? grad) -> ()",
        # z (B, …) with frames along `frame_dim` (1 or 2) and H, W last; flow (B, 2, T − 1, H, W) of z's dtype or
        # float32; mask broadcastable to z's shape with T − 1 frames.
        "warp_loss": "(Tensor z, Tensor flow, Tensor? mask, float grad_scale, int frame_dim, "
        "Tensor(a!) loss, Tensor(b!)? grad) -> ()",
    },
    "tiles": {
        # `tiles`: `grid` (T, H, W) of them, in that order, each (B, C, t, h, w); neighbours share min(sizes, `overlap`)
        # along each dimension, and a tile no more with both of its neighbours than it has. `kind`: 0 sequential,
        # 1 overlap_add. `clamp`: (), or (least, largest). `out` (B, C, T, H, W), of the tiles' whole extent or less.
        "stitch": "(Tensor[] tiles, int[] grid, int[] overlap, int kind, float[] clamp, Tensor(a!) out) -> ()",
    },
    "stats": {
        # z (p, n, q, m) as above -> mean, std: p·q each, both float32 or float64; std unbiased, 0 for one element.
        "channel_stats": f"(Tensor z, {_SIZES}, Tensor(a!) mean, Tensor(b!) std) -> ()",
        # `ref` is (ref_p, ref_n, q, ref_m) with ref_p = p or 1.
        "adain": f"(Tensor z, Tensor ref, float factor, {_SIZES}, {_SIZE} ref_p, {_SIZE} ref_n, {_SIZE} ref_m, "
        "Tensor(a!) out) -> ()",
        # (z − mean)·scale/std, or z·std/scale + mean if `inverse`, for each of c channels of latents (b, c, t, h, w).
        # mean and std are tensors (c,) or `host_mean` and `host_std`; no mean at all is 0. `layout`: 0 as they lie;
        # 1 out is, 2 z is packed to tokens (b, t/pt · h/ph · w/pw, c·pt·ph·pw).
        "standardize": "(Tensor z, Tensor? mean, Tensor? std, float[] host_mean, float[] host_std, float scale, "
        f"bool inverse, int layout, {_SIZE} b, {_SIZE} c, {_SIZE} t, {_SIZE} h, {_SIZE} w, int pt, int ph, int pw, "
        "Tensor(a!) out) -> ()",
        # LTX's tone map of z, or, if `grad` is given, grad times its slope.
        "tone_map": "(Tensor z, Tensor? grad, float compression, Tensor(a!) out) -> ()",
    },
    "preview": {
        # z (B, C, T, H, W), H and W not 0 unless `out` is empty; weight (C, 3) and bias (3,), float32, beside float64
        # latents float64; out (B, T, H', W', 3): the enlarged RGB x in weight's dtype, or round((x + 1)·127.5) as
        # uint8.
        "latent_to_rgb": "(Tensor z, Tensor weight, Tensor bias, Tensor(a!) out) -> ()",
    },
    "mask": {
        # q (B, H, Nq, D) and k (B, H, Nk, D) of one dtype, or (B, Nq, H, D) and (B, Nk, H, D) where q_heads_last and
        # k_heads_last. Either `weights` (G, Nk), float32 or float64, or groups of keys: `keys`, the lists one after
        # another, `sizes` of them. key_mask (B or 1, Nk) bool. out (B, G, Nq), float32, or float64 beside float64.
        "token_heatmap": "(Tensor q, Tensor k, bool q_heads_last, bool k_heads_last, Tensor? weights, int[] keys, "
        "int[] sizes, Tensor? key_mask, float scale, Tensor(a!) out) -> ()",
        # heat (B, G, t·h·w) -> out (B, G, T, H, W), both float32 or both float64; grid (t, h, w). NaN for a threshold
        # or a quantile that is not wanted.
        "heatmap_to_mask": "(Tensor heat, int[] grid, float threshold, float quantile, float softness, int dilate, "
        "float smooth_time, Tensor(a!) out) -> ()",
    },
    "guidance": {
        # The prediction guided from `cond` and `uncond`, one sample an index of dimension 0; `kind` as in GUIDANCE.
        # Without `sample`, `out` is the prediction p. With it `out` is sample + dt·p and `x0` sample − sigma·p, and
        # with a mask `out` is known + mask·(that − known). `momentum` (cond's dtype or float32; kind apg alone) is
        # replaced by cond − uncond + beta·momentum. What each number means is said in csrc/common/
        # guidance_coefficients.h.
        "guide": "(Tensor cond, Tensor uncond, Tensor? sample, Tensor(a!)? momentum, Tensor? mask, Tensor? known, "
        "int kind, int original, float scale, float rescale, float eta, float norm_threshold, float beta, float alpha, "
        "float sigma, float dt, Tensor(b!) out, Tensor(c!)? x0) -> ()",
        # Linear combinations of 1 to 8 tensors of one shape, each of a floating dtype of its own: K outputs, 1 to 4 of
        # them, the k-th Σ_i coefficients[k·N + i]·tensors[i], summed in the order of i, in float64 if `precise` is not
        # 0 or a tensor or an output is float64, and in float32 otherwise, rounded once.
        "combine": "(Tensor[] tensors, float[] coefficients, int precise, Tensor(a!) out, Tensor(b!)? out1, "
        "Tensor(c!)? out2, Tensor(d!)? out3) -> ()",
    },
    "plan": {
        # A plan of K instructions, `program` five integers each: the operation (PLAN_OPERATIONS), the numbers of its
        # operand and its mask among `inputs`, of its slider, and of its row of the statistics; -1 for none. `inputs`
        # are five-dimensional; the first is the source (B, C, T, H, W), others broadcast to it, their H and W both full
        # or both 1; masks have the working dtype, all else the source's; a style's reference, of which there is a row
        # (mean, std) in statistics (R, B, C, 2), float64, is as it is. coefficients (K, B, C, 4), of the working dtype.
        #
        # The moments of `values`, numbers of inputs: of the first one's place the value that the instructions before
        # `start` make. (B, C, 3·N + N·(N + 1)/2) float64 for N values; see csrc/common/plan.h.
        "plan_moments": "(Tensor[] inputs, int[] program, int start, int[] values, Tensor coefficients, "
        "Tensor(a!) moments) -> ()",
        # The coefficients of the instructions from `start` to `stop`, from the sliders and the moments of `values`, of
        # channels of `elements`. Numbers in `given` become the sliders before, float64.
        "plan_coefficients": "(int[] program, int start, int stop, int[] values, int elements, float[] given, "
        "Tensor statistics, Tensor moments, Tensor(a!) sliders, Tensor(b!) coefficients) -> ()",
        # The walk: `latents` like the source, `rgb` as of latent_to_rgb, one of them or both.
        "plan_run": "(Tensor[] inputs, int[] program, Tensor sliders, Tensor statistics, Tensor coefficients, "
        "Tensor? weight, Tensor? bias, Tensor(a!)? latents, Tensor(b!)? rgb) -> ()",
    },
}
SCHEMAS: dict[str, str] = {name: schema for stem in TABLE.values() for name, schema in stem.items()}
#: The stem that an operator belongs to.
STEMS: dict[str, str] = {name: stem for stem, operators in TABLE.items() for name in operators}

MODES = {"lerp": 0, "nlerp": 1, "slerp": 2}
SEAMS = {"sequential": 0, "overlap_add": 1}
NORMS = {"l2": 0, "l1": 1, "charbonnier": 2}
LAYOUTS = {"same": 0, "pack": 1, "unpack": 2}
#: "zero" is what mode "cfg_zero" does in its first steps.
GUIDANCE = {"cfg": 0, "apg": 1, "cfg_zero": 2, "tcfg": 3, "magnitude_aware": 4, "zero": 5}

PLAN_OPERATIONS = {name: i for i, name in enumerate((
    "lerp", "nlerp", "slerp", "direction", "blend", "confine", "adain", "tone_map", "standardize", "unstandardize",
))}  # fmt: skip
#: Stems that Triton's backend lacks. A plan's kernel interprets a list of instructions, so that one compiled kernel
#: serves every list; Triton, which specialises, would compile each list anew.
WITHOUT_TRITON = ("plan",)


def _nothing_to_infer(*args, **kwargs) -> None:
    """The fake implementation: outputs were allocated by the caller, so there is no shape to infer."""


def _lazily(module: str, name: str) -> Callable[..., None]:
    """`module.name`, imported when it is first called: Triton alone takes half a second to import."""
    found: Callable[..., None] | None = None

    def call(*args) -> None:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(module), name)
        found(*args)

    return call


_LIBRARIES = {ns: torch.library.Library(ns, "DEF") for ns in ("latentfast", "latentfast_triton", "latentfast_eager")}
for _ns, _library in _LIBRARIES.items():
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema)
        torch.library.register_fake(f"{_ns}::{_name}", _nothing_to_infer, lib=_library)
for _name, _stem in STEMS.items():
    if _stem not in WITHOUT_TRITON:
        _launcher = _lazily(f"latentfast.kernels.triton.{_stem}", _name)
        for _key in ("CUDA", "CPU"):  # on the CPU for Triton's interpreter alone; backends.py sees to that
            _LIBRARIES["latentfast_triton"].impl(_name, _launcher, _key)
    _eager = _lazily(f"latentfast._eager.{_stem}", _name)
    _LIBRARIES["latentfast_eager"].impl(_name, _eager, "CompositeExplicitAutograd")
