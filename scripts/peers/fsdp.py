#!/usr/bin/env python3
"""A GPT-2-shaped model under PyTorch's DDP or FSDP2, over Gloo on the CPU: the peer of `scripts/bench-fsdp`.

    torchrun --standalone --nproc-per-node N fsdp.py --mode bare|ddp|fsdp [--dim N --layers N --heads N --context N --steps N]

One sequence of random bytes per process and step. Rank 0 prints one JSON object: seconds of each step, parameters, and the largest
peak of resident memory among the processes, in MiB. `bare` has no model: what the runtime itself takes. With --save FOLDER it saves
checkpoints there by torch.distributed.checkpoint after the steps, --saves times in each way, each the slowest rank's: `sync` tells
seconds of dcp.save; `async` how long async_save blocks the loop, how long it takes until all is there, and the steps meanwhile. Needs torch.
"""
import argparse
import json
import resource
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.mlp_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        batch, time_, dim = x.shape
        split = self.c_attn(self.ln_1(x)).reshape(batch, time_, 3, self.heads, dim // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).reshape(batch, time_, dim))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Model(nn.Module):
    """Learned positions, pre-norm layers, head tied to the embedding."""

    def __init__(self, args):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, args.dim), nn.Embedding(args.context, args.dim)
        self.layers = nn.ModuleList(Layer(args.dim, args.heads) for _ in range(args.layers))
        self.ln_f = nn.LayerNorm(args.dim)

    def forward(self, rows):
        inputs, targets = rows[:, :-1], rows[:, 1:]
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1]))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def wrapped(mode, model):
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(args):
    model = wrapped(args.mode, Model(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step():
        begun = time.perf_counter()
        rows = torch.randint(VOCABULARY, (1, args.context + 1), generator=generator)
        optimizer.zero_grad()
        model(rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - begun

    seconds = [step() for _ in range(args.steps)]
    result = {"seconds": seconds, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    if args.save:
        result |= save(args, model, optimizer, step)
    return result


def save(args, model, optimizer, step):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    # What saves in the background must not share the training's exchanges.
    background = dist.new_group(backend="gloo")
    state = lambda: dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    found = {"sync": [], "async": []}
    for number in range(args.saves):
        dist.barrier()
        begun = time.perf_counter()
        dcp.save(state(), checkpoint_id=f"{args.save}/sync-{number}")
        found["sync"].append(slowest(time.perf_counter() - begun))
        step()
        dist.barrier()
        begun = time.perf_counter()
        saving = dcp.async_save(state(), checkpoint_id=f"{args.save}/async-{number}", process_group=background)
        stall, steps = time.perf_counter() - begun, []
        while slowest(not saving.done()):
            steps.append(step())
        saving.result()
        found["async"].append({"stall": slowest(stall), "durable": slowest(time.perf_counter() - begun), "steps": steps})
    return found


def slowest(value):
    """The largest of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["bare", "ddp", "fsdp"], required=True)
    for name, default in [("dim", 768), ("layers", 14), ("heads", 12), ("context", 128), ("steps", 6)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--save")
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    result = {} if args.mode == "bare" else train(args)
    peaks = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if dist.get_rank() == 0:
        print(json.dumps(result | {"peak_mib": max(peaks), "torch": torch.__version__}))
    # Who goes first would take the others with it.
    dist.barrier()
    dist.destroy_process_group()


main()
