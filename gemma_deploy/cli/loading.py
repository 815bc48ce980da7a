"""Loading the model that `generate` and `chat` run, and what is said of it."""

import warnings
from typing import TYPE_CHECKING, Any

from gemma_deploy.cli.console import notice, working

if TYPE_CHECKING:
    from gemma_deploy.runtime.request import GenerationOptions
    from gemma_deploy.runtime.text_generator import TextGenerator


def load_model(bundle: str, **options: Any) -> "TextGenerator":
    """Load a model; what would be a warning in a program is a notice here.

    Args:
        bundle: The folder.
        **options: As for `gemma_deploy.load`.
    """
    from gemma_deploy.api import load
    from gemma_deploy.runtime.generation_config import GenerationConfigWarning

    with warnings.catch_warnings(record=True) as caught, working(f"loading {bundle}"):
        warnings.simplefilter("always", GenerationConfigWarning)
        generator = load(bundle, **options)
    for warning in caught:
        if issubclass(warning.category, GenerationConfigWarning):
            notice(f"Warning: {warning.message}.")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return generator


def tell_sampling(generator: "TextGenerator", options: "GenerationOptions") -> None:
    """Say that the model's file, and no option, has tokens sampled: the text is another each time."""
    resolved = generator.resolved_options(options)
    if resolved.is_greedy or options.is_sampling_asked_for:
        return
    notice(
        f"Sampling as the model's generation_config.json says: temperature {resolved.temperature:g}, "
        f"top-k {resolved.top_k or 'off'}, top-p {resolved.top_p:g}. --greedy takes the likeliest "
        "tokens instead."
    )
