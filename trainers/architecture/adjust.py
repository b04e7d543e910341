"""What is changed in a model or its configuration so that it can be trained as the job says."""

from typing import Any

from trainers.architecture.config import DEPTHS, INNER_WIDTHS, KINDS, VOCABULARIES, WINDOWS, configs, dropout_places
from trainers.architecture.model import DOCUMENTS, attention_of, pads_left
from trainers.errors import JobError


def set_pad(config: Any, pad_id: int) -> None:
    """Give a configuration the tokenizer's padding id where it has none: heads and embeddings ask for it."""
    for part in configs(config):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = pad_id


def cut_layers(config: Any, layers: int) -> None:
    """Make a configuration that of the first layers alone."""
    for part in configs(config):
        for name in DEPTHS:
            if isinstance(depth := getattr(part, name, None), int):
                setattr(part, name, min(depth, layers))
        for name in KINDS:
            if name in vars(part) and isinstance(kinds := getattr(part, name), list):  # elsewhere it is worked out
                setattr(part, name, kinds[:layers])


def shrink(config: Any, vocabulary: int, window: int, inner_width: int | None) -> None:
    """Make a configuration that of a model of few tokens, which sees no further than a window where it has one, with
    feed-forward layers of this width."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = dict.fromkeys(VOCABULARIES, vocabulary) | dict.fromkeys(WINDOWS, window) | ids
    for part in configs(config):
        for name, value in (values | dict.fromkeys(INNER_WIDTHS, inner_width)).items():
            asked = getattr(part, name, None)
            is_size = bool(asked) and not isinstance(asked, list)
            if value is not None and asked is not None and (is_size or name in ids):
                setattr(part, name, value)


def set_dropout(config: Any, rate: float, model_class: type = object) -> None:
    """Set every dropout rate of a configuration, also that of a head which drops where the configuration does not say
    how much. Raises JobError where there is none."""
    from huggingface_hub.errors import StrictDataclassError

    places = dropout_places(config, model_class)
    if not places:
        raise JobError(f"model.dropout: a {config.model_type} configuration has no dropout rate; leave it out")
    for part, name in places:
        whole = isinstance(getattr(part, name, None), int) and not rate  # MPT's is declared as a whole number
        try:
            setattr(part, name, 0 if whole else rate)
        except StrictDataclassError as error:
            raise JobError(f"model.dropout: {config.model_type} takes no {rate} as its {name}; leave it out") from error


def make_ready(model: Any, head: str) -> None:
    """What a model that was loaded with a head needs so that it reads rows and packs as it should.

    Args:
        head: transformers' automatic class that gave it.
    """
    if head == "AutoModelForSequenceClassification":
        read_last_tokens(model)
    if attention_of(model) == DOCUMENTS:
        from trainers.architecture.document_states import keep_states_apart

        keep_states_apart(model)


def read_last_tokens(model: Any) -> None:
    """Make a head that picks a row's last token pick it by the attention mask.

    The classification heads of decoders compute logits at every position and pick those of the last token that is not
    the padding id, which is another where a text ends with that id. Here the logits of the row's last token are put at
    every position, so that it does not matter which one is picked. A head that reads the last place of a row padded on
    the left gets the last token alone. One that reads another state of a row is left as it is.
    """
    import torch

    backbone = getattr(model, model.base_model_prefix, None)
    if backbone is None or backbone is model:
        return
    last: list[Any] = [None]

    def note_mask(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        last[0] = None if mask is None or mask.dim() != 2 else mask.long().cumsum(-1).argmax(-1)

    def spread(module: Any, args: Any, logits: Any) -> Any:
        rows = last[0]
        if rows is None or logits.dim() != 3 or len(logits) != len(rows):
            return logits
        picked = logits.gather(1, rows[:, None, None].expand(-1, 1, logits.shape[-1]))
        return picked.expand_as(logits)

    def to_end(module: Any, args: Any) -> Any:
        if last[0] is None:
            return args
        every = torch.arange(len(last[0]), device=last[0].device)
        return (args[0][every, last[0]].unsqueeze(1), *args[1:])

    backbone.register_forward_pre_hook(note_mask, with_kwargs=True)
    for name, part in model.named_children():
        if name != model.base_model_prefix:
            part.register_forward_hook(spread)
    for part in filter(pads_left, model.modules()):
        part.register_forward_pre_hook(to_end)
