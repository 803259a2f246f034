"""Device meshes, written as words."""

from typing import Annotated

from pydantic import Field

from oapl_jax.config.section import Section

_AXIS, _SAMPLER_AXIS = (f"(({names})=(-1|[1-9][0-9]*))" for names in ("data|fsdp|context|tensor", "data|fsdp|tensor"))
MeshAxes = Annotated[str, Field(pattern=rf"^{_AXIS}(,{_AXIS})*$")]
"""A mesh as words, e.g. ``fsdp=4`` or ``data=2,tensor=4``; -1: all devices that are left."""
SamplerAxes = Annotated[str, Field(pattern=rf"^{_SAMPLER_AXIS}(,{_SAMPLER_AXIS})*$")]
"""The same without ``context``: a decode step has one token of a sequence, which nothing can split."""


class MeshConfig(Section):
    """Device meshes. ``sampler: null`` is colocated (one mesh); else the sampler has devices of its own."""

    trainer: MeshAxes = "fsdp=-1"
    """Axes of the trainer's mesh."""
    sampler: SamplerAxes | None = None
    """Axes of the sampler's own mesh, on the devices after the trainer's."""
