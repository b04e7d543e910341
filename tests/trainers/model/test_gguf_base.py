"""A GGUF file becomes the folder that transformers would save, byte for byte, a tensor at a time, within the memory of
the largest tensor plus 256 MiB."""

import json
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import chat_rows, tiny_job
from tests.trainers.checkpoint.test_export import ALLOWANCE, run_within
from trainers.errors import JobError
from trainers.model import gguf_base
from trainers.model.gguf_base import dequantize
from trainers.tokenizer.gguf_vocabulary import add_vocabulary

Shapes = dict[str, tuple[int, ...]]
KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16")


def begin_file(file: Path, arch: str, sizes: dict[str, int]) -> Any:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, arch)
    for key, value in sizes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    return writer


def end_file(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_file(
    file: Path, tokenizer: Path, arch: str, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]
) -> None:
    """A GGUF file with random weights of all kinds that the gguf package can quantize to in short."""
    from gguf import GGMLQuantizationType, quantize

    draw = np.random.default_rng(0)
    writer = begin_file(file, arch, sizes)
    add_vocabulary(writer, tokenizer, shapes["token_embd.weight"][0], [])
    for at, (name, shape) in enumerate(shapes.items()):
        kind = GGMLQuantizationType[KINDS[at % len(KINDS)] if len(shape) > 1 else "F32"]
        values = quantize(draw.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    end_file(writer)


def llama_shapes(tied: bool, words: int = 400, width: int = 64, layers: int = 2, inner: int = 96) -> Shapes:
    shapes: Shapes = {"token_embd.weight": (words, width), "output_norm.weight": (width,)}
    shapes |= {} if tied else {"output.weight": (words, width)}
    for layer in range(layers):
        block = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (width // 2, width),
                 "attn_v": (width // 2, width), "attn_output": (width, width), "ffn_gate": (inner, width),
                 "ffn_up": (inner, width), "ffn_down": (width, inner)}  # fmt: skip
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
def test_the_folder_is_what_transformers_would_save(
    tmp_path: Path, tiny_chat_tokenizer: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where arrays as long as the vocabulary are counted and not kept, and where nothing else has its size."""
    monkeypatch.setattr(gguf_base, "LONG_ARRAY", 100)
    name, _, tied = arch.partition(" ")
    shapes, sizes = (moe_shapes(), SIZES | EXPERTS) if name == "qwen3moe" else (llama_shapes(bool(tied)), dict(SIZES))
    if tied:
        del sizes["vocab_size"]
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


def test_a_file_without_words_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    writer = begin_file(tmp_path / "m.gguf", "llama", SIZES)
    writer.add_tokenizer_model("gpt2")
    end_file(writer)
    with pytest.raises(JobError, match=r"it has no tokenizer\.ggml\.tokens"):
        dequantize(tmp_path, "m.gguf", tmp_path)


def write_large_file(file: Path, words: int, width: int, layers: int = 2, inner: int = 96) -> None:
    """A Llama in blocks of Q8_0, with so many words: the bytes', and those that are merged of two of them."""
    from gguf import GGMLQuantizationType, quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pairs = list(islice(product(letters, letters), words - len(letters)))
    sizes = SIZES | {
        "embedding_length": width,
        "vocab_size": words,
        "block_count": layers,
        "feed_forward_length": inner,
    }
    writer = begin_file(file, "llama", sizes)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters, *map("".join, pairs)])
    writer.add_token_types([1] * words)
    writer.add_token_merges([*map(" ".join, pairs)])
    draw = np.random.default_rng(0)
    for name, shape in llama_shapes(True, words, width, layers, inner).items():
        kind = GGMLQuantizationType.Q8_0 if len(shape) > 1 else GGMLQuantizationType.F32
        row = quantize(draw.normal(size=shape[-1:]).astype(np.float32), kind)
        writer.add_tensor(name, row if len(shape) == 1 else np.tile(row, (shape[0], 1)), raw_dtype=kind)
    end_file(writer)


CONVERT = """
import json, sys
from trainers.job.load import parse_job
from trainers.model.source import prepare_model
print(prepare_model(parse_job(json.loads(sys.argv[1]))).path)
"""


@pytest.mark.slow
def test_it_needs_the_largest_tensor_and_256_mib_whatever_the_vocabulary(tmp_path: Path, cgroup: Any) -> None:
    """50,000 words under a limit that kills a process which holds a map of each, or the embedding beside libraries."""
    words, width = 50_000, 768
    (tmp_path / "source").mkdir()
    write_large_file(tmp_path / "source" / "m.gguf", words, width)
    job = tiny_job(tmp_path, tmp_path / "source", "sft", chat_rows(10))
    job = job.model_copy(update={"model": job.model.model_copy(update={"gguf_file": "m.gguf"})})
    done = run_within(cgroup(4 * words * width + ALLOWANCE), CONVERT, job.model_dump_json())
    assert done.returncode == 0, done.stderr[-2000:]
    model = Path(done.stdout.splitlines()[-1])
    assert (model / "model.safetensors").stat().st_size > 4 * words * width
    assert len(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]) == words
