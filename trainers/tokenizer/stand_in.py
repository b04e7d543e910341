"""A tokenizer in the place of one that is not there yet, so that a configuration alone can be planned."""

import atexit
import shutil
import tempfile
from pathlib import Path

CHARACTERS = 4
"""Of a token: about what published tokenizers take of English text."""
END, MASK = "<end>", "<mask>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}\n{{ message['content'] }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def with_stand_in(folder: Path) -> Path:
    """Links to all that a model folder holds, and a tokenizer to which every four characters are a token; they are
    there as long as this process."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    place = Path(tempfile.mkdtemp(prefix="tuneyard-plan-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for file in folder.iterdir():
        (place / file.name).symlink_to(file.absolute())
    words = {"<other>": 0, END: 1, MASK: 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<other>"))
    pieces = Regex(r"[\s\S]" f"{{1,{CHARACTERS}}}")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    backend.post_processor = processors.TemplateProcessing(f"$A {END}", f"$A {END} $B:1 {END}:1", [(END, words[END])])
    special = {"unk_token": "<other>", "eos_token": END, "pad_token": END, "sep_token": END, "mask_token": MASK}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place
