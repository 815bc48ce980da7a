"""Text to token ids, and back."""

from gemma_deploy.tokenizer.streaming import StreamingDetokenizer
from gemma_deploy.tokenizer.tokenizer import BatchEncoding, GemmaTokenizer

__all__ = ["BatchEncoding", "GemmaTokenizer", "StreamingDetokenizer"]
