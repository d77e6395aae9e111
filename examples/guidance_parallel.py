"""Draw one prompt on two GPUs at once: one computes the conditional half of each scale, the other the unconditional one.

    torchrun --nproc-per-node 2 examples/guidance_parallel.py "a cat" --model mit-han-lab/hart-0.7b-1024px --out cat.png

Without GPUs the processes share the CPU. For many pictures examples/data_parallel.py makes better use of two GPUs.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from hart_infer import HartPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--model", default="hart-mini")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--guidance", type=float, default=4.5, help="at 0, hart-mini's default, there is nothing to share")
parser.add_argument("--out", type=Path, default=Path("picture.png"))
args = parser.parse_args()

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
pipe = HartPipeline.from_pretrained(args.model, device=device)
pipe.enable_guidance_parallel()
if dist.get_rank() > 0:
    pipe.set_progress_bar_config(disable=True)
image = pipe(args.prompt, guidance_scale=args.guidance, seed=args.seed).images[0]
if dist.get_rank() == 0:
    image.save(args.out)
dist.destroy_process_group()
