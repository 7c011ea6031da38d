"""Models whose attention can be chosen by name."""

from pyattn.models.caption import Captioner
from pyattn.models.forecast import Forecaster
from pyattn.models.gpt import GPT, GPTClassifier
from pyattn.models.seq2seq import Seq2Seq
from pyattn.models.speech import SpeechTransformer
from pyattn.models.transformer import Transformer
from pyattn.models.vit import ViT

__all__ = ["GPT", "Captioner", "Forecaster", "GPTClassifier", "Seq2Seq", "SpeechTransformer", "Transformer", "ViT"]
