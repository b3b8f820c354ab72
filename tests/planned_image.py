"""A planned image for tests, with a default for everything."""

from generation.planned_images import GenerationSettings, PlannedImage

SETTINGS = {
    "steps": 25, "scheduler": "dpmpp_2m_karras", "guidance_scale": 7.0, "guidance_rescale": 0.0,
    "negative_prompt": "blurred", "height": 48, "width": 32, "token_chunks": 3, "dtype": "fp32",
    "safety_checker": False, "model": "out/jeans with a LoRA",
}  # fmt: skip


def planned_image(
    prompt: str = "denim jeans", seed: int = 965400086, extension: str = "png", model_hash: str = "0123", **changes
) -> PlannedImage:
    """`changes` are fields of GenerationSettings."""
    return PlannedImage(
        prompt, seed, GenerationSettings(**{**SETTINGS, **changes}), model_hash, "jeans, blue", extension
    )
