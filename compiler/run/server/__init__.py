"""An artifact behind HTTP with OpenAI's interface. Needs the extra `serve`; imports neither torch nor transformers."""
