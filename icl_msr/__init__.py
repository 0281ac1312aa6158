"""Contrastive pre-training that asks: does the encoder look at the object or at the background?"""

__version__ = "0.2.0"
