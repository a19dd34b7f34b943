"""The suite runs ``analyzers`` with its shapes checked, in functions within functions too."""

from collections.abc import Callable

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import checked
from torch import Tensor

from analyzers.similarity import linear_cka


def test_a_wrong_shape_is_refused() -> None:
    rows = torch.randn(6, 3)
    linear_cka(rows, rows[:, :2])
    with pytest.raises(TypeCheckError, match="linear_cka"):
        linear_cka(rows, rows[:5])
    with pytest.raises(TypeCheckError, match="linear_cka"):
        linear_cka(rows, 3)  # type: ignore[arg-type]


def test_functions_of_one_signature_share_a_check_and_nothing_else() -> None:
    def scaled(by: float) -> Callable[[Tensor], Tensor]:
        @jaxtyped(typechecker=checked)
        def inner(x: Float[Tensor, "n d"]) -> Float[Tensor, "d n"]:
            return by * x.T

        return inner

    first, second = scaled(2.0), scaled(3.0)
    one = torch.ones(2, 3)
    assert first(one).tolist() == (2 * one.T).tolist()
    assert second(one).tolist() == (3 * one.T).tolist()
    with pytest.raises(TypeCheckError, match="inner"):
        second(torch.ones(3))
