"""The texts of a wish: which, which part of them, and how they are cut into windows of tokens."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

NAME, MIX = "<name>", "<mix>"  # the two forms of calibration.data, for pydantic's error paths
PARTS = ("split", "config", "revision", "column")
ON_POLICY = "on-policy"  # text that the model writes itself
WRITING = ("prompts", "temperature", "top_p", "max_new_tokens")  # how it does


class Part(BaseModel):
    """A part of a recipe: it cannot be changed, and refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Portion(Part):
    """One text: its name, which part of it, and, in a mix, its share by weight.

    >>> Portion(data="c4", weight=3).split is None
    True
    """

    data: str = Field(min_length=1)
    weight: float = Field(default=1, gt=0, allow_inf_nan=False)
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    column: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_name_is_enough(cls, portion: Any) -> Any:
        return {"data": portion} if isinstance(portion, str) else portion


Data = Annotated[
    Annotated[str, Field(min_length=1), Tag(NAME)] | Annotated[tuple[Portion, ...], Tag(MIX)],
    Discriminator(lambda data: MIX if isinstance(data, list | tuple) else NAME),
]


class Texts(Part):
    """Texts by name, and which part of them."""

    data: Data = "auto"
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    column: str | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _one_text_is_a_mix_of_one(cls, data: object) -> object:
        if isinstance(data, list | tuple) and not data:
            raise ValueError("[] names no text. Type one, such as c4, or `data: [c4, ultrachat]`.")
        return [data] if isinstance(data, dict | Portion) else data

    @model_validator(mode="after")
    def _a_mix_says_it_per_text(self) -> Self:
        given = [name for name in PARTS if getattr(self, name) is not None]
        if not isinstance(self.data, str) and given:
            raise ValueError(
                f"'{given[0]}' beside a mix belongs to none of its texts. Write it into the text "
                f"that it is about, as in `data: [{{data: c4, weight: 3, {given[0]}: NAME}}]`."
            )
        return self


class Calibration(Texts):
    """The text that statistics are learnt from, and how it is cut into windows of tokens.

    `micro_batch` is how many windows go through a block at once: as many as fit, and no more than
    that. Runs with the same one sum in the same order, whatever the number of processes.

    `statistics` is a folder that ``llmprune stats`` wrote, in place of any text.

    With ``data`` on-policy the model writes it: `prompts` is a file, preset or data set to begin
    from, `temperature` and `top_p` say how tokens are drawn, at most `max_new_tokens` after each.
    With `cache` false it writes again what it has written before.
    """

    num_samples: int = Field(default=128, ge=1)
    seq_len: int | None = Field(default=None, ge=2)
    bos: bool = False
    micro_batch: int | None = Field(default=None, ge=1)
    statistics: str | None = Field(default=None, min_length=1)
    prompts: str | None = Field(default=None, min_length=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    cache: bool | None = None

    @model_validator(mode="after")
    def _a_manner_of_writing_needs_a_writer(self) -> Self:
        given = [name for name in (*WRITING, "cache") if getattr(self, name) is not None]
        if given and self.data != ON_POLICY:
            raise ValueError(
                f"'{given[0]}' is of text that the model writes itself, and '{self.data}' is text "
                f"that is there. Type calibration.data={ON_POLICY} beside it, or leave it out."
            )
        return self
