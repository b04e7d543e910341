"""A conversation with an exported causal model: its template asks, its generation settings end an answer."""

from collections.abc import Callable
from typing import Any, Literal

from trainers.architecture import positions
from trainers.errors import JobError
from trainers.evaluation.placement import load_to_answer


class Conversation:
    """What was said so far, and the model that answers. One without a chat template goes on with each text alone.

    Args:
        path: an exported model folder.
        max_new_tokens: most tokens of an answer.
        temperature: of sampling; 0 takes the likeliest token each time.
        system: text of a system message, if any.
    """

    def __init__(
        self,
        path: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        system: str | None = None,
        trust_remote_code: bool = False,
        gpus: int | Literal["auto"] = "auto",
    ) -> None:
        """`gpus`: as scale.gpus_per_worker says; 0 leaves them alone."""
        from transformers import AutoTokenizer
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # it warns of sampling settings that a greedy answer does not use
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        self._model, self._device = load_to_answer(path, trust_remote_code, gpus)
        self._sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self._max_new_tokens, self._system = max_new_tokens, system
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Say something; `write` gets pieces of the answer as they are generated, then the whole is returned.

        Raises:
            JobError: where the conversation fills the model's positions.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        inputs = self._inputs(asked, text).to(self._device)
        length = inputs["input_ids"].shape[1]
        room = positions(self._model.config)
        if room is not None and length >= room:
            raise JobError(f"the conversation has {length:,} tokens, the model has room for {room:,}: start a new one")
        most = self._max_new_tokens if room is None else min(self._max_new_tokens, room - length)
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        ids = self._model.generate(
            **inputs, **self._sampling, max_new_tokens=most, pad_token_id=pad, streamer=self._streamer(write)
        )
        said = str(self._tokenizer.decode(ids[0, length:], skip_special_tokens=True))
        if self._tokenizer.chat_template is not None:
            self.messages = [*asked, {"role": "assistant", "content": said}]
        return said

    def _inputs(self, messages: list[dict[str, Any]], text: str) -> Any:
        if self._tokenizer.chat_template is None:
            return self._tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def _streamer(self, write: Callable[[str], None]) -> Any:
        from transformers import TextStreamer

        class Pieces(TextStreamer):  # type: ignore[misc, unused-ignore]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                write(text)

        return Pieces(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
