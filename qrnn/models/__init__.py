"""The paper's models, each on any stack of `qrnn.make_stack`."""

from .beam import beam_search
from .classifier import Classifier
from .language_model import LanguageModel
from .seq2seq import Seq2Seq

__all__ = ["Classifier", "LanguageModel", "Seq2Seq", "beam_search"]
