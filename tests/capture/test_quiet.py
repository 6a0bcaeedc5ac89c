"""Warnings of other packages about their own code are silenced; all other warnings remain errors in the tests."""

import warnings

import pytest

from qcompiler.capture.quiet import third_party_silence


def warn(module: str, category: type[Warning] = DeprecationWarning) -> None:
    """Raises a warning as if from a module with that name."""
    warnings.warn_explicit("a name is deprecated", category, f"{module}.py", 1, module)


@pytest.mark.parametrize("module", ["torch.jit", "transformers.utils", "torchao.dtypes.uintx", "torchao"])
def test_other_packages_are_silenced(module: str) -> None:
    with third_party_silence():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warn(module, category)


@pytest.mark.parametrize("module", ["torchaoo", "my_model", "qcompiler.api"])
def test_a_model_s_own_warnings_pass(module: str) -> None:
    with third_party_silence(), pytest.raises(DeprecationWarning):
        warn(module)


def test_only_the_import_of_torchao_is_silenced() -> None:
    warn("torchao.dtypes")
    for module, category in (("torchao", FutureWarning), ("torchaoo", DeprecationWarning), ("torch", UserWarning)):
        with pytest.raises(category):
            warn(module, category)
