"""Does it fit? What the run summary says of GPU memory, and which flags help where it does not fit."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from optimization.memory import CONTEXT_BYTES, GB, MemoryForecast, MemorySettings, trace_step
from runtime.devices import supports_bf16
from runtime.errors import WorkError, first_line, is_out_of_memory
from training.setup import PreparedRun

CARDS = 8, 12, 16, 24, 48, 80  # GB
ADVISED_RANK = 16
MOST_ADVICE = 3  # alternatives that are named, of those that fit
Rows = list[tuple[str, str]]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True)
class MemoryPlan:
    """What a step's memory depends on; `flags` are those that lead here from the command line as it is."""

    settings: MemorySettings
    batch: int  # samples at once, on each process
    flags: Mapping[str, object] = field(default_factory=dict)  # the value "" for a flag that takes none

    @property
    def forecast(self) -> MemoryForecast:
        return trace_step(self.settings).forecast(self.batch)

    def fits(self, room: int | None) -> bool:
        """Whether it fits into `room` bytes beside CUDA's context; yes where the room is not known."""
        return room is None or self.forecast.total + CONTEXT_BYTES <= room


Change = Callable[[PreparedRun, MemoryPlan, int], MemoryPlan | None]  # None: it is so already, or not possible


def memory_rows(run: PreparedRun) -> Rows:
    """For a dry run all that is foretold; on a GPU what the run takes, and what helps where it does not fit.

    A run that cannot be foretold may still train: it is said in a row.
    """
    room = gpu_bytes(run)
    if not run.is_main or not (run.args.dry_run or room):
        return []
    try:
        return _foretold_rows(run, room)
    except Exception as error:  # a UNet or a version of PyTorch that the forecast does not know
        return [("GPU memory", f"cannot be foretold ({first_line(error)})")]


def _foretold_rows(run: PreparedRun, room: int | None) -> Rows:
    plan = plan_memory(run)
    rows = [("GPU memory", _forecast_line(plan))]
    if run.args.dry_run:
        rows += _card_rows(run, plan)
    if room and not plan.fits(room):
        rows.append(("WILL NOT FIT", f"into this GPU's {_gigabytes(room)} GB with CUDA's context; what takes less:"))
        rows += [("", line) for line in advice(run, room)]
    return rows


def gpu_bytes(run: PreparedRun) -> int | None:
    """The memory of the run's GPU; None on another device."""
    device = run.accelerator.device
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def explain_out_of_memory(
    work: Callable[Concatenate[PreparedRun, Parameters], Result],
) -> Callable[Concatenate[PreparedRun, Parameters], Result]:
    """`work`, a function of the run, with a GPU's 'out of memory' as a WorkError that says which flags take less."""

    @functools.wraps(work)
    def explained(run: PreparedRun, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return work(run, *args, **kwargs)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if expected := out_of_memory_error(run, error):
                raise expected from None
            raise

    return explained


def out_of_memory_error(run: PreparedRun, error: Exception) -> WorkError | None:
    """A GPU's 'out of memory' as the line that says which flags take less; None for any other error."""
    if not (isinstance(error, RuntimeError) and is_out_of_memory(error) and (room := gpu_bytes(run))):
        return None
    return WorkError(f"not enough GPU memory ({first_line(error)}); what takes less: {'; '.join(advice(run, room))}")


def plan_memory(run: PreparedRun) -> MemoryPlan:
    """The memory plan of the command line as it is."""
    args, plan = run.args, run.plan
    height, width = plan.largest_size
    settings = MemorySettings(
        unet_config=json.loads((plan.unet_base / "unet" / "config.json").read_text()),
        precision=run.precision,
        optimizer=args.optimizer,
        lora_rank=args.lora_rank,
        ema=args.use_ema and not args.offload_ema,
        gradient_checkpointing=args.gradient_checkpointing,
        accumulated=args.gradient_accumulation_steps > 1 or len(plan.buckets) > 1,
        processes=run.accelerator.num_processes,
        height=height,
        width=width,
        vae_factor=plan.shape.vae_factor,
        text_tokens=run.record["token_chunks"] * run.tokenizer.model_max_length,
    )
    return MemoryPlan(settings, samples_at_once(run, args.gradient_accumulation_steps))


def samples_at_once(run: PreparedRun, accumulation: int) -> int:
    """The samples of a micro-batch, prior images included."""
    return math.ceil(run.plan.samples_per_step / (run.accelerator.num_processes * accumulation))


def _forecast_line(plan: MemoryPlan) -> str:
    forecast, settings = plan.forecast, plan.settings
    parts = {
        "weights": forecast.weights,
        "optimizer": forecast.optimizer,
        "EMA": forecast.ema,
        "gradients and activations": forecast.gradients_and_activations,
    }
    words = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)
    size = f"{settings.width} x {settings.height} px"
    loading = "" if forecast.loading < forecast.step else f" to load the weights, {_gigabytes(forecast.step)} a step"
    return f"{_gigabytes(forecast.total)} GB{loading}, of which {words}; foretold for {plan.batch} at once of {size}"


def _gigabytes(size: int) -> str:
    return f"{size / GB:.1f}" if size >= GB / 10 else f"{size / GB:.2g}"


def _card_rows(run: PreparedRun, plan: MemoryPlan) -> Rows:
    """CUDA's context, and the largest --train_batch_size for each size of card, with and without checkpointing."""
    now, share = plan.settings.gradient_checkpointing, run.plan.global_batch / run.plan.samples_per_step
    other = replace(plan.settings, gradient_checkpointing=not now)
    flag = "--no_gradient_checkpointing" if now else "--gradient_checkpointing"
    return [
        ("GPU context", f"about {CONTEXT_BYTES / GB:.1f} GB more, counted in what fits"),
        ("largest batch", _cards_line(plan.settings, share)),
        ("", f"{_cards_line(other, share)} with {flag}"),
    ]


