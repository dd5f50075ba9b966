"""A model behind OpenAI's HTTP interface, with a page to chat on. Needs the extra `serve`."""
