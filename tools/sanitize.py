"""Calls every operation once on small, odd shapes on the GPU: what compute-sanitizer runs over.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tools/sanitize.py

Without the caching allocator every tensor has bounds of its own, so that an access beyond one is seen.
"""

import argparse

import torch

import latentfast


def calls(dtype: torch.dtype) -> None:
    """Every operation, forward and backward, on shapes that divide by nothing."""
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    shape = (2, 3, 5, 7, 13)
    a, b = noise(*shape).requires_grad_(), noise(*shape).requires_grad_()
    for function in (latentfast.lerp, latentfast.nlerp, latentfast.slerp):
        for dim in (None, 1, (1, 3, 4), (0, 2)):
            function(a, b, 0.3, dim=dim).sum().backward()
    big_a, big_b = noise(2, 16, 5, 60, 104), noise(2, 16, 5, 60, 104)  # several chunks a vector, the aligned path
    for function in (latentfast.lerp_path, latentfast.nlerp_path, latentfast.slerp_path):
        function(a, b, [0.0, 0.25, 1.0, 1.5]).sum().backward()
        function(big_a, big_b, [0.25, 0.75])
    latentfast.slerp(big_a.flatten()[1:], big_b.flatten()[1:], 0.5)  # not aligned to 16 bytes
    latentfast.slerp(a.detach(), -a.detach(), 0.5)
    latentfast.interpolate_keys(noise(4, *shape), [0.0, 1.5, 2.2], mode="catmull_rom")
    latentfast.spherical_mean(noise(3, *shape), [0.2, 0.3, 0.5])

    mask = torch.rand(2, 1, 5, 7, 13, device="cuda", generator=generator)
    latentfast.edit(a, noise(4, 1, 3, 5, 7, 13), [1.0, 0.5, -1.0, 2.0], mask).sum().backward()
    latentfast.edit(a.detach(), noise(2, 1, 3, 1, 1, 1), torch.rand(2, 2, device="cuda"))
    latentfast.edit(big_a, noise(4, 1, 16, 5, 60, 104), [1.0] * 4, noise(2, 1, 5, 60, 104))
    latentfast.blend(a, b, mask).sum().backward()
    latentfast.blend(big_a, big_b, noise(2, 1, 5, 60, 104))

    for norm in ("l2", "l1", "charbonnier"):
        latentfast.temporal_loss(a, b.detach(), mask, second=0.5, norm=norm).backward()
        latentfast.temporal_loss_and_grad(big_a, big_b, second=0.5, norm=norm)
    latentfast.temporal_loss_and_grad(big_a, big_b, noise(2, 1, 5, 60, 104))
    latentfast.temporal_loss_and_grad(a.detach(), frame_dim=1)
    latentfast.warp_loss(a, noise(2, 2, 4, 7, 13), mask[:, :, 1:]).backward()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"))
    arguments = parser.parse_args()
    with latentfast.use_backend(arguments.backend):
        if arguments.backend == "cuda":
            for name in latentfast.backends():
                print(f"{name.name}: {'available' if name.available else name.reason}")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            calls(dtype)
            print(f"{arguments.backend} {dtype}: every operation called")


if __name__ == "__main__":
    main()
