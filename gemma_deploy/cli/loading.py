"""Loading the model that `generate` and `chat` run, and what is said of it."""

from typing import TYPE_CHECKING, Any

from gemma_deploy.cli.console import notice, working

if TYPE_CHECKING:
    from gemma_deploy.runtime.request import GenerationOptions
    from gemma_deploy.runtime.text_generator import TextGenerator


def load_model(bundle: str, **options: Any) -> "TextGenerator":
    """Load a model, and show that this is under way.

    Args:
        bundle: The folder.
        **options: As for `gemma_deploy.load`.
    """
    from gemma_deploy.api import load

    with working(f"loading {bundle}"):
        return load(bundle, **options)


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
