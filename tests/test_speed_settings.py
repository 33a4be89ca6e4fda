"""The settings that increase speed are in effect. `make bench` measures speed; tests do not."""

import ctypes
import platform
import resource
from types import SimpleNamespace

import pytest
import torch

from bnrnn.command import allocator
from bnrnn.command.device import set_precision
from bnrnn.errors import ConfigError


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_the_allocator_keeps_large_blocks():
    size = 64 << 20

    def new_pages_of(blocks):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(blocks):
            torch.zeros(size, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert allocator.keep_large_blocks()
    new_pages_of(50)  # the first ones do not fit into what earlier ones left
    assert new_pages_of(10) < size // resource.getpagesize()


def test_a_glibc_that_refuses_the_threshold_maps_no_blocks(monkeypatch):
    """glibc 2.31 refuses a threshold above 32 MiB and returns 0."""
    settings = {}

    def mallopt(name, value):
        if name == allocator._M_MMAP_THRESHOLD and value > 32 << 20:
            return 0
        settings[name] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert allocator.keep_large_blocks()
    assert settings == {
        allocator._M_MMAP_MAX: 0, allocator._M_TRIM_THRESHOLD: (1 << 31) - 1
    }  # fmt: skip


@pytest.fixture
def tf32():
    """The TF32 settings of matrix products and cuDNN, restored after the test."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield lambda: (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32, cudnn.allow_tf32 = before


def test_precision_is_that_of_all_products_on_a_gpu(composed, tf32):
    """It applies to `torch.lstm` too: TF32 is the default of cuDNN but not of matrix products."""
    gpu = torch.device("cuda")
    set_precision(composed("precision=tf32"), gpu)
    assert tf32() == (True, True)
    set_precision(composed(), gpu)
    assert tf32() == (False, False)


def test_a_cpu_does_not_train_in_tf32_but_tests_what_was(composed, tf32):
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"precision=tf32 is for GPUs: set precision=float32"):
        set_precision(composed("precision=tf32"), cpu)
    set_precision(composed("precision=tf32", "mode=evaluate", "run=outputs"), cpu)
