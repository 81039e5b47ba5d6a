"""One rank of test_tensor_parallel: `rank.py MODEL_FOLDER`; prints what this rank generated and cached."""

import sys

import modes
import torch
from transformers import AutoModelForCausalLM

from kvstrata.hf import KVCache, patch


def main():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", local_files_only=True).eval()
    patch(model)
    cache = KVCache.for_model(model)
    print("heads", [layer.kv_heads for layer in cache.cache.shape.layers])
    print("tokens", modes.run(model, cache, modes.prompt()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
