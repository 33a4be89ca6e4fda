"""What makes it fast is really set; how fast, `make bench` measures, never a test."""

import platform

import pytest

from bnrnn.command import allocator


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_the_allocator_keeps_large_blocks():
    assert allocator.keep_large_blocks()
