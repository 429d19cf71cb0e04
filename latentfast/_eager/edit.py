"""Edits: the operators' signatures in front of the reference."""

from latentfast import reference


def edit(z, directions, strengths, host_strengths, mask, out) -> None:
    out.copy_(reference.edit.edit(z, directions, host_strengths if strengths is None else strengths, mask))


def blend(base, edited, mask, out) -> None:
    out.copy_(reference.edit.blend(base, edited, mask))
