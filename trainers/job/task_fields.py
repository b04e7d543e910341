"""Which fields of a job file mean something to which tasks. Data only; the schema is `job.py`'s."""

import re

PACKING_TASKS = ("pretrain", "sft")
SPLITTING_TASKS = ("pretrain", "mlm", "extract")
"""Tasks that can use a row in several pieces, and do unless told otherwise."""
TOKEN_TASKS = ("pretrain", "mlm", "sft", "seq2seq", "classify", "tag")
"""Tasks whose loss is a cross entropy over classes, so that it can be smoothed and distilled."""
FIELD_TASKS: dict[str, tuple[str, ...]] = {
    "data.multi_label": ("classify",),
    "data.window_overlap": ("extract",),
    "data.score_range": ("similarity",),
    "data.prompt": ("seq2seq",),
    "data.max_target_length": ("seq2seq",),
    "data.chat_template": ("sft",),
    "train.label_smoothing": (*TOKEN_TASKS, "extract"),
    "train.class_weights": ("classify",),
    "train.mask": ("mlm",),
    "train.objective": ("similarity",),
    "train.neftune_alpha": ("pretrain", "sft", "seq2seq"),
    "train.distill": TOKEN_TASKS,
    "evaluate.generate": ("sft", "seq2seq"),
    "evaluate.no_answer_threshold": ("extract",),
    "evaluate.bleu_tokenize": ("seq2seq",),
}
"""Fields that mean something to some tasks only; given to another they are refused."""
PROMPT_FIELDS = ("source", "source_language", "target_language")
"""Fields of a seq2seq row that `data.prompt` may hold in braces."""
PLACE = re.compile(r"\{(\w+)\}")
"""A field in a prompt."""
