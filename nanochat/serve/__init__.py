"""Serving a trained model: backends, chat templates, the API of OpenAI, a chat page, the terminal."""
