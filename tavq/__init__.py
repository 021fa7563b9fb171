"""Text-aligned image tokens: `from tavq import TAVQTokenizer, Pipeline`."""

from pathlib import Path

__all__ = ["Pipeline", "TAVQTokenizer", "__version__"]

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))  # tavq.metrics and the rest lie beside this folder until installed


def __getattr__(name: str):
    """Load the public names on first use, so that `import tavq` stays light."""
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("ta-vq")
    if name == "TAVQTokenizer":
        from tavq.tokenizer.model import TAVQTokenizer

        return TAVQTokenizer
    if name == "Pipeline":
        from tavq.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'tavq' has no attribute {name!r}")
