"""OpenAI's API for speech: its requests, its errors, its list of models."""
