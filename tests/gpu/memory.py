"""The peak of memory that is foretold, beside what PyTorch really allocates."""

from functools import cached_property

from gpu.rows import Measurement
from gpu.settings import Settings, need_gpu
from gpu.training_runs import Trainer, memory_columns

LIMIT = 0.1  # relative
STEPS = 3
EMA, BF16, CHECKPOINTING = "--use_ema", ("--mixed_precision", "bf16"), "--gradient_checkpointing"
SETTINGS: dict[str, tuple[object, ...]] = {
    "bf16, EMA, batch 4": (4, *BF16, EMA),
    "bf16, EMA, batch 16, checkpointing": (16, *BF16, EMA, CHECKPOINTING),
    "LoRA 16, bf16, batch 4": (4, *BF16, "--lora_rank", 16),
    "fp32, batch 1": (1,),
    "fp16, batch 4": (4, "--mixed_precision", "fp16"),
    "pure bf16, Adafactor, batch 4": (4, "--mixed_precision", "pure_bf16", "--optimizer", "adafactor"),
}


def measurements(group: str, settings: Settings) -> list[Measurement]:
    memory = Memory(settings)
    return [Measurement(name, lambda f=flags: memory.compare(*f), 10) for name, flags in SETTINGS.items()]


class Memory:
    """Three steps of each setting."""

    def __init__(self, settings: Settings):
        self.settings = settings

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer.usual(self.settings)

    def compare(self, batch: int, *flags: object) -> dict:
        need_gpu()
        started = self.trainer.start("--train_batch_size", self.settings.batch(batch), *flags)
        started.seconds_per_step(1, STEPS - 1)
        columns = memory_columns(started.run)
        apart = columns["foretold GB"] / columns["peak GB"] - 1
        assert abs(apart) <= LIMIT, f"{100 * apart:+.0f} %: {columns}"
        return {**columns, "apart": f"{100 * apart:+.0f} %"}
