"""A Megatron that changed is refused by name, before anything runs."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_mosaic.errors import VersionError
from megatron_mosaic.parallel_state_ext.rebound import rebind as compat
from megatron_mosaic.parallel_state_ext.rebound.rebind import (
    rebind,
    rebind_training,
    rebound,
    require_supported_megatron,
)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for a Megatron module, with one function."""
    module = ModuleType("library_of_a_test")

    def build(config, model):
        return config, model

    module.build = build
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_rebind_replaces_the_name_and_returns_the_original(library) -> None:
    original = library.build
    assert rebind("library_of_a_test.build", "ours", must_accept=("config", "model")) is original
    assert library.build == "ours"


def test_rebound_puts_the_original_back_also_after_an_error(library) -> None:
    original = library.build
    with pytest.raises(KeyError, match="inside"):
        with rebound("library_of_a_test.build", "ours", must_accept=("config",)) as stock:
            assert (stock, library.build) == (original, "ours")
            raise KeyError("inside")
    assert library.build is original


def test_what_is_replaced_is_named_in_this_folder_alone() -> None:
    """Everybody else calls a function of `rebind.py` that says what it replaces."""
    package = Path(compat.__file__).parents[2]
    calls = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in package.rglob("*.py")
        if path.parent != Path(compat.__file__).parent
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("rebind", "rebound")
    ]
    assert not calls


def test_a_missing_name_is_a_version_error(library) -> None:
    with pytest.raises(VersionError, match=r"library_of_a_test\.gone\n.*no such name") as error:
        rebind("library_of_a_test.gone", "ours")
    assert "rebind.py" in error.value.fix
    assert not hasattr(library, "gone")


def test_a_changed_signature_is_a_version_error_and_replaces_nothing(library) -> None:
    original = library.build
    with pytest.raises(VersionError, match=r"no parameters \['chunks'\]"):
        rebind("library_of_a_test.build", "ours", must_accept=("config", "chunks"))
    assert library.build is original


@pytest.mark.parametrize("installed", ["0.18.3", "0.19.0", "0.19.1", "0.20.0", "0.20.0rc1", "1.0.0"])
def test_other_versions_are_refused(installed, monkeypatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: installed)
    with pytest.raises(VersionError, match=f"megatron-core\n.*{installed}"):
        require_supported_megatron()


@pytest.mark.parametrize("installed", ["0.19.2", "0.19.2.post1", "0.19.10", "0.19.3+local"])
def test_known_versions_pass(installed, monkeypatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: installed)
    assert require_supported_megatron() == installed


def test_the_installed_megatron_has_every_name_that_is_replaced(monkeypatch) -> None:
    import megatron.training.training as training

    for name in ("get_megatron_optimizer", "get_forward_backward_func"):
        monkeypatch.setattr(training, name, getattr(training, name))  # puts them back afterwards
    rebind_training(get_megatron_optimizer="optimizer", get_forward_backward_func="step")
    assert (training.get_megatron_optimizer, training.get_forward_backward_func) == ("optimizer", "step")
