"""``inspect``: what a recipe will do before it runs, and what a model is and costs, from configs alone.

And ``mixing``: by which matrices the layers of a model mix tokens.
"""

from matvlm.inspection.model import describe_model
from matvlm.inspection.recipe import describe
from matvlm.inspection.text import table

__all__ = ["describe", "describe_model", "table"]
