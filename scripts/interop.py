#!/usr/bin/env python3
"""Compares GPT-2 in transformers and in Mattock, on small models with random weights. See scripts/interop.

    interop.py           compares both ways; MATTOCK names the program
    interop.py golden    writes tests/golden/gpt2: a model that transformers saved, and what it computes

From transformers to Mattock: models are saved in each way that transformers has (one file, several with an index, half
precision, head tied or not), and `mattock checkpoint logits` reads them. From Mattock to transformers: `mattock checkpoint
init` starts from such a model and saves it, and two workers train on it; `from_pretrained` reads what they saved. Ends
with 1 where logits differ by more than LOGITS or gradients by more than GRADIENTS, relative to each tensor's largest, or
where weights that only went through Mattock come back with any other logit, or where the limits are too wide to notice
another activation.
"""
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

LOGITS = 1e-4
GRADIENTS = 1e-3
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 48}
ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
name = "interop"
[model]
family = "gpt"
layers = {n_layer}
heads = {n_head}
dim = {n_embd}
context = {n_positions}
tied = {tied}
init = "{init}"
[data]
text = ["{root}/LICENSE-APACHE"]
tokenizer = {{ kind = "bytes" }}
[batch]
size = 8
micro = 2
[optimizer]
lr = 1e-3
[train]
steps = 5
"""


def random_model(seed, tied=True, **shape):
    """A GPT-2 in which no parameter is near zero or one, so that none can be mistaken for another."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=256, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, **shape)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_tokens(model, count):
    return torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(count))


def bare(name):
    return name.removeprefix("transformer.")


