"""The decode kernels in Triton's interpreter: on a CPU, in float32, against the model's own modules.

Set up in a folder of its own (the interpreter needs NumPy below 2.4), then run:

    pip install --target interpreter --no-deps triton==3.6.0 'numpy<2.4'
    PYTHONPATH=interpreter TRITON_INTERPRET=1 python -m pytest tests/test_decode_interpreter.py --timeout 1800

On a GPU ``tests/gpu/test_decode_gpu.py`` does the same with the compiled kernels.
"""

from __future__ import annotations

import os

import pytest
from family_table import hybrid_case, teacher_case

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1, see the file"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

TOLERANCE = 1e-5
"""Largest difference of logits, as Euclidean norms. Measured: at most 4e-6."""


@pytest.mark.parametrize("sizes", [(9,), (9, 5)], ids=["one", "padded"])
@pytest.mark.parametrize("name", ["phi hybrid", "llama plain", "mistral plain", "qwen3 hybrid", "phi3 hybrid"])
def test_a_step_is_that_of_the_models_own_modules(name: str, sizes: tuple[int, ...]) -> None:
    from decode_cases import worst_difference

    from matvlm.generation.plan import read

    family, kind = name.split()
    case = {"plain": teacher_case, "hybrid": hybrid_case}[kind](family)
    assert worst_difference(case, sizes, read(case.model)) < TOLERANCE


def test_mistakes_are_larger_than_what_is_let_through() -> None:
    from decode_cases import worst_difference, wrong_plans

    from matvlm.generation.plan import read
    from matvlm.generation.trial import LIMIT

    case = hybrid_case("phi")
    found = {name: worst_difference(case, (9,), plan) for name, plan in wrong_plans(read(case.model)).items()}
    print(found)
    assert min(found.values()) > 10 * LIMIT


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "cohere", "qwen2_vl"])
def test_what_the_kernels_do_not_know_is_left_alone(name: str) -> None:
    from matvlm.generation.plan import Unknown, read

    with pytest.raises(Unknown):
        read(teacher_case(name).model)


def test_a_plan_is_taken_where_it_computes_the_same(caplog: pytest.LogCaptureFixture) -> None:
    from matvlm.generation.trial import find_plan

    assert find_plan(hybrid_case("llava").model) is not None
    assert find_plan(hybrid_case("qwen2").model) is not None  # full attention, and with a window
    assert not [record for record in caplog.records if record.name.endswith("trial")]
    granite = teacher_case("granite").model
    assert find_plan(granite) is not None
    for layer in granite.model.layers:
        layer.residual_multiplier = 0.8
    assert find_plan(granite) is None  # looks the same
    assert "Granite" in caplog.text
