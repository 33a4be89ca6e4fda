"""The settings that increase speed are in effect. `make bench` measures speed; tests do not."""

import ctypes
import os
import platform
import resource
from types import SimpleNamespace

import pytest
import torch

from bnrnn import cpus
from bnrnn.command import allocator, device
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


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        # Version 2: the limit of an outer group counts, too; the smallest one applies.
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "150000 100000"}, 2),
        ("0::/pod/box\n", {"pod/box/cpu.max": "50000 100000", "pod/cpu.max": "200000 100000"}, 1),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/../outside\n", {}, None),
        ("0::/\u2028box\udcff\n", {"\u2028box\udcff/cpu.max": "300000 100000\n"}, 3),
        ("", {}, None),
        # Version 1: a container sees its own group as the top, but the machine's path of it.
        (
            "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n",
            {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (None, {}, None),
    ],
)
def test_the_limit_of_a_container(groups, files, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(cpus, "_ROOT", tmp_path / "root")
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path / "groups")
    if groups is not None:
        (tmp_path / "groups").write_bytes(os.fsencode(groups))
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpus.available() == (limit or 8)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a function of Linux")
def test_the_affinity_is_a_limit():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cpus.available() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("limit", "variables", "threads"),
    [
        (2, {}, 2), (64, {}, 8),
        (2, {"OMP_NUM_THREADS": "8"}, 8), (2, {"MKL_NUM_THREADS": "8"}, 8),
    ],
)  # fmt: skip
def test_the_threads_are_within_the_limit(limit, variables, threads, monkeypatch):
    """Unless the environment sets their number."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(cpus, "available", lambda: limit)
    assert device._default_threads() == threads


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
