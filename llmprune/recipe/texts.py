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
    """The text that statistics are learnt from, and how it is cut into windows of tokens."""

    num_samples: int = Field(default=128, ge=1)
    seq_len: int | None = Field(default=None, ge=2)
    bos: bool = False
