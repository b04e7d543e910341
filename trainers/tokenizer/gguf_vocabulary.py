"""A tokenizer as llama.cpp reads it out of a GGUF file: tokens, merges, how text is split, template, special tokens.

Byte-level BPE, as Llama 3, Qwen and SmolLM have it. Key names and token types: gguf's own constants.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from trainers.errors import EvaluationError, JobError

GPT2_SPLIT, SMOLLM_SPLIT = "gpt-2", "smollm"
SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Ways to split text before BPE that transformers reads back out of a GGUF file, by llama.cpp's names."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SAMPLED_ROWS = 200


def read_split(folder: Path) -> str:
    """llama.cpp's name for the way the tokenizer of a model folder splits text.

    Raises:
        JobError: where it is no byte-level BPE, or splits in a way without a name here.
    """
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    split = _split_name(told.get("pre_tokenizer") or {})
    if told.get("model", {}).get("type") != "BPE" or split is None:
        raise JobError(
            "--quantize q8_0 writes byte-level BPE tokenizers that split text as GPT-2, SmolLM, Llama 3, Qwen 2 and 3, "
            "Tekken or GPT-4o do; this model's is another: take int8 or fp8, which leave the tokenizer as it is"
        )
    return split


def _split_name(told: dict[str, Any]) -> str | None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    steps = told.get("pretokenizers", [told])
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        return None
    own = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and own:
        return SMOLLM_SPLIT
    if kinds == ["Split", "ByteLevel"] and not own and steps[0].get("behavior") == "Isolated":
        regex = steps[0]["pattern"].get("Regex")
        return next((name for name in SPLITS if GGUF_PRE_TOKENIZER_SPLITS.get(name) == regex), None)
    return None


def add_vocabulary(writer: Any, folder: Path, rows: int, stop_ids: list[int]) -> None:
    """Write the tokenizer of a model folder into a GGUF file.

    Args:
        writer: a GGUFWriter.
        rows: of the embedding; those without a token are named as unused.
        stop_ids: tokens that end generation.
    """
    from gguf import SpecialVocab

    tokens, types = _tokens(folder, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(read_split(folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    special.add_special_token.setdefault("bos", _begins(folder))
    special.add_to_gguf(writer, quiet=True)
    turn_ends = [stop for stop in stop_ids if stop != special.special_token_ids.get("eos")]
    if turn_ends:
        writer.add_eot_token_id(turn_ends[-1])


def _begins(folder: Path) -> bool:
    """Whether the tokenizer puts its first token before a text."""
    tokenizer = _tokenizer(folder)
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _tokens(folder: Path, rows: int) -> tuple[list[str], list[int]]:
    told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    by_id = {number: (token, NORMAL) for token, number in told["model"]["vocab"].items()}
    for added in told.get("added_tokens", []):
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(by_id) >= rows:
        raise EvaluationError(f"the tokenizer of {folder} has token {max(by_id)}, the embedding {rows} rows")
    found = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [token for token, _ in found], [kind for _, kind in found]


def check_vocabulary(folder: Path, file: Path, rows: list[list[int]]) -> str | None:
    """Read the tokenizer back out of a GGUF file and see that texts become the same ids. A note where they may not.

    Args:
        folder: the exported model.
        rows: ids of texts to try.

    Raises:
        EvaluationError: where the ids or the chat template differ.
    """
    own, read = _tokenizer(folder), _tokenizer(file.parent, gguf_file=file.name)
    if (own.chat_template or None) != (read.chat_template or None):
        raise EvaluationError(f"the chat template did not go into {file.name} as it is")
    if read_split(folder) == SMOLLM_SPLIT:
        return "transformers joins digits when it reads this tokenizer out of the file; take the unquantized folder's"
    encode = partial(own.decode, skip_special_tokens=False)
    for text in (encode(row) for row in rows[:SAMPLED_ROWS]):
        ours, theirs = (each(text, add_special_tokens=False).input_ids for each in (own, read))
        if ours != theirs:
            raise EvaluationError(f"the tokenizer in {file.name} gives other ids than the model's for {text[:80]!r}")
    return None


def _tokenizer(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **options)
