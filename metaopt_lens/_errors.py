"""Every error this library raises on purpose: what was needed, what came, what to do."""


class MetaoptLensError(Exception):
    """Base class of all errors raised on purpose by metaopt-lens."""


class OptionError(MetaoptLensError, ValueError):
    """An argument has a value that makes no sense, whatever the model and the prompt."""


class PromptError(MetaoptLensError, ValueError):
    """A prompt, demonstration, template or tokenizer is not usable."""


class ContextWindowError(PromptError):
    """A prompt is longer than the model's context window."""


class SpanError(MetaoptLensError, ValueError):
    """Token positions do not form the partition S, D, Q (docs/theory.md, section 1)."""


class HeadError(MetaoptLensError, ValueError):
    """A layer or head that the model does not have, or a head name that cannot be read."""


class UnsupportedModelError(MetaoptLensError, TypeError):
    """The model's architecture cannot be decomposed, or does not expose what is needed."""


class ModelMismatchError(MetaoptLensError, ValueError):
    """A saved or computed object belongs to a model of another shape or parametrisation."""


class NonFiniteError(MetaoptLensError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""


class FileFormatError(MetaoptLensError, ValueError):
    """A file is damaged, cut short, or not what it should be."""


class UndefinedMetricError(MetaoptLensError, ArithmeticError):
    """A metric has no value on these data (for example a ratio with an empty denominator)."""


class DataError(MetaoptLensError, ValueError):
    """The rows of a task are missing, too few, or not what the task says."""


class OutputError(MetaoptLensError, OSError):
    """A directory cannot be written, or holds the results of something else."""


class ModelTooLargeError(MetaoptLensError, MemoryError):
    """A model's weights take more memory than there is."""


class SweepError(MetaoptLensError, RuntimeError):
    """Some runs of a sweep failed, or their model cannot be loaded; all others are finished and stored."""
