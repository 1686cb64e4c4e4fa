"""The `vocabulary` section of a recipe: the tokens of the output, and the rows that inputs lack."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_PADDING = 65_536
"""Largest multiple to which rows are filled up."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )


class TokenRow(_Section):
    """The row that a token takes where an input has none. A bare string is `from`."""

    from_: str = Field(alias="from")
    """`zero`, `base`, or the id or path of a model."""
    token: str | None = None
    """Another token of that input, whose row is taken. Default: the same token."""
    row: Annotated[int, Field(ge=0)] | None = None
    """The row of that input's embedding that is taken, counted from 0."""
    everywhere: bool = False
    """True: all inputs take this row, also those that have one for the token."""

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        return {"from": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_row(self) -> "TokenRow":
        if self.token is not None and self.row is not None:
            raise ValueError("give either `token` or `row`")
        if self.from_ == "zero" and (self.token is not None or self.row is not None):
            raise ValueError("`from: zero` takes neither `token` nor `row`")
        return self


class Vocabulary(_Section):
    """How inputs of different vocabularies are merged: their embedding rows are matched by token.

    A bare string is `tokens`. Without this section all inputs need the base's vocabulary.
    """

    tokens: str = "base"
    """The output's tokens and tokenizer: `base`, the id or path of a model, or `union`.

    `union`: the base's tokens keep their ids, and the tokens that only models have follow as added tokens.
    """
    missing: Literal["base", "mean", "zero"] = "base"
    """The row of a token for the inputs that lack it.

    `base`: the base's row; where the base lacks it too, the mean of the models that have it.
    `mean`: the mean of the models that have it; the base's row where none has it.
    `zero`: the base's row; zeros where the base lacks it too.
    """
    rows: dict[str, TokenRow] = {}
    """Rows by token. A token that the output would lack becomes an added token of it."""
    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=MOST_PADDING)
    """The number of rows is the smallest multiple of this that holds all tokens.

    Default: the rows of the input that gives the tokens, or more where tokens are added. The rows that fill up repeat
    the row of the last ordinary token.
    """

    @model_validator(mode="before")
    @classmethod
    def _from_tokens(cls, value: Any) -> Any:
        return {"tokens": value} if isinstance(value, str) else value
