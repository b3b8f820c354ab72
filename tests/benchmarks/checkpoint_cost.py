"""What a checkpoint of Stable Diffusion 1.5's size costs: seconds and bytes, hashing and verifying apart.

    python tests/benchmarks/checkpoint_cost.py
    python tests/benchmarks/checkpoint_cost.py --lora_rank 16

The UNet of 860 M parameters has random weights, Adam's averages are real tensors of its size. Takes 12 GB of memory
and 11 GB of disk in the temporary folder (TMPDIR), with --ema 3.4 GB more of each.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "text_to_image"), str(ROOT / "tests")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora_rank", type=int, help="of a LoRA instead of the whole UNet")
    parser.add_argument("--ema", action="store_true", help="with the weights' average")
    args = parser.parse_args()

    import torch
    from diffusers import UNet2DConditionModel

    from optimization.parameters import FullUNet, LoraAdapter
    from runs.checkpoints import find_damage, save_checkpoint

    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    )
    trainable = LoraAdapter(args.lora_rank, None) if args.lora_rank else FullUNet()
    if args.lora_rank:
        unet.requires_grad_(False).add_adapter(trainable.config)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def save(part: Path) -> None:
        trainable.save_checkpoint(unet, part)
        if args.ema:
            unet.save_pretrained(part / "unet_ema")

    with tempfile.TemporaryDirectory() as folder:
        state = {"optimizer": optimizer.state_dict(), "scaler": None}
        begun = time.perf_counter()
        checkpoint = save_checkpoint(Path(folder), 1, {"trained": trainable.kind, "fingerprint": ""}, save, state)
        saved = time.perf_counter()
        assert find_damage(checkpoint) is None
        verified = time.perf_counter()
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    print(
        f"{sum(map(torch.numel, parameters)) / 1e6:.1f} M trained parameters: {size / 1e9:.2f} GB, "
        f"{saved - begun:.1f} s to write, flush and hash, {verified - saved:.1f} s to read and hash it at resume "
        "(so long the hashing takes when it is saved, too)"
    )


if __name__ == "__main__":
    main()
