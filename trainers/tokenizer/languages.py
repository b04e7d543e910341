"""Tokenizers of many languages (mBART, mBART-50, NLLB): a source and a target name theirs, each by a special token."""

from typing import Any

from trainers.tokenizer.gigatoken import special_affixes

Affixes = tuple[tuple[int, ...], tuple[int, ...]]
"""Special tokens before and after a text."""


def target_affixes(tokenizer: Any) -> Affixes | str | None:
    """What stands around a target, as `tokenizer(text_target=...)` has it; None where that is what stands around every
    text, and the reason where a target cannot be written."""
    if not hasattr(tokenizer, "_switch_to_target_mode") or not hasattr(tokenizer, "tgt_lang"):
        return None
    named = {name: tokenizer.init_kwargs.get(name) for name in ("src_lang", "tgt_lang")}
    if lacking := [name for name, language in named.items() if language is None]:
        return (
            f"the tokenizer puts the language before or after each text, and its tokenizer_config.json has no "
            f'{" and no ".join(lacking)}: add it, such as "{lacking[-1]}": {_example(tokenizer)}'
        )
    unknown = [language for language in named.values() if language not in tokenizer.get_vocab()]
    if unknown:
        return f"the tokenizer has no token for the language {unknown[0]!r}; name another in tokenizer_config.json"
    if getattr(tokenizer, "legacy_behaviour", False):
        return "legacy_behaviour of the tokenizer names no language before a target; set it to false"
    tokenizer._switch_to_target_mode()
    try:
        affixes = special_affixes(tokenizer.backend_tokenizer)
    finally:
        tokenizer._switch_to_input_mode()
    if affixes is None:
        return "what the tokenizer puts around a target cannot be told apart from it"
    return tuple(affixes[0]), tuple(affixes[1])


def first_tokens(affixes: Affixes | None, eos_id: int | None) -> dict[str, int]:
    """Settings of `generate` for the language of targets: it is the first token that is written, or, where it ends the
    targets, the token that writing starts from."""
    if affixes is None:
        return {}
    before, after = affixes
    if before:
        return {"forced_bos_token_id": before[-1]}
    return {"decoder_start_token_id": after[-1]} if after and after[-1] != eos_id else {}


def _example(tokenizer: Any) -> str:
    """A language that the tokenizer knows, as JSON."""
    known = [token for token in tokenizer.all_special_tokens if "_" in token]
    return f'"{known[0]}"' if known else '"de_DE"'
