"""Networks of the course. Those of diffusion map noisy data, a time in [0, 1] and a label to an output of the data's shape."""

from dgm_course.nets.classifier import Classifier
from dgm_course.nets.conv import ConvCoupler, ConvDecoder, ConvEncoder
from dgm_course.nets.dit import DiT
from dgm_course.nets.embeddings import LabelEmbedding, TimeEmbedding, WeightEmbedding
from dgm_course.nets.language import LanguageModel
from dgm_course.nets.mlp import MLP, perceptron
from dgm_course.nets.unet import UNet

__all__ = [
    "MLP",
    "Classifier",
    "ConvCoupler",
    "ConvDecoder",
    "ConvEncoder",
    "DiT",
    "LabelEmbedding",
    "LanguageModel",
    "TimeEmbedding",
    "UNet",
    "WeightEmbedding",
    "perceptron",
]
