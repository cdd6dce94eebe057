"""Models behind a server of OpenAI's completions API."""
