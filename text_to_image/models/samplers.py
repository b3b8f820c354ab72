"""The samplers by name, and the settings of sampling. Standard library only, for `--help` and a prompts file."""

from dataclasses import dataclass, field
from typing import Any

DEFAULT_SAMPLER = "dpmpp_2m_karras"


@dataclass(frozen=True)
class SamplerPreset:
    """One of diffusers' schedulers, and the config that makes it the sampler called `title`."""

    scheduler_class: str  # in diffusers
    title: str  # AUTOMATIC1111's name; it is written into the picture files
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingSettings:
    """How noise becomes latents, whatever the sampler."""

    steps: int
    guidance_scale: float  # 1 or less: no guidance, at half the cost
    guidance_rescale: float = 0.0  # phi of arXiv:2305.08891, section 3.4; 0: off

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1


# These settings always override the model's own scheduler config. Some classes would otherwise clip latents to -1..1,
# or begin with Runge-Kutta steps.
NO_CLIPPING = {"clip_sample": False}
PLAIN = {"use_karras_sigmas": False}
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2}
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
KARRAS = {"use_karras_sigmas": True}  # noise levels of arXiv:2206.00364
SAMPLERS = {
    "dpmpp_2m_karras": SamplerPreset("DPMSolverMultistepScheduler", "DPM++ 2M Karras", {**DPM, **KARRAS}),
    "dpmpp_2m": SamplerPreset("DPMSolverMultistepScheduler", "DPM++ 2M", {**DPM, **PLAIN}),
    "dpmpp_2m_sde_karras": SamplerPreset("DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", {**SDE, **KARRAS}),
    "unipc": SamplerPreset("UniPCMultistepScheduler", "UniPC", PLAIN),
    "euler": SamplerPreset("EulerDiscreteScheduler", "Euler", PLAIN),
    "euler_karras": SamplerPreset("EulerDiscreteScheduler", "Euler Karras", KARRAS),
    "euler_a": SamplerPreset("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": SamplerPreset("HeunDiscreteScheduler", "Heun", {**PLAIN, **NO_CLIPPING}),
    "lms": SamplerPreset("LMSDiscreteScheduler", "LMS", PLAIN),
    "ddim": SamplerPreset("DDIMScheduler", "DDIM", NO_CLIPPING),
    "pndm": SamplerPreset("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "ddpm": SamplerPreset("DDPMScheduler", "DDPM", NO_CLIPPING),
    "lcm": SamplerPreset("LCMScheduler", "LCM", NO_CLIPPING),
}
