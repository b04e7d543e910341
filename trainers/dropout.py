"""The job's dropout rate, in place of all that a configuration and a head have."""

import inspect
import re
from typing import Any

from trainers.architecture import configs, text_config
from trainers.errors import JobError

DROPOUT_RATE = re.compile(r"(dropout(_rate|_prob)?|_pdrop)$")
HEAD_RATE = "classifier_dropout"


def set_dropout(config: Any, rate: float, model_class: type = object) -> None:
    """Set every dropout rate of a configuration, also that of a head which drops where the configuration does not say
    how much. Raises JobError where there is none."""
    from huggingface_hub.errors import StrictDataclassError

    inner = [part for part in vars(text_config(config)).values() if hasattr(part, "model_type")]  # MPT's attention
    places = [(config, HEAD_RATE)] if _reads(model_class, HEAD_RATE) else []
    places += [
        (part, name)
        for part in (*configs(config), *inner)
        for name, value in part.to_dict().items()
        if DROPOUT_RATE.search(name) and (isinstance(value, float | int) or value is None)
    ]
    if not places:
        raise JobError(f"model.dropout: a {config.model_type} configuration has no dropout rate; leave it out")
    for part, name in places:
        whole = isinstance(getattr(part, name, None), int) and not rate  # MPT's is declared as a whole number
        try:
            setattr(part, name, 0 if whole else rate)
        except StrictDataclassError as error:
            raise JobError(f"model.dropout: {config.model_type} takes no {rate} as its {name}; leave it out") from error


def _reads(model_class: type, name: str) -> bool:
    """Whether a class or one that it inherits from asks for a name when it is made."""
    makers = [vars(each)["__init__"] for each in model_class.__mro__[:-1] if "__init__" in vars(each)]
    return any(name in inspect.getsource(maker) for maker in makers)
