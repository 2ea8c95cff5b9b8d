"""A pytest plugin: CPU tensors go to the CUDA kernels, which numba's simulator runs as Python threads.

    NUMBA_ENABLE_CUDASIM=1 PYTHONPATH=tests python -m pytest -p simulated_cuda --kernel chunked tests/test_pooling.py

So the backend named "numba" in the tests' ids is numba_cuda here. Blocks are small, since a lane is a Python
thread, and ragged against the tests' shapes in both directions.
"""

import pytest
from numba import config as numba_config
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

from qrnn.pooling import numba_cuda, ops

TOO_LARGE_OR_NOT_FOR_KERNELS = (
    "T33-B5-C67",
    "T4-B2-C1030",
    "T11-B40-C41",
    "forked_child",
    "any_number_of_threads",
    "simulat",
    "equation_6_drops",
    "activations_are_accurate",
    "denormal",
    "vector_code",
    "reference]",
)
TOO_SLOW_IN_CHUNKS = (
    "gradcheck",
    "registration",
    "second_derivative",
    "bad_argument",
    "activated-float32",
    "raw-float64",
    "any_shape",
    "extreme",
    "torch_",
    "autocast",
    "zoneout_does",
    "by_hand",
)
TOO_SLOW_IN_CHUNKS += tuple(f"zoneout_in_a_kernel_equals_the_reference[{mode}-" for mode in ("f", "if", "ifo"))
KERNELS = {"serial": numba_cuda.Shape(4, 1, 2), "chunked": numba_cuda.Shape(4, 3, 2)}


class Memory(FakeCUDAArray):
    """A pointer's memory, with nothing before its first element: numpy would count a negative place from the end."""

    def __getitem__(self, place):
        return super().__getitem__(self._within(place))

    def __setitem__(self, place, value):
        super().__setitem__(self._within(place), value)

    def _within(self, place):
        if place < 0:
            raise IndexError(f"expected a place within the tensor, got {place}")
        return place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel", choices=KERNELS, required=True)


def pytest_configure(config: pytest.Config) -> None:
    kernel = config.getoption("--kernel")
    ops._MODULES["cpu"] = "numba_cuda"
    ops._TAKES_HALF.add("numba")
    numba_cuda.FakeCUDAArray = Memory
    numba_cuda.forced_kernel = kernel
    for shapes in numba_cuda.SHAPES.values():
        shapes[kernel] = KERNELS[kernel]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    assert numba_config.ENABLE_CUDASIM, "expected NUMBA_ENABLE_CUDASIM=1"
    left_out = TOO_LARGE_OR_NOT_FOR_KERNELS
    if config.getoption("--kernel") == "chunked":  # its barriers make every simulated thread wait for every other
        left_out += TOO_SLOW_IN_CHUNKS
    items[:] = [item for item in items if not any(part in item.nodeid for part in left_out)]
