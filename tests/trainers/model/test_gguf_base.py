"""A GGUF file becomes the folder that transformers would save, byte for byte, a tensor at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.errors import JobError
from trainers.model.gguf_base import dequantize
from trainers.tokenizer.gguf_vocabulary import add_vocabulary

Shapes = dict[str, tuple[int, ...]]
KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16")


def write_file(
    file: Path, tokenizer: Path, arch: str, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]
) -> None:
    """A GGUF file with random weights of all kinds that the gguf package can quantize to in short."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    draw = np.random.default_rng(0)
    writer = GGUFWriter(file, arch)
    for key, value in sizes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    add_vocabulary(writer, tokenizer, shapes["token_embd.weight"][0], [])
    for at, (name, shape) in enumerate(shapes.items()):
        kind = GGMLQuantizationType[KINDS[at % len(KINDS)] if len(shape) > 1 else "F32"]
        values = quantize(draw.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_shapes(tied: bool) -> Shapes:
    shapes: Shapes = {"token_embd.weight": (400, 64), "output_norm.weight": (64,)}
    shapes |= {} if tied else {"output.weight": (400, 64)}
    for layer in range(2):
        block = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
                 "attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def moe_shapes() -> Shapes:
    shapes = {name: shape for name, shape in llama_shapes(False).items() if "ffn_" not in name or "norm" in name}
    for layer in range(2):
        block = {"attn_q_norm": (32,), "attn_k_norm": (32,), "ffn_gate_inp": (4, 64), "ffn_gate_exps": (4, 768, 64),
                 "ffn_up_exps": (4, 768, 64), "ffn_down_exps": (4, 64, 768)}  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


SIZES = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "vocab_size": 400,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 768}
"""768: transformers 5.23 does not read it, and takes the default of the family."""


def save_whole(source: Path, file: str, target: Path) -> None:
    """What transformers does with the whole model in memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unpacked: Any = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=unpacked, dtype=torch.float32
    )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


@pytest.mark.parametrize("arch", ["llama", "llama tied", "qwen3moe"])
def test_the_folder_is_what_transformers_would_save(tmp_path: Path, tiny_chat_tokenizer: Path, arch: str) -> None:
    name, _, tied = arch.partition(" ")
    shapes, sizes = (moe_shapes(), SIZES | EXPERTS) if name == "qwen3moe" else (llama_shapes(bool(tied)), SIZES)
    (tmp_path / "source").mkdir()
    write_file(tmp_path / "source" / "m.gguf", tiny_chat_tokenizer, name, shapes, sizes)
    save_whole(tmp_path / "source", "m.gguf", tmp_path / "whole")
    (tmp_path / "ours").mkdir()
    dequantize(tmp_path / "source", "m.gguf", tmp_path / "ours")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    assert ours.keys() == files.keys() and len(files["model.safetensors"]) > 200_000
    assert [file for file in files if ours[file] != files[file]] == []


def test_weights_that_the_file_lacks_are_named(tmp_path: Path, tiny_chat_tokenizer: Path) -> None:
    shapes = llama_shapes(True)
    del shapes["blk.1.ffn_up.weight"]
    write_file(tmp_path / "m.gguf", tiny_chat_tokenizer, "llama", shapes, SIZES)
    (tmp_path / "ours").mkdir()
    with pytest.raises(JobError, match=r"1 weights of LlamaForCausalLM are not in .*layers\.1\.mlp\.up_proj\.weight"):
        dequantize(tmp_path, "m.gguf", tmp_path / "ours")
