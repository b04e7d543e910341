"""Fixtures that several packages' tests share."""

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray_head import init_ray, ray_head

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and none may wait for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as ranks and evaluations have it; here others may compute first
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of pytest-xdist share two cores, and idle threads spin
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no question starts a Ray that `ray_session` then meets
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of some 300 processes would compile our files: 0.3 s of CPU
sys.dont_write_bytecode = False
FAULTS = str(Path(__file__).parent / "faults")
os.environ["PYTHONPATH"] = os.pathsep.join([FAULTS, *filter(None, [os.environ.get("PYTHONPATH")])])

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers of pytest-xdist take whole files, the long ones first: none is waited for at the end."""
    if hasattr(config, "workerinput"):
        marked = {name: {item.path for item in items if item.get_closest_marker(name)} for name in ("cluster", "slow")}
        items.sort(key=lambda item: -sum(item.path in paths for paths in marked.values()))


@pytest.fixture(scope="session")
def head() -> Iterator[str]:
    """Address of the dashboard of a Ray head of two cores."""
    with ray_head() as address:
        yield address


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray of two cores for the whole session: starting it takes 5 s."""
    import ray

    init_ray(num_cpus=2, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an encoder's tokenizer: one token a word, [CLS] and [SEP] around texts and pairs."""
    return make_tokenizer(tmp_path_factory.mktemp("tiny_tokenizer"))


def make_tokenizer(folder: Path) -> Path:
    """What `tiny_tokenizer` gives, in a folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "good", "bad", "film", "plot", "is", "not", ".", "!"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a decoder's tokenizer: byte-level BPE, lossless on any text, with a chat template."""
    return make_chat_tokenizer(tmp_path_factory.mktemp("tiny_chat_tokenizer"))


def make_chat_tokenizer(folder: Path) -> Path:
    """What `tiny_chat_tokenizer` gives, in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the plot of the film is good, the acting is not", "user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cgroup() -> Any:
    """A function that makes a control group with a memory limit."""
    root = Path("/sys/fs/cgroup")
    made: list[Path] = []

    def make(limit: int) -> Path:
        unified = (root / "cgroup.controllers").exists()
        place = (root if unified else root / "memory") / f"tuneyard-{uuid.uuid4().hex[:8]}"
        try:
            place.mkdir()
            made.append(place)
            (place / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"no control group with a memory limit can be made here: {error}")
        return place

    yield make
    for place in made:
        place.rmdir()
