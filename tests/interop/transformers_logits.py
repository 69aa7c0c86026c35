#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Whether transformers reads what we save: for every checkpoint folder given, our copy of it, whole and in shards, with
its own head and with a further one, must load in transformers without missing, unexpected or mismatched tensors, and
give the logits that we give.

    tests/interop/transformers_logits.py build/release/tests/zamba_save_case tests/data/zamba tests/data/zamba-gqa

Both compute in float64, but transformers holds some steps (norms, the scan, softmax) in float32: relative errors, by
norm, are about 1e-7, and at most 1e-5 are allowed. Needs torch and transformers.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file

BOUND = 1e-5
PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def logits_of(folder, input_ids):
    """Logits by transformers, and what it had to say about the tensors of the folder."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, local_files_only=True
    )
    problems = {kind: list(info[kind]) for kind in PROBLEMS if info.get(kind)}
    with torch.no_grad():
        return model.eval()(input_ids, use_cache=False).logits.double(), problems


def check(save_case, source):
    """Prints a line for each layout of one case; False where one fails."""
    passed = True
    with tempfile.TemporaryDirectory() as target:
        subprocess.run([save_case, source, target], check=True)
        target = pathlib.Path(target)
        shards = len(list((target / "sharded").glob("model-*.safetensors")))
        for layout in ("whole", "sharded", "own_head/whole", "own_head/sharded"):
            ours = load_file((target / layout).parent / "logits.safetensors")
            theirs, problems = logits_of(target / layout, ours["input_ids"].long())
            error = float((theirs - ours["logits"]).norm() / ours["logits"].norm())
            good = not problems and error <= BOUND  # a NaN is not
            passed = passed and good
            files = f"{len(list((target / layout).glob('model*.safetensors')))} files"
            print(f"{'ok' if good else 'FAILED':6} {source} {layout} ({files}): relative error {error:.2g} {problems or ''}")
        if shards < 2:
            print(f"FAILED {source}: in {shards} shards, wanted several")
            passed = False
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("save_case", help="the program of save_case.cpp")
    parser.add_argument("folders", nargs="+", help="checkpoints of types that it knows")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = [check(arguments.save_case, folder) for folder in arguments.folders]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
