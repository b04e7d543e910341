"""Heads that pick a row's last token pick the right one."""

from typing import Any


def read_last_tokens(model: Any) -> None:
    """Make a head that picks a row's last token pick it by the attention mask.

    The classification heads of decoders compute logits at every position and pick those of the last token that is not
    the padding id, which is another where a text ends with that id. Here the logits of the row's last token are put at
    every position, so that it does not matter which one is picked. A head that reads one state a row is left alone.
    """
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

    backbone.register_forward_pre_hook(note_mask, with_kwargs=True)
    for name, part in model.named_children():
        if name != model.base_model_prefix:
            part.register_forward_hook(spread)
