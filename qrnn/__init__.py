"""Quasi-recurrent neural networks (Bradbury et al., ICLR 2017) for PyTorch."""

from .families import make_stack
from .layer import QRNNLayer, QRNNLayerState
from .lstm import LSTM
from .pooling.ops import backends, pool
from .stack import QRNN
from .state import State
from .variational import VariationalLSTM

__version__ = "0.1.0"
__all__ = [
    "LSTM",
    "QRNN",
    "QRNNLayer",
    "QRNNLayerState",
    "State",
    "VariationalLSTM",
    "__version__",
    "backends",
    "make_stack",
    "pool",
]
