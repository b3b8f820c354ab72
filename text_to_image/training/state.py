"""What a step changes: the UNet's weights, their EMA, the optimizer and the fp16 scaler; created, resumed, saved."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DConditionModel

from models.compiling import compile_blocks
from models.loading import set_attention
from optimization.ema import EMA, NoEMA, make_ema
from optimization.optimizers import load_optimizer_state, make_optimizer, skipping_if
from optimization.parameters import FullUNet, LoraAdapter, OptimizedWeights, cast_weights, make_parameters
from runs.checkpoints import load_training_state
from training.setup import PreparedRun


@dataclass
class TrainState:
    """The UNet and all that follows its weights through a run."""

    accelerator: Accelerator
    trainable: FullUNet | LoraAdapter
    unet: torch.nn.Module  # as it is called in training: wrapped where several processes exchange gradients
    unwrapped: UNet2DConditionModel
    weights: OptimizedWeights
    optimizer: AcceleratedOptimizer
    ema: EMA | NoEMA

    @classmethod
    def create(cls, run: PreparedRun) -> "TrainState":
        """New, or as the run's checkpoint has it."""
        accelerator, checkpoint = run.accelerator, run.resume.checkpoint
        unwrapped = run.trainable.load(run.plan.unet_base, checkpoint)
        cast_weights(unwrapped, run.precision)
        unwrapped.to(accelerator.device).train()
        _configure_unet(run, unwrapped)
        parameters = make_parameters(unwrapped, run.precision, accelerator.num_processes)
        ema = make_ema(run.args, unwrapped, parameters.parameters, checkpoint)
        optimizer = make_optimizer(run.args, parameters.parameters, run.seed)
        unet, optimizer = accelerator.prepare(unwrapped, optimizer)
        state = cls(accelerator, run.trainable, unet, unwrapped, parameters, optimizer, ema)
        if checkpoint:
            state.load(load_training_state(checkpoint))
        return state

    def load(self, saved: dict) -> None:
        """The optimizer and the scaler, from what `saved_state` returned; weights and EMA are read by `create`."""
        load_optimizer_state(self.optimizer, saved["optimizer"])
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def saved_state(self) -> dict:
        """The optimizer and the scaler."""
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}

    def save_weights(self, folder: Path) -> None:
        """unet/ or a LoRA's file, and unet_ema/ where there is an average."""
        with self.weights.full_precision():
            self.trainable.save_checkpoint(self.unwrapped, folder)
        self.ema.save_pretrained(folder / "unet_ema")

    @contextlib.contextmanager
    def final_unet(self) -> Iterator[UNet2DConditionModel]:
        """The UNet to be saved at the end: the EMA where there is one, in fp32. The last use of the state."""
        self.weights.widen()
        self.ema.copy_to(self.weights.parameters)
        with self.weights.full_precision():
            yield self.unwrapped

    # --- One step ---

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def sync_gradients(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange their gradients only in the last backward pass of a step."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.unet)

    def backward(self, loss: torch.Tensor) -> None:
        """`loss` is already divided by the samples of all processes: times their number undoes DDP's mean."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self, loss: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
        """Clips the gradients, updates the weights and the EMA, and returns the gradients' norm.

        Where `loss` or the norm is non-finite, the weights stay, and only the EMA moves on towards them.
        """
        norm = self.weights.clip_gradients(self.accelerator, max_grad_norm)
        non_finite = ~(loss + norm).isfinite()
        for parameters in self.weights.gradient_chunks():
            with self._skipping_if(non_finite, parameters):
                self.optimizer.step()
        self.ema.step(self.weights.parameters)
        return norm

    def _skipping_if(
        self, non_finite: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
    ) -> contextlib.AbstractContextManager:
        """For the optimizer's step; the fp16 scaler skips by itself."""
        if self.accelerator.scaler:
            return contextlib.nullcontext()
        return skipping_if(non_finite, self.optimizer.optimizer, parameters)


def _configure_unet(run: PreparedRun, unet: UNet2DConditionModel) -> None:
    """The attention that suits device and size; recomputation and compilation where asked for."""
    set_attention(unet, run.plan.shape, *run.plan.largest_size, run.accelerator.device.type)
    if run.args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if run.args.compile:
        compile_blocks(unet)
    if run.args.enable_xformers_memory_efficient_attention:
        run.accelerator.print(
            "PyTorch's own attention is used in place of xformers': as fast, and it takes every mask"
        )
