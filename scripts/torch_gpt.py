#!/usr/bin/env python3
"""The built-in language model in PyTorch on the CPU: the peer for loss curves and for speed.

    torch_gpt.py --weights model.safetensors --config config.json --batches batches.npy --lr 1e-3 ... > losses.json

Weights and config are a checkpoint of ours (Hugging Face's GPT-2 layout); batches are int32 [steps, batch, context + 1].
Prints one JSON object: losses and gradient norms per step (before the update), and tokens per second (median step).
Needs torch, numpy, safetensors.
"""
import argparse
import json
import math
import os
import time

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--weights", required=True)
PARSER.add_argument("--config", required=True)
PARSER.add_argument("--batches", required=True)
PARSER.add_argument("--threads", type=int, default=1)
PARSER.add_argument("--lr", type=float, default=1e-3)
PARSER.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
PARSER.add_argument("--eps", type=float, default=1e-8)
PARSER.add_argument("--weight-decay", type=float, default=0.1)
PARSER.add_argument("--clip", type=float, default=0.0, help="0: none")
PARSER.add_argument("--warmup", type=int, default=0)
PARSER.add_argument("--final", type=float, default=None, help="cosine to this factor of lr; constant where absent")
PARSER.add_argument("--schedule-steps", type=int, help="steps of the whole schedule (default: those of the batches)")
PARSER.add_argument("--micro", type=int, default=0, help="sequences per micro-batch, 0: the whole batch")
ARGS = PARSER.parse_args()
os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)  # before torch starts its pool

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F


def loss_of(weights, config, ids):
    """Mean cross entropy per token of a GPT-2 with these parameters."""
    heads, epsilon = config["n_head"], config["layer_norm_epsilon"]
    inputs, targets = ids[:, :-1], ids[:, 1:]
    batch, time_ = inputs.shape

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)

    def linear(x, name):
        rows = torch.addmm(weights[f"{name}.bias"], x.reshape(-1, x.shape[-1]), weights[f"{name}.weight"])
        return rows.view(batch, time_, -1)

    x = F.embedding(inputs, weights["wte.weight"]) + weights["wpe.weight"][:time_]
    for layer in range(config["n_layer"]):
        name = f"h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").split(x.shape[-1], dim=2)
        q, k, v = (part.view(batch, time_, heads, -1).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(batch, time_, -1), f"{name}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"{name}.mlp.c_proj")
    logits = norm(x, "ln_f") @ weights.get("lm_head.weight", weights["wte.weight"]).T
    return F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1))


def learning_rate(step, steps):
    if step < ARGS.warmup:
        return ARGS.lr * (step + 1) / ARGS.warmup
    if ARGS.final is None:
        return ARGS.lr
    done = min(1.0, (step - ARGS.warmup) / max(1, steps - ARGS.warmup))
    return ARGS.lr * (ARGS.final + (1 - ARGS.final) * 0.5 * (1 + math.cos(math.pi * done)))


def main():
    torch.set_num_threads(ARGS.threads)
    with open(ARGS.config, encoding="utf-8") as file:
        config = json.load(file)
    weights = {name: value.requires_grad_() for name, value in safetensors.torch.load_file(ARGS.weights).items()}
    batches = np.load(ARGS.batches)
    matrices = [value for value in weights.values() if value.dim() >= 2]
    vectors = [value for value in weights.values() if value.dim() < 2]
    groups = [{"params": matrices, "weight_decay": ARGS.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=ARGS.lr, betas=tuple(ARGS.betas), eps=ARGS.eps)
    losses, norms, seconds = [], [], []
    for step, ids in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, ARGS.schedule_steps or len(batches))
        parts = torch.from_numpy(ids.astype(np.int64)).split(ARGS.micro or len(ids))
        start = time.perf_counter()
        adamw.zero_grad(set_to_none=True)
        total = 0.0
        for part in parts:
            loss = loss_of(weights, config, part) / len(parts)
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), ARGS.clip or math.inf).item())
        adamw.step()
        seconds.append(time.perf_counter() - start)
        losses.append(total)
    median = sorted(seconds[1:] or seconds)[len(seconds[1:] or seconds) // 2]
    tokens = batches.shape[1] * (batches.shape[2] - 1)
    print(json.dumps({
        "torch": torch.__version__, "threads": ARGS.threads, "steps": len(losses), "losses": losses,
        "gradient_norms": norms, "tokens_per_second": tokens / median,
    }))


main()
