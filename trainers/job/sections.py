"""Sections of a job file that stand inside other sections, and what every section is. The whole is `job.py`'s."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """Base of every section: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class LoraSection(Section):
    """Low-rank adapters in place of full fine-tuning; export merges them into the weights."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Inner dimension of the two factors."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Their product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters."""
    target_modules: Strings = ("all-linear",)
    """Names of the linear layers that get adapters; all-linear means every one but the head."""


class MaskSection(Section):
    """mlm: what is hidden."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are predicted; of these 80 % become the mask token, 10 % a random one, 10 % stay."""
    whole_words: bool = False
    """Hide all tokens of a word together."""


class DistillSection(Section):
    """Learning from a teacher beside the labels."""

    teacher: str
    """Folder or hub id of a model with the same head and vocabulary; every rank holds it whole."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Both distributions are softened by it; the divergence is scaled by its square."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the divergence; the cross entropy has the rest."""


class GenerateSection(Section):
    """How texts are generated in evaluation, as transformers' `generate` names it."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    num_beams: Annotated[int, Field(ge=1)] = 1
    do_sample: bool = False
    """Sample instead of taking the likeliest; draws depend on the seed and the row alone."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 is no bound."""
    length_penalty: float = 1.0
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
