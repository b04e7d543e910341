"""Targets of the last turn beside what a template writes behind its own generation prompt.

    python -m tests.trainers.tasks.chat.prompts FOLDER

For a folder of templates without training variants. What is generated stands behind the prompt, so where a
conversation without its last turn, and asked for an answer, is the beginning of the whole, the rest is what the turn
says. Prints every shape where the targets differ from that rest by more than the prompt's own thought, and counts.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.trainers.tasks.chat.table import SHAPES, encoder_of, make_tokenizer, ours, renderer_of, shown
from trainers.tasks.chat.conversations import read_chat
from trainers.tasks.chat.spans import THINKING
from trainers.tokenizer.encoder import Encoder


def compare(encoder: Encoder, source: str, shape: str) -> tuple[str, str | None]:
    """(verdict, what differs)."""
    chat, found = read_chat(SHAPES[shape]), ours(encoder, source, SHAPES[shape])
    assert not isinstance(chat, str)
    if isinstance(found, str):
        return f"refused: {found.partition(':')[0]}", None
    text, marked, _ = found
    prompt = renderer_of(encoder, source)._write(chat.messages[:-1], chat.tools, add_generation_prompt=True)
    if chat.messages[-1]["role"] != "assistant" or prompt is None or not text.startswith(prompt):
        return "not told by the prompt", None
    said, rest = shown(text, marked)[-1].rstrip(), text[len(prompt) :].rstrip()
    thought = said.removesuffix(rest)
    if said == rest or (said.endswith(rest) and prompt.endswith(thought) and THINKING.match(thought.lstrip())):
        return "same", None
    return "differs", f"{said!r} beside {rest!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    sources = {file.stem: file.read_text("utf-8") for file in sorted(parser.parse_args().folder.rglob("*.jinja"))}
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        encoder = encoder_of(str(make_tokenizer(Path(folder), list(sources.values()))))
        for name, source in sources.items():
            for shape in SHAPES:
                verdict, difference = compare(encoder, source, shape)
                verdicts[verdict] += 1
                if difference:
                    print(f"{name}, {shape}: {difference}")
    for verdict, count in verdicts.most_common():
        print(f"{count:6,}  {verdict}", file=sys.stdout)


if __name__ == "__main__":
    main()
