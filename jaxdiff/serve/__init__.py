"""The HTTP server: OpenAI's images API, A1111's, and jobs, over one engine of `generation/`."""
