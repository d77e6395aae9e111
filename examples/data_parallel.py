"""Draw a file of prompts, one a line, on all GPUs of a machine: one process a GPU, each with every n-th prompt.

    torchrun --nproc-per-node 8 examples/data_parallel.py prompts.txt pictures --model mit-han-lab/hart-0.7b-1024px

Picture i has seed SEED + i and is drawn alone, so it does not depend on the number of processes. Without GPUs the processes
share the CPU. `hart-infer batch` does more (it goes on where a run was killed, and takes tables), in one process or on Ray.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from hart_infer import HartPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--model", default="hart-mini")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

dist.init_process_group("gloo")  # only counts the pictures at the end; nothing goes from GPU to GPU
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
pipe = HartPipeline.from_pretrained(args.model, device=device)
pipe.set_progress_bar_config(disable=True)
if device.type == "cuda":
    pipe.enable_graphs()

prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
args.out.mkdir(parents=True, exist_ok=True)
for index in range(rank, len(prompts), world):
    image = pipe(prompts[index], seed=args.seed + index, reproducible=True).images[0]
    image.save(args.out / f"{index:06d}.png")

drawn = torch.tensor(len(range(rank, len(prompts), world)))
dist.all_reduce(drawn)
if rank == 0:
    print(f"{int(drawn)} pictures by {world} processes in {args.out}")
dist.destroy_process_group()
