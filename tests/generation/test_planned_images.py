"""A planned image has the same file name for ever, and a row that says how to generate it again."""

from models.samplers import SamplingSettings
from planned_image import planned_image


def test_another_picture_has_another_name_and_the_same_the_same():
    changes = [{"steps": 24}, {"scheduler": "ddim"}, {"negative_prompt": ""}, {"dtype": "bf16"}, {"height": 56}]
    changes += [{"prompt": "jeans"}, {"seed": 1}, {"extension": "jpg"}, {"model_hash": "4567"}]
    others = [planned_image(**change) for change in changes]
    assert len({image.file_name for image in [planned_image(), *others]}) == len(others) + 1
    assert planned_image(model="elsewhere").file_name == planned_image().file_name
    assert planned_image("../ä/é?*").file_name.startswith("ä-é-")


def test_file_names_stay_those_of_earlier_versions():
    """Otherwise --resume would generate every picture again."""
    starter = "83ebc20c0af39a5bd9fdd826caaf41c8393b8e845f51a44be895ce78cc57a0ca"
    changes = {"steps": 3, "guidance_scale": 4.0, "negative_prompt": "", "height": 256, "width": 256}
    image = planned_image("a red t-shirt", 3, model_hash=starter, **changes)
    assert image.file_name == "a-red-t-shirt-adb88571-000003.png"
    assert image.withheld_name == "a-red-t-shirt-adb88571-000003-withheld.png"


def test_the_row_has_the_keys_of_images_jsonl():
    row = planned_image().to_row(planned_image().file_name)
    assert list(row) == [
        "file_name", "prompt", "seed", "steps", "scheduler", "guidance", "guidance_rescale", "negative_prompt",
        "height", "width", "token_chunks", "dtype", "safety_checker", "model", "model_hash", "checkpoint",
    ]  # fmt: skip
    assert row["guidance"] == 7.0 and row["model"] == "out/jeans with a LoRA"
    assert planned_image().to_row(planned_image().withheld_name)["withheld"] is True


def test_sampling_settings_are_those_of_the_picture():
    settings = planned_image(steps=3, guidance_scale=2.5, guidance_rescale=0.7).settings
    assert settings.sampling == SamplingSettings(steps=3, guidance_scale=2.5, guidance_rescale=0.7)
    assert settings.size == (48, 32)
