#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The keys of config.json that transformers knows for the families read here, with its defaults: writes
tests/data/config_keys.json, from which tests/checkpoints/config_keys.cpp tries every one.

    tests/interop/config_keys.py tests/data/config_keys.json

Needs transformers.
"""
import argparse
import json
import math
import pathlib

import transformers

FAMILIES = {
    "zamba": transformers.ZambaConfig,
    "zamba2": transformers.Zamba2Config,
    "mamba": transformers.MambaConfig,
    "mamba2": transformers.Mamba2Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
}


def plain(value):
    """A value as JSON has it, infinite numbers as transformers spells them."""
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity"}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="the file to write")
    keys = {family: plain(config().to_dict()) for family, config in FAMILIES.items()}
    for defaults in keys.values():
        defaults["transformers_version"] = None  # so that the file does not depend on it
    lines = [f'  {json.dumps(family)}: {json.dumps(defaults, sort_keys=True)}' for family, defaults in keys.items()]
    parser.parse_args().file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
