"""torch.compile: what it needs, the UNet's repeated blocks compiled for training, and how long that has taken."""

import shutil
import sys

from diffusers import UNet2DConditionModel

from runtime.devices import choose_device
from runtime.errors import UserError
from runtime.progress import format_duration

# Nearly all of a step's time is spent in these, and blocks of one width share their code: the starter's take 145 s to
# compile on a CPU, its whole UNet 247 s.
REPEATED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
BACKEND = "inductor"
# Versions of one block's code: widths, with and without gradients, fixed and dynamic sizes. torch stops at 8.
MOST_VERSIONS = 128


def check_compiler(wanted: bool) -> None:
    """UserError where --compile is asked for and there is no compiler: of C for a GPU, of C++ for a CPU."""
    language, names = ("C", ("cc", "gcc", "clang"))
    if choose_device().type == "cpu":
        language, names = ("C++", ("c++", "g++", "clang++"))
    if wanted and not any(map(shutil.which, names)):
        raise UserError(f"--compile needs a {language} compiler ({', '.join(names)}) and there is none; leave it out")


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """Compiles the repeated blocks, each when it is first called; a second size compiles once more, for all sizes.

    In place: names and parameters stay, so that what is saved is the same with and without.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    for module in unet.modules():
        if type(module).__name__ in REPEATED_BLOCKS:
            module.compile(backend=BACKEND)


def compile_seconds() -> float:
    """How long this process has compiled so far, its backward passes included; 0 where nothing was."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]


def compile_clause() -> str:
    """How long compiling has taken, to be put behind a sentence; empty where nothing was compiled."""
    seconds = compile_seconds()
    return f"; compiling took {format_duration(seconds)}" if seconds else ""
