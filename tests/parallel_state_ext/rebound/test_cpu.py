"""What `cpu.install()` promises of a machine without CUDA."""

import pytest
import torch

from megatron_mosaic.parallel_state_ext.rebound import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="install() does nothing where CUDA exists")


def test_nothing_is_compiled() -> None:
    """Megatron's fused functions are torch.compile'd; a C++ build per process would need a compiler and minutes."""
    cpu.install()
    builds = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: builds.append(graph) or graph.forward)
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert builds == []


def test_cuda_names_mean_the_cpu() -> None:
    cpu.install()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device="cpu", pin_memory=True).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.cuda.current_device() == cpu.device() == torch.device("cpu")
    assert cpu.is_cpu() and not torch.cuda.is_available()


def test_install_twice_is_install_once() -> None:
    cpu.install()
    before = torch.zeros, torch.Tensor.type
    cpu.install()
    assert (torch.zeros, torch.Tensor.type) == before
