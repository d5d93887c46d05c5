#!/usr/bin/env python3
"""All-reduces of Gloo through torch.distributed: f32 sums on the CPU, in place, which is all that it offers.

    torchrun --standalone --nproc-per-node=N gloo.py RUNS BYTES...

Rank 0 prints a line for each size: bytes, and seconds of one all-reduce as the slowest rank sees it (median over runs).
GLOO_SOCKET_IFNAME names the interface (default: lo).
"""
import os
import sys
import time

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

RUN_SECONDS = 0.05


def timed(tensor, repeats):
    """Seconds of one all-reduce among so many."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    seconds = torch.tensor([(time.perf_counter() - start) / repeats], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, runs = dist.get_world_size(), int(sys.argv[1])
    for size in map(int, sys.argv[2:]):
        tensor = torch.full((size // 4,), float(dist.get_rank() + 1))
        dist.all_reduce(tensor)
        assert bool((tensor == ranks * (ranks + 1) / 2).all()), f"a sum of {size} bytes is wrong"
        tensor.zero_()  # sums stay finite, however often they are repeated
        repeats = max(1, min(5000, round(RUN_SECONDS / timed(tensor, 1))))
        seconds = sorted(timed(tensor, repeats) for _ in range(runs))
        if dist.get_rank() == 0:
            print(size, seconds[runs // 2], flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()
