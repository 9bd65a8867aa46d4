"""Text encoders of captions, through Transformers, which the extra ``text`` installs."""

from pipeline.text_encoders.encoder import TextEncoder, encoder_size
from pipeline.text_encoders.tokenizer import CaptionTokenizer, CaptionTokens

__all__ = ["CaptionTokenizer", "CaptionTokens", "TextEncoder", "encoder_size"]
