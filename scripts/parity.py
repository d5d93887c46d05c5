#!/usr/bin/env python3
"""Runs torch_gpt.py on what scripts/parity left in a folder, and compares its losses with Mattock's.

    parity.py FOLDER    holds recipe.toml (resolved), initial/step-00000000, batches.npy and run/events.jsonl

Prints both losses and both gradient norms of every step. Ends with 1 where a loss differs by more than LIMIT, where
a curve has not the recipe's number of steps, or where a loss is no number.
"""
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

LIMIT = 1e-3


def torch_curve(folder, recipe):
    """What torch_gpt.py prints, run with the recipe's optimizer."""
    optimizer, schedule = recipe["optimizer"], recipe["optimizer"]["schedule"]
    initial = folder / "initial" / "step-00000000"
    options = {
        "weights": initial / "model.safetensors", "config": initial / "config.json", "batches": folder / "batches.npy",
        "threads": os.cpu_count(), "micro": recipe["batch"]["micro"], "lr": optimizer["lr"], "eps": optimizer["eps"],
        "weight-decay": optimizer["weight_decay"], "clip": optimizer.get("clip", 0.0),
        "warmup": schedule.get("warmup", 0), "schedule-steps": recipe["train"]["steps"],
    }
    if schedule["kind"] == "cosine":
        options["final"] = schedule.get("final", 0.0)
    command = [sys.executable, str(Path(__file__).with_name("torch_gpt.py"))]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--betas", *map(str, optimizer["betas"])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def mattock_curve(folder):
    """The step events of the run, in order."""
    with open(folder / "run" / "events.jsonl", encoding="utf-8") as file:
        return [event for event in map(json.loads, file) if event["event"] == "step"]


def main():
    folder = Path(sys.argv[1])
    with open(folder / "recipe.toml", "rb") as file:
        recipe = tomllib.load(file)
    ours, theirs = mattock_curve(folder), torch_curve(folder, recipe)
    losses = [(event["loss"], loss) for event, loss in zip(ours, theirs["losses"])]
    norms = [(event["grad_norm"], norm) for event, norm in zip(ours, theirs["gradient_norms"])]
    print("step    mattock    pytorch difference | gradient norms")
    for event, (a, b), (c, d) in zip(ours, losses, norms):
        print(f"{event['step']:4} {a:10.6f} {b:10.6f} {a - b:10.1e} | {c:9.6f} {d:9.6f}")
    largest = max(abs(a - b) if math.isfinite(a - b) else math.inf for a, b in losses)
    norm = max(abs(a - b) / b for a, b in norms)
    count = recipe["train"]["steps"]
    print(f"{len(losses)} steps, sum {recipe['reduce']['sum']}, PyTorch {theirs['torch']}")
    print(f"largest difference of losses {largest:.2e} (limit {LIMIT:.0e}), of gradient norms {norm:.2e} relative")
    whole = len(ours) == count and len(theirs["losses"]) == count
    if not whole:
        print(f"{len(ours)} and {len(theirs['losses'])} steps were run, {count} were asked for")
    sys.exit(0 if whole and largest <= LIMIT else 1)


main()
