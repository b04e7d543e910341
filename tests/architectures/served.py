"""Which listed families llama.cpp converts to GGUF and which vLLM serves: served.json here, by their own code.

`python -m tests.architectures.served VLLM LLAMA_CPP` writes it anew. Both are unpacked source distributions, of `vllm`
and of `llama-cpp-python`, which holds llama.cpp; nothing is installed. vLLM is asked by its registry, which is read and
not run. llama.cpp's converter runs on a tiny model of each family under its published names, the vocabulary left out:
it knows vocabularies by a checksum that a tiny one has not.
"""

import ast
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.architectures.families import FAMILIES, auto_class, write_model
from tests.architectures.single import kind_of, tokenizers
from trainers.pretrained import class_for

SERVED = Path(__file__).with_name("served.json")
REGISTRY, CONVERSION = "vllm/model_executor/models/registry.py", "vendor/llama.cpp"
HEADS = {
    "AutoModelForCausalLM": "texts",
    "AutoModel": "embeddings",
    "AutoModelForSequenceClassification": "classes",
    "AutoModelForTokenClassification": "tags",
}
"""What is served with a head; those of encoders but the first, of decoders the first."""


def served() -> dict[str, Any]:
    """What the last look saw."""
    found: dict[str, Any] = json.loads(SERVED.read_text(encoding="utf-8"))
    return found


def version_of(folder: Path) -> str:
    """Name and version of an unpacked source distribution."""
    said = dict(line.split(": ", 1) for line in (folder / "PKG-INFO").read_text().splitlines() if ": " in line)
    return f"{said['Name']} {said['Version']}"


def registry_of(folder: Path) -> dict[str, str]:
    """vLLM's word on each class of transformers: "own", "transformers" where it runs transformers' code, or the last
    version that knew it."""
    tables: dict[str, dict[str, Any]] = {}
    for node in ast.parse((folder / REGISTRY).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            pairs = [(key, value) for key, value in zip(node.value.keys, node.value.values, strict=True) if key]
            tables[node.targets[0].id] = {ast.literal_eval(key): ast.unparse(value) for key, value in pairs}
    word = {name: f"until {ast.literal_eval(last)}" for name, last in tables["_PREVIOUSLY_SUPPORTED_MODELS"].items()}
    for table in ("TEXT_GENERATION", "EMBEDDING", "TOKEN_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "MULTIMODAL"):
        word |= dict.fromkeys(tables[f"_{table}_MODELS"], "own")
    return word | dict.fromkeys(tables["_TRANSFORMERS_SUPPORTED_MODELS"], "transformers")


def asked_vllm(registry: dict[str, str], config: Any, kind: str) -> dict[str, str]:
    """vLLM's word by what is served."""
    heads = [head for head in HEADS if (head == "AutoModelForCausalLM") == (kind != "encoder")]
    known = (
        {HEADS[head]: registry.get(class_for(head, config).__name__, "") for head in heads} if kind != "pair" else {}
    )
    return {name: word for name, word in known.items() if word}


def converted(folder: Path) -> str:
    """Whether llama.cpp's converter takes a model folder's tensors and sizes: "" or why not."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    try:
        name = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
        kind = get_model_class(name)
        kind.no_mtp = True  # heads that guess several tokens, which transformers does not load: its --no-mtp
        converter = kind(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf")
        converter.prepare_tensors()
        converter.set_gguf_parameters()
    except NotImplementedError:
        return "unknown"
    except KeyError as error:
        return "finds no " + re.findall(r"\w+", str(error.args[0]))[-1]
    except Exception as error:  # of whatever kind the converter raises
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def main() -> None:
    from transformers import AutoConfig

    vllm, llama = map(Path, sys.argv[1:])
    sys.path[:0] = [str(llama / CONVERSION / "gguf-py"), str(llama / CONVERSION)]
    registry, families = registry_of(vllm), {}
    with tempfile.TemporaryDirectory() as scratch:
        words = tokenizers(Path(scratch) / "words")
        for family in FAMILIES:
            path = write_model(family, Path(scratch) / family, words[kind_of(family)])
            config = AutoConfig.from_pretrained(path)
            head = class_for(auto_class(family).__name__, config).__name__
            refused = converted(path)
            families[family] = {"class": head, "vllm": asked_vllm(registry, config, kind_of(family)), "gguf": refused}
            print(family, families[family], flush=True)
    found = {"vllm": version_of(vllm), "llama.cpp": version_of(llama), "families": families}
    SERVED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