def _cards_line(settings: MemorySettings, share: float) -> str:
    """`share`: of the samples at once, those of the data set; the others are prior images."""
    step = trace_step(settings)
    batches = {card: int(step.largest_batch(card) * share) for card in CARDS}
    return ", ".join(f"{batch or 'none'} in {card} GB" for card, batch in batches.items())


# --- What helps -----------------------------------------------------------------------------------------------------


def advice(run: PreparedRun, room: int) -> list[str]:
    """Lines of flags and the gigabytes they lead to: each alone if one is enough, else several together."""
    start = plan_memory(run)
    single = [plan for change in CHANGES if (plan := change(run, start, room))]
    if fitting := [plan for plan in single if plan.fits(room)]:
        return [_advice_line(plan) for plan in fitting[:MOST_ADVICE]]
    plan = _several_changes(run, start, room)
    if plan.fits(room):
        return [_advice_line(plan)]
    return [f"{_advice_line(plan)}, and a lower --resolution" if plan.flags else "a lower --resolution"]


def _several_changes(run: PreparedRun, start: MemoryPlan, room: int) -> MemoryPlan:
    """As many of CHANGES as it takes to fit, without those that are then not needed, the costliest tried first."""

    def apply(changes: Sequence[Change]) -> MemoryPlan:
        return functools.reduce(lambda plan, change: change(run, plan, room) or plan, changes, start)

    count = next((n for n in range(2, len(CHANGES)) if apply(CHANGES[:n]).fits(room)), len(CHANGES))
    chosen = list(CHANGES[:count])
    for change in reversed(CHANGES[:count]):
        without = [other for other in chosen if other is not change]
        if apply(without).fits(room):
            chosen = without
    return apply(chosen)


def _advice_line(plan: MemoryPlan) -> str:
    flags = " ".join(f"{flag} {value}".strip() for flag, value in plan.flags.items())
    return f"{flags}: {_gigabytes(plan.forecast.total)} GB"


def _with(plan: MemoryPlan, flags: Mapping[str, object], **changes: Any) -> MemoryPlan:
    return MemoryPlan(replace(plan.settings, **changes), plan.batch, {**plan.flags, **flags})


def _checkpointing(run: PreparedRun, plan: MemoryPlan, room: int) -> MemoryPlan | None:
    if plan.settings.gradient_checkpointing:
        return None
    return _with(plan, {"--gradient_checkpointing": ""}, gradient_checkpointing=True)


def _eight_bit(run: PreparedRun, plan: MemoryPlan, room: int) -> MemoryPlan | None:
    if plan.settings.optimizer != "adamw" or plan.settings.precision == "pure_bf16":
        return None
    return _with(plan, {"--optimizer": "adamw8bit"}, optimizer="adamw8bit")


def _smaller_batch(run: PreparedRun, plan: MemoryPlan, room: int) -> MemoryPlan | None:
    """The largest part of the batch that fits, else one picture at once, with as many more to accumulate."""
    batch, accumulation = run.args.train_batch_size, run.args.gradient_accumulation_steps
    for parts in (n for n in range(2, batch + 1) if batch % n == 0):
        flags = {"--train_batch_size": batch // parts, "--gradient_accumulation_steps": parts * accumulation}
        smaller = _with(plan, flags, accumulated=True)
        smaller = replace(smaller, batch=samples_at_once(run, parts * accumulation))
        if parts == batch or smaller.fits(room):
            return smaller
    return None


def _offloaded_ema(run: PreparedRun, plan: MemoryPlan, room: int) -> MemoryPlan | None:
    return _with(plan, {"--offload_ema": ""}, ema=False) if plan.settings.ema else None


def _pure_bf16(run: PreparedRun, plan: MemoryPlan, room: int) -> MemoryPlan | None:
    settings = plan.settings
    least = (settings.precision, settings.optimizer) == ("pure_bf16", "adafactor")
    if settings.lora_rank or least or not computes_in_bf16(run):
        return None
    flags = {"--mixed_precision": "pure_bf16", "--optimizer": "adafactor"}
    flags |= {"--no_use_8bit_adam": ""} if run.args.use_8bit_adam else {}
    return _with(plan, flags, precision="pure_bf16", optimizer="adafactor")


def _lora(run: PreparedRun, plan: MemoryPlan, room: int) -> MemoryPlan | None:
    """In place of the whole UNet, which alone has an EMA and pure bf16."""
    if plan.settings.lora_rank:
        return None
    flags: dict[str, object] = {"--lora_rank": ADVISED_RANK, **({"--no_use_ema": ""} if run.args.use_ema else {})}
    if plan.settings.precision != "pure_bf16":
        return _with(plan, flags, lora_rank=ADVISED_RANK, ema=False)
    return _with(plan, {**flags, "--mixed_precision": "bf16"}, lora_rank=ADVISED_RANK, ema=False, precision="bf16")


def computes_in_bf16(run: PreparedRun) -> bool:
    return run.accelerator.device.type != "cuda" or supports_bf16()


CHANGES: Sequence[Change] = (
    _checkpointing,
    _eight_bit,
    _smaller_batch,
    _offloaded_ema,
    _pure_bf16,
    _lora,
)  # in the order of what they cost