def theirs(model, tokens):
    """Logits [tokens, vocab], mean loss of each token after the first, and its gradients by name."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    gradients = {bare(name): parameter.grad.clone() for name, parameter in model.named_parameters()}
    return output.logits[0].detach(), output.loss.item(), gradients


def mattock(*arguments):
    """Standard output of the program; its errors are shown where it fails."""
    done = subprocess.run([os.environ["MATTOCK"], *map(str, arguments)], capture_output=True)
    if done.returncode != 0:
        sys.exit(f"mattock {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr.decode()}")
    return done.stdout


def ours(folder, tokens):
    """The same of `mattock checkpoint logits`; gradients flat."""
    ids = ",".join(map(str, tokens[0].tolist()))
    found = json.loads(mattock("checkpoint", "logits", folder, "--tokens", ids, "--gradients"))
    gradients = {name: torch.tensor(values) for name, values in found["gradients"].items()}
    return torch.tensor(found["logits"]), found["loss"], gradients


class Report:
    def __init__(self):
        self.bad = False
        print(f"transformers {transformers.__version__}, torch {torch.__version__}, {mattock('--version').decode().strip()}")
        print(f"{'weights':52} {'logits (limit ' + format(LOGITS, '.0e') + ')':>24} {'gradients (limit ' + format(GRADIENTS, '.0e') + ')':>26}")

    def line(self, what, logits, gradients, limit=LOGITS):
        self.bad |= not (logits <= limit and gradients <= GRADIENTS)
        print(f"{what:52} {logits:24.2e} {gradients:26.2e}")

    def compare(self, what, model, folder, tokens):
        """What transformers computes with `model` and Mattock with the weights in `folder`."""
        (logits, loss, gradients), (our_logits, our_loss, our_gradients) = theirs(model, tokens), ours(folder, tokens)
        assert gradients.keys() == our_gradients.keys(), gradients.keys() ^ our_gradients.keys()
        relative = [
            ((our_gradients[name] - gradient.flatten()).abs().max() / gradient.abs().max()).item()
            for name, gradient in gradients.items()
        ]
        worst = max((our_logits - logits).abs().max().item(), abs(our_loss - loss))
        self.line(what, worst, max(relative))


def loaded(folder):
    """What transformers reads; anything that is missing or left over there is an error."""
    model, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    problems = {what: list(names) for what, names in info.items() if names}
    assert not problems, problems
    return model.float().eval()


def both_ways(report, folder, tied, shape):
    name = "tied" if tied else "untied"
    model = random_model(1, tied, **shape)
    tokens = random_tokens(model, shape["n_positions"])
    one = folder / f"{name}-one"
    model.save_pretrained(one)
    report.compare(f"transformers -> mattock, {name}", model, one, tokens)
    several = folder / f"{name}-several"
    model.save_pretrained(several, max_shard_size="100KB")
    count = len(list(several.glob("*.safetensors")))
    assert count > 1, "the model is too small for several files"
    report.compare(f"transformers -> mattock, {name}, {count} files", model, several, tokens)
    for dtype in [torch.float16, torch.bfloat16]:
        half = folder / f"{name}-{dtype}"
        random_model(1, tied, **shape).to(dtype).save_pretrained(half)
        report.compare(f"transformers -> mattock, {name}, {str(dtype).removeprefix('torch.')}", loaded(half), half, tokens)

    recipe = folder / f"{name}.toml"
    recipe.write_text(RECIPE.format(tied=str(tied).lower(), init=several, root=ROOT, **shape), encoding="utf-8")
    mattock("checkpoint", "init", recipe, "--out", folder / f"{name}-initial")
    back = loaded(folder / f"{name}-initial" / "step-00000000")
    logits = theirs(back, tokens)[0] - theirs(model, tokens)[0]
    report.line(f"transformers -> mattock -> transformers, {name}", logits.abs().max().item(), 0.0, limit=0.0)

    run = folder / f"{name}-run"
    mattock("train", recipe, "--device", "cpu", "--workers", "2", "--out", run)
    trained = run / "checkpoints" / "step-00000005"
    count = len(list(trained.glob("model*.safetensors")))
    model = loaded(trained)
    report.compare(f"mattock, trained -> transformers, {name}, {count} files", model, trained, tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(trained / "tokenizer.json"))
    text = "Weights open in any tool: naïve, \n 北京."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, "the tokenizer does not give back its text"


def notices_a_mistake(folder, shape):
    """Whether the limit is small enough to tell GPT-2's GELU, an approximation, from the exact one."""
    model = random_model(1, **shape)
    model.save_pretrained(folder / "control")
    exact = GPT2LMHeadModel(GPT2Config(**{**model.config.to_dict(), "activation_function": "gelu"})).eval()
    exact.load_state_dict(model.state_dict())
    tokens = random_tokens(model, shape["n_positions"])
    difference = (ours(folder / "control", tokens)[0] - theirs(exact, tokens)[0]).abs().max().item()
    print(f"{'control: another GELU in transformers':52} {difference:24.2e}")
    return difference > LOGITS


def golden():
    folder = ROOT / "tests" / "golden" / "gpt2"
    model = random_model(7, n_layer=2, n_head=2, n_embd=8, n_positions=16)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    tokens = random_tokens(model, 8)
    logits, loss, gradients = theirs(model, tokens)

    def rounded(values, digits):
        return [float(f"{value:.{digits}g}") for value in values.flatten().tolist()]

    with open(folder / "expected.json", "w", encoding="utf-8") as file:
        lines = [f'"transformers": "{transformers.__version__}"', f'"tokens": {json.dumps(tokens[0].tolist())}',
                 f'"loss": {loss:.7g}', f'"logits": {json.dumps([rounded(row, 7) for row in logits])}']
        named = ",\n".join(f"{json.dumps(name)}: {json.dumps(rounded(values, 5))}" for name, values in gradients.items())
        file.write("{" + ",\n".join([*lines, f'"gradients": {{\n{named}\n}}']) + "}\n")


def main():
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if sys.argv[1:] == ["golden"]:
        return golden()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        for tied in [True, False]:
            both_ways(report, Path(folder), tied, SHAPE)
        report.bad |= not notices_a_mistake(Path(folder), SHAPE)
    sys.exit(1 if report.bad else 0)


main()
