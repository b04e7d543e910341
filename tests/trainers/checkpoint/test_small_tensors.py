"""Where every tensor is small: what an export or a conversion takes once its code is imported, torch and transformers
among it, is the largest tensor plus 64 MiB."""

import json
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import chat_rows, make_llama, tiny_job
from tests.trainers.checkpoint.test_adapter_export import adapted
from tests.trainers.checkpoint.test_export import EXPORT, LOAD_WHOLE, run_within, write_checkpoint
from tests.trainers.model.test_gguf_base import CONVERT, write_large_file
from trainers.storage import Folder

WORDS, WIDTH, LAYERS, INNER = 50_000, 64, 14, 16_384
LARGEST = 4 * WORDS * WIDTH
MORE = 64 << 20
IMPORT = """
import transformers.models.llama.modeling_llama
from tests.trainers.checkpoint.test_export import export_here
from trainers.checkpoint import export
from trainers.model import gguf_base, source
"""
ALLOW = """
import sys
from pathlib import Path
group, more = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
held = int(status["RssAnon"].split()[0]) << 10
limits = [group / "memory.max", group / "memory.limit_in_bytes"]
next(file for file in limits if file.exists()).write_text(str(held + more))
"""
"""The process gives its control group what it holds now and so much more as its limit."""


def tokenizer_of_many_words(known: Path, folder: Path) -> Path:
    """A tokenizer with further words: each of two of the bytes' letters."""
    from transformers import AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    AutoTokenizer.from_pretrained(known).save_pretrained(folder)
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    vocabulary, letters = said["model"]["vocab"], bytes_to_unicode().values()
    pairs = [pair for pair in product(letters, letters) if "".join(pair) not in vocabulary]
    pairs = list(islice(pairs, WORDS - len(vocabulary)))
    said["model"]["merges"] += [list(pair) for pair in pairs]
    said["model"]["vocab"] |= {"".join(pair): len(vocabulary) + at for at, pair in enumerate(pairs)}
    file.write_text(json.dumps(said))
    return folder


def small_llama(folder: Path, known: Path) -> Path:
    return make_llama(folder / "base", tokenizer_of_many_words(known, folder / "words"), vocab_size=WORDS,
                      hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
                      intermediate_size=INNER)  # fmt: skip


def plain(folder: Path, known: Path) -> tuple[str, ...]:
    from transformers import AutoModelForCausalLM

    base = small_llama(folder, known)
    write_checkpoint(Folder(str(folder / "checkpoint")), AutoModelForCausalLM.from_pretrained(base))
    job = tiny_job(folder, base, "sft", chat_rows(10))
    return EXPORT, job.model_dump_json(), str(folder / "checkpoint"), str(folder / "export")


def merging(folder: Path, known: Path) -> tuple[str, ...]:
    job, _ = adapted(folder, small_llama(folder, known), "sft", chat_rows(10))
    return EXPORT, job.model_dump_json(), str(folder / "checkpoint"), str(folder / "export")


def conversion(folder: Path, known: Path) -> tuple[str, ...]:
    (folder / "source").mkdir()
    write_large_file(folder / "source" / "m.gguf", WORDS, WIDTH, LAYERS, INNER)
    job = tiny_job(folder, folder / "source", "sft", chat_rows(10))
    job = job.model_copy(update={"model": job.model.model_copy(update={"gguf_file": "m.gguf"})})
    return CONVERT, job.model_dump_json()


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [plain, merging, conversion])
def test_what_is_taken_beside_the_imported_code_is_the_largest_tensor_and_64_mib(
    tmp_path: Path, tiny_chat_tokenizer: Path, cgroup: Any, prepare: Callable[[Path, Path], tuple[str, ...]]
) -> None:
    """183 MiB of weights, of which 12 are the largest tensor; 50,000 words. Who holds all the weights is killed."""
    code, *arguments = prepare(tmp_path, tiny_chat_tokenizer)

    def run(imports: str, code: str, *arguments: str) -> Any:
        group = cgroup(2 << 30)
        return run_within(group, imports + ALLOW + code, str(group), str(LARGEST + MORE), *arguments)

    done = run(IMPORT, code, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    result = Path(done.stdout.splitlines()[-1]) if prepare is conversion else tmp_path / "export"
    assert sum(file.stat().st_size for file in result.glob("*.safetensors")) > 2 * (LARGEST + MORE)
    whole = run("import safetensors.torch", LOAD_WHOLE, str(result))
    assert whole.returncode == -9, "the limit would not have been felt"
