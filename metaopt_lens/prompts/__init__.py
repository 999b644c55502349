"""In-context prompts: demonstrations, templates, token spans, prompt files."""

from metaopt_lens.prompts._context import ContextPrompt as ContextPrompt
from metaopt_lens.prompts._encoder import HFTokenizer as HFTokenizer
from metaopt_lens.prompts._files import load_prompts as load_prompts
from metaopt_lens.prompts._for_model import tokenize_all as tokenize_all
from metaopt_lens.prompts._for_model import tokenize_for as tokenize_for
from metaopt_lens.prompts._likes import PromptLike as PromptLike
from metaopt_lens.prompts._likes import as_prompt as as_prompt
from metaopt_lens.prompts._likes import as_prompts as as_prompts
from metaopt_lens.prompts._likes import is_single as is_single
from metaopt_lens.prompts._prompt import Demo as Demo
from metaopt_lens.prompts._prompt import ICLPrompt as ICLPrompt
from metaopt_lens.prompts._prompt import Piece as Piece
from metaopt_lens.prompts._template import Template as Template
from metaopt_lens.prompts._tokenize import read_token as read_token
from metaopt_lens.prompts._tokenize import tokenize_label as tokenize_label
from metaopt_lens.prompts._tokenize import tokenize_prompt as tokenize_prompt
from metaopt_lens.prompts._tokenized import TokenizedPrompt as TokenizedPrompt

__all__ = [
    "ContextPrompt",
    "Demo",
    "ICLPrompt",
    "PromptLike",
    "Template",
    "TokenizedPrompt",
    "load_prompts",
    "tokenize_prompt",
]
