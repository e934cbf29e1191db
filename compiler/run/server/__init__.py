"""An artifact behind OpenAI's HTTP API. Needs the extra `serve`; imports neither torch nor transformers."""
