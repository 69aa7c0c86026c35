#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What bfloat16 costs PyTorch in the reference cases: the bounds of tests/models/reference_cases.cu are made of it.

    tests/interop/torch_bf16.py tests/data/llama tests/data/zamba tests/data/zamba2

For every case it loads the checkpoint in bfloat16 by transformers, in the paths that need no other package, on the GPU
where there is one, and prints relative errors, by norm, against the case's reference of float64: of the logits, of the
worst hidden state, of the worst cache, of the worst gradient, and of the
worst loss of the case's eight steps, which AdamW takes with masters of float32. Needs torch, transformers and
safetensors.
"""
import argparse
import pathlib

import torch
import transformers
from safetensors.torch import load_file

PARTS = {"conv_states": "conv", "recurrent_states": "ssm", "ssm_states": "ssm", "keys": "key", "values": "value"}


KEPT = ("A_log", ".D", "dt_proj_bias", "conv1d")  # matrices that do not decay


def error(got, wanted):
    got, wanted = got.double().cpu(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


def load(folder, device):
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "use_mamba_kernels"):
        config.use_mamba_kernels = False
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, attn_implementation="eager", local_files_only=True
    )
    return model.to(device).eval()


def caches(output):
    """The tensors of the cache that a pass leaves, by their names in the reference."""
    names = ("cache", "past_key_values", "cache_params")  # in one release or another
    cache = next((found for name in names if (found := getattr(output, name, None)) is not None), None)
    for index, layer in enumerate(getattr(cache, "layers", [])):
        for attribute, name in PARTS.items():
            tensor = getattr(layer, attribute, None)
            if isinstance(tensor, (list, tuple, dict)):
                tensor = tensor[0] if len(tensor) else None
            if torch.is_tensor(tensor) and tensor.numel():
                yield f"cache.{name}.{index}", tensor


@torch.no_grad()
def errors(folder, device):
    """Of the logits, of the worst hidden state, of the worst cache."""
    reference = load_file(folder / "reference.safetensors")
    ids = reference["input_ids"].long().to(device)
    model = load(folder, device)
    output = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=0)
    hidden = [error(h, reference[f"hidden_states.{i}"]) for i, h in enumerate(output.hidden_states)]
    left = model(input_ids=ids, use_cache=True)
    cache = [error(tensor, reference[name]) for name, tensor in caches(left) if name in reference]
    return error(output.logits, reference["logits"]), max(hidden), max(cache)


def loss(model, ids):
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=0).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))


def training_errors(folder, device):
    """Of the worst gradient, of the worst loss of training."""
    reference = load_file(folder / "reference.safetensors")
    ids = reference["input_ids"].long().to(device)
    model = load(folder, device).train()
    loss(model, ids).backward()
    named = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name: reference["grad." + name] for name in named if "grad." + name in reference}
    count = sum(gradient.numel() for gradient in wanted.values())
    mean_square = sum(float(gradient.double().square().sum()) for gradient in wanted.values()) / count

    def gradient_error(name):
        gradient = wanted[name].double()
        least = 1e-4 * (mean_square * gradient.numel()) ** 0.5
        return float((named[name].grad.double().cpu() - gradient).norm()) / max(float(gradient.norm()), least)

    worst = max(map(gradient_error, wanted))

    parameters = dict(model.named_parameters())
    masters = {name: parameter.detach().float() for name, parameter in parameters.items()}
    decays = lambda name: masters[name].dim() >= 2 and not any(part in name for part in KEPT)
    groups = [
        {"params": [master for name, master in masters.items() if decays(name)], "weight_decay": 0.1},
        {"params": [master for name, master in masters.items() if not decays(name)], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for _ in reference["train.losses"]:
        model.zero_grad()
        value = loss(model, ids)
        value.backward()
        losses.append(value.item())
        for name, master in masters.items():
            master.grad = parameters[name].grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimiser.step()
        with torch.no_grad():
            for name, master in masters.items():
                parameters[name].copy_(master)
    return worst, max(abs(got / float(step) - 1) for got, step in zip(losses, reference["train.losses"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="reference cases")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__}, transformers {transformers.__version__}, {device}")
    for folder in arguments.folders:
        logits, hidden, cache = errors(folder, device)
        gradients, losses = training_errors(folder, device)
        print(
            f"{folder.name:20} logits {logits:.5f}  hidden_states {hidden:.5f}  caches {cache:.5f}"
            f"  gradients {gradients:.5f}  losses {losses:.5f}"
        )


if __name__ == "__main__":
    main()
