"""SparseGPT by llm-compressor on the tokens of sparse_ppl.py, to be run in an environment of its own.

    python benchmarks/sparse_ppl.py --rows --save-ids ids.pt            # here: the tokens
    python benchmarks/peer_llmcompressor.py MODEL ids.pt                # there: needs llmcompressor alone

llm-compressor asks for other versions of Transformers than this project. The perplexity is that of sparse_ppl.py,
written out again.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM


WINDOW, WINDOWS = 1024, 16


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    total = 0.0
    for row in ids[: WINDOW * WINDOWS].view(WINDOWS, WINDOW):
        logits = model(row[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[1:]).item()
    return math.exp(total / WINDOWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("ids", type=Path, help="what sparse_ppl.py --save-ids wrote")
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    options = parser.parse_args()
    ids = torch.load(options.ids)
    samples, length = ids["calibration"].shape
    data = {"input_ids": ids["calibration"].tolist(), "attention_mask": [[1] * length] * samples}
    for pattern in options.patterns:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        shape = {"mask_structure": pattern} if ":" in pattern else {}
        recipe = SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"], **shape)
        start = time.perf_counter()
        oneshot(
            model=model,
            dataset=Dataset.from_dict(data),
            recipe=recipe,
            max_seq_length=length,
            num_calibration_samples=samples,
        )
        seconds = time.perf_counter() - start
        zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if "_proj" in n)
        count = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
        found = perplexity(model, ids["test"])
        print(f"llm-compressor {pattern}: {found:.2f}, {zeros / count:.4f} zeros, {seconds:.0f} s")


if __name__ == "__main__":
    main()
