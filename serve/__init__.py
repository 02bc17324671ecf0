"""Ray Serve: the OpenAI protocol, the engine replica, the chat page."""
