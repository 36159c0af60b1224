"""The last step of a recipe that brings the result to the Hub."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from llmprune.recipe.texts import Part


class PushStep(Part):
    """Upload the result to the Hub in one commit, with a model card.

    ``repo`` is OWNER/NAME or a name of your own; ``private`` makes a new repository private.
    """

    repo: str = Field(min_length=1)
    private: bool = False
    create_pr: bool = False
    base_model: str | None = None
    message: str | None = Field(default=None, min_length=1)
    revision: str | None = Field(default=None, min_length=1)

    @field_validator("repo", "base_model")
    @classmethod
    def _the_hub_has_such_names(cls, name: str | None) -> str | None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            if name is not None:
                validate_repo_id(name)
        except HFValidationError:
            raise ValueError(
                f"{name!r} is no name of a repository. Give OWNER/NAME, with letters, digits, "
                "'-', '_' and '.' in both."
            ) from None
        return name

    @model_validator(mode="after")
    def _a_pull_request_goes_to_main(self) -> Self:
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError(
                f"a pull request goes to the main branch, not to {self.revision!r}. Leave out "
                "revision or create_pr."
            )
        return self
