"""Generation with teacher, hybrid or any other model that transformers has, at the speed of the memory.

A prompt goes through the decoder in parts, all but its last token; from there every token is one step that reads the
weights, the filled part of the cache and nothing else, and that a GPU runs as one recorded graph.
"""

from matvlm.generation.engine import Engine, Stream
from matvlm.generation.sampling import Sampling
from matvlm.generation.session import Session

__all__ = ["Engine", "Sampling", "Session", "Stream"]
