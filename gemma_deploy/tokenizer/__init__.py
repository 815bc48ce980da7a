"""Text to token ids, and back."""

from gemma_deploy.tokenizer.settings import TOKENIZER_FILE
from gemma_deploy.tokenizer.streaming import StreamingDetokenizer
from gemma_deploy.tokenizer.tokenizer import BatchEncoding, GemmaTokenizer

__all__ = ["TOKENIZER_FILE", "BatchEncoding", "GemmaTokenizer", "StreamingDetokenizer"]
