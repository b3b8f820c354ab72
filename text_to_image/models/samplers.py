"""The samplers by name: diffusers' class, its settings, and the name AUTOMATIC1111 knows it by. Data alone."""

from dataclasses import dataclass, field

DEFAULT_SAMPLER = "dpmpp_2m_karras"


@dataclass(frozen=True)
class Sampler:
    """How one of diffusers' schedulers is made for a model; `title` goes into the pictures' files."""

    scheduler: str  # the class in diffusers
    title: str
    settings: dict = field(default_factory=dict)


# All that is named here is said outright: a model's own scheduler config may say otherwise, or nothing, and some
# classes would then clip latents to -1..1, or take Runge-Kutta steps first.
NO_CLIPPING = {"clip_sample": False}
PLAIN = {"use_karras_sigmas": False}
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2}
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
KARRAS = {"use_karras_sigmas": True}  # noise levels of arXiv:2206.00364
SAMPLERS = {
    "dpmpp_2m_karras": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M Karras", {**DPM, **KARRAS}),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", {**DPM, **PLAIN}),
    "dpmpp_2m_sde_karras": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", {**SDE, **KARRAS}),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC", PLAIN),
    "euler": Sampler("EulerDiscreteScheduler", "Euler", PLAIN),
    "euler_karras": Sampler("EulerDiscreteScheduler", "Euler Karras", KARRAS),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun", {**PLAIN, **NO_CLIPPING}),
    "lms": Sampler("LMSDiscreteScheduler", "LMS", PLAIN),
    "ddim": Sampler("DDIMScheduler", "DDIM", NO_CLIPPING),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "ddpm": Sampler("DDPMScheduler", "DDPM", NO_CLIPPING),
    "lcm": Sampler("LCMScheduler", "LCM", NO_CLIPPING),
}
